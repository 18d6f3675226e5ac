"""One rule of exclusion: by action and by window before the user's newest event."""

import pytest

from pipeline.records import Event, EventSchema, Histories
from pipeline.serving.exclusion import Exclusion

SCHEMA = EventSchema()
DAY_MS = 86_400_000


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
def test_an_item_is_excluded_by_its_actions_within_the_window(actions, days, mask):
    assert Exclusion.from_names(actions, days, SCHEMA).mask(histories()).tolist() == mask


def test_an_action_outside_the_schema_is_refused():
    with pytest.raises(KeyError, match="dance"):
        Exclusion.from_names(("dance",), 0, SCHEMA)
