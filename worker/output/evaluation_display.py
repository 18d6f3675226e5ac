"""An evaluation's report in the terminal: rankings by cutoff, properties of their slates, and the heads."""

from rich.table import Table

from pipeline.evaluation.comparison import Estimate
from pipeline.evaluation.evaluate import MODEL, EvaluationReport
from pipeline.evaluation.ranking import excluded_sentence
from worker.output.tables import print_tables, table


def print_report(report: EvaluationReport) -> None:
    """Print the report's tables to stdout."""
    tables = [_rankings(report), _slates(report), _heads(report)]
    if report.business_metrics:
        tables.append(_business_metrics(report))
    print_tables(*tables, *_notes(report))


def _rankings(report: EvaluationReport) -> Table:
    scored = f"{report.events:,} events of {report.users:,} users ({report.split})"
    title = f"{scored}; among {report.candidates}; 95 % intervals over users"
    rows = table("ranking", "at", "hit rate", "NDCG", "MRR", title=title)
    for name, ranking in report.rankings.items():
        for cutoff, row in ranking.at.items():
            rows.add_row(name, str(cutoff), *map(_interval, (row.hit_rate, row.ndcg, row.mrr)))
    return rows


def _slates(report: EvaluationReport) -> Table:
    """Return the model's difference to each ranking, hit rates by slice, and beyond-accuracy metrics."""
    k = report.k
    rows = table(
        "ranking",
        f"{MODEL}'s NDCG@{k} minus this",
        f"cold items' hit rate@{k}",
        f"cold users' hit rate@{k}",
        f"untied events' hit rate@{k}",
        "coverage",
        "novelty, bits",
        "diversity",
        title="",
    )
    for name, ranking in report.rankings.items():
        difference = _interval(ranking.difference[k].ndcg) if ranking.difference else "–"
        slices = [f"{part.hit_rate:.4f} of {part.events:,}" for part in ranking.slices.values()]
        slates = ranking.slates
        beyond_accuracy = (slates.coverage, slates.novelty, slates.diversity) if slates else (None, None, None)
        rows.add_row(name, difference, *slices, *map(_number, beyond_accuracy))
    return rows


def _heads(report: EvaluationReport) -> Table:
    rows = table("head", "labels", "positive", "AUC", "log loss", "ECE", title="")
    for name, head in report.heads.items():
        metrics = (head.positive_rate, head.auc, head.log_loss, head.ece)
        rows.add_row(name, f"{head.labels:,}", *map(_number, metrics))
    return rows


def _business_metrics(report: EvaluationReport) -> Table:
    columns = [f"expected {name}" for name in report.business_metrics]
    rows = table(*columns, title=f"per slate of {report.k} items by {MODEL}")
    rows.add_row(*map(_number, report.business_metrics.values()))
    return rows


def _notes(report: EvaluationReport) -> list[str]:
    """Return sentences on what the figures do not show."""
    notes = []
    if report.excluded:
        notes.append(excluded_sentence(report.excluded, report.events))
    if report.tied_fraction:
        notes.append(
            f"{report.tied_fraction:.1%} of the scored events have the time of their user's event before: only the"
            " log's order says which came first, and a source that sorts them may tell a model the next item; compare"
            " the untied events"
        )
    return notes


def _interval(estimate: Estimate) -> str:
    return f"{estimate.value:.4f} [{estimate.low:.4f}, {estimate.high:.4f}]"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"
