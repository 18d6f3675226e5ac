"""Exclusion by action and by window before the user's newest event."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.records import DAY_MS, Event, EventSchema, Histories, item_hash
from pipeline.strategies.exclusion import Exclusion

SCHEMA = EventSchema()


@pytest.fixture
def histories() -> Histories:
    first = [Event("u", "a", "view", 0), Event("u", "b", "purchase", 5 * DAY_MS), Event("u", "c", "view", 9 * DAY_MS)]
    return Histories.from_events([first, [], [Event("v", "a", "view", 0)]], SCHEMA)


@pytest.mark.parametrize(
    ("actions", "days", "mask"),
    [
        (None, 0, [True, True, True, True]),
        (("purchase",), 0, [False, True, False, False]),
        (None, 4, [False, True, True, True]),
        (("view",), 4, [False, False, True, True]),
    ],
)
def test_items_are_excluded_by_action_within_the_window(histories: Histories, actions, days, mask):
    assert Exclusion.from_names(actions, days, SCHEMA).mask(histories).tolist() == mask


def test_action_outside_the_schema_is_rejected():
    with pytest.raises(KeyError, match="dance"):
        Exclusion.from_names(("dance",), 0, SCHEMA)


def test_batch_without_any_event_excludes_nothing_also_with_a_window() -> None:
    nobody = Histories.from_events([[], []], EventSchema())
    assert Exclusion(None, 1000).mask(nobody).tolist() == []


@given(
    st.lists(st.tuples(st.integers(0, 2), st.integers(0, 3), st.sampled_from(["view", "cart"])), max_size=40), st.data()
)
def test_excluded_targets_are_those_that_the_ring_before_them_excludes(log, data: st.DataObject) -> None:
    actions = data.draw(st.sampled_from([None, (), ("cart",)]))
    rule = Exclusion.from_names(actions, data.draw(st.sampled_from([0, 2, 5])), SCHEMA)
    ring_events = data.draw(st.integers(1, 8))
    events = [Event(f"u{user}", f"i{item}", action, DAY_MS * day) for day, (user, item, action) in enumerate(log)]
    by_user = [[event for event in events if event.user_id == f"u{user}"] for user in range(3)]
    expected = []
    for history in by_user:
        for position, event in enumerate(history):
            ring = Histories.from_events([history[max(0, position - ring_events) : position]], SCHEMA)
            expected.append(item_hash(event.item_id) in ring.items[rule.mask(ring)])
    histories = Histories.from_events(by_user, SCHEMA)
    assert rule.excluded_targets(histories, ring_events).tolist() == expected
