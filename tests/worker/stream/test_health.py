"""The probes answer from their own thread; the watchdog ends a worker that stands still, and only that."""

import asyncio
import urllib.error
import urllib.request
from dataclasses import dataclass, field

import pytest

from worker import metrics
from worker.config import HealthConfig as HealthConfig
from worker.errors import ConfigError, Stalled
from worker.interfaces import Partition, PolledRecords, RecordOffset
from worker.stream.health import LOOP_BLOCKED_S, HealthServer, HealthState, Watchdog
from worker.stream.offset_tracker import OffsetTracker

PARTITION = Partition("events", 0)


@dataclass
class HandClock:
    now_s: float = 100.0

    def now_ms(self) -> int:
        return int(self.now_s * 1000)

    def monotonic(self) -> float:
        return self.now_s


@dataclass
class Lagging:
    """The part of a source that the watchdog looks at."""

    records: dict = field(default_factory=dict)

    def lag(self) -> dict:
        return self.records


@dataclass
class Row:
    offset: int


def get(port: int, page: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{page}", timeout=5) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


@pytest.fixture
def clock() -> HandClock:
    return HandClock()


@pytest.fixture
def served(clock: HandClock):
    pulse = HealthState(clock, clock.monotonic())
    health = HealthServer(HealthConfig(port=0), pulse)
    yield health.port, pulse
    health.close()


def test_readiness_says_what_is_missing(served):
    port, pulse = served
    assert get(port, "/readyz") == (503, "starting\n")
    pulse.ready = True
    assert get(port, "/readyz") == (200, "serving\n")
    pulse.problems["Sequences.push"] = "Redis is away"
    assert get(port, "/readyz") == (503, "Sequences.push: Redis is away\n")


def test_liveness_fails_when_the_loop_has_not_turned(served, clock: HandClock):
    port, pulse = served
    assert get(port, "/livez")[0] == 200
    clock.now_s += LOOP_BLOCKED_S
    assert get(port, "/livez")[0] == 503
    pulse.heartbeat_s = clock.now_s
    assert get(port, "/livez")[0] == 200


def test_metrics_are_in_the_text_format_and_other_pages_are_404(served):
    port, _ = served
    status, text = get(port, "/metrics")
    assert status == 200
    assert "millrace_in_flight_events" in text
    assert get(port, "/nothing")[0] == 404


def test_a_taken_port_is_one_clear_sentence(served, clock: HandClock):
    port, pulse = served
    with pytest.raises(ConfigError, match=f"cannot listen on 127.0.0.1:{port}.*health.port"):
        HealthServer(HealthConfig(port=port), pulse)


def watched(clock: HandClock) -> tuple[OffsetTracker, Lagging, Watchdog]:
    tracker, source = OffsetTracker(clock), Lagging()
    tracker.assign(PARTITION, 1)
    watchdog = Watchdog(HealthConfig(stall_timeout_s=60), tracker, source, HealthState(clock), clock)  # type: ignore[arg-type]
    watchdog.check()
    return tracker, source, watchdog


def test_an_idle_worker_never_stalls(clock: HandClock):
    _, _, watchdog = watched(clock)
    clock.now_s += 10_000
    watchdog.check()
    assert watchdog._progress_s == clock.now_s


@pytest.mark.parametrize("where", ["open", "lag"])
def test_events_that_wait_without_progress_end_the_process(clock: HandClock, where: str, capfd):
    tracker, source, watchdog = watched(clock)
    if where == "open":
        tracker.open(PolledRecords(PARTITION, 1, 6, 0, 0.0, [Row(5)]))  # type: ignore[list-item]
    else:
        source.records[PARTITION] = 7
    clock.now_s += 59
    watchdog.check()
    clock.now_s += 2
    with pytest.raises(Stalled, match=r"no event was completed for 61 s"):
        asyncio.run(watchdog.run())
    assert "test_events_that_wait" in capfd.readouterr().err  # the stacks


def test_progress_resets_the_watchdog(clock: HandClock):
    tracker, _, watchdog = watched(clock)
    tracker.open(PolledRecords(PARTITION, 1, 7, 0, 0.0, [Row(5), Row(6)]))  # type: ignore[list-item]
    clock.now_s += 50
    tracker.complete([RecordOffset(PARTITION, 1, 5)])
    watchdog.check()
    clock.now_s += 50
    watchdog.check()
    assert tracker.open_count == 1


def test_a_partition_that_went_to_another_member_shows_no_lag_here(clock: HandClock):
    _, source, watchdog = watched(clock)
    source.records = {PARTITION: 7, Partition("events", 1): 3}
    watchdog.check()
    assert shown_lag() == {"0": 7, "1": 3}
    source.records = {Partition("events", 1): 2}
    watchdog.check()
    assert shown_lag() == {"1": 2}
    with pytest.raises(TimeoutError):
        asyncio.run(asyncio.wait_for(watchdog.run(), 0.01))
    assert shown_lag() == {}


def shown_lag() -> dict[str, float]:
    return {sample.labels["partition"]: sample.value for sample in metrics.LAG.collect()[0].samples}
