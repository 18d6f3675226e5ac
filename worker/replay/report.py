"""The result of a replay: what is written as JSON, and its summary in the terminal."""

import msgspec

from pipeline.evaluation.ranking import excluded_sentence
from worker.replay.display import Percentiles, format_fractions
from worker.replay.prequential import CUTOFF


class ReplayReport(msgspec.Struct, frozen=True):
    """The result of a replay. Hit rates at 10 and latencies are those of the scored events.

    strategies, backends: number of slates by each name
    tied_fraction: of the scored events, those with the time of their user's event before
    untied_hit_rates: hit rates of the others; empty without any
    excluded: number of scored events whose item was kept off their user's slates; 0 without an artifact
    lost: number of records that got neither a slate nor a dead letter
    log_speed: log seconds per real second; at high speeds a user's events wait for their predecessors
    """

    log: str
    source: str
    events: int
    slates: int
    dead_letters: int
    lost: int
    scored: int
    scored_fraction: float
    hit_rates: dict[str, float]
    tied_fraction: float
    untied_hit_rates: dict[str, float]
    excluded: int
    strategies: dict[str, int]
    backends: dict[str, int]
    events_per_s: float
    latency: Percentiles
    elapsed_s: float
    log_speed: float
    model_version: str


def summary(report: ReplayReport) -> list[tuple[str, str]]:
    """Return the report as rows for the terminal."""
    latency = report.latency
    return [
        ("events", f"{report.events:,} from {report.source}; {report.dead_letters:,} dead letters"),
        ("slates", f"{report.slates:,}; {report.lost:,} events lost"),
        ("rate", f"{report.events_per_s:,.0f} events/s over {report.elapsed_s:.1f} s"),
        (
            "speed",
            f"{report.log_speed:,.0f} times the log's: a session's events arrive at once and wait for one another",
        ),
        (
            "latency, scored part",
            f"p50 {latency.p50_ms:.1f} ms  p95 {latency.p95_ms:.1f} ms  p99 {latency.p99_ms:.1f} ms",
        ),
        ("strategies", format_fractions(report.strategies)),
        ("backends", format_fractions(report.backends)),
        ("scored", f"{report.scored:,} events, {report.scored_fraction:.1%} of those to score"),
        *([("excluded", excluded_sentence(report.excluded, report.scored))] if report.excluded else []),
        ("tied", f"{report.tied_fraction:.1%} of the scored events have the time of their user's event before"),
        *((f"hit rate@{CUTOFF}, {ranking}", _rates(report, ranking)) for ranking in report.hit_rates),
    ]


def _rates(report: ReplayReport, ranking: str) -> str:
    rate = f"{report.hit_rates[ranking]:.4f}"
    if not report.tied_fraction or ranking not in report.untied_hit_rates:
        return rate
    return f"{rate}; of untied events {report.untied_hit_rates[ranking]:.4f}"
