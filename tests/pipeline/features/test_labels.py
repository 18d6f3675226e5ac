"""Labels of the next event, and of the return after it."""

import numpy as np
import pytest

from pipeline.features.labels import compute_labels, compute_log_labels
from pipeline.records import DAY_MS, Event, EventSchema, Histories

SCHEMA = EventSchema()
MINUTE_MS = 60_000


def labels(*users: list[Event], end_ms: int = 1 << 45) -> list[list[float]]:
    return compute_labels(Histories.from_events(users, SCHEMA), SCHEMA, end_ms).tolist()


def event(ts_ms: int, action: str = "view", user: str = "u", **more: float) -> Event:
    return Event(user, "i", action, ts_ms, **more)  # pyright: ignore[reportArgumentType] - value or dwell_ms


@pytest.mark.parametrize(
    ("following", "engaged"),
    [
        (event(2, "view"), 0),
        (event(2, "like"), 1),
        (event(2, "purchase"), 1),
        (event(2, "view", dwell_ms=29_900), 0),
        (event(2, "view", dwell_ms=30_000), 1),
        (event(2, "rate", value=3.0), 0),
        (event(2, "rate", value=4.0), 1),
        (event(2, "view", value=100.0), 0),
    ],
)
def test_engagement_labels_the_next_event(following: Event, engaged: int) -> None:
    assert labels([event(1, "purchase"), following])[0][0] == engaged


def test_monetization_is_a_cart_or_purchase_next() -> None:
    history = [event(1), event(2, "cart"), event(3, "like"), event(4, "purchase")]
    assert [row[2] for row in labels(history)[:3]] == [1, 0, 1]


def test_retention_is_a_session_within_seven_days_of_the_next_event() -> None:
    first = [event(0), event(MINUTE_MS)]
    assert labels([*first, event(31 * MINUTE_MS)])[0][1] == 1
    assert labels([*first, event(30 * MINUTE_MS)])[0][1] == 0, "a gap of 29 minutes is the same session"
    assert labels([*first, event(MINUTE_MS + 7 * DAY_MS)])[0][1] == 1
    assert labels([*first, event(MINUTE_MS + 7 * DAY_MS + 1)])[0][1] == 0


def test_retention_is_unknown_until_the_log_covers_the_horizon() -> None:
    history = [event(0), event(MINUTE_MS), event(40 * MINUTE_MS)]
    horizon_ms = MINUTE_MS + 7 * DAY_MS
    assert np.isnan(labels(history, end_ms=horizon_ms - 1)[0][1]), "even when it shows a return"
    assert labels(history, end_ms=horizon_ms)[0][1] == 1
    assert labels(history[:2], end_ms=horizon_ms)[0][1] == 0


def test_log_ends_with_the_newest_event_of_any_user() -> None:
    horizon_ms = MINUTE_MS + 7 * DAY_MS
    for newest_ms, retention in ((horizon_ms - 1, np.nan), (horizon_ms, 0)):
        users = [[event(0), event(MINUTE_MS)], [event(newest_ms, user="v")], []]
        found = compute_log_labels(Histories.from_events(users, SCHEMA), SCHEMA)
        np.testing.assert_array_equal(found[0], [0, retention, 0])
    assert compute_log_labels(Histories.from_events([[]], SCHEMA), SCHEMA).shape == (0, 3)


def test_labels_never_cross_users() -> None:
    rows = labels([event(0)], [event(60 * MINUTE_MS, "purchase", "v"), event(60 * MINUTE_MS + 1, user="v")])
    assert np.isnan(rows[0]).all()
    assert np.isnan(rows[2]).all()
    assert rows[1] == [0, 0, 0]
