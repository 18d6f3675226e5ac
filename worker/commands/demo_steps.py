"""The demo: simulate, train, stream through a real broker, show. Each part is the command of that name."""

from pathlib import Path

from rich.console import Console

from worker.replay.local_servers import available

EVENTS_A_USER, EVENTS_AN_ITEM = 30, 60  # enough to learn from
EPOCHS = 12  # two more minutes of training would win two more points of hit rate


def demo(out: Path, events: int, rate: float, seed: int) -> int:
    """Exit status; everything that is made stays in `out`."""
    console = Console()
    missing = available()
    through = "from the log" if missing else "through Kafka"
    if missing:
        console.print(f"[yellow]no broker: {missing}; the log itself is the source[/]")
    steps = [
        ("1/3  a shop is simulated", "simulate", [
            "--out", str(out / "shop"), "--events", str(events), "--seed", str(seed),
            "--users", str(max(50, events // EVENTS_A_USER)), "--items", str(max(50, events // EVENTS_AN_ITEM)),
        ]),
        ("2/3  an HSTU is trained on its first 80 %", "train", [
            str(out / "shop" / "events.jsonl"), "--out", str(out / "artifact"),
            "--seed", str(seed), "--epochs", str(EPOCHS),
        ]),
        (f"3/3  the events stream {through} while the worker answers", "replay", [
            str(out / "shop" / "events.jsonl"), "--artifact", str(out / "artifact"),
            "--report", str(out / "report.json"), "--slates", str(out / "slates.jsonl"),
            *([] if missing else ["--kafka", "start", "--rate", str(rate)]),
        ]),
    ]  # fmt: skip
    from worker.cli import main

    for title, command, arguments in steps:
        console.rule(title, align="left")
        if status := main([command, *arguments]):
            return status
    _files(console, out, through_kafka=not missing)
    return 0


def _files(console: Console, out: Path, through_kafka: bool) -> None:
    kinds = {
        "shop/events.jsonl": "the log", "shop/items.jsonl": "its items", "shop/truth.json": "what could be known of it",
        "artifact/manifest.json": "the model", "report.json": "the replay's report",
    }  # fmt: skip
    if not through_kafka:
        kinds |= {"slates.jsonl": "every slate", "slates.dead.jsonl": "what was no event: empty"}
    console.rule("what it left", align="left")
    for name, kind in kinds.items():
        console.print(f"  {out / name}  [dim]{kind}[/]", soft_wrap=True)
    console.print(f"next: millrace evaluate {out / 'artifact'} {out / 'shop' / 'events.jsonl'}", soft_wrap=True)
