"""Replay a recorded log through the whole worker and score it: `millrace replay`, and the last step of the demo.

Either the log itself is the source, on its own virtual clock, or (`ReplayOptions.kafka`) it is produced to a real topic
and consumed from there. Unless a Redis is given, a Valkey is started for the run, and on any broker the topics and the
group are the run's own: no deployment is touched by accident.
"""

import asyncio
from array import array
from bisect import bisect_left
from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from itertools import dropwhile, groupby, islice
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
from worker.interfaces import Clock, Sink, Source
from worker.kafka.sink import KafkaSink
from worker.kafka.source import KafkaSource
from worker.process import Components, build_components, first_error, supervise
from worker.replay.baselines import build_evaluator
from worker.replay.display import REFRESH_S, LatencyRecorder, Percentiles, ReplayDisplay
from worker.replay.feed import STEP_S, at_once, at_rate, produce
from worker.replay.file_sink import FileSink
from worker.replay.local_servers import LocalKafka, LocalValkey
from worker.replay.log_source import LogSource
from worker.replay.prequential import PrequentialEvaluator
from worker.replay.report import ReplayReport
from worker.stream.health import HealthState
from worker.stream.loop import Worker


class ReplayOptions(msgspec.Struct, frozen=True):
    """Options of `millrace replay`."""

    log: Path
    slates: Path  # JSON lines file of the slates, when the log itself is the source
    layout: LogLayout | None = None
    since_ms: int | None = None  # what is before the first event from this time on is left out
    limit: int | None = None  # number of events to replay
    speed: float | None = None  # log seconds per real second; None: no limit
    train_fraction: float = 0.8  # of the events, before scoring begins
    kafka: str | None = None  # None: the log itself is the source; a broker's address; "": start one
    redis: str | None = None  # URL; None: start a Valkey for the run
    rate: float | None = None  # scored events per second, through Kafka; None: no limit
    name: str = msgspec.field(
        default_factory=lambda: f"replay-{token_hex(4)}"
    )  # group id, and prefix of the topics and keys


class Timeline(NamedTuple):
    """The times of the log's events in order, 8 bytes per event, and the number of records that are not events."""

    times_ms: "array[int]"
    unreadable: int


@dataclass(frozen=True, slots=True)
class _Run:
    """One replay under way."""

    config: Config
    options: ReplayOptions
    score_from_ms: int
    components: Components
    worker: Worker
    evaluator: PrequentialEvaluator
    recorder: LatencyRecorder


async def replay(config: Config, options: ReplayOptions, console: Console) -> ReplayReport:
    """Replay the log and return the report. LogFileError, ArtifactError, SourceError, StoreError, SinkError."""
    timeline = await asyncio.to_thread(_read_timeline, options)
    events = len(timeline.times_ms)
    score_from_ms = timeline.times_ms[min(int(options.train_fraction * events), events - 1)]
    async with AsyncExitStack() as stack:
        config = _replay_config(config, options, stack)
        if options.kafka is not None:
            console.print(_describe_topics(config.kafka), soft_wrap=True)
        clock: Clock = WallClock() if options.kafka is not None else VirtualClock(options.speed)
        components = await stack.enter_async_context(build_components(config, clock))
        evaluator = build_evaluator(components.ranker, config.pipeline.artifact, score_from_ms)
        sink: Sink = await stack.enter_async_context(
            KafkaSink(config, components.slates)
            if options.kafka is not None
            else FileSink(options.slates, components.slates)
        )
        worker = components.worker(
            source=_source(config, options, clock),
            sink=sink,
            health=HealthState(clock, clock.monotonic()),
            ranker=evaluator,
            on_delivered=evaluator.on_delivered,
        )
        run = _Run(config, options, score_from_ms, components, worker, evaluator, LatencyRecorder())
        with ReplayDisplay(options.log.name, events, console) as display:
            await _supervise(run, display)
        run.recorder.tick(evaluator, worker.tracker.completed_count)
    return _report(run, timeline)


async def _supervise(run: _Run, display: ReplayDisplay) -> None:
    """Run until the worker ends; the first error of worker, feed and display ends the others."""
    try:
        async with asyncio.TaskGroup() as tasks:
            showing = tasks.create_task(_every(REFRESH_S, lambda: _show(run, display)), name="display")
            if run.options.kafka is not None:
                tasks.create_task(_feed(run), name="feed")
            await supervise(run.worker, run.components)
            showing.cancel()
    except BaseExceptionGroup as group:
        raise first_error(group) from group


async def _feed(run: _Run) -> None:
    """Produce the events before scoring as fast as they are answered, the scored ones at the rate; stop the worker."""
    worker = run.worker
    options = run.options
    while not worker.health.ready:  # noqa: ASYNC110 - the worker has then created the topics
        await asyncio.sleep(STEP_S)
    produced = 0
    for is_scored, events in groupby(_events(options), lambda event: event.ts_ms >= run.score_from_ms):
        wait = at_rate(options.rate) if is_scored and options.rate else at_once
        produced += await produce(run.config.kafka, events, wait)
        while worker.tracker.completed_count < produced:  # noqa: ASYNC110 - the counter is the condition
            await asyncio.sleep(STEP_S)
    worker.stop()


async def _every(period_s: float, function: Callable[[], None]) -> None:
    while True:
        function()
        await asyncio.sleep(period_s)


def _show(run: _Run, display: ReplayDisplay) -> None:
    tracker = run.worker.tracker
    run.recorder.tick(run.evaluator, tracker.completed_count)
    display.show(run.recorder, run.evaluator, completed=tracker.completed_count, pending=tracker.open_count)


def _read_timeline(options: ReplayOptions) -> Timeline:
    times_ms = array("q")
    unreadable = 0
    for entry in _entries(options):
        if isinstance(entry, Event):
            times_ms.append(entry.ts_ms)
        else:
            unreadable += 1
    if not times_ms:
        reason = "look at its first lines, or give --columns" if unreadable else "it is empty"
        if options.since_ms is not None:
            reason = "it is empty, or ends before --since"
        raise LogFileError(f"{options.log}: no event in it could be read; {reason}")
    return Timeline(times_ms, unreadable)


def _entries(options: ReplayOptions) -> Iterator[LogEntry]:
    since_ms = options.since_ms
    entries = read_log_by_time(options.log, options.layout)
    if since_ms is not None:
        entries = dropwhile(lambda entry: not isinstance(entry, Event) or entry.ts_ms < since_ms, entries)
    return islice(entries, options.limit)


def _events(options: ReplayOptions) -> Iterator[Event]:
    return (entry for entry in _entries(options) if isinstance(entry, Event))


def _replay_config(config: Config, options: ReplayOptions, stack: AsyncExitStack) -> Config:
    """Return the configuration of a replay: servers of its own, events of any age, one model, and one slate per event
    whatever its action, because each event is scored by the slate before it."""
    folder = Path(stack.enter_context(TemporaryDirectory(prefix="millrace-replay-")))
    url = options.redis or stack.enter_context(LocalValkey(folder / "valkey")).url
    kafka = config.kafka
    if options.kafka is not None:
        bootstrap = options.kafka or stack.enter_context(LocalKafka(folder / "kafka")).bootstrap
        kafka = _isolate(replace(kafka, bootstrap_servers=bootstrap, create_topics=True), options.name)
    return replace(
        config,
        kafka=kafka,
        redis=replace(config.redis, url=url, cluster=False, prefix=f"{options.name}:"),
        events=replace(config.events, max_age_days=0.0, max_clock_skew_s=1e12, trigger_actions=None),
        batcher=replace(config.batcher, coalesce=False),
        pipeline=replace(config.pipeline, artifact_poll_interval_s=0.0),
    )


def _isolate(kafka: KafkaConfig, name: str) -> KafkaConfig:
    """Return the configuration with a group and topics of the run's own: a deployment's are never read or written."""
    return replace(
        kafka,
        group_id=name,
        events_topic=f"{name}.events",
        recommendations_topic=f"{name}.recommendations",
        dead_letter_topic=f"{name}.events.dead",
    )


def _describe_topics(kafka: KafkaConfig) -> str:
    topics = f"{kafka.events_topic}, {kafka.recommendations_topic}, {kafka.dead_letter_topic}"
    return f"through {kafka.bootstrap_servers}: topics {topics}; group {kafka.group_id}"


def _source(config: Config, options: ReplayOptions, clock: Clock) -> Source:
    if isinstance(clock, VirtualClock):
        return LogSource(_entries(options), clock, options.log.name, config.kafka.max_poll_records)
    return KafkaSource(config.kafka, clock)


def _report(run: _Run, timeline: Timeline) -> ReplayReport:
    options = run.options
    evaluator = run.evaluator
    recorder = run.recorder
    events = len(timeline.times_ms)
    to_score = events - bisect_left(timeline.times_ms, run.score_from_ms)
    records = events + (timeline.unreadable if options.kafka is None else 0)  # only events are produced to a topic
    dead_letters = run.worker.limits.total
    log_s = (timeline.times_ms[-1] - timeline.times_ms[0]) / 1e3
    return ReplayReport(
        log=options.log.name,
        source="log" if options.kafka is None else "kafka",
        events=events,
        slates=sum(evaluator.strategies.values()),
        dead_letters=dead_letters,
        lost=records - evaluator.answered - dead_letters,
        scored=evaluator.scored,
        scored_fraction=round(evaluator.scored / to_score, 6),
        hit_rates={ranking: round(evaluator.hit_rate(ranking), 5) for ranking in evaluator.rankings},
        tied_fraction=round(evaluator.tied / max(1, evaluator.scored), 6),
        excluded=evaluator.excluded,
        untied_hit_rates={
            ranking: round(evaluator.untied_hit_rate(ranking), 5)
            for ranking in evaluator.rankings
            if evaluator.scored > evaluator.tied
        },
        strategies=dict(evaluator.strategies),
        backends=dict(evaluator.backends),
        events_per_s=round(evaluator.answered / recorder.elapsed_s, 1),
        latency=Percentiles.from_samples(recorder.latencies_ms),
        elapsed_s=round(recorder.elapsed_s, 2),
        log_speed=round(log_s / recorder.elapsed_s, 1),
        model_version=evaluator.pipeline.version,
    )
