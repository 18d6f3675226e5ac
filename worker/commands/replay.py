"""Stream a recorded log through the worker and report hit rates against frozen counters, latencies and strategies.

Each event is scored by the slate that its user had before it. The events before --train-fraction fill the sequences.
A Valkey is started for the run. With --kafka the log goes through a real broker, in topics and a group of the run's own
(replay-1a2b3c4d.events, .recommendations, .events.dead), which are printed: a deployment's topics are never read or
written. On a broker that was already running they remain.

examples:
  millrace replay log.jsonl.gz --artifact artifact --speed max --report report.json
  millrace replay ratings.tsv --columns user,item,value,ts --artifact artifact --kafka start
"""

from argparse import ArgumentParser, Namespace
from pathlib import Path

from worker.commands.arguments import fraction, positive, rate, since, speed
from worker.commands.config import add_config
from worker.commands.log_arguments import LOG_HELP, add_log_layout, log_layout, say_recognised, with_action_aliases
from worker.output.paths import check_file


def configure(parser: ArgumentParser) -> None:
    parser.add_argument("log", type=Path, help=LOG_HELP)
    parser.add_argument("--artifact", help="folder written by `millrace train` (default: pipeline.artifact, or none)")
    parser.add_argument("--speed", type=speed, metavar="10x|max", help="log seconds per real second (default max)")
    parser.add_argument(
        "--train-fraction",
        type=fraction,
        default=0.8,
        metavar="X",
        help="fraction of the events before scoring begins (default 0.8)",
    )
    parser.add_argument(
        "--kafka", metavar="start|HOST:PORT", help="broker to stream through: start one, or use this one"
    )
    parser.add_argument(
        "--rate", type=rate, metavar="N", help="scored events per second, with --kafka (default: no limit)"
    )
    parser.add_argument(
        "--since", type=since, metavar="TIME", help="ISO 8601 time from which to replay (default: from the beginning)"
    )
    parser.add_argument("--limit", type=positive, metavar="N", help="number of events to replay (default: all)")
    parser.add_argument("--report", type=Path, default=Path("replay.json"), help="report file (default replay.json)")
    parser.add_argument(
        "--slates", type=Path, default=Path("slates.jsonl"), help="slates file, without --kafka (default slates.jsonl)"
    )
    add_log_layout(parser)
    add_config(parser)


def run(args: Namespace) -> int:
    import asyncio

    import msgspec
    from msgspec.structs import replace
    from rich.console import Console

    from worker import config_file, logging
    from worker.kafka.client import cli_timeouts
    from worker.replay.display import print_summary
    from worker.replay.replay import ReplayOptions, replay
    from worker.replay.report import summary

    _check(args)
    loaded = with_action_aliases(config_file.load(args.config), args)
    if args.artifact:
        loaded = replace(loaded, pipeline=replace(loaded.pipeline, artifact=args.artifact))
    if args.kafka != "start":  # a broker of our own is up before the first request, so it needs no short timeout
        loaded = replace(loaded, kafka=cli_timeouts(loaded.kafka))
    logging.configure(replace(loaded.log, format="console", level="warning"))
    layout = log_layout(args)
    say_recognised(args, layout)
    options = ReplayOptions(
        log=args.log,
        slates=args.slates,
        layout=layout,
        since_ms=args.since,
        limit=args.limit,
        speed=args.speed,
        train_fraction=args.train_fraction,
        kafka="" if args.kafka == "start" else args.kafka,
        rate=args.rate,
    )
    console = Console()
    report = asyncio.run(replay(loaded, options, console))
    args.report.write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=1) + b"\n")
    print_summary(console, f"replay of {args.log}", [*summary(report), ("report", str(args.report))])
    return 0


def _check(args: Namespace) -> None:
    from worker.config import are_addresses
    from worker.errors import ConfigError

    if args.kafka not in (None, "start") and not are_addresses(args.kafka):
        raise ConfigError(f"--kafka {args.kafka!r}: want start, HOST:PORT, or several addresses separated by commas")
    if args.rate and not args.kafka:
        raise ConfigError("--rate paces a broker's events and needs --kafka; without a broker use --speed 10x")
    if args.speed and args.kafka:
        raise ConfigError("--speed needs the log's virtual clock; with --kafka use --rate N")
    check_file(args.report, "--report")
    if not args.kafka:
        check_file(args.slates, "--slates")
