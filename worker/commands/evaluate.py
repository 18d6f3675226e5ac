"""Measure a model against the baselines on the part of a log that it has not seen, as serving would have ranked it.

Each scored event is ranked from its user's preceding events; the model and the counters are as the artifact holds them,
the histories grow; all events count. --protocol online scores the events behind a share of the log in time: `millrace
replay` gives the same numbers, slower, through the whole worker. --protocol last scores each user's newest events, of
an artifact made by `millrace train --leave-out N`; --last 1 is the classic leave-one-out. What taught the artifact is
refused.

examples:
  millrace evaluate artifact log.jsonl.gz --report evaluation.json
  millrace evaluate artifact log.jsonl.gz --protocol last --last 10 --cutoffs 5,10,20
  millrace evaluate artifact log.jsonl.gz --negatives 100 --seed 0
"""

from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import TYPE_CHECKING

from worker.commands.arguments import cutoffs, positive, seed, share
from worker.commands.config import add_config
from worker.commands.log_arguments import add_items, add_layout, read_events, read_records
from worker.commands.output_paths import check_file

if TYPE_CHECKING:
    from pipeline.evaluation.evaluate import EvaluationOptions


def configure(parser: ArgumentParser) -> None:
    parser.add_argument("artifact", type=Path, help="folder made by `millrace train`")
    parser.add_argument("log", type=Path, help="JSON lines, MessagePack or delimited text, gzipped or not")
    parser.add_argument("--protocol", choices=["online", "last"], default="online", help="see above (default online)")
    parser.add_argument("--score-from", type=share, metavar="SHARE", help="online: of the events (default 0.8)")
    parser.add_argument("--last", type=positive, metavar="N", help="last: of each user's events (default 10)")
    parser.add_argument("--cutoffs", type=cutoffs, default=(5, 10, 20, 50), metavar="K,…", help="(default 5,10,20,50)")
    parser.add_argument("--negatives", type=positive, metavar="N", help="rank among so many items that the user has"
                        " not touched, as older papers do (default: among all items)")  # fmt: skip
    parser.add_argument("--negatives-by", choices=["uniform", "popularity"], default="uniform", help="how often drawn")
    parser.add_argument("--seed", type=seed, default=0, help="of the negatives and the intervals (default 0)")
    parser.add_argument("--report", type=Path, metavar="FILE", help="write the numbers as JSON")
    add_items(parser)
    add_layout(parser)
    add_config(parser)


def run(args: Namespace) -> int:
    import sys

    import msgspec

    from pipeline.artifact import load
    from pipeline.evaluation.evaluate import evaluate
    from worker import config
    from worker.commands.evaluation_display import print_report
    from worker.inference.ranker import pipeline_options

    loaded = config.load(args.config)
    asked = options_of(args, loaded.sequences.cap_events)
    options = pipeline_options(loaded)
    if args.report:
        check_file(args.report, "--report")
    artifact = load(args.artifact)
    artifact.check_schema(options.schema)
    report = evaluate(artifact, read_events(args, options.schema), options, asked, read_records(args))
    if report.warning:
        print(f"millrace evaluate: WARNING: {report.warning}", file=sys.stderr)
    print_report(report)
    if args.report:
        args.report.write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=1) + b"\n")
    return 0


def options_of(args: Namespace, cap_events: int) -> "EvaluationOptions":
    """EvaluationError when an option belongs to the other protocol."""
    from pipeline.data.split import Cut
    from pipeline.errors import EvaluationError
    from pipeline.evaluation.evaluate import EvaluationOptions
    from pipeline.evaluation.negatives import Negatives

    strange = "score_from" if args.protocol == "last" else "last"
    if getattr(args, strange) is not None:
        raise EvaluationError(f"--{strange.replace('_', '-')} is not of --protocol {args.protocol}; see --help")
    if args.protocol == "last":
        cut = Cut(last=args.last or 10)
    else:
        cut = Cut() if args.score_from is None else Cut(args.score_from)
    negatives = Negatives(args.negatives, args.seed, args.negatives_by) if args.negatives else None
    return EvaluationOptions(cut, args.cutoffs, negatives, seed=args.seed, cap_events=cap_events)
