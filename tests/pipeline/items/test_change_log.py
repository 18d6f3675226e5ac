"""Readers of a change log see every change once, or learn that they must look at everything."""

import pytest

from pipeline.items import change_log
from pipeline.items.change_log import ChangeLog


def changes(log: ChangeLog, position: int) -> list[int] | None:
    found = log.since(position)
    return None if found is None else found.tolist()


def test_changes_after_a_position_are_distinct_and_ascending() -> None:
    log = ChangeLog()
    log.add([5, 3])
    position = log.end
    log.add([9])
    log.add([2, 9])
    assert changes(log, 0) == [2, 3, 5, 9]
    assert changes(log, position) == [2, 9]
    assert changes(log, log.end) == []


def test_reader_that_is_too_far_behind_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(change_log, "KEPT", 4)
    log = ChangeLog()
    for token in range(20):
        log.add([token])
    assert log.end == 20
    assert changes(log, 0) is None
    assert changes(log, 16) == [16, 17, 18, 19]
    log.add(range(20, 120))
    assert changes(log, 116) == [116, 117, 118, 119]
    assert changes(log, 115) is None
