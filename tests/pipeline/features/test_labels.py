"""Labels of the next event, and of the return after it."""

import numpy as np
import pytest

from pipeline.features.labels import LabelOptions, LabelRules, compute_labels, compute_log_labels
from pipeline.records import DAY_MS, Event, EventSchema, Histories

SCHEMA = EventSchema()
RULES = LabelRules.from_options(SCHEMA)
MINUTE_MS = 60_000


def labels(*users: list[Event], end_ms: int = 1 << 45) -> list[list[float]]:
    return compute_labels(Histories.from_events(users, SCHEMA), RULES, end_ms).tolist()


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
        found = compute_log_labels(Histories.from_events(users, SCHEMA), RULES)
        np.testing.assert_array_equal(found[0], [0, retention, 0])
    assert compute_log_labels(Histories.from_events([[]], SCHEMA), RULES).shape == (0, 3)


def test_labels_never_cross_users() -> None:
    rows = labels([event(0)], [event(60 * MINUTE_MS, "purchase", "v"), event(60 * MINUTE_MS + 1, user="v")])
    assert np.isnan(rows[0]).all()
    assert np.isnan(rows[2]).all()
    assert rows[1] == [0, 0, 0]


TEN_POINTS = LabelOptions(
    engaged_actions=("share",),
    valued_actions=("rate", "click"),
    engaged_value=8.0,
    engaged_dwell_ms=150,
    paid_actions=("like",),
    retention_days=1.0,
)


@pytest.mark.parametrize(
    ("following", "expected"),
    [
        (event(2, "like"), [0, 1]),
        (event(2, "share"), [1, 0]),
        (event(2, "cart"), [0, 0]),
        (event(2, "rate", value=7.9), [0, 0]),
        (event(2, "rate", value=8.0), [1, 0]),
        (event(2, "click", value=9.0), [1, 0]),
        (event(2, "view", value=9.0), [0, 0]),
        (event(2, "view", dwell_ms=149), [0, 0]),
        (event(2, "view", dwell_ms=250), [1, 0]),
    ],
)
def test_labels_follow_their_options(following: Event, expected: list[int]) -> None:
    rules = LabelRules.from_options(SCHEMA, TEN_POINTS)
    found = compute_labels(Histories.from_events([[event(1), following]], SCHEMA), rules, 1 << 45)
    assert found[0, [0, 2]].tolist() == expected


def test_retention_window_is_an_option() -> None:
    history = Histories.from_events([[event(0), event(1), event(1 + 2 * DAY_MS)]], SCHEMA)
    for days, returned in ((1.0, 0.0), (2.0, 1.0)):
        rules = LabelRules.from_options(SCHEMA, LabelOptions(retention_days=days))
        assert compute_labels(history, rules, 1 << 45)[0, 1] == returned


def test_dwell_of_zero_does_not_count_and_absent_actions_are_ignored() -> None:
    schema = EventSchema(actions=("view", "watch"))
    rules = LabelRules.from_options(schema, LabelOptions(engaged_actions=("watch", "like"), engaged_dwell_ms=0))
    history = [event(0), event(1, dwell_ms=10**9), event(2, "watch"), event(3)]
    found = compute_labels(Histories.from_events([history], schema), rules, 1 << 45)
    assert found[:3, 0].tolist() == [0, 1, 0]


def test_event_of_the_far_future_does_not_make_unknown_returns_known() -> None:
    """All users are seen once a day; without the wrong time the last week's returns are unknown."""
    users = [[event(day * DAY_MS + user) for day in range(20)] for user in range(10)]
    honest = compute_log_labels(Histories.from_events(users, SCHEMA), RULES)
    wrong = [*users, [event(0), event(20 * 365 * DAY_MS)]]
    found = compute_log_labels(Histories.from_events(wrong, SCHEMA), RULES)
    assert np.array_equal(found[: len(honest)], honest, equal_nan=True)
    assert np.isnan(honest[:, 1]).any()
