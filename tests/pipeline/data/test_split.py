"""Train/test splits by time and by user, and the check that no scored event was trained on."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.data.event_log import EventLog, event_log_from_blocks
from pipeline.data.layout import LogEntry
from pipeline.data.split import Split, TrainingProvenance, position_from_end, split_index
from pipeline.records import Event, EventSchema

logs = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 5)), max_size=60)  # (user, item) in time order


def make_log(rows: list[tuple[int, int]], step_ms: int = 1000) -> EventLog:
    events: list[LogEntry] = [Event(f"u{user}", f"i{item}", "view", step_ms * n) for n, (user, item) in enumerate(rows)]
    return event_log_from_blocks([events], EventSchema())


@given(st.lists(st.integers(0, 4), max_size=40))
def test_position_from_end_counts_the_users_later_events(users: list[int]) -> None:
    expected = [users[position + 1 :].count(user) for position, user in enumerate(users)]
    assert position_from_end(np.array(users, np.int32)).tolist() == expected


@given(logs, st.integers(1, 5))
def test_split_by_user_holds_out_each_users_latest_events(rows: list[tuple[int, int]], last: int) -> None:
    mask = Split(leave_last_out=last).test_mask(make_log(rows))
    for user in {user for user, _ in rows}:
        own = [held_out for (other, _), held_out in zip(rows, mask.tolist(), strict=True) if other == user]
        assert own == [False] * max(0, len(own) - last) + [True] * min(last, len(own))


def test_split_by_time_holds_out_the_end_and_splits_no_millisecond() -> None:
    log = make_log([(0, item) for item in range(10)])
    assert Split(0.7).test_mask(log).tolist() == [False] * 7 + [True] * 3
    assert Split(0.7).test_mask(make_log([(0, item) for item in range(6)], step_ms=0)).all(), "all times are equal"


@given(st.lists(st.integers(0, 50), min_size=1, max_size=40).map(sorted), st.floats(0, 1))
def test_split_never_separates_events_of_one_time(times: list[int], fraction: float) -> None:
    index = split_index(np.array(times), fraction)
    assert index == len(times) or index == 0 or times[index - 1] < times[index]
    assert index <= fraction * len(times)


@given(logs, st.data())
def test_selected_log_has_only_its_own_items(rows: list[tuple[int, int]], data: st.DataObject) -> None:
    mask = data.draw(st.lists(st.booleans(), min_size=len(rows), max_size=len(rows)))
    part = make_log(rows).select(np.array(mask, bool))
    expected = [row for row, selected in zip(rows, mask, strict=True) if selected]
    got = [(part.user_ids[u], part.item_ids[i]) for u, i in zip(part.users, part.items, strict=True)]
    assert got == [(f"u{user}", f"i{item}") for user, item in expected]
    assert part.item_ids == sorted({f"i{item}" for _, item in expected})


ROWS = [(n % 3, n % 7) for n in range(30)]


@pytest.mark.parametrize(
    ("split", "scored", "seen"),
    [
        (Split(0.8), Split(0.8), 0),
        (Split(0.8), Split(0.5), 9),
        (Split(leave_last_out=2), Split(leave_last_out=2), 0),
        (Split(leave_last_out=1), Split(leave_last_out=4), 9),
    ],
)
def test_training_events_are_counted_among_those_to_score(split: Split, scored: Split, seen: int) -> None:
    log = make_log(ROWS)
    provenance = TrainingProvenance.from_log(split, log.select(~split.test_mask(log)))
    assert provenance.count_seen(log, scored.test_mask(log)) == seen


def test_changed_log_is_trusted_only_after_the_training_events() -> None:
    log = make_log(ROWS)
    split = Split(0.8)
    provenance = TrainingProvenance.from_log(split, log.select(~split.test_mask(log)))
    grown = make_log([*ROWS, *ROWS])
    assert provenance.count_seen(grown, Split(0.5).test_mask(grown)) == 0
    assert provenance.count_seen(grown, Split(0.2).test_mask(grown)) is None
    assert provenance.count_seen(grown, Split(leave_last_out=2).test_mask(grown)) == 0
