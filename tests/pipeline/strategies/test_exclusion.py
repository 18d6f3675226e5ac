"""Exclusion by action and by window before the user's newest event."""

import pytest

from pipeline.records import DAY_MS, Event, EventSchema, Histories
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
