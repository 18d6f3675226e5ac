"""The closed loop: the simulated shop's users react to the slates that a model shows them.

    simulator = Simulator(config)
    log, truth = warm_up(simulator, days=60)   # nobody is shown anything: the log that trains a model
    ...
    reaction = run(simulator, 60, 14, Showcase(simulator, rung, vocabulary, log))

At every step of a session the user takes from the slate with the configuration's chance `follow`, else goes their own
way; what is taken is written to their history and changes the next slate. Good sessions bring users back sooner.
"""

import msgspec
import numpy as np

from pipeline.data.event_log import EventLog
from pipeline.features.labels import LONG_DWELL_MS
from pipeline.items.vocabulary import UNKNOWN, Vocabulary
from pipeline.jagged import ranges
from pipeline.records import EVENT_DTYPE, EventSchema, Histories, encode_value, item_hash, pack_columns
from pipeline.serving.strategy import Strategy
from pipeline.simulation.choices import ACTIONS, CART, LIKE, PURCHASE
from pipeline.simulation.simulator import EXCLUDED_EVENTS, Columns, Simulator, user_id
from pipeline.simulation.users import DEVICES
from pipeline.simulation.world import item_id

RETURN_DAYS = 7
TRUTHS = ("engaged", "returned", "monetized")  # by labels.TASKS


class ClosedLoopMetrics(msgspec.Struct, frozen=True):
    """What came of some days. `money`: paid for all purchases; `returned_share`: of a user's days with a session those
    that another one followed within RETURN_DAYS, counted where the days show so many; None: they never do."""

    events: int
    sessions: int
    engaged_share: float
    purchases: int
    money: float
    returned_share: float | None


class ColumnPacker:
    """A simulator's columns as EVENT_DTYPE, what rings and logs hold."""

    def __init__(self, simulator: Simulator, schema: EventSchema) -> None:
        actions, devices = schema.action_codes(), schema.device_codes()
        self._actions = np.array([actions[name] for name in ACTIONS], np.uint64)
        self._devices = np.array([devices[name] for name in DEVICES], np.uint64)[simulator.devices]
        self.hashes = np.array([item_hash(item_id(number)) for number in range(simulator.config.items)], np.uint64)
        self._values = np.array([encode_value(price) for price in simulator.world.price.tolist()], np.uint16)

    def pack(self, columns: Columns) -> np.ndarray:
        """EVENT_DTYPE [n]; money goes with carts and purchases."""
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
    """A rung as the simulator's shelf: it sees every user's history and nothing else."""

    def __init__(
        self, simulator: Simulator, strategy: Strategy, vocabulary: Vocabulary, log: EventLog, k: int = 10
    ) -> None:
        """log: what happened before, as `warm_up` left it."""
        self._rung, self._k = strategy, k
        self._packer = ColumnPacker(simulator, EventSchema())
        self._numbers = np.full(len(vocabulary), -1)  # of the items, by token
        self._numbers[vocabulary.tokens(self._packer.hashes)] = np.arange(simulator.config.items)
        self._numbers[UNKNOWN] = -1
        users = simulator.config.users
        self._rings = np.zeros((users, EXCLUDED_EVENTS), EVENT_DTYPE)
        self._counts = np.zeros(users, np.int64)
        self._remember(_numbers_of(log.user_ids)[log.users], log.events)

    def slates(self, users: np.ndarray) -> np.ndarray:
        size = self._rings.shape[1]
        lengths = np.minimum(self._counts[users], size)
        index, offsets = ranges(self._counts[users] - lengths, lengths)
        events = self._rings[np.repeat(users, lengths), index % size]
        rings = [part.tobytes() for part in np.split(events, offsets[1:-1])]
        return self._numbers[self._rung.rank(Histories.from_rings(rings), self._k).tokens]

    def record(self, step: Columns) -> None:
        self._remember(step["user"], self._packer.pack(step))

    def _remember(self, users: np.ndarray, events: np.ndarray) -> None:
        """events: in time order; a user may have several."""
        order = np.argsort(users, kind="stable")
        starts = np.flatnonzero(np.diff(users[order], prepend=-1))
        counts = np.diff(np.append(starts, len(order)))
        places, _ = ranges(self._counts[users[order[starts]]], counts)
        self._rings[users[order], places % self._rings.shape[1]] = events[order]
        self._counts += np.bincount(users, minlength=len(self._counts))


def warm_up(simulator: Simulator, days: int) -> tuple[EventLog, Columns]:
    """The log of the shop's first days, without slates, and its truth (see Simulator), aligned."""
    columns = _joined([simulator.day(day) for day in range(days)])
    user_ids = sorted(user_id(number) for number in range(simulator.config.users))
    item_ids = sorted(item_id(number) for number in range(simulator.config.items))
    users, items = np.argsort(_numbers_of(user_ids)), np.argsort(_numbers_of(item_ids))  # an id's place, by number
    users, items = users[columns["user"]].astype(np.int32), items[columns["item"]].astype(np.int32)
    order = np.lexsort((items, users, columns["ts_ms"]))
    events = ColumnPacker(simulator, EventSchema()).pack(columns)
    log = EventLog(user_ids, users[order], item_ids, items[order], events[order])
    return log, {name: columns[name][order] for name in TRUTHS}


def run(simulator: Simulator, first_day: int, days: int, policy: PolicyUnderTest | None) -> ClosedLoopMetrics:
    """These days with slates; None: without. The simulator and the showcase go on from where they are."""
    parts = [simulator.day(first_day + day, policy=policy) for day in range(days)]
    came = np.zeros((simulator.config.users, days), bool)
    for day, part in enumerate(parts):
        came[part["user"], day] = True
    columns = _joined(parts)
    bought = columns["action"] == PURCHASE
    engaged = np.isin(columns["action"], (LIKE, CART, PURCHASE)) | (columns["dwell_ms"] >= LONG_DWELL_MS)
    return ClosedLoopMetrics(
        events=len(bought),
        sessions=int(came.sum()),
        engaged_share=float(engaged.mean()),
        purchases=int(bought.sum()),
        money=float(simulator.world.price[columns["item"][bought]].sum()),
        returned_share=_returned_share(came),
    )


def _returned_share(came: np.ndarray) -> float | None:
    """came: bool [users, days]"""
    if came.shape[1] <= RETURN_DAYS:
        return None
    later = [came[:, day + 1 : day + 1 + RETURN_DAYS].any(axis=1) for day in range(came.shape[1] - RETURN_DAYS)]
    asked = came[:, : len(later)]
    return float(np.stack(later, axis=1)[asked].mean()) if asked.any() else None


def _joined(parts: list[Columns]) -> Columns:
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _numbers_of(ids: list[str]) -> np.ndarray:
    """int64: the numbers within the simulator's ids."""
    return np.array([int(one.rpartition("-")[2]) for one in ids])
