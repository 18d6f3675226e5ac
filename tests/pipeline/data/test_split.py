import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.data.event_log import Log, columns
from pipeline.data.split import Cut, Taught, places_from_end
from pipeline.records import Event, EventSchema

logs = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 5)), max_size=60)  # (user, item) in time order


def log_of(rows: list[tuple[int, int]], step_ms: int = 1000) -> Log:
    events = [Event(f"u{user}", f"i{item}", "view", step_ms * place) for place, (user, item) in enumerate(rows)]
    return columns([events], EventSchema())


@given(st.lists(st.integers(0, 4), max_size=40))
def test_places_count_back_from_each_users_newest_event(users: list[int]) -> None:
    wanted = [users[place + 1 :].count(user) for place, user in enumerate(users)]
    assert places_from_end(np.array(users, np.int32)).tolist() == wanted


@given(logs, st.integers(1, 5))
def test_a_cut_by_user_leaves_out_each_users_newest_events(rows: list[tuple[int, int]], last: int) -> None:
    left_out = Cut(last=last).left_out(log_of(rows))
    for user in {user for user, _ in rows}:
        own = [out for (who, _), out in zip(rows, left_out.tolist(), strict=True) if who == user]
        assert own == [False] * max(0, len(own) - last) + [True] * min(last, len(own))


def test_a_cut_by_time_leaves_out_the_last_share_and_splits_no_millisecond() -> None:
    log = log_of([(0, item) for item in range(10)])
    assert Cut(0.7).left_out(log).tolist() == [False] * 7 + [True] * 3
    assert Cut(0.7).left_out(log_of([(0, item) for item in range(6)], step_ms=0)).all(), "all times are equal"


@given(logs, st.data())
def test_a_part_of_a_log_has_its_own_items_alone(rows: list[tuple[int, int]], data: st.DataObject) -> None:
    kept = data.draw(st.lists(st.booleans(), min_size=len(rows), max_size=len(rows)))
    part = log_of(rows).part(np.array(kept, bool))
    wanted = [row for row, keep in zip(rows, kept, strict=True) if keep]
    got = [(part.user_ids[u], part.item_ids[i]) for u, i in zip(part.users, part.items, strict=True)]
    assert got == [(f"u{user}", f"i{item}") for user, item in wanted]
    assert part.item_ids == sorted({f"i{item}" for _, item in wanted})


ROWS = [(place % 3, place % 7) for place in range(30)]


@pytest.mark.parametrize(
    ("cut", "scored", "seen"),
    [(Cut(0.8), Cut(0.8), 0), (Cut(0.8), Cut(0.5), 9), (Cut(last=2), Cut(last=2), 0), (Cut(last=1), Cut(last=4), 9)],
)
def test_events_that_taught_are_counted_among_those_to_score(cut: Cut, scored: Cut, seen: int) -> None:
    log = log_of(ROWS)
    taught = Taught.of(cut, log.part(~cut.left_out(log)))
    assert taught.seen(log, scored.left_out(log)) == seen


def test_a_log_that_has_changed_is_trusted_only_behind_all_that_taught() -> None:
    log, cut = log_of(ROWS), Cut(0.8)
    taught = Taught.of(cut, log.part(~cut.left_out(log)))
    grown = log_of([*ROWS, *ROWS])
    assert taught.seen(grown, Cut(0.5).left_out(grown)) == 0
    assert taught.seen(grown, Cut(0.2).left_out(grown)) is None
    assert taught.seen(grown, Cut(last=2).left_out(grown)) == 0
