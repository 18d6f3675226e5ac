"""The simulated shop, day by day: a realistic log of any size and its ground truth, for `millrace simulate`.

Within a day all sessions advance at once, one step of numpy per event. A user has a mixture of a few topics that
changes, a price level, and an activity that grows with good sessions. A session has an intent, a topic drawn from that
mixture, and may resume where the last one ended. The next item is a sequel of the last one, a complement of it (after a
cart or a purchase), or a popular item of the intent's topic at the user's price level; items that the user has seen
recently are avoided. The user's action depends on interest, quality and price.

Each event carries its ground truth, computed before the event is drawn. It refers to the slate that the user's
preceding event requests: is the item among the ten likeliest, given the hidden state after that event and only the
probability that the session has ended? Items of the user's last EXCLUDED_EVENTS are excluded, as in serving. It also
has the probabilities of engagement, return and monetization, by the label definitions of pipeline/features/labels.py.
"""

from collections.abc import Iterator
from copy import deepcopy
from typing import Protocol

import numpy as np

from pipeline.records import DAY_MS, Event, Item
from pipeline.simulation.choices import (
    ACTIONS,
    CART,
    DWELL_SIGMA,
    PURCHASE,
    SKIP,
    ChoiceModel,
    SessionStates,
    choose_from_slates,
    outcomes,
)
from pipeline.simulation.users import DEVICES, RecentItems, SimulatedUsers, distinct_topics
from pipeline.simulation.world import SimulatorConfig, World, item_id

WEEKDAY_ACTIVITY = np.array([0.9, 0.9, 0.95, 1.0, 1.15, 1.2, 0.9])
EXCLUDED_EVENTS = 512  # what serving excludes: the default of sequences.max_events
HOUR_MS = 3_600_000
HIT_RANKS = 10
MAX_SESSION_EVENTS = 40
USUAL_ENGAGEMENT = 0.3  # fraction of engaged events; a session above it is a good one
COLUMNS = ("ts_ms", "user", "item", "action", "dwell_ms", "position", "hit", "engaged", "monetized", "returned")
TRUTHS = ("engaged", "returned", "monetized")  # columns by labels.TASKS
Columns = dict[str, np.ndarray]


class SlatePolicy(Protocol):
    """Shows slates to the shop's users and observes what they do (closed_loop.py)."""

    def slates(self, users: np.ndarray) -> np.ndarray:
        """Return int [n, k]: the items shown to each of these users, best first, -1 = none."""
        ...

    def record(self, step: Columns) -> None:
        """Observe a step's events, one per user."""
        ...


class Simulator:
    """The shop, advanced day by day. A seed determines the log."""

    def __init__(self, config: SimulatorConfig, truth_from: float = 1.0) -> None:
        """truth_from: fraction of the events after which hits are computed (a dense row of items per event)."""
        self.config = config
        self.world = World.from_config(config)
        self._truth_from = truth_from
        self._rng = np.random.default_rng([config.seed, 3])
        self._users = SimulatedUsers.from_config(config, self._rng)
        self._touched = RecentItems.empty(config.users, EXCLUDED_EVENTS) if truth_from < 1 else None
        self._trend = np.zeros(config.items)  # drift of log popularity
        self._user_ids = [user_id(number) for number in range(config.users)]
        self._item_ids = [item_id(number) for number in range(config.items)]

    def items(self) -> list[Item]:
        return self.world.records()

    def fork(self, seed: int) -> "Simulator":
        """Return the same shop and users at the same day, with a future of their own."""
        other = deepcopy(self)
        other._rng = np.random.default_rng([self.config.seed, 4, seed])
        return other

    @property
    def devices(self) -> np.ndarray:  # int [users], index into DEVICES
        return self._users.device

    def chunks(self) -> Iterator[tuple[list[Event], Columns]]:
        """Yield (events, truth), about a day's at a time, in event-time order, ties in the order drawn.

        truth: columns hit (bool), engaged, monetized, returned (float), aligned with the events
        """
        count = 0
        day = 0
        later = {name: np.empty(0) for name in COLUMNS}  # events of earlier days' sessions after midnight
        while count < self.config.events:
            today = self.day(day, with_hits=count >= self._truth_from * self.config.events)
            columns = {name: np.concatenate([later[name].astype(today[name].dtype), today[name]]) for name in COLUMNS}
            is_due = columns["ts_ms"] < self.config.start_ms + (day + 1) * DAY_MS
            due = np.flatnonzero(is_due)
            order = due[np.argsort(columns["ts_ms"][due], kind="stable")][: self.config.events - count]
            later = {name: column[~is_due] for name, column in columns.items()}
            count += len(order)
            day += 1
            chunk = {name: column[order] for name, column in columns.items()}
            yield self._events(chunk), {name: chunk[name] for name in COLUMNS[-4:]}

    def day(self, day: int, with_hits: bool = False, policy: SlatePolicy | None = None) -> Columns:
        """Return the events of all sessions that begin this day, unordered.

        With a policy, users take events from its slates at the rate `slate_take_rate`.
        """
        config = self.config
        users = self._users
        self._drift()
        active = np.flatnonzero(self._rng.random(config.users) < -np.expm1(-users.activity * WEEKDAY_ACTIVITY[day % 7]))
        sessions = _DaySessions(self, active, ChoiceModel(self.world, self._trend, day), day, policy)
        steps = list(sessions.steps(with_hits)) or [_no_events()]
        columns = {name: np.concatenate([step[name] for step in steps]) for name in COLUMNS[:-1]}
        users.last_item[active] = sessions.last_item
        users.last_action[active] = sessions.last_action
        users.intent[active] = sessions.intent
        # Good sessions make a user come back sooner, poor ones later.
        engagement = sessions.engaged_events / np.maximum(sessions.events, 1)
        users.activity[active] *= np.exp(0.6 * (engagement - USUAL_ENGAGEMENT))
        np.clip(users.activity, 0.4 * users.usual_activity, 2.5 * users.usual_activity, out=users.activity)
        # Seven days from a moment of this day end within the seventh day after it: half of that one counts.
        ahead = sum(WEEKDAY_ACTIVITY[(day + offset) % 7] for offset in range(1, 7)) + 0.5 * WEEKDAY_ACTIVITY[day % 7]
        columns["returned"] = -np.expm1(-users.activity[columns["user"]] * ahead)
        return columns

    def _drift(self) -> None:
        """Change popularity and replace some users' interests, as of one more day."""
        config = self.config
        rng = self._rng
        interests = self._users.interests
        self._trend = 0.98 * self._trend + rng.normal(0, config.drift / np.sqrt(7), config.items)
        users = np.flatnonzero(rng.random(config.users) < config.interest_change_rate)
        column = rng.integers(config.interests, size=len(users))
        old = interests[users, column]
        same_category = (old + config.categories * rng.integers(1, 5, size=len(users))) % config.topics
        new = np.where(rng.random(len(users)) < 0.5, same_category, distinct_topics(config, rng, len(users))[:, 0])
        is_present = (interests[users] == new[:, None]).any(axis=1)
        interests[users, column] = np.where(is_present, old, new)

    def _events(self, chunk: Columns) -> list[Event]:
        device = self._users.device
        price = self.world.price
        rows = zip(*(chunk[name].tolist() for name in COLUMNS[:6]), strict=True)
        return [
            Event(
                self._user_ids[user],
                self._item_ids[item],
                ACTIONS[action],
                ts_ms,
                float(price[item]) if action in (CART, PURCHASE) else None,
                dwell_ms,
                device=DEVICES[device[user]],
                position=position,
            )
            for ts_ms, user, item, action, dwell_ms, position in rows
        ]


class _DaySessions:
    """All sessions that begin on one day, advanced step by step."""

    def __init__(
        self, simulator: Simulator, active: np.ndarray, choices: ChoiceModel, day: int, policy: SlatePolicy | None
    ) -> None:
        """active: int [n], the users who have a session."""
        n = len(active)
        config = simulator.config
        users = simulator._users
        self._sim = simulator
        self._rng = simulator._rng
        self._users = users
        self._active = active
        self._choices = choices
        self._policy = policy
        hour = np.clip(self._rng.normal(users.hour[active], 2.0), 0, 23.99)
        self._ts_ms = config.start_ms + day * DAY_MS + (hour * HOUR_MS).astype(np.int64)
        self._lengths = np.minimum(self._rng.geometric(1 / config.session_events, n), MAX_SESSION_EVENTS)
        self.last_item = users.last_item[active]
        self.last_action = users.last_action[active]
        self.intent = users.intent[active]
        self.events = np.zeros(n)
        self.engaged_events = np.zeros(n)

    def steps(self, with_hits: bool) -> Iterator[Columns]:
        """Yield one event of each unfinished session at a time."""
        rows = np.arange(len(self._active))
        while rows.size:
            likely = self._likeliest(rows) if with_hits else None
            states = self._states(rows, self._users.seen)
            step = self._step(rows, states.after_session(self.events[rows] == 0), likely)
            if self._policy is not None:
                self._policy.record(step)
            yield step
            rows = rows[self.events[rows] < self._lengths[rows]]

    def _states(self, rows: np.ndarray, seen: RecentItems) -> SessionStates:
        """Return the states after the last event, of this session or of the one before."""
        users = self._active[rows]
        return SessionStates(
            price_level=self._users.price_level[users],
            interests=self._users.interests[users],
            interest_weights=self._users.interest_weights[users],
            intent=self.intent[rows],
            last_item=self.last_item[rows],
            last_action=self.last_action[rows],
            seen=seen.items[users],
        )

    def _likeliest(self, rows: np.ndarray) -> np.ndarray:
        """Return int [n, HIT_RANKS], the likeliest items, -1 for those of probability zero."""
        touched = self._sim._touched
        assert touched is not None, "hits are computed only after truth_from"
        # Lengths are geometric: after every event the session ends with the same probability.
        end_probability = 1 / self._sim.config.session_events
        likelihood = self._choices.likelihood(self._states(rows, touched), end_probability)
        best = np.argpartition(-likelihood, HIT_RANKS, axis=1)[:, :HIT_RANKS]
        return np.where(np.take_along_axis(likelihood, best, axis=1) > 0, best, -1)

    def _step(self, rows: np.ndarray, states: SessionStates, likely: np.ndarray | None) -> Columns:
        rng = self._rng
        config = self._sim.config
        users = self._active[rows]
        item, intent = self._next(rows, states)
        is_checkout = (states.last_action == CART) & (rng.random(len(rows)) < config.checkout_rate)
        item = np.where(is_checkout, states.last_item, item)
        intent = np.where(is_checkout, states.intent, intent)
        outcome = outcomes(self._sim.world, states, item)
        action = (rng.random(len(rows))[:, None] > np.cumsum(outcome.actions, axis=1)[:, :-1]).sum(axis=1)
        action = np.where(is_checkout, PURCHASE, action)
        dwell_ms = np.exp(rng.normal(outcome.dwell_log_ms, DWELL_SIGMA)) * np.where(action == SKIP, 0.1, 1.0)
        gap_ms = 1000 * config.gap_s * np.exp(rng.normal(0, 0.8, len(rows)))
        columns = {
            "ts_ms": self._ts_ms[rows],
            "user": users,
            "item": item,
            "action": action,
            "dwell_ms": dwell_ms.astype(np.int64),
            "position": self.events[rows].astype(np.int64),
            "hit": np.zeros(len(rows), bool) if likely is None else (likely == item[:, None]).any(axis=1),
            "engaged": np.where(is_checkout, 1.0, outcome.engaged),
            "monetized": np.where(is_checkout, 1.0, outcome.monetized),
        }
        self._users.seen.append(users[~is_checkout], item[~is_checkout])
        if self._sim._touched is not None:
            self._sim._touched.append(users, item)
        self.intent[rows] = intent
        self.last_item[rows] = item
        self.last_action[rows] = action
        self._ts_ms[rows] += (dwell_ms + gap_ms).astype(np.int64) + 1
        self.events[rows] += 1
        self.engaged_events[rows] += columns["engaged"]
        return columns

    def _next(self, rows: np.ndarray, states: SessionStates) -> tuple[np.ndarray, np.ndarray]:
        """Return items and intents: the user's own choice, or an item of the slate, whose topic becomes the intent."""
        item, intent = self._choices.sample(self._rng, states)
        if self._policy is None:
            return item, intent
        world = self._sim.world
        offered = choose_from_slates(self._rng, world, states, self._policy.slates(self._active[rows]))
        takes = (self._rng.random(len(rows)) < self._sim.config.slate_take_rate) & (offered >= 0)
        return np.where(takes, offered, item), np.where(takes, world.topic[offered], intent)


def user_id(number: int) -> str:
    return f"user-{number}"


def _no_events() -> Columns:
    dtypes = {"hit": bool, "engaged": float, "monetized": float}
    return {name: np.empty(0, dtypes.get(name, np.int64)) for name in COLUMNS[:-1]}
