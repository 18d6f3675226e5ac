"""Data passed between the worker's folders, and the protocols of its components.

One event's path through these types:
    Record ─ codec ─► ConsumedEvent (event + offset) ─ Store.push ─► the same with its ring ─ batcher ─► Entry, Batch
    ─ Ranker ─► Slate ─ Sink.send ─ tracker.complete(record offsets)
The garbage collector does not track the structs (gc=False): they hold no cycles.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from msgspec import Struct

from pipeline.records import Event
from pipeline.slates import Slate


class Partition(NamedTuple):
    topic: str
    partition: int


class RecordOffset(NamedTuple):
    """A record's position. `assignment` numbers the partition's assignments: an offset of an older one is void."""

    partition: Partition
    assignment: int
    offset: int


class Record(Protocol):
    """A record as a source yields it; aiokafka's ConsumerRecord, which is frozen, fits."""

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
class PolledRecords:
    """One partition's records of a poll, in offset order."""

    partition: Partition
    assignment: int
    end_offset: int  # the partition's high watermark at the poll: one past its last record
    polled_ms: int  # Clock.now_ms() when the poll returned
    polled_s: float  # Clock.monotonic() then, for latencies
    records: Sequence[Record]


class ConsumedEvent(Struct, gc=False):
    """One decoded event. It copies three values of its poll, so that the poll's raw records can be freed."""

    event: Event  # without context, session and device
    packed: bytes  # the event's 24 ring bytes
    record_offset: RecordOffset
    end_offset: int
    polled_ms: int
    polled_s: float
    trigger: bool = True  # requests a slate
    strategy: str | None = None  # requested by the record's header
    k: int | None = None  # slate length requested by the record's header
    ring_offset: int | None = None  # while Store.push fails: its partition's last offset in the ring before that
    is_new: bool = True  # set by Store.push; False: the ring had it before the first attempt (a replay)
    # set by Store.push: the user's events, oldest first, 24 bytes each; dropped where a later event of its entry has it
    ring: bytes = b""


class DeadLetter(Struct, gc=False):
    """A record that cannot become an event, with everything needed to requeue it."""

    record_offset: RecordOffset
    key: bytes | None
    value: bytes | None
    headers: Sequence[tuple[str, bytes]]
    timestamp: int
    reason: str  # one clear sentence


class Entry(Struct, gc=False):
    """A user's place in the batcher: all of the user's triggering events that the next slate answers."""

    user_id: str
    events: list[ConsumedEvent]
    deadline_ms: int
    order: int  # of admission: breaks ties of the deadline
    is_taken: bool = False  # in a batch: later events of the user make a new entry

    @property
    def ring(self) -> bytes:
        return self.events[-1].ring

    @property
    def partition(self) -> Partition:
        return self.events[0].record_offset.partition


@dataclass(slots=True)
class Batch:
    """Entries of distinct users, ranked together."""

    entries: list[Entry]
    bucket: int  # events: the length bucket of its longest ring; the last bucket has no upper limit
    strategy: str | None = None
    opened_s: float = 0.0

    @property
    def deadline_ms(self) -> int:
        """When the first of its slates is due, by Clock.now_ms."""
        return min(entry.deadline_ms for entry in self.entries)

    @property
    def record_offsets(self) -> Iterable[RecordOffset]:
        return (event.record_offset for entry in self.entries for event in entry.events)


OnDelivered = Callable[[Batch, Sequence[Slate]], None]


class Clock(Protocol):
    """The source of time: the machine's clocks, or a log's virtual time."""

    def now_ms(self) -> int: ...

    def monotonic(self) -> float: ...


class RebalanceListener(Protocol):
    """Called by the source, in the source's task, which waits for it. `revoked` may await the drain."""

    async def assigned(self, partitions: Mapping[Partition, int]) -> None:
        """Take over the partitions, given with their assignments; polling of them starts after this returns."""
        ...

    async def revoked(self, partitions: Iterable[Partition]) -> None:
        """Complete what can be completed within `drain_timeout_s`, commit, then forget these partitions."""
        ...


class Source(Protocol):
    """The origin of records. One task calls poll; commit, pause and resume may come from others."""

    async def start(self, rebalance: RebalanceListener) -> None:
        """Join the group or open the log. SourceError; SourceUnavailable after `start_timeout_s`."""
        ...

    async def poll(self, timeout_s: float) -> list[PolledRecords]:
        """Return new records, at most `max_poll_records`, after at most `timeout_s`. Call it while paused, too."""
        ...

    def pause(self) -> None: ...

    def resume(self) -> None: ...

    async def commit(self, offsets: Mapping[Partition, int], assignments: Mapping[Partition, int]) -> None:
        """Commit the next offsets, skipping partitions from an older assignment. A rebalance is not an error."""
        ...

    def uncommitted(self) -> Mapping[Partition, int]:
        """Return the next offsets whose commit is not acknowledged; they go with the next commit."""
        ...

    def lag(self) -> Mapping[Partition, int]:
        """Return the number of records after the last polled one, by owned partition."""
        ...

    def stalled_s(self) -> Mapping[Partition, float]:
        """Return for how long each owned partition has stood still although readable records wait in it."""
        ...

    def problem(self) -> str:
        """Return why there is nothing to read, in one sentence; "" when there is no such reason."""
        ...

    @property
    def exhausted(self) -> bool:
        """Whether nothing more can be read: a log is at its end, or a topic's next record cannot be decoded."""
        ...

    async def stop(self) -> None: ...


class Store(Protocol):
    """The users' rings."""

    async def push(self, events: Sequence[ConsumedEvent]) -> None:
        """Append the events to their users' rings (one round trip), and set `ring` and `is_new` of each.

        Each event is guarded by its source's last offset, so pushing again changes nothing: after an attempt that was
        carried out but not answered, the same events are still new. `ring` holds the user's events up to and including
        this one, not those pushed after it in the same call; of an event that the ring had already it holds at least
        those.
        Raises StoreUnavailable (retry with the same event objects), TopicRecreated, StoreError.
        """
        ...

    def forget(self, partition: Partition) -> None:
        """Drop the cached rings of a partition that is no longer owned."""
        ...


class Ranker(Protocol):
    """Ranks batches into slates; the pipeline behind it runs in a thread of its own."""

    async def rank(self, batch: Batch) -> list[Slate]:
        """Return one slate per entry, in the batch's order, by the best strategy that can answer."""
        ...

    async def observe(self, events: Sequence[ConsumedEvent]) -> None:
        """Count the events that are new to their rings, before any later batch is ranked."""
        ...


class Sink(Protocol):
    """The destination of slates and dead letters."""

    async def send(self, slates: Sequence[Slate]) -> None:
        """Return when Kafka has acknowledged all of them and Redis holds them as `rec:{u:<user>}`.

        Raises SinkUnavailable (send all again: `covers` lets a reader drop the repetition), SinkError.
        """
        ...

    async def send_dead_letters(self, dead_letters: Sequence[DeadLetter]) -> None:
        """Return when the dead-letter topic has acknowledged all of them. Same errors."""
        ...


class SlateWriter(Protocol):
    """The users' last slates, for lookup."""

    async def put(self, slates: Sequence[Slate], values: Sequence[bytes] | None = None) -> None:
        """Write the slates. Idempotent; an older slate never replaces a newer one. StoreUnavailable, StoreError.

        values: their JSON, where the caller has it
        """
        ...
