"""A believable shop's log of any size, and what could be known of it: `millrace simulate`.

Day by day; within a day all sessions walk at once, a step of numpy each. A user has a mixture of a few topics that
changes, a price level, and an activity that grows with good sessions. A session has an intent, a topic drawn from that
taste, and may resume where the last one ended. The next item is a sequel of the last one, a complement of it (after a
cart or a purchase), or something popular of the intent's topic at the user's price level; what the user had lately is
passed over. What is done with it depends on taste, quality and price.

Truth goes with every event, worked out before it is drawn. It is that of the slate which the user's preceding event
asks for: was the item among the ten likeliest, given the hidden state after that event, and only the chance that the
session is over; the items of the user's last EXCLUDED_EVENTS are excluded, as in serving. With it go the probabilities
of engagement, return and monetization, by the label definitions of pipeline/features/labels.py.
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

WEEK = np.array([0.9, 0.9, 0.95, 1.0, 1.15, 1.2, 0.9])  # activity by day of the week
EXCLUDED_EVENTS = 512  # what serving excludes: the default of sequences.max_events
HOUR_MS = 3_600_000
TOP = 10
MAX_SESSION_EVENTS = 40
USUAL_ENGAGED = 0.3  # share of events: a session above it was a good one
COLUMNS = ("ts_ms", "user", "item", "action", "dwell_ms", "position", "hit", "engaged", "monetized", "returned")
Columns = dict[str, np.ndarray]


class SlatePolicy(Protocol):
    """Where the shop shows slates, and learns what became of them (closed_loop.py)."""

    def slates(self, users: np.ndarray) -> np.ndarray:
        """int [n, k]: the items shown to each of these users, best first, -1 = none."""
        ...

    def record(self, step: Columns) -> None:
        """A step's events, one a user."""
        ...


class Simulator:
    """`chunks()` yields (events, truth) in event-time order, ties by (user id, item id); one seed, one log.

    truth: columns hit (bool), engaged, returned, monetized (float), aligned with the events.
    """

    def __init__(self, config: SimulatorConfig, truth_from: float = 1.0) -> None:
        """truth_from: the share of the events behind which hits are worked out (a dense row of items an event)."""
        self.config, self.world, self._truth_from = config, World.from_config(config), truth_from
        self._rng = np.random.default_rng([config.seed, 3])
        self._users = SimulatedUsers.from_config(config, self._rng)
        self._touched = RecentItems.empty(config.users, EXCLUDED_EVENTS) if truth_from < 1 else None
        self._trend = np.zeros(config.items)  # log popularity
        self._user_ids = [user_id(number) for number in range(config.users)]
        self._item_ids = [item_id(number) for number in range(config.items)]
        self._ranks = _ranks(self._user_ids), _ranks(self._item_ids)

    def items(self) -> list[Item]:
        return self.world.records()

    def fork(self, seed: int) -> "Simulator":
        """The same shop and the same users at the same day, with a future of its own."""
        other = deepcopy(self)
        other._rng = np.random.default_rng([self.config.seed, 4, seed])
        return other

    @property
    def devices(self) -> np.ndarray:  # int [users], of DEVICES
        return self._users.device

    def chunks(self) -> Iterator[tuple[list[Event], Columns]]:
        """A day's events at a time."""
        made, day, held = 0, 0, {name: np.empty(0) for name in COLUMNS}
        while made < self.config.events:
            today = self.day(day, with_hits=made >= self._truth_from * self.config.events)
            columns = {name: np.concatenate([held[name].astype(today[name].dtype), today[name]]) for name in COLUMNS}
            due = columns["ts_ms"] < self.config.start_ms + (day + 1) * DAY_MS
            order = self._in_order(columns, np.flatnonzero(due))[: self.config.events - made]
            held = {name: column[~due] for name, column in columns.items()}
            made, day = made + len(order), day + 1
            chunk = {name: column[order] for name, column in columns.items()}
            yield self._events(chunk), {name: chunk[name] for name in COLUMNS[-4:]}

    def day(self, day: int, with_hits: bool = False, policy: SlatePolicy | None = None) -> Columns:
        """All sessions that begin this day, in no order. With a shelf, users take from its slates by config.follow."""
        config, users = self.config, self._users
        self._drift()
        active = np.flatnonzero(self._rng.random(config.users) < -np.expm1(-users.activity * WEEK[day % 7]))
        walk = _DaySessions(self, active, ChoiceModel(self.world, self._trend, day), day, policy)
        steps = list(walk.steps(with_hits)) or [_no_events()]
        columns = {name: np.concatenate([step[name] for step in steps]) for name in COLUMNS[:-1]}
        users.last[active], users.action[active], users.topic[active] = walk.last, walk.action, walk.topic
        # Good sessions make a user come back sooner, poor ones later.
        satisfied = walk.engaged_events / np.maximum(walk.events, 1)
        users.activity[active] *= np.exp(0.6 * (satisfied - USUAL_ENGAGED))
        np.clip(users.activity, 0.4 * users.usual, 2.5 * users.usual, out=users.activity)
        # Seven days from a moment of this day end within the seventh day after it: half of that one counts.
        ahead = sum(WEEK[(day + offset) % 7] for offset in range(1, 7)) + 0.5 * WEEK[day % 7]
        columns["returned"] = -np.expm1(-users.activity[columns["user"]] * ahead)
        return columns

    def _drift(self) -> None:
        config, dice, users = self.config, self._rng, self._users
        self._trend = 0.98 * self._trend + dice.normal(0, config.drift / np.sqrt(7), config.items)
        who = np.flatnonzero(dice.random(config.users) < config.interest_change_rate)
        place = dice.integers(config.interests, size=len(who))
        old = users.interests[who, place]
        near = (old + config.categories * dice.integers(1, 5, size=len(who))) % config.topics  # of the same category
        new = np.where(dice.random(len(who)) < 0.5, near, distinct_topics(config, dice, len(who))[:, 0])
        known = (users.interests[who] == new[:, None]).any(axis=1)
        users.interests[who, place] = np.where(known, old, new)

    def _in_order(self, columns: Columns, rows: np.ndarray) -> np.ndarray:
        """By time, then by the ids as strings: the order of logfile.in_event_time."""
        ts_ms, users, items = (columns[name][rows] for name in ("ts_ms", "user", "item"))
        return rows[np.lexsort((self._ranks[1][items], self._ranks[0][users], ts_ms))]

    def _events(self, chunk: Columns) -> list[Event]:
        device, price = self._users.device, self.world.price
        users, items = self._user_ids, self._item_ids
        rows = zip(*(chunk[name].tolist() for name in COLUMNS[:6]), strict=True)
        return [
            Event(
                users[user],
                items[item],
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
    """A day's sessions, all at the same step."""

    def __init__(
        self, simulator: Simulator, active: np.ndarray, choices: ChoiceModel, day: int, shelf: SlatePolicy | None
    ) -> None:
        self._sim, self._rng, self._users = simulator, simulator._rng, simulator._users
        self._active, self._choices, self._policy = active, choices, shelf
        n, config = len(active), simulator.config
        hour = np.clip(self._rng.normal(self._users.hour[active], 2.0), 0, 23.99)
        self._ts_ms = config.start_ms + day * DAY_MS + (hour * HOUR_MS).astype(np.int64)
        self._lengths = np.minimum(self._rng.geometric(1 / config.session_events, n), MAX_SESSION_EVENTS)
        users = self._users
        self.last, self.action, self.topic = users.last[active], users.action[active], users.topic[active]
        self.events, self.engaged_events = np.zeros(n), np.zeros(n)

    def steps(self, with_hits: bool) -> Iterator[Columns]:
        rows = np.arange(len(self._active))
        while rows.size:
            likely = self._likeliest(rows) if with_hits else None
            states = self._states(rows, self._users.seen)
            step = self._step(rows, states.after_session(self.events[rows] == 0), likely)
            if self._policy is not None:
                self._policy.record(step)
            yield step
            rows = rows[self.events[rows] < self._lengths[rows]]

    def _states(self, rows: np.ndarray, passed: RecentItems) -> SessionStates:
        """After the last event, be it of this session or of the one before."""
        users, who = self._users, self._active[rows]
        return SessionStates(
            users.level[who], users.interests[who], users.interest_weights[who],
            self.topic[rows], self.last[rows], self.action[rows], passed.items[who],
        )  # fmt: skip

    def _likeliest(self, rows: np.ndarray) -> np.ndarray:
        """int [n, TOP]; a row of no probability at all counts nothing as likely."""
        touched, config = self._sim._touched, self._sim.config
        assert touched is not None, "hits are worked out only behind truth_from"
        # Lengths are geometric: after every event the session is over with the same chance.
        likelihood = self._choices.likelihood(self._states(rows, touched), over=1 / config.session_events)
        best = np.argpartition(-likelihood, TOP, axis=1)[:, :TOP]
        return np.where(np.take_along_axis(likelihood, best, axis=1) > 0, best, -1)

    def _step(self, rows: np.ndarray, states: SessionStates, likely: np.ndarray | None) -> Columns:
        dice, config, world, who = self._rng, self._sim.config, self._sim.world, self._active[rows]
        item, topic = self._next(rows, states)
        bought = (states.action == CART) & (dice.random(len(rows)) < config.checkout_rate)
        item, topic = np.where(bought, states.last, item), np.where(bought, states.topic, topic)
        odds = outcomes(world, states, item)
        action = (dice.random(len(rows))[:, None] > np.cumsum(odds.actions, axis=1)[:, :-1]).sum(axis=1)
        action = np.where(bought, PURCHASE, action)
        dwell_ms = np.exp(dice.normal(odds.dwell_log_ms, DWELL_SIGMA)) * np.where(action == SKIP, 0.1, 1.0)
        gap_ms = 1000 * config.gap_s * np.exp(dice.normal(0, 0.8, len(rows)))
        columns = {
            "ts_ms": self._ts_ms[rows],
            "user": who,
            "item": item,
            "action": action,
            "dwell_ms": dwell_ms.astype(np.int64),
            "position": self.events[rows].astype(np.int64),
            "hit": np.zeros(len(rows), bool) if likely is None else (likely == item[:, None]).any(axis=1),
            "engaged": np.where(bought, 1.0, odds.engaged),
            "monetized": np.where(bought, 1.0, odds.monetized),
        }
        self._users.seen.append(who[~bought], item[~bought])
        if self._sim._touched is not None:
            self._sim._touched.append(who, item)
        self.topic[rows], self.last[rows], self.action[rows] = topic, item, action
        self._ts_ms[rows] += (dwell_ms + gap_ms).astype(np.int64) + 1
        self.events[rows] += 1
        self.engaged_events[rows] += columns["engaged"]
        return columns

    def _next(self, rows: np.ndarray, states: SessionStates) -> tuple[np.ndarray, np.ndarray]:
        """Items and intents: the user's own way, or from the slate, whose item's topic is the intent then."""
        item, topic = self._choices.draw(self._rng, states)
        if self._policy is None:
            return item, topic
        world, config = self._sim.world, self._sim.config
        offered = choose_from_slates(self._rng, world, states, self._policy.slates(self._active[rows]))
        follows = (self._rng.random(len(rows)) < config.slate_take_rate) & (offered >= 0)
        return np.where(follows, offered, item), np.where(follows, world.topic[offered], topic)


def user_id(number: int) -> str:
    return f"user-{number}"


def _no_events() -> Columns:
    kinds = {"hit": bool, "engaged": float, "monetized": float}
    return {name: np.empty(0, kinds.get(name, np.int64)) for name in COLUMNS[:-1]}


def _ranks(ids: list[str]) -> np.ndarray:
    """int [n]: each id's place among the sorted ones."""
    ranks = np.empty(len(ids), np.int64)
    ranks[sorted(range(len(ids)), key=ids.__getitem__)] = np.arange(len(ids))
    return ranks
