"""Measure a model against the baselines on the last part of a log, by the rankings that serving would have shown.

--protocol online: each event is scored by the ranking made from its user's preceding events; the model and the counters
are as the artifact holds them, the histories grow; all events count. `millrace replay` gives the same numbers, slower,
through the whole worker.

example:
  millrace evaluate artifact log.jsonl.gz --report evaluation.json
"""

from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import TYPE_CHECKING

from worker.commands.arguments import share
from worker.commands.config import add_config
from worker.commands.replay import add_layout

if TYPE_CHECKING:
    from pipeline.evaluation import Report

K = 10


def configure(parser: ArgumentParser) -> None:
    parser.add_argument("artifact", type=Path, help="folder made by `millrace train`")
    parser.add_argument("log", type=Path, help="JSON lines, MessagePack or delimited text, gzipped or not")
    parser.add_argument("--protocol", choices=["online"], default="online", help="see above (default online)")
    parser.add_argument("--score-from", type=share, default=0.8, metavar="SHARE", help="of the events (default 0.8)")
    parser.add_argument("--report", type=Path, metavar="FILE", help="write the numbers as JSON")
    add_layout(parser)
    add_config(parser)


def run(args: Namespace) -> int:
    import msgspec

    from pipeline.artifact import load
    from pipeline.evaluation import evaluate
    from pipeline.logfile import Layout, read_columns
    from worker import config
    from worker.ranker import pipeline_options

    loaded = config.load(args.config)
    options = pipeline_options(loaded)
    artifact = load(args.artifact)
    artifact.check_schema(options.schema)
    log = read_columns(args.log, Layout.parse(args.columns, action=args.action), options.schema)
    report = evaluate(artifact, log, args.score_from, options, K, loaded.sequences.cap_events)
    print_report(report)
    if args.report:
        args.report.write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=1) + b"\n")
    return 0


def print_report(report: "Report") -> None:
    from worker.terminal import show, table

    rankings = table("ranking", "hit rate@10", "NDCG@10", "MRR@10", title=f"{report.events} events")
    for name, row in report.rankings.items():
        rankings.add_row(name, *(f"{value:.4f}" for value in (row.hit_rate, row.ndcg, row.mrr)))
    heads = table("head", "labels", "positive", "AUC", "log loss")
    for name, head in report.heads.items():
        heads.add_row(name, str(head.labels), *map(_text, (head.positive_share, head.auc, head.log_loss)))
    show(rankings, heads)


def _text(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"
