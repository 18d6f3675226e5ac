from tests.worker.clocks import ManualClock
from worker.interfaces import Partition
from worker.kafka.partition_progress import PartitionProgress

ONE, TWO = Partition("events", 1), Partition("events", 2)


def observe(steps: list[tuple[dict, dict, bool]]) -> dict[Partition, float]:
    """Update once per ten seconds, and return the standstills ten seconds after the last update."""
    clock = ManualClock()
    progress = PartitionProgress(clock)
    for positions, ends, paused in steps:
        progress.update(positions, ends, paused)
        clock.now_s += 10
    return progress.stalled_s()


def test_partition_stands_still_while_records_wait_and_its_position_does_not_move() -> None:
    steps = [({ONE: 5, TWO: 5 + step}, {ONE: 9, TWO: 99}, False) for step in range(4)]
    assert observe(steps) == {ONE: 40, TWO: 10}


def test_partition_without_waiting_records_does_not_stand_still() -> None:
    assert observe([({ONE: 9}, {ONE: 9}, False)] * 4) == {ONE: 0}


def test_time_without_waiting_records_does_not_count() -> None:
    assert observe([({ONE: 9}, {ONE: 9}, False)] * 4 + [({ONE: 9}, {ONE: 10}, False)] * 2) == {ONE: 30}


def test_pause_is_no_standstill() -> None:
    assert observe([({ONE: 5}, {ONE: 9}, True)] * 4 + [({ONE: 5}, {ONE: 9}, False)]) == {ONE: 20}


def test_revoked_partition_is_forgotten() -> None:
    steps = [({ONE: 5, TWO: 5}, {ONE: 9, TWO: 9}, False)] * 3 + [({TWO: 5}, {TWO: 9}, False)]
    assert observe(steps) == {TWO: 40}
    assert observe([*steps, ({ONE: 5, TWO: 6}, {ONE: 9, TWO: 9}, False)]) == {ONE: 10, TWO: 10}
