"""Watch a simulated shop, a trained model and a real broker work together in your terminal, in a few minutes.

Simulates a log, trains on its first 80 %, then produces it to a Kafka broker while the worker serves: the first part as
fast as it is answered, the rest at --rate. Each event is scored by the slate that its user had before it. Without Java
the log itself is the source. All files stay in --out.

example:
  millrace demo --out out/demo --rate 400
"""

import sys
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from pathlib import Path
from typing import TYPE_CHECKING

from worker.commands.arguments import positive, rate, seed

if TYPE_CHECKING:
    from rich.console import Console

EVENTS_PER_USER = 30
EVENTS_PER_ITEM = 60  # enough to train on
MIN_EVENTS = 1000
EPOCHS = 12  # two more minutes of training would gain two more points of hit rate


def configure(parser: ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, default=Path("out/demo"), help="output folder (default out/demo)")
    parser.add_argument(
        "--events", type=_enough, default=60_000, metavar="N", help="number of simulated events (default 60000)"
    )
    parser.add_argument("--rate", type=rate, default=400.0, help="events per second of the live part (default 400)")
    parser.add_argument("--seed", type=seed, default=7, help="random seed (default 7)")


def run(args: Namespace) -> int:
    from rich.console import Console

    from worker.commands.dispatch import run_command
    from worker.replay.local_servers import missing_requirement

    console = Console()
    missing = missing_requirement()
    if missing:
        console.print(f"[yellow]no broker: {missing}; the log itself is the source[/]")
    for title, command, arguments in _steps(args, through_kafka=not missing):
        console.rule(title, align="left")
        if status := run_command(command, arguments):
            return status
    _list_files(console, args.out, through_kafka=not missing)
    return 0


def _enough(text: str) -> int:
    if (number := positive(text)) < MIN_EVENTS:
        raise ArgumentTypeError(f"{number} are too few to train on and to score; want at least {MIN_EVENTS}")
    return number


def _steps(args: Namespace, through_kafka: bool) -> list[tuple[str, str, list[str]]]:
    """Return title, command and arguments of each step."""
    out = args.out
    events = args.events
    seed_text = str(args.seed)
    log = str(out / "shop" / "events.jsonl")
    artifact = str(out / "artifact")
    simulate = ["--out", str(out / "shop"), "--events", str(events), "--seed", seed_text]
    simulate += ["--users", str(max(50, events // EVENTS_PER_USER)), "--items", str(max(50, events // EVENTS_PER_ITEM))]
    train = [log, "--out", artifact, "--seed", seed_text, "--epochs", str(EPOCHS)]
    replay = [log, "--artifact", artifact, "--report", str(out / "report.json"), "--slates", str(out / "slates.jsonl")]
    if through_kafka:
        replay += ["--kafka", "start", "--rate", str(args.rate)]
    source = "through Kafka" if through_kafka else "from the log"
    return [
        ("1/3  simulate a shop", "simulate", simulate),
        ("2/3  train an HSTU on its first 80 %", "train", train),
        (f"3/3  stream the events {source} while the worker answers", "replay", replay),
    ]


def _list_files(console: "Console", out: Path, through_kafka: bool) -> None:
    kinds = {
        "shop/events.jsonl": "the log",
        "shop/items.jsonl": "its items",
        "shop/truth.json": "its ground truth",
        "artifact/manifest.json": "the model",
        "report.json": "the replay's report",
    }
    if not through_kafka:
        kinds |= {"slates.jsonl": "every slate", "slates.dead.jsonl": "dead letters: none"}
    console.rule("files", align="left")
    for name, kind in kinds.items():
        console.print(f"  {out / name}  [dim]{kind}[/]", soft_wrap=True)
    console.print(f"next: {sys.argv[0]} evaluate {out / 'artifact'} {out / 'shop' / 'events.jsonl'}", soft_wrap=True)
