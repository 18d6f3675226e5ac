"""Stream a recorded log through the worker and report: hit rates against frozen counters, latencies, rungs, losses.

Each event is judged by the slate that its user had before it. The events before --score-from fill the sequences.
A Valkey is started for the run; with --kafka the log goes through a real broker, too, in topics and a group of the
run's own (replay-1a2b3c4d.events, .recommendations, .events.dead), which are printed: no deployment's are read or
written. On a broker that was there before they stay.

examples:
  millrace replay log.jsonl.gz --artifact artifact --speed max --report report.json
  millrace replay ratings.tsv --columns user,item,value,ts --artifact artifact --kafka start
"""

from argparse import ArgumentParser, Namespace
from pathlib import Path

from worker.commands.arguments import positive, rate, share, speed
from worker.commands.config import add_config
from worker.commands.log_arguments import add_layout, layout_of
from worker.commands.output_paths import check_file


def configure(parser: ArgumentParser) -> None:
    parser.add_argument("log", type=Path, help="JSON lines, MessagePack or delimited text, gzipped or not")
    parser.add_argument("--artifact", help="folder made by `millrace train` (default: pipeline.artifact, or none)")
    parser.add_argument("--speed", type=speed, default=None, metavar="10x|max", help="log time to real time (max)")
    parser.add_argument("--score-from", type=share, default=0.8, metavar="SHARE", help="of the events (default 0.8)")
    parser.add_argument("--kafka", metavar="start|HOST:PORT", help="through a broker: start one, or use this one")
    parser.add_argument("--rate", type=rate, metavar="N", help="with --kafka: scored events a second (no limit)")
    parser.add_argument("--limit", type=positive, metavar="N", help="only the first N events")
    parser.add_argument("--report", type=Path, default=Path("replay.json"), help="default: replay.json")
    parser.add_argument("--slates", type=Path, default=Path("slates.jsonl"), help="if no --kafka (slates.jsonl)")
    add_layout(parser)
    add_config(parser)


def run(args: Namespace) -> int:
    import asyncio

    import msgspec
    from msgspec.structs import replace
    from rich.console import Console

    from worker import config, logging
    from worker.kafka.client import one_shot
    from worker.replay.display import print_summary
    from worker.replay.replay import Replay, replay, summary

    _check(args)
    loaded = config.load(args.config)
    if args.artifact:
        loaded = replace(loaded, pipeline=replace(loaded.pipeline, artifact=args.artifact))
    if args.kafka != "start":  # which is up when it is first asked, and is given the time that it needs
        loaded = replace(loaded, kafka=one_shot(loaded.kafka))
    logging.configure(replace(loaded.log, format="console", level="warning"))
    task = Replay(
        log=args.log,
        slates=args.slates,
        layout=layout_of(args),
        limit=args.limit,
        speed=args.speed,
        share=args.score_from,
        kafka="" if args.kafka == "start" else args.kafka,
        rate=args.rate,
    )
    console = Console()
    report = asyncio.run(replay(loaded, task, console))
    args.report.write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=1) + b"\n")
    print_summary(console, f"replay of {args.log}", [*summary(report), ("report", str(args.report))])
    return 0


def _check(args: Namespace) -> None:
    from worker.errors import ConfigError

    if args.rate and not args.kafka:
        raise ConfigError("--rate paces what goes to a broker, and there is no --kafka; without one: --speed 10x")
    if args.speed and args.kafka:
        raise ConfigError("--speed is of log time, and a broker's time is now; with --kafka: --rate N")
    check_file(args.report, "--report")
    if not args.kafka:
        check_file(args.slates, "--slates")
