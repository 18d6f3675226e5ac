"""A recorded log through the whole worker, with a scoreboard: `millrace replay`, and the second half of the demo.

Either the log itself is the source, on its own virtual clock, or (`through_kafka`) it is produced to a real topic and
consumed from there. Unless one is named, a Valkey is started for the run, and on any broker the topics and the group
are the run's own: no deployment is touched by accident.
"""

import asyncio
from array import array
from bisect import bisect_left
from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack
from itertools import groupby, islice
from pathlib import Path
from secrets import token_hex
from tempfile import TemporaryDirectory
from typing import NamedTuple

import msgspec
from msgspec.structs import replace
from rich.console import Console

from pipeline.data.log_io import LogEntry, LogLayout, read_log_by_time
from pipeline.errors import LogFileError
from pipeline.records import Event
from worker.clock import VirtualClock, WallClock
from worker.config import Config, KafkaConfig
from worker.interfaces import Clock, Source
from worker.kafka.sink import KafkaSink
from worker.kafka.source import KafkaSource
from worker.process import Components, build_components, supervise
from worker.replay.baselines import prequential_evaluator
from worker.replay.display import REFRESH_S, LatencyRecorder, Percentiles, ReplayDisplay
from worker.replay.feed import STEP_S, at_once, at_rate, produce
from worker.replay.file_sink import FileSink
from worker.replay.local_servers import LocalKafka, LocalValkey
from worker.replay.log_source import LogSource
from worker.replay.prequential import PrequentialEvaluator
from worker.stream.health import HealthState
from worker.stream.loop import Worker


class ReplayOptions(msgspec.Struct, frozen=True):
    """What to replay and how."""

    log: Path
    slates: Path  # where they are written when the log itself is the source, as JSON lines
    layout: LogLayout | None = None
    limit: int | None = None  # events
    speed: float | None = None  # log seconds a real second; None: as fast as it goes
    train_fraction: float = 0.8  # of the events, before scoring begins
    kafka: str | None = None  # None: the log itself is the source; a broker's address; "": start one
    redis: str | None = None  # URL; None: start a Valkey for the run
    rate: float | None = None  # events a second of the scored part, through Kafka; None: as fast as it goes
    name: str = msgspec.field(default_factory=lambda: f"replay-{token_hex(4)}")  # of its group, begins its topics


class Timeline(NamedTuple):
    """What the log holds: the events' times in order, 8 bytes an event, and how many records are no events."""

    times_ms: "array[int]"
    unreadable: int


class ReplayReport(msgspec.Struct, frozen=True):
    """`lost`: records that got neither a slate nor a dead letter. Hit rates at 10 and latencies of the scored events.

    log_speed: seconds of the log a real second. At high speeds a user's events wait for their own predecessors.
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
    strategies: dict[str, int]
    events_per_s: float
    latency: Percentiles
    elapsed_s: float
    log_speed: float
    model_version: str


async def replay(config: Config, options: ReplayOptions, console: Console) -> ReplayReport:
    """Runs the log through and returns what came of it. LogFileError, ArtifactError, SourceError as elsewhere."""
    timeline = await asyncio.to_thread(_timeline, options)
    events = len(timeline.times_ms)
    from_ts_ms = timeline.times_ms[min(int(options.train_fraction * events), events - 1)]
    async with AsyncExitStack() as stack:
        config = _replay_config(config, options, stack)
        if options.kafka is not None:
            console.print(_destination(config.kafka), soft_wrap=True)
        clock: Clock = WallClock() if options.kafka is not None else VirtualClock(options.speed)
        made = await stack.enter_async_context(build_components(config, clock))
        board = prequential_evaluator(made.ranker, config.pipeline.artifact, from_ts_ms)
        sink = await stack.enter_async_context(
            KafkaSink(config, made.slates) if options.kafka is not None else FileSink(options.slates, made.slates)
        )
        source = _source(config, options, clock)
        worker = made.worker(
            source, sink, HealthState(clock, clock.monotonic()), board, on_delivered=board.on_delivered
        )
        recorder = LatencyRecorder()
        with ReplayDisplay(options.log.name, events, console) as display:
            await _run(config, options, worker, made, from_ts_ms, lambda: _show(display, recorder, board, worker))
        recorder.tick(board, worker.tracker.completed_count)
    return _report(options, timeline, from_ts_ms, board, recorder, worker.limits.total)


async def _run(
    config: Config, options: ReplayOptions, worker: Worker, made: Components, from_ts_ms: int, show: Callable[[], None]
) -> None:
    showing = asyncio.create_task(_every(REFRESH_S, show))
    feeding = asyncio.create_task(_feed(config, options, worker, from_ts_ms)) if options.kafka is not None else None
    try:
        await supervise(worker, made)
    finally:
        for job in filter(None, (showing, feeding)):
            job.cancel()
        await asyncio.gather(*filter(None, (showing, feeding)), return_exceptions=True)


async def _feed(config: Config, options: ReplayOptions, worker: Worker, from_ts_ms: int) -> None:
    """The part before scoring as fast as it is answered, then the scored part at its rate; then the worker may stop."""
    while not worker.health.ready:  # noqa: ASYNC110 - it has made the topic
        await asyncio.sleep(STEP_S)
    fed = 0
    for scored, events in groupby(_events(options), lambda event: event.ts_ms >= from_ts_ms):
        fed += await produce(config.kafka, events, at_rate(options.rate) if scored and options.rate else at_once)
        while worker.tracker.completed_count < fed:  # noqa: ASYNC110 - the counter is the condition
            await asyncio.sleep(STEP_S)
    worker.stop()


async def _every(period_s: float, act: Callable[[], None]) -> None:
    while True:
        act()
        await asyncio.sleep(period_s)


def _show(display: ReplayDisplay, recorder: LatencyRecorder, board: PrequentialEvaluator, worker: Worker) -> None:
    recorder.tick(board, worker.tracker.completed_count)
    display.show(recorder, board, worker.tracker.completed_count, worker.tracker.open_count)


def _timeline(options: ReplayOptions) -> Timeline:
    times_ms, unreadable = array("q"), 0
    for entry in _entries(options):
        if isinstance(entry, Event):
            times_ms.append(entry.ts_ms)
        else:
            unreadable += 1
    if not times_ms:
        why = "look at its first lines, or give --columns" if unreadable else "it is empty"
        raise LogFileError(f"{options.log}: no event in it could be read; {why}")
    return Timeline(times_ms, unreadable)


def _entries(options: ReplayOptions) -> Iterator[LogEntry]:
    return islice(read_log_by_time(options.log, options.layout), options.limit)


def _events(options: ReplayOptions) -> Iterator[Event]:
    return (entry for entry in _entries(options) if isinstance(entry, Event))


def _replay_config(config: Config, options: ReplayOptions, stack: AsyncExitStack) -> Config:
    """Servers of its own, any age of event, one slate per event whatever its action: each is judged by the slate before
    it; one model."""
    folder = Path(stack.enter_context(TemporaryDirectory(prefix="millrace-replay-")))
    url = options.redis or stack.enter_context(LocalValkey(folder / "valkey")).url
    kafka = config.kafka
    if options.kafka is not None:
        broker = options.kafka or stack.enter_context(LocalKafka(folder / "kafka")).bootstrap
        kafka = _isolated(replace(kafka, bootstrap_servers=broker, create_topics=True), options.name)
    return replace(
        config,
        kafka=kafka,
        redis=replace(config.redis, url=url, cluster=False),
        events=replace(config.events, max_age_days=0.0, max_clock_skew_s=1e12, trigger_actions=None),
        batcher=replace(config.batcher, coalesce=False),
        pipeline=replace(config.pipeline, artifact_poll_interval_s=0.0),
    )


def _isolated(kafka: KafkaConfig, name: str) -> KafkaConfig:
    """With topics and a group that nobody else has: a deployment's are neither read nor written."""
    return replace(
        kafka,
        group_id=name,
        events_topic=f"{name}.events",
        recommendations_topic=f"{name}.recommendations",
        dead_letter_topic=f"{name}.events.dead",
    )


def _destination(kafka: KafkaConfig) -> str:
    topics = f"{kafka.events_topic}, {kafka.recommendations_topic}, {kafka.dead_letter_topic}"
    return f"through {kafka.bootstrap_servers}: topics {topics}; group {kafka.group_id}"


def _source(config: Config, options: ReplayOptions, clock: Clock) -> Source:
    if isinstance(clock, VirtualClock):
        return LogSource(_entries(options), clock, options.log.name, config.kafka.max_poll_records)
    return KafkaSource(config.kafka, clock)


def _report(
    options: ReplayOptions,
    timeline: Timeline,
    from_ts_ms: int,
    board: PrequentialEvaluator,
    recorder: LatencyRecorder,
    dead_letters: int,
) -> ReplayReport:
    events = len(timeline.times_ms)
    wanted = events - bisect_left(timeline.times_ms, from_ts_ms)
    admitted = events + (timeline.unreadable if options.kafka is None else 0)  # only events are produced to a topic
    return ReplayReport(
        log=options.log.name,
        source="log" if options.kafka is None else "kafka",
        events=events,
        slates=sum(board.strategies.values()),
        dead_letters=dead_letters,
        lost=admitted - board.answered - dead_letters,
        scored=board.scored,
        scored_fraction=round(board.scored / wanted, 6),
        hit_rates={name: round(board.hit_rate(name), 5) for name in board.rankings},
        strategies=dict(board.strategies),
        events_per_s=round(board.answered / recorder.elapsed_s, 1),
        latency=Percentiles.from_samples(recorder.latencies_ms),
        elapsed_s=round(recorder.elapsed_s, 2),
        log_speed=round((timeline.times_ms[-1] - timeline.times_ms[0]) / 1e3 / recorder.elapsed_s, 1),
        model_version=board.pipeline.version,
    )


def summary(report: ReplayReport) -> list[tuple[str, str]]:
    """The report as rows for the terminal."""
    latency, total = report.latency, max(1, sum(report.strategies.values()))
    rungs = "  ".join(f"{rung} {count / total:.1%}" for rung, count in report.strategies.items())
    return [
        ("events", f"{report.events:,} from {report.source}; {report.dead_letters:,} dead letters"),
        ("slates", f"{report.slates:,}; {report.lost:,} events lost"),
        ("rate", f"{report.events_per_s:,.0f} events/s over {report.elapsed_s:.1f} s"),
        ("speed", f"{report.log_speed:,.0f} times the log's: a session's events come at once and wait for one another"),
        (
            "latency, scored part",
            f"p50 {latency.p50_ms:.1f} ms  p95 {latency.p95_ms:.1f} ms  p99 {latency.p99_ms:.1f} ms",
        ),
        ("rungs", rungs),
        ("scored", f"{report.scored:,} events, {report.scored_fraction:.1%} of the part after --train-fraction"),
        *((f"hit rate@10, {name}", f"{rate:.4f}") for name, rate in report.hit_rates.items()),
    ]
