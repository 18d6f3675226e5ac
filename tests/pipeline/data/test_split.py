import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.data.event_log import EventLog, event_log_from_blocks
from pipeline.data.split import Split, TrainingProvenance, position_from_end
from pipeline.records import Event, EventSchema

logs = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 5)), max_size=60)  # (user, item) in time order


def log_of(rows: list[tuple[int, int]], step_ms: int = 1000) -> EventLog:
    events = [Event(f"u{user}", f"i{item}", "view", step_ms * place) for place, (user, item) in enumerate(rows)]
    return event_log_from_blocks([events], EventSchema())


@given(st.lists(st.integers(0, 4), max_size=40))
def test_places_count_back_from_each_users_newest_event(users: list[int]) -> None:
    wanted = [users[place + 1 :].count(user) for place, user in enumerate(users)]
    assert position_from_end(np.array(users, np.int32)).tolist() == wanted


@given(logs, st.integers(1, 5))
def test_a_cut_by_user_leaves_out_each_users_newest_events(rows: list[tuple[int, int]], last: int) -> None:
    left_out = Split(leave_last_out=last).test_mask(log_of(rows))
    for user in {user for user, _ in rows}:
        own = [out for (who, _), out in zip(rows, left_out.tolist(), strict=True) if who == user]
        assert own == [False] * max(0, len(own) - last) + [True] * min(last, len(own))


def test_a_cut_by_time_leaves_out_the_last_share_and_splits_no_millisecond() -> None:
    log = log_of([(0, item) for item in range(10)])
    assert Split(0.7).test_mask(log).tolist() == [False] * 7 + [True] * 3
    assert Split(0.7).test_mask(log_of([(0, item) for item in range(6)], step_ms=0)).all(), "all times are equal"


@given(logs, st.data())
def test_a_part_of_a_log_has_its_own_items_alone(rows: list[tuple[int, int]], data: st.DataObject) -> None:
    kept = data.draw(st.lists(st.booleans(), min_size=len(rows), max_size=len(rows)))
    part = log_of(rows).select(np.array(kept, bool))
    wanted = [row for row, keep in zip(rows, kept, strict=True) if keep]
    got = [(part.user_ids[u], part.item_ids[i]) for u, i in zip(part.users, part.items, strict=True)]
    assert got == [(f"u{user}", f"i{item}") for user, item in wanted]
    assert part.item_ids == sorted({f"i{item}" for _, item in wanted})


ROWS = [(place % 3, place % 7) for place in range(30)]


@pytest.mark.parametrize(
    ("cut", "scored", "seen"),
    [
        (Split(0.8), Split(0.8), 0),
        (Split(0.8), Split(0.5), 9),
        (Split(leave_last_out=2), Split(leave_last_out=2), 0),
        (Split(leave_last_out=1), Split(leave_last_out=4), 9),
    ],
)
def test_events_that_taught_are_counted_among_those_to_score(cut: Split, scored: Split, seen: int) -> None:
    log = log_of(ROWS)
    taught = TrainingProvenance.from_log(cut, log.select(~cut.test_mask(log)))
    assert taught.count_seen(log, scored.test_mask(log)) == seen


def test_a_log_that_has_changed_is_trusted_only_behind_all_that_taught() -> None:
    log, cut = log_of(ROWS), Split(0.8)
    taught = TrainingProvenance.from_log(cut, log.select(~cut.test_mask(log)))
    grown = log_of([*ROWS, *ROWS])
    assert taught.count_seen(grown, Split(0.5).test_mask(grown)) == 0
    assert taught.count_seen(grown, Split(0.2).test_mask(grown)) is None
    assert taught.count_seen(grown, Split(leave_last_out=2).test_mask(grown)) == 0
