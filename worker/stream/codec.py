"""Records become arrivals, or dead letters with one clear sentence. Never an exception.

Headers (names are case-sensitive, as Kafka's are; of two with one name the last counts):
          content-type   application/json (default) or application/msgpack, application/x-msgpack
          schema         event/1 (default), event/1.x is read too; another major version is not
          strategy       a rung of the ladder;  k   a slate length, 1 to 512
          unreadable     why a log's reader could not read the value: buried with that reason
A header that cannot be obeyed makes a dead letter: whoever asked for something must learn that it was not done.
A record's key may differ from its user id: then order holds only within the record's partition, and it is counted
(metrics.STRANGE_KEYS).
"""

import math
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import TypeVar

import msgspec

from pipeline.records import Event, EventPacker
from pipeline.serving.strategy import LADDER
from worker import logging, metrics
from worker.config import Config
from worker.interfaces import Arrival, Clock, DeadLetter, Fetched, Record, Ticket

log = logging.get("codec")
UNREADABLE = "unreadable"
MAX_K = 512  # as pipeline.slate_items
DAY_MS = 86_400_000
JSON: tuple[str, ...] = ("application/json", "text/json")
MSGPACK: tuple[str, ...] = ("application/msgpack", "application/x-msgpack", "application/vnd.msgpack")
Wire = TypeVar("Wire")
Decoder = msgspec.json.Decoder[Wire] | msgspec.msgpack.Decoder[Wire]


def formats_of(kind: type[Wire]) -> dict[str, Decoder[Wire]]:
    """A decoder of such records for every content-type that is known."""
    as_json, as_msgpack = msgspec.json.Decoder(kind), msgspec.msgpack.Decoder(kind)
    return dict.fromkeys(JSON, as_json) | dict.fromkeys(MSGPACK, as_msgpack)


FORMATS = formats_of(Event)


class Unreadable(ValueError):
    """Its text is the dead letter's reason."""


class Request(msgspec.Struct, frozen=True):
    """What a record's headers ask for."""

    decoder: Decoder[Event]
    strategy: str | None
    k: int | None


class Codec:
    """Decodes polls. 3.1 us of one core per event of 162 bytes JSON: 0.7 to decode, 1.4 to pack its ring bytes."""

    def __init__(self, config: Config, clock: Clock) -> None:
        self._clock = clock
        self._packer = EventPacker(config.schema)
        self._actions = frozenset(config.events.actions)
        triggers = config.events.trigger_actions
        self._triggers = self._actions if triggers is None else frozenset(triggers)
        self._ahead_ms = int(config.events.max_ahead_s * 1000)
        self._age_ms = int(config.events.max_age_days * DAY_MS)
        self._key_noted = False

    def decode_all(self, fetched: Iterable[Fetched]) -> tuple[list[Arrival], list[DeadLetter]]:
        """All shares of a poll; within a partition in offset order."""
        arrivals: list[Arrival] = []
        letters: list[DeadLetter] = []
        for part in fetched:
            good, bad = self.decode(part)
            arrivals += good
            letters += bad
        return arrivals, letters

    def decode(self, fetched: Fetched) -> tuple[list[Arrival], list[DeadLetter]]:
        """Every record of the share, once: as an arrival or as a dead letter."""
        arrivals, letters = [], []
        now_ms = self._clock.now_ms()
        oldest_ms = now_ms - self._age_ms if self._age_ms else 0
        for record in fetched.records:
            ticket = Ticket(fetched.partition, fetched.epoch, record.offset)
            try:
                request = _request(tuple(record.headers))
                event = self._event(record, request, oldest_ms, now_ms + self._ahead_ms)
                arrivals.append(
                    Arrival(
                        event,
                        self._packer.pack(event),
                        ticket,
                        fetched.end_offset,
                        fetched.polled_ms,
                        fetched.polled_s,
                        event.action in self._triggers,
                        request.strategy,
                        request.k,
                    )
                )
            except Unreadable as reason:
                letters.append(_letter(record, ticket, str(reason)))
        return arrivals, letters

    def _event(self, record: Record, request: Request, oldest_ms: int, newest_ms: int) -> Event:
        if record.value is None:
            raise Unreadable("the record has no value (a tombstone); an events topic keeps events, it deletes none")
        try:
            event = request.decoder.decode(record.value)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise Unreadable(f"not an event: {error}") from error
        if event.action not in self._actions:
            raise Unreadable(f"unknown action {event.action!r}; events.actions has {', '.join(sorted(self._actions))}")
        if not oldest_ms <= event.ts_ms <= newest_ms:
            raise Unreadable(_out_of_time(event.ts_ms, oldest_ms, newest_ms))
        if event.value is not None and not math.isfinite(event.value):  # MessagePack can say infinity
            raise Unreadable(f"value is {event.value}; wanted a finite number of at least 0")
        if record.key is not None and record.key != event.user_id.encode():
            self._note_key(record, event)
        return event

    def _note_key(self, record: Record, event: Event) -> None:
        metrics.STRANGE_KEYS.inc()
        if not self._key_noted:
            self._key_noted = True
            log.warning(
                "a record's key is not its user's id: order holds within one partition only; said once, then counted",
                key=record.key,
                user_id=event.user_id,
                offset=record.offset,
            )


@lru_cache(maxsize=4096)  # producers repeat their headers; a trace id in each costs 2 us a record
def _request(headers: Sequence[tuple[str, bytes]]) -> Request:
    if not headers:
        return Request(FORMATS["application/json"], None, None)
    values = values_of(headers)
    if UNREADABLE in values:
        raise Unreadable(_text(values, UNREADABLE, "") or "the log's reader could not read it")
    schema = _text(values, "schema", "event/1")
    if schema.split(".")[0] != "event/1":
        raise Unreadable(f"schema {schema!r}; this worker reads event/1")
    return Request(decoder_of(values, FORMATS), _strategy(values), _k(values))


def values_of(headers: Iterable[tuple[str, bytes | None]]) -> dict[str, bytes]:
    """By name; of several the last one, of none an empty value."""
    return {name: value or b"" for name, value in headers}


def decoder_of(values: dict[str, bytes], formats: dict[str, Decoder[Wire]]) -> Decoder[Wire]:
    """What the header `content-type` names. Unreadable when it is not known."""
    name = _text(values, "content-type", "application/json").split(";")[0].strip().lower()
    if name not in formats:
        raise Unreadable(f"content-type {name!r}; wanted one of {', '.join(formats)}")
    return formats[name]


def _strategy(values: dict[str, bytes]) -> str | None:
    name = _text(values, "strategy", "")
    if name and name not in LADDER:
        raise Unreadable(f"strategy {name!r} in the header; wanted one of {', '.join(LADDER)}")
    return name or None


def _k(values: dict[str, bytes]) -> int | None:
    text = _text(values, "k", "")
    if not text:
        return None
    if not (text.isascii() and text.isdigit() and len(text) <= 3 and 1 <= int(text) <= MAX_K):
        raise Unreadable(f"k {text!r} in the header; wanted a whole number from 1 to {MAX_K}")
    return int(text)


def _text(values: dict[str, bytes], name: str, absent: str) -> str:
    return values[name].decode("utf-8", "backslashreplace") if name in values else absent


def _out_of_time(ts_ms: int, oldest_ms: int, newest_ms: int) -> str:
    if ts_ms > newest_ms:
        return f"ts_ms {ts_ms} lies {(ts_ms - newest_ms) / 1000:.0f} s beyond events.max_ahead_s from now"
    return f"ts_ms {ts_ms} lies {(oldest_ms - ts_ms) / DAY_MS:.1f} days before events.max_age_days ago"


def _letter(record: Record, ticket: Ticket, reason: str) -> DeadLetter:
    return DeadLetter(ticket, record.key, record.value, record.headers, record.timestamp, reason)
