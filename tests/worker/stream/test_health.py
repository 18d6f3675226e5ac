"""The probes answer from their own thread; the watchdog stops a worker that makes no progress, and no other."""

import asyncio
import contextlib
import socket
import threading
from dataclasses import dataclass, field

import pytest
from prometheus_client import REGISTRY

from tests.pages import read_page
from tests.worker.clocks import ManualClock
from worker import metrics
from worker.config import HealthConfig
from worker.errors import ConfigError, Stalled
from worker.interfaces import Partition, PolledRecords, RecordOffset
from worker.stream import health
from worker.stream.health import LOOP_BLOCKED_S, MAX_CONNECTIONS, HealthServer, HealthState, Watchdog
from worker.stream.offset_tracker import OffsetTracker

PARTITION = Partition("events", 0)


@dataclass
class FakeSource:
    """The part of a source that the watchdog reads."""

    records: dict = field(default_factory=dict)
    stalled: dict = field(default_factory=dict)
    reason: str = ""

    def stalled_s(self) -> dict:
        return self.stalled

    def problem(self) -> str:
        return self.reason

    def lag(self) -> dict:
        return self.records


@dataclass
class FakeRecord:
    offset: int


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
def served(clock: ManualClock):
    state = HealthState(clock, clock.monotonic())
    server = HealthServer(HealthConfig(port=0), state)
    yield server.port, state
    server.close()


def test_readiness_names_the_problem(served):
    port, state = served
    assert read_page(port, "/readyz") == (503, "starting\n")
    state.ready = True
    assert read_page(port, "/readyz") == (200, "serving\n")
    state.problems["SequenceStore.push"] = "Redis is unreachable"
    assert read_page(port, "/readyz") == (503, "SequenceStore.push: Redis is unreachable\n")


def test_liveness_fails_without_a_heartbeat(served, clock: ManualClock):
    port, state = served
    assert read_page(port, "/livez")[0] == 200
    clock.now_s += LOOP_BLOCKED_S
    assert read_page(port, "/livez")[0] == 503
    state.heartbeat_s = clock.now_s
    assert read_page(port, "/livez")[0] == 200


def test_metrics_are_text_and_other_pages_are_not_found(served):
    port, _ = served
    status, text = read_page(port, "/metrics")
    assert status == 200
    assert "millrace_in_flight_events" in text
    assert read_page(port, "/nothing")[0] == 404


def test_port_in_use_is_one_clear_sentence(served):
    port, state = served
    with pytest.raises(ConfigError, match=f"cannot listen on 127.0.0.1:{port}.*health.port"):
        HealthServer(HealthConfig(port=port), state)


def test_idle_and_slow_connections_are_bounded_and_ended_so_that_probes_are_answered(served, monkeypatch):
    port, _ = served
    monkeypatch.setattr(health, "CONNECTION_S", 0.3)
    threads_before = threading.active_count()
    with contextlib.ExitStack() as stack:
        connections = []
        for _ in range(5 * MAX_CONNECTIONS):
            connections.append(stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=10)))
            with contextlib.suppress(ConnectionError):
                connections[-1].sendall(b"GET /livez")
            assert threading.active_count() - threads_before <= MAX_CONNECTIONS
        assert {received(connection) for connection in connections} == {b""}
    assert read_page(port, "/livez")[0] == 200


def received(connection: socket.socket) -> bytes:
    """Return what the server sends before it ends the connection."""
    try:
        return connection.recv(100)
    except ConnectionError:
        return b""


def watched(clock: ManualClock) -> tuple[OffsetTracker, FakeSource, Watchdog]:
    tracker = OffsetTracker(clock)
    source = FakeSource()
    tracker.assign(PARTITION, 1)
    watchdog = Watchdog(HealthConfig(stall_timeout_s=60), tracker, source, HealthState(clock), clock)  # type: ignore[arg-type]
    watchdog.check()
    return tracker, source, watchdog


def test_idle_worker_never_stalls(clock: ManualClock):
    _, _, watchdog = watched(clock)
    clock.now_s += 10_000
    watchdog.check()
    assert watchdog._progress_s == clock.now_s


@pytest.mark.parametrize("where", ["open", "lag"])
async def test_waiting_events_without_progress_stall_the_worker(clock: ManualClock, where: str, capfd):
    tracker, source, watchdog = watched(clock)
    if where == "open":
        tracker.open(PolledRecords(PARTITION, 1, 6, 0, 0.0, [FakeRecord(5)]))  # type: ignore[list-item]
    else:
        source.records[PARTITION] = 7
    clock.now_s += 59
    watchdog.check()
    clock.now_s += 2
    with pytest.raises(Stalled, match=r"no event was completed for 61 s"):
        await watchdog.run()
    assert "test_waiting_events" in capfd.readouterr().err  # the stacks


def test_progress_resets_the_watchdog(clock: ManualClock):
    tracker, _, watchdog = watched(clock)
    tracker.open(PolledRecords(PARTITION, 1, 7, 0, 0.0, [FakeRecord(5), FakeRecord(6)]))  # type: ignore[list-item]
    clock.now_s += 50
    tracker.complete([RecordOffset(PARTITION, 1, 5)])
    watchdog.check()
    clock.now_s += 50
    watchdog.check()
    assert tracker.open_count == 1


async def test_failed_attempts_of_a_write_are_no_stall_but_one_that_never_ends_is(clock: ManualClock):
    tracker, _, watchdog = watched(clock)
    tracker.open(PolledRecords(PARTITION, 1, 6, 0, 0.0, [FakeRecord(5)]))  # type: ignore[list-item]
    for _ in range(10):
        clock.now_s += 59
        watchdog._health.next_attempt_s = clock.now_s + 5
        watchdog.check()
    clock.now_s += 66
    with pytest.raises(Stalled):
        watchdog.check()


async def test_lag_of_a_revoked_partition_is_no_longer_exported(clock: ManualClock):
    _, source, watchdog = watched(clock)
    source.records = {PARTITION: 7, Partition("events", 1): 3}
    watchdog.check()
    assert exported_lag() == {"0": 7, "1": 3}
    source.records = {Partition("events", 1): 2}
    watchdog.check()
    assert exported_lag() == {"1": 2}
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(watchdog.run(), 0.01)
    assert exported_lag() == {}


def exported_lag() -> dict[str, float]:
    return {sample.labels["partition"]: sample.value for sample in metrics.LAG.collect()[0].samples}


async def test_one_partition_that_stands_still_is_reported_while_others_go_on_and_then_ends_the_worker(
    clock: ManualClock, capfd, logged
):
    tracker, source, watchdog = watched(clock)
    health = watchdog._health
    health.ready = True
    source.records = {PARTITION: 5, Partition("events", 1): 0}
    for late_s in (0.0, 50.0):
        source.stalled = {PARTITION: late_s, Partition("events", 1): 0.0}
        tracker.completed_count += 1  # of the other partition
        watchdog.check()
        assert health.serving()[0]
    source.stalled[PARTITION] = 59.0
    watchdog._config = HealthConfig(stall_timeout_s=60, partition_stall_s=55)
    watchdog.check()
    assert health.serving() == (False, "partitions: records wait in events-0, which stand still for more than 55 s")
    assert [line["partitions"] for line in logged() if "stand still" in line["event"]] == [["events-0"]]
    assert REGISTRY.get_sample_value(
        "millrace_partition_stalled_seconds", {"topic": "events", "partition": "0"}
    ) == pytest.approx(59.0)
    source.stalled[PARTITION] = 61.0
    with pytest.raises(Stalled, match="events-0"):
        watchdog.check()
    source.stalled = {PARTITION: 0.0}
    watchdog.check()
    assert health.serving()[0]


def test_source_without_a_topic_is_not_ready(clock: ManualClock):
    _, source, watchdog = watched(clock)
    source.reason = "topic events was deleted"
    watchdog.check()
    assert watchdog._health.serving() == (False, "source: topic events was deleted")
    source.reason = ""
    watchdog.check()
    assert not watchdog._health.problems
