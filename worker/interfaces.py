"""The seams between the rooms of the worker: the data that crosses them and the contracts of those who pass it.

One event's way through these types:
    Record ─ codec ─► Arrival (event + ticket) ─ Store.push ─► Arrival with its ring ─ batcher ─► Entry, Batch
    ─ Ranker ─► Slate ─ Sink.send ─ ledger.done(tickets)
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from pipeline.records import Event, Slate


class Partition(NamedTuple):
    topic: str
    partition: int


class Ticket(NamedTuple):
    """One record's claim in the ledger. `epoch` counts assignments: a ticket of an older one settles nothing."""

    partition: Partition
    epoch: int
    offset: int


class Record(Protocol):
    """What a source yields (aiokafka's ConsumerRecord, which is frozen, fits)."""

    @property
    def offset(self) -> int: ...

    @property
    def key(self) -> bytes | None: ...

    @property
    def value(self) -> bytes | None: ...

    @property
    def headers(self) -> Sequence[tuple[str, bytes]]: ...

    @property
    def timestamp(self) -> int: ...  # ms


@dataclass(slots=True)
class Fetched:
    """One partition's share of a poll, in offset order."""

    partition: Partition
    epoch: int
    end_offset: int  # the partition's high watermark at the poll: one beyond the last record in it
    polled_ms: int  # Clock.now_ms() when the poll returned
    polled_s: float  # Clock.monotonic() then, for latencies
    records: Sequence[Record]


@dataclass(slots=True)
class Arrival:
    """One decoded event on its way. `ring` is set by Store.push: the user's events, oldest first, 24 bytes each."""

    event: Event
    packed: bytes  # the event's 24 ring bytes
    ticket: Ticket
    end_offset: int
    polled_ms: int
    polled_s: float
    trigger: bool = True  # asks for a slate
    strategy: str | None = None  # the rung asked for by the record's header
    k: int | None = None  # the slate length asked for
    fresh: bool = True  # False: the ring had it already (a replay)
    ring: bytes = b""


@dataclass(slots=True)
class DeadLetter:
    """A record that cannot become an event. It keeps everything needed to requeue it."""

    ticket: Ticket
    key: bytes | None
    value: bytes | None
    headers: Sequence[tuple[str, bytes]]
    timestamp: int
    reason: str  # one clear sentence


@dataclass(slots=True)
class Entry:
    """A user's place in the batcher: all of its triggering events that the next slate answers."""

    user_id: str
    arrivals: list[Arrival]
    deadline_ms: int
    order: int  # of admission: breaks ties of the deadline
    taken: bool = False  # in a batch: later events of the user make a new entry

    @property
    def ring(self) -> bytes:
        return self.arrivals[-1].ring

    @property
    def tickets(self) -> Iterable[Ticket]:
        return (arrival.ticket for arrival in self.arrivals)


@dataclass(slots=True)
class Batch:
    """Entries of distinct users, ranked together."""

    entries: list[Entry]
    bucket: int  # no ring in the batch is longer (events)
    strategy: str | None = None
    opened_s: float = 0.0
    tickets: list[Ticket] = field(default_factory=list)


class Clock(Protocol):
    """Time is passed in: the wall's, or a log's virtual one."""

    def now_ms(self) -> int: ...

    def monotonic(self) -> float: ...


class Rebalance(Protocol):
    """Told by the source, in the source's task, before it goes on. `revoked` may await the drain."""

    async def assigned(self, partitions: Mapping[Partition, int]) -> None:
        """The partitions now owned, with their epochs; polling of them starts after this returns."""
        ...

    async def revoked(self, partitions: Iterable[Partition]) -> None:
        """These partitions go away: settle what can be settled within `drain_s`, commit, then forget them."""
        ...


class Source(Protocol):
    """Where records come from. One task calls poll; commit, pause and resume may come from others."""

    async def start(self, rebalance: Rebalance) -> None:
        """Join the group or open the log. SourceError / SourceUnavailable after `start_timeout_s`."""
        ...

    async def poll(self, timeout_s: float) -> list[Fetched]:
        """What has come, at most `max_poll_records`, after at most `timeout_s`. Must be called while paused, too."""
        ...

    def pause(self) -> None: ...

    def resume(self) -> None: ...

    async def commit(self, frontiers: Mapping[Partition, int], epochs: Mapping[Partition, int]) -> None:
        """Commit next offsets, but none of a partition whose epoch has passed. A rebalance is no error."""
        ...

    def lag(self) -> Mapping[Partition, int]:
        """Records beyond the last polled one, by owned partition."""
        ...

    @property
    def exhausted(self) -> bool:
        """A recorded log at its end; a topic never is."""
        ...

    async def stop(self) -> None: ...


class Store(Protocol):
    """The users' rings."""

    async def push(self, arrivals: Sequence[Arrival]) -> None:
        """Append the events to their users' rings (one round trip), and set `ring` and `fresh` of every arrival.

        Each event is guarded by its source's last offset, so pushing again changes nothing. `ring` holds the user's
        events up to and including the arrival, not those pushed after it in the same call; of an arrival that is not
        `fresh` it holds at least those.
        Raises StoreUnavailable (retry with the same arguments), TopicRecreated, StoreError.
        """
        ...

    def forget(self, partition: Partition) -> None:
        """The partition is no longer owned: what is cached of it may be outdated from now on."""
        ...


class Ranking(Protocol):
    """From batches to slates; the pipeline behind it runs in a thread of its own."""

    async def rank(self, batch: Batch) -> list[Slate]:
        """One slate an entry, in the batch's order, by the best rung that can answer."""
        ...

    async def observe(self, arrivals: Sequence[Arrival]) -> None:
        """Count the events that are new to their rings; batches that are ranked later see them."""
        ...


class Sink(Protocol):
    """Where slates and dead letters go."""

    async def send(self, slates: Sequence[Slate]) -> None:
        """Returns when Kafka has acknowledged all of them and Redis holds them as `rec:{u:<user>}`.

        Raises SinkUnavailable (send all again: `covers` lets a reader drop the repetition), SinkError.
        """
        ...

    async def bury(self, letters: Sequence[DeadLetter]) -> None:
        """Returns when the dead-letter topic has acknowledged all of them. Same errors."""
        ...
