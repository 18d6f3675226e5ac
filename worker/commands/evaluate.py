"""Measure a model against the baselines on the part of a log that it was not trained on, ranked as serving would.

Each held-out event is ranked from its user's preceding events. The model and the counters stay as they are in the
artifact; the histories grow by every event. --protocol temporal scores the events after a fraction of the log in time:
`millrace replay` gives the same numbers, slower, through the whole worker. --protocol leave-last-out scores each user's
newest events, with an artifact from `millrace train --leave-last-out N`; --leave-last-out 1 is the classic
leave-one-out. Events that the artifact was trained on are rejected.

examples:
  millrace evaluate artifact log.jsonl.gz --report evaluation.json
  millrace evaluate artifact log.jsonl.gz --protocol leave-last-out --leave-last-out 10 --cutoffs 5,10,20
  millrace evaluate artifact log.jsonl.gz --negatives 100 --seed 0
"""

from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import TYPE_CHECKING

from worker.commands.arguments import cutoffs, fraction, positive, seed
from worker.commands.config import add_config
from worker.commands.log_arguments import (
    LOG_HELP,
    add_items,
    add_log_layout,
    read_events,
    read_records,
    with_action_aliases,
)
from worker.output.paths import check_file

if TYPE_CHECKING:
    from pipeline.evaluation.evaluate import EvaluationOptions

PROTOCOLS = ("temporal", "leave-last-out")
TEMPORAL, LEAVE_LAST_OUT = PROTOCOLS
DEFAULT_LAST = 10


def configure(parser: ArgumentParser) -> None:
    parser.add_argument("artifact", type=Path, help="folder written by `millrace train`")
    parser.add_argument("log", type=Path, help=LOG_HELP)
    parser.add_argument(
        "--protocol", choices=PROTOCOLS, default=TEMPORAL, help="choice of the held-out events (default temporal)"
    )
    parser.add_argument(
        "--train-fraction",
        type=fraction,
        metavar="X",
        help="temporal: fraction of the events before the held-out ones (default 0.8)",
    )
    parser.add_argument(
        "--leave-last-out",
        type=positive,
        metavar="N",
        help="leave-last-out: number of newest events held out per user (default 10)",
    )
    parser.add_argument(
        "--cutoffs",
        type=cutoffs,
        default=(5, 10, 20, 50),
        metavar="K,…",
        help="cutoffs k of the metrics (default 5,10,20,50)",
    )
    parser.add_argument(
        "--negatives",
        type=positive,
        metavar="N",
        help="number of sampled untouched items to rank among, as older papers do (default: rank all items)",
    )
    parser.add_argument(
        "--negative-sampling",
        choices=["uniform", "popularity"],
        default="uniform",
        help="distribution of the sampled negatives (default uniform)",
    )
    parser.add_argument("--seed", type=seed, default=0, help="random seed of negatives and intervals (default 0)")
    parser.add_argument("--report", type=Path, metavar="FILE", help="file to write the metrics to, as JSON")
    add_items(parser)
    add_log_layout(parser)
    add_config(parser)


def run(args: Namespace) -> int:
    import sys

    import msgspec

    from pipeline.artifact import load
    from pipeline.evaluation.evaluate import evaluate
    from worker import config_file
    from worker.inference.load import pipeline_options
    from worker.output.evaluation_display import print_report

    loaded = with_action_aliases(config_file.load(args.config), args)
    request = evaluation_options(args)
    options = pipeline_options(loaded)
    if args.report:
        check_file(args.report, "--report")
    artifact = load(args.artifact)
    artifact.check_schema(options.schema)
    report = evaluate(artifact, read_events(args, loaded), options, request, read_records(args))
    if report.warning:
        print(f"millrace evaluate: WARNING: {report.warning}", file=sys.stderr)
    print_report(report)
    if args.report:
        args.report.write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=1) + b"\n")
    return 0


def evaluation_options(args: Namespace) -> "EvaluationOptions":
    """Return what to evaluate. EvaluationError when an option belongs to the other protocol."""
    from pipeline.data.split import Split
    from pipeline.errors import EvaluationError
    from pipeline.evaluation.evaluate import EvaluationOptions
    from pipeline.evaluation.negatives import NegativeSampling

    foreign = "train_fraction" if args.protocol == LEAVE_LAST_OUT else "leave_last_out"
    if getattr(args, foreign) is not None:
        raise EvaluationError(
            f"--{foreign.replace('_', '-')} cannot be used with --protocol {args.protocol}; see --help"
        )
    if args.protocol == LEAVE_LAST_OUT:
        split = Split(leave_last_out=args.leave_last_out or DEFAULT_LAST)
    else:
        split = Split() if args.train_fraction is None else Split(args.train_fraction)
    negatives = NegativeSampling(args.negatives, args.seed, args.negative_sampling) if args.negatives else None
    return EvaluationOptions(split, args.cutoffs, negatives, seed=args.seed)
