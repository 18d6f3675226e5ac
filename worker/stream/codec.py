"""Decode records into events, or into dead letters with one clear sentence. Bad records never raise.

Headers (names are case-sensitive, as Kafka's are; of two with the same name the last counts):
          content-type   application/json (default) or application/msgpack, application/x-msgpack
          schema         event/1 (default), event/1.x is read too; another major version is not
          strategy       where to start in the fallback order;  k   a slate length, 1 to 512
          unreadable     why a log's reader could not read the value: dead-lettered with that reason
A record with an invalid header is dead-lettered, so the producer finds out. A record's key may differ from its user id:
order then holds only within the record's partition, and it is counted (metrics.KEY_MISMATCHES). `events.action_aliases`
maps foreign names of actions before they are checked.
"""

from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import TypeVar

import msgspec
from msgspec.structs import replace

from pipeline.records import DAY_MS, Event, EventPacker
from pipeline.strategies.own_strategies import own_names
from pipeline.strategies.strategy import FALLBACK_ORDER
from worker import logging, metrics
from worker.config import Config
from worker.interfaces import Clock, ConsumedEvent, DeadLetter, PolledRecords, Record, RecordOffset

log = logging.get("codec")
UNREADABLE = "unreadable"
REQUEST_HEADERS = frozenset(
    ("content-type", "schema", "strategy", "k", UNREADABLE)
)  # others, as trace ids, are not read
CACHED_HEADER_BYTES = 256  # a record's headers that are larger are read each time
MAX_K = 512  # as pipeline.slate_size
JSON: tuple[str, ...] = ("application/json", "text/json")
MSGPACK: tuple[str, ...] = ("application/msgpack", "application/x-msgpack", "application/vnd.msgpack")
Wire = TypeVar("Wire")
Decoder = msgspec.json.Decoder[Wire] | msgspec.msgpack.Decoder[Wire]


def decoders_for(kind: type[Wire]) -> dict[str, Decoder[Wire]]:
    """Return the decoders of records of this type, by content-type."""
    as_json = msgspec.json.Decoder(kind)
    as_msgpack = msgspec.msgpack.Decoder(kind)
    return dict.fromkeys(JSON, as_json) | dict.fromkeys(MSGPACK, as_msgpack)


DECODERS = decoders_for(Event)


class InvalidRecord(ValueError):
    """A record that cannot be used. The message becomes a dead letter's reason."""


class RequestHeaders(msgspec.Struct, frozen=True):
    """A record's headers: its decoder, and the strategy, yet to be checked, and slate length that it requests."""

    decoder: Decoder[Event]
    strategy: str | None
    k: int | None


NO_HEADERS = RequestHeaders(DECODERS["application/json"], None, None)


class Codec:
    """Decodes polls. 3.1 us of one core per event of 162 bytes JSON: 0.7 to decode, 1.4 to pack its ring bytes."""

    def __init__(self, config: Config, clock: Clock) -> None:
        """Raises StrategyError for one of `pipeline.strategies` that cannot be imported."""
        self._clock = clock
        self._packer = EventPacker(config.schema)
        self._actions = frozenset(config.events.actions)
        self._action_aliases = config.events.action_aliases
        triggers = config.events.trigger_actions
        self._triggers = self._actions if triggers is None else frozenset(triggers)
        self._max_skew_ms = int(config.events.max_clock_skew_s * 1000)
        self._max_age_ms = int(config.events.max_age_days * DAY_MS)
        self._strategies = (*own_names(config.pipeline.strategies), *FALLBACK_ORDER)
        self._key_warned = False

    def decode_all(self, polled: Iterable[PolledRecords]) -> tuple[list[ConsumedEvent], list[DeadLetter]]:
        """Decode all records of a poll; within a partition in offset order."""
        events: list[ConsumedEvent] = []
        dead_letters: list[DeadLetter] = []
        for records in polled:
            good, bad = self.decode(records)
            events += good
            dead_letters += bad
        return events, dead_letters

    def decode(self, polled: PolledRecords) -> tuple[list[ConsumedEvent], list[DeadLetter]]:
        """Decode every record once: as an event or as a dead letter."""
        events: list[ConsumedEvent] = []
        dead_letters: list[DeadLetter] = []
        now_ms = self._clock.now_ms()
        oldest_ms = now_ms - self._max_age_ms if self._max_age_ms else 0
        for record in polled.records:
            record_offset = RecordOffset(polled.partition, polled.assignment, record.offset)
            try:
                headers = _request_headers(record.headers)
                self._check_strategy(headers.strategy)
                event = self._event(record, headers, oldest_ms, now_ms + self._max_skew_ms)
                events.append(
                    ConsumedEvent(
                        _without_texts(event),
                        self._packer.pack(event),
                        record_offset,
                        polled.end_offset,
                        polled.polled_ms,
                        polled.polled_s,
                        event.action in self._triggers,
                        headers.strategy,
                        headers.k,
                    )
                )
            except InvalidRecord as reason:
                dead_letters.append(_dead_letter(record, record_offset, str(reason)))
        return events, dead_letters

    def _check_strategy(self, name: str | None) -> None:
        if name is not None and name not in self._strategies:
            raise InvalidRecord(f"header strategy is {name!r}; want one of {', '.join(self._strategies)}")

    def _event(self, record: Record, headers: RequestHeaders, oldest_ms: int, newest_ms: int) -> Event:
        if record.value is None:
            raise InvalidRecord("the record has no value (a tombstone); an events topic is never compacted")
        try:
            event = headers.decoder.decode(record.value)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise InvalidRecord(f"not an event: {error}") from error
        if event.action in self._action_aliases:
            event = replace(event, action=self._action_aliases[event.action])
        if event.action not in self._actions:
            actions = ", ".join(sorted(self._actions))
            raise InvalidRecord(
                f"unknown action {event.action!r}; events.actions has {actions}; map it with events.action_aliases"
            )
        if not oldest_ms <= event.ts_ms <= newest_ms:
            raise InvalidRecord(_out_of_time(event.ts_ms, oldest_ms, newest_ms))
        if record.key is not None and record.key != event.user_id.encode():
            self._count_key_mismatch(record, event)
        return event

    def _count_key_mismatch(self, record: Record, event: Event) -> None:
        metrics.KEY_MISMATCHES.inc()
        if not self._key_warned:
            self._key_warned = True
            log.warning(
                "record key is not its user id: order holds within one partition only (logged once, then counted)",
                key=record.key,
                user_id=event.user_id,
                offset=record.offset,
            )


def _request_headers(headers: Sequence[tuple[str, bytes]]) -> RequestHeaders:
    """Return the request of a record's headers. Cached: producers repeat them, and reading them takes 2 us."""
    if not headers:
        return NO_HEADERS
    ours = tuple([header for header in headers if header[0] in REQUEST_HEADERS])
    size = sum([len(value or b"") for _, value in ours])
    return _cached_request(ours) if size <= CACHED_HEADER_BYTES else _request(ours)


def _request(headers: Sequence[tuple[str, bytes]]) -> RequestHeaders:
    values = header_values(headers)
    if UNREADABLE in values:
        raise InvalidRecord(_text(values, UNREADABLE, "") or "the log's reader could not read it")
    schema = _text(values, "schema", "event/1")
    if schema.split(".")[0] != "event/1":
        raise InvalidRecord(f"schema {schema!r}; this worker reads event/1")
    return RequestHeaders(decoder_named(values, DECODERS), _text(values, "strategy", "") or None, _k(values))


_cached_request = lru_cache(maxsize=4096)(_request)  # at most 3 MiB


def header_values(headers: Iterable[tuple[str, bytes | None]]) -> dict[str, bytes]:
    """Return the headers by name: of a repeated name the last value, of a missing value empty bytes."""
    return {name: value or b"" for name, value in headers}


def decoder_named(values: dict[str, bytes], decoders: dict[str, Decoder[Wire]]) -> Decoder[Wire]:
    """Return the decoder of the header `content-type`. InvalidRecord when it is unknown."""
    name = _text(values, "content-type", "application/json").split(";")[0].strip().lower()
    if name not in decoders:
        raise InvalidRecord(f"content-type {name!r}; want one of {', '.join(decoders)}")
    return decoders[name]


def _k(values: dict[str, bytes]) -> int | None:
    text = _text(values, "k", "")
    if not text:
        return None
    if not (text.isascii() and text.isdigit() and len(text) <= 3 and 1 <= int(text) <= MAX_K):
        raise InvalidRecord(f"header k is {text!r}; want a whole number from 1 to {MAX_K}")
    return int(text)


def _text(values: dict[str, bytes], name: str, default: str) -> str:
    return values[name].decode("utf-8", "backslashreplace") if name in values else default


def _without_texts(event: Event) -> Event:
    """Return the event without its texts of any length: thousands of events may wait, and the packed form has them."""
    if event.context is None and event.session_id is None and event.device is None:
        return event
    return replace(event, context=None, session_id=None, device=None)


def _out_of_time(ts_ms: int, oldest_ms: int, newest_ms: int) -> str:
    if ts_ms > newest_ms:
        return f"ts_ms {ts_ms} is {(ts_ms - newest_ms) / 1000:.0f} s beyond events.max_clock_skew_s from now"
    return f"ts_ms {ts_ms} is {(oldest_ms - ts_ms) / DAY_MS:.1f} days older than events.max_age_days"


def _dead_letter(record: Record, record_offset: RecordOffset, reason: str) -> DeadLetter:
    return DeadLetter(record_offset, record.key, record.value, record.headers, record.timestamp, reason)
