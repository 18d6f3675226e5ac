"""The closed loop: the simulated shop's users react to the slates that a model shows them.

    simulator = Simulator(config)
    log, truth = warm_up(simulator, days=60)   # without slates: the log that trains a model
    ...
    metrics = run(simulator, 60, 14, PolicyUnderTest(simulator, strategy, vocabulary, log))

At every step of a session the user takes an item of the slate at the rate `slate_take_rate`, else makes their own
choice; the item taken enters their history and changes the next slate. Good sessions bring users back sooner.
"""

import msgspec
import numpy as np

from pipeline.data.event_log import EventLog
from pipeline.features.labels import LabelOptions
from pipeline.items.vocabulary import UNKNOWN, Vocabulary
from pipeline.jagged import ranges
from pipeline.records import EVENT_DTYPE, EventSchema, Histories, encode_value, item_hash, pack_columns
from pipeline.simulation.choices import ACTIONS, CART, LIKE, PURCHASE
from pipeline.simulation.simulator import EXCLUDED_EVENTS, TRUTHS, Columns, Simulator, user_id
from pipeline.simulation.users import DEVICES
from pipeline.simulation.world import item_id
from pipeline.strategies.strategy import Strategy, rank

RETURN_DAYS = 7


class ClosedLoopMetrics(msgspec.Struct, frozen=True):
    """Metrics over some days.

    engaged_share: fraction of engaged events; money: paid for all purchases
    returned_share: fraction of (user, day) pairs with a session that are followed by another session within
    RETURN_DAYS, over the days with at least RETURN_DAYS days after them; None without such days
    """

    events: int
    sessions: int
    engaged_share: float
    purchases: int
    money: float
    returned_share: float | None


class ColumnPacker:
    """A simulator's columns as EVENT_DTYPE, what rings and logs hold."""

    def __init__(self, simulator: Simulator, schema: EventSchema) -> None:
        actions = schema.action_codes()
        devices = schema.device_codes()
        self._actions = np.array([actions[name] for name in ACTIONS], np.uint64)
        self._devices = np.array([devices[name] for name in DEVICES], np.uint64)[simulator.devices]
        self.hashes = np.array([item_hash(item_id(number)) for number in range(simulator.config.items)], np.uint64)
        self._values = np.array([encode_value(price) for price in simulator.world.price.tolist()], np.uint16)

    def pack(self, columns: Columns) -> np.ndarray:
        """Return EVENT_DTYPE [n]; carts and purchases have the item's price as value."""
        return pack_columns(
            items=self.hashes[columns["item"]],
            ts_ms=columns["ts_ms"].astype(np.uint64),
            actions=self._actions[columns["action"]],
            devices=self._devices[columns["user"]],
            dwell_ms=columns["dwell_ms"],
            positions=columns["position"],
            value_codes=np.where(np.isin(columns["action"], (CART, PURCHASE)), self._values[columns["item"]], 0),
        )


class PolicyUnderTest:
    """A serving strategy as the simulator's slate policy; it sees the users' histories and nothing else."""

    def __init__(
        self, simulator: Simulator, strategy: Strategy, vocabulary: Vocabulary, log: EventLog, k: int = 10
    ) -> None:
        """log: the events so far, as returned by `warm_up`."""
        self._strategy = strategy
        self._k = k
        self._packer = ColumnPacker(simulator, EventSchema())
        self._numbers = np.full(len(vocabulary), -1)  # the simulator's item numbers, by token
        self._numbers[vocabulary.tokens(self._packer.hashes)] = np.arange(simulator.config.items)
        self._numbers[UNKNOWN] = -1
        users = simulator.config.users
        self._rings = np.zeros((users, EXCLUDED_EVENTS), EVENT_DTYPE)
        self._counts = np.zeros(users, np.int64)
        self._append(_parse_numbers(log.user_ids)[log.users], log.events)

    def slates(self, users: np.ndarray) -> np.ndarray:
        """See SlatePolicy."""
        size = self._rings.shape[1]
        lengths = np.minimum(self._counts[users], size)
        index, offsets = ranges(self._counts[users] - lengths, lengths)
        events = self._rings[np.repeat(users, lengths), index % size]
        rings = [ring.tobytes() for ring in np.split(events, offsets[1:-1])]
        return self._numbers[rank(self._strategy, Histories.from_rings(rings), self._k).tokens]

    def record(self, step: Columns) -> None:
        """See SlatePolicy."""
        self._append(step["user"], self._packer.pack(step))

    def _append(self, users: np.ndarray, events: np.ndarray) -> None:
        """Append events, in time order, to their users' rings; a user may have several."""
        order = np.argsort(users, kind="stable")
        starts = np.flatnonzero(np.diff(users[order], prepend=-1))
        counts = np.diff(np.append(starts, len(order)))
        positions, _ = ranges(self._counts[users[order[starts]]], counts)
        self._rings[users[order], positions % self._rings.shape[1]] = events[order]
        self._counts += np.bincount(users, minlength=len(self._counts))


def warm_up(simulator: Simulator, days: int) -> tuple[EventLog, Columns]:
    """Return the log of the shop's first days, without slates, and its truth (see Simulator), aligned."""
    columns = _concatenate([simulator.day(day) for day in range(days)])
    user_ids = sorted(user_id(number) for number in range(simulator.config.users))
    item_ids = sorted(item_id(number) for number in range(simulator.config.items))
    user_index = np.argsort(_parse_numbers(user_ids))  # index of a number's id in user_ids
    item_index = np.argsort(_parse_numbers(item_ids))
    users = user_index[columns["user"]].astype(np.int32)
    items = item_index[columns["item"]].astype(np.int32)
    order = np.argsort(columns["ts_ms"], kind="stable")
    events = ColumnPacker(simulator, EventSchema()).pack(columns)
    log = EventLog(user_ids, users[order], item_ids, items[order], events[order])
    return log, {name: columns[name][order] for name in TRUTHS}


def run(simulator: Simulator, first_day: int, days: int, policy: PolicyUnderTest | None) -> ClosedLoopMetrics:
    """Simulate more days, with slates or (None) without, and measure them. Advances the simulator and the policy."""
    columns_by_day = [simulator.day(first_day + day, policy=policy) for day in range(days)]
    has_session = np.zeros((simulator.config.users, days), bool)
    for day, columns in enumerate(columns_by_day):
        has_session[columns["user"], day] = True
    columns = _concatenate(columns_by_day)
    is_purchase = columns["action"] == PURCHASE
    is_long = columns["dwell_ms"] >= LabelOptions().engaged_dwell_ms
    is_engaged = np.isin(columns["action"], (LIKE, CART, PURCHASE)) | is_long
    return ClosedLoopMetrics(
        events=len(is_purchase),
        sessions=int(has_session.sum()),
        engaged_share=float(is_engaged.mean()),
        purchases=int(is_purchase.sum()),
        money=float(simulator.world.price[columns["item"][is_purchase]].sum()),
        returned_share=_return_rate(has_session),
    )


def _return_rate(has_session: np.ndarray) -> float | None:
    """See ClosedLoopMetrics.returned_share. has_session: bool [users, days]"""
    days = has_session.shape[1] - RETURN_DAYS
    if days <= 0:
        return None
    returns = np.stack([has_session[:, day + 1 : day + 1 + RETURN_DAYS].any(axis=1) for day in range(days)], axis=1)
    has_session = has_session[:, :days]
    return float(returns[has_session].mean()) if has_session.any() else None


def _concatenate(parts: list[Columns]) -> Columns:
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _parse_numbers(ids: list[str]) -> np.ndarray:
    """Return int64: the numbers in the simulator's ids."""
    return np.array([int(text.rpartition("-")[2]) for text in ids])
