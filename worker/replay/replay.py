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

from pipeline.data.log_io import Entry, Layout, in_event_time
from pipeline.errors import LogFileError
from pipeline.records import Event
from worker.clock import VirtualClock, WallClock
from worker.config import Config, Kafka
from worker.interfaces import Clock, Source
from worker.kafka.sink import FileSink, KafkaSink
from worker.kafka.source import KafkaSource
from worker.process import Parts, parts, supervise
from worker.replay.baselines import scoreboard
from worker.replay.display import REFRESH_S, Display, Percentiles, Recorder
from worker.replay.feed import STEP_S, at_once, at_rate, produce
from worker.replay.local_servers import LocalKafka, LocalValkey
from worker.replay.log_source import LogSource
from worker.replay.scoreboard import Scoreboard
from worker.stream.health import Pulse
from worker.stream.loop import Worker


class Replay(msgspec.Struct, frozen=True):
    """What to replay and how."""

    log: Path
    slates: Path  # where they are written when the log itself is the source, as JSON lines
    layout: Layout | None = None
    limit: int | None = None  # events
    speed: float | None = None  # log seconds a real second; None: as fast as it goes
    share: float = 0.8  # of the events, before scoring begins
    kafka: str | None = None  # None: the log itself is the source; a broker's address; "": start one
    redis: str | None = None  # URL; None: start a Valkey for the run
    rate: float | None = None  # events a second of the scored part, through Kafka; None: as fast as it goes
    name: str = msgspec.field(default_factory=lambda: f"replay-{token_hex(4)}")  # of its group, begins its topics


class Timeline(NamedTuple):
    """What the log holds: the events' times in order, 8 bytes an event, and how many records are no events."""

    times_ms: "array[int]"
    unreadable: int


class Report(msgspec.Struct, frozen=True):
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
    rungs: dict[str, int]
    events_per_s: float
    latency: Percentiles
    elapsed_s: float
    log_speed: float
    model_version: str


async def replay(config: Config, task: Replay, console: Console) -> Report:
    """Runs the log through and returns what came of it. LogFileError, ArtifactError, SourceError as elsewhere."""
    timeline = await asyncio.to_thread(_timeline, task)
    events = len(timeline.times_ms)
    from_ts_ms = timeline.times_ms[min(int(task.share * events), events - 1)]
    async with AsyncExitStack() as stack:
        config = _prepared(config, task, stack)
        if task.kafka is not None:
            console.print(_where(config.kafka), soft_wrap=True)
        clock: Clock = WallClock() if task.kafka is not None else VirtualClock(task.speed)
        made = await stack.enter_async_context(parts(config, clock))
        board = scoreboard(made.ranker, config.pipeline.artifact, from_ts_ms)
        sink = await stack.enter_async_context(
            KafkaSink(config, made.slates) if task.kafka is not None else FileSink(task.slates, made.slates)
        )
        source = _source(config, task, clock)
        worker = made.worker(source, sink, Pulse(clock, clock.monotonic()), board, audience=board.audience)
        recorder = Recorder()
        with Display(task.log.name, events, console) as display:
            await _run(config, task, worker, made, from_ts_ms, lambda: _show(display, recorder, board, worker))
        recorder.tick(board, worker.ledger.settled_count)
    return _report(task, timeline, from_ts_ms, board, recorder, worker.buried_count)


async def _run(
    config: Config, task: Replay, worker: Worker, made: Parts, from_ts_ms: int, show: Callable[[], None]
) -> None:
    showing = asyncio.create_task(_every(REFRESH_S, show))
    feeding = asyncio.create_task(_feed(config, task, worker, from_ts_ms)) if task.kafka is not None else None
    try:
        await supervise(worker, made)
    finally:
        for job in filter(None, (showing, feeding)):
            job.cancel()
        await asyncio.gather(*filter(None, (showing, feeding)), return_exceptions=True)


async def _feed(config: Config, task: Replay, worker: Worker, from_ts_ms: int) -> None:
    """The part before scoring as fast as it is answered, then the scored part at its rate; then the worker may stop."""
    while not worker.pulse.ready:  # noqa: ASYNC110 - it has made the topic
        await asyncio.sleep(STEP_S)
    fed = 0
    for scored, events in groupby(_events(task), lambda event: event.ts_ms >= from_ts_ms):
        fed += await produce(config.kafka, events, at_rate(task.rate) if scored and task.rate else at_once)
        while worker.ledger.settled_count < fed:  # noqa: ASYNC110 - the counter is the condition
            await asyncio.sleep(STEP_S)
    worker.stop()


async def _every(period_s: float, act: Callable[[], None]) -> None:
    while True:
        act()
        await asyncio.sleep(period_s)


def _show(display: Display, recorder: Recorder, board: Scoreboard, worker: Worker) -> None:
    recorder.tick(board, worker.ledger.settled_count)
    display.show(recorder, board, worker.ledger.settled_count, worker.ledger.open_count)


def _timeline(task: Replay) -> Timeline:
    times_ms, unreadable = array("q"), 0
    for entry in _entries(task):
        if isinstance(entry, Event):
            times_ms.append(entry.ts_ms)
        else:
            unreadable += 1
    if not times_ms:
        why = "look at its first lines, or give --columns" if unreadable else "it is empty"
        raise LogFileError(f"{task.log}: no event in it could be read; {why}")
    return Timeline(times_ms, unreadable)


def _entries(task: Replay) -> Iterator[Entry]:
    return islice(in_event_time(task.log, task.layout), task.limit)


def _events(task: Replay) -> Iterator[Event]:
    return (entry for entry in _entries(task) if isinstance(entry, Event))


def _prepared(config: Config, task: Replay, stack: AsyncExitStack) -> Config:
    """Servers of its own, any age of event, one slate per event whatever its action: each is judged by the slate before
    it; one model."""
    folder = Path(stack.enter_context(TemporaryDirectory(prefix="millrace-replay-")))
    url = task.redis or stack.enter_context(LocalValkey(folder / "valkey")).url
    kafka = config.kafka
    if task.kafka is not None:
        broker = task.kafka or stack.enter_context(LocalKafka(folder / "kafka")).bootstrap
        kafka = _own(replace(kafka, bootstrap=broker, create_topics=True), task.name)
    return replace(
        config,
        kafka=kafka,
        redis=replace(config.redis, url=url, cluster=False),
        events=replace(config.events, max_age_days=0.0, max_ahead_s=1e12, trigger_actions=None),
        batcher=replace(config.batcher, coalesce=False),
        pipeline=replace(config.pipeline, follow_s=0.0),
    )


def _own(kafka: Kafka, name: str) -> Kafka:
    """With topics and a group that nobody else has: a deployment's are neither read nor written."""
    return replace(
        kafka,
        group=name,
        events_topic=f"{name}.events",
        slates_topic=f"{name}.recommendations",
        dead_letter_topic=f"{name}.events.dead",
    )


def _where(kafka: Kafka) -> str:
    topics = f"{kafka.events_topic}, {kafka.slates_topic}, {kafka.dead_letter_topic}"
    return f"through {kafka.bootstrap}: topics {topics}; group {kafka.group}"


def _source(config: Config, task: Replay, clock: Clock) -> Source:
    if isinstance(clock, VirtualClock):
        return LogSource(_entries(task), clock, task.log.name, config.kafka.max_poll_records)
    return KafkaSource(config.kafka, clock)


def _report(
    task: Replay, timeline: Timeline, from_ts_ms: int, board: Scoreboard, recorder: Recorder, buried: int
) -> Report:
    events = len(timeline.times_ms)
    wanted = events - bisect_left(timeline.times_ms, from_ts_ms)
    admitted = events + (timeline.unreadable if task.kafka is None else 0)  # only events are produced to a topic
    return Report(
        log=task.log.name,
        source="log" if task.kafka is None else "kafka",
        events=events,
        slates=sum(board.rungs.values()),
        dead_letters=buried,
        lost=admitted - board.answered - buried,
        scored=board.scored,
        scored_fraction=round(board.scored / wanted, 6),
        hit_rates={name: round(board.hit_rate(name), 5) for name in board.rankings},
        rungs=dict(board.rungs),
        events_per_s=round(board.answered / recorder.elapsed_s, 1),
        latency=Percentiles.of(recorder.latencies_ms),
        elapsed_s=round(recorder.elapsed_s, 2),
        log_speed=round((timeline.times_ms[-1] - timeline.times_ms[0]) / 1e3 / recorder.elapsed_s, 1),
        model_version=board.pipeline.version,
    )


def summary(report: Report) -> list[tuple[str, str]]:
    """The report as rows for the terminal."""
    latency, total = report.latency, max(1, sum(report.rungs.values()))
    rungs = "  ".join(f"{rung} {count / total:.1%}" for rung, count in report.rungs.items())
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
        ("scored", f"{report.scored:,} events, {report.scored_fraction:.1%} of the part from --score-from on"),
        *((f"hit rate@10, {name}", f"{rate:.4f}") for name, rate in report.hit_rates.items()),
    ]
