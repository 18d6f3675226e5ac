"""Checks of what a library's caller passes, made before anything is admitted: a refused call leaves nothing behind."""

from collections.abc import Collection, Iterable, Sequence

import msgspec
import numpy as np

from pipeline.records import Event, Histories, Id, Item

MAX_SLATE_ITEMS = 10_000  # as many as reranking may have candidates


def checked_histories(
    call: str, histories: Iterable[Iterable[Event]], actions: Collection[str]
) -> list[Sequence[Event]]:
    """Return the histories. ValueError, which names history and event, unless all are events with these actions."""
    if not isinstance(histories, Iterable):
        raise ValueError(f"{call}: the histories are {type(histories).__name__}, want one list of events per user")
    return [_checked_history(f"{call}: history {row}", each, actions) for row, each in enumerate(histories)]


def _checked_history(call: str, history: Iterable[Event], actions: Collection[str]) -> Sequence[Event]:
    if not isinstance(history, Iterable):
        raise ValueError(f"{call}: it is {type(history).__name__}, want events")
    history = list(history)
    for position, event in enumerate(history):
        place = f"{call}, event {position}"
        _check_record(place, event, Event)
        if event.action not in actions:
            raise ValueError(f"{place}: unknown actions ['{event.action}'], want of {tuple(actions)}")
    return history


def check_k(call: str, k: object) -> None:
    """Raise ValueError unless this is a possible number of items per slate."""
    if isinstance(k, bool) or not isinstance(k, int | np.integer) or not 1 <= k <= MAX_SLATE_ITEMS:
        raise ValueError(f"{call}: k = {k!r}, want a whole number from 1 to {MAX_SLATE_ITEMS:,}")


def checked_ids(call: str, item_ids: Iterable[str]) -> list[str]:
    """Return the ids. ValueError, which names the position, unless all are item ids."""
    if isinstance(item_ids, str) or not isinstance(item_ids, Iterable):
        raise ValueError(f"{call}: the item ids are {type(item_ids).__name__}, want a list of them")
    item_ids = list(item_ids)
    try:
        "".join(msgspec.convert(item_ids, list[Id])).encode()  # all at once takes a tenth of one by one
    except (msgspec.ValidationError, UnicodeEncodeError):
        for position, item_id in enumerate(item_ids):
            _check(f"{call}: item id {position}", item_id, Id)
    return item_ids


def check_items(call: str, items: Iterable[Item]) -> None:
    """Raise ValueError, which names the position, unless all are item records."""
    for position, item in enumerate(items):
        _check_record(f"{call}: item {position}", item, Item)


def check_new(histories: Histories, is_new: np.ndarray) -> None:
    """Raise ValueError unless the array marks each event of the histories."""
    if not isinstance(is_new, np.ndarray) or is_new.dtype != bool or is_new.shape != histories.events.shape:
        raise ValueError(f"observe: is_new must be an array of bool [{len(histories.events)}], one per event")


def _check_record(place: str, record: object, kind: type[msgspec.Struct]) -> None:
    if not isinstance(record, kind):
        raise ValueError(f"{place}: it is {type(record).__name__}, want {kind.__name__}")
    fields = msgspec.structs.asdict(record)
    plain = {name: each.item() if isinstance(each, np.generic) else each for name, each in fields.items()}
    _check(place, plain, kind)


def _check(place: str, value: object, kind: object) -> None:
    """Raise ValueError unless the value has this type, with finite numbers, and its texts can be encoded."""
    try:
        msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        raise ValueError(f"{place}: {error}") from error
    _check_leaves(place, value)


def _check_leaves(place: str, value: object) -> None:
    match value:
        case str():
            try:
                value.encode()
            except UnicodeEncodeError as error:
                raise ValueError(f"{place}: {value!r} is not valid Unicode: {error.reason}") from error
        case dict():
            for key, each in value.items():
                _check_leaves(place, key)
                _check_leaves(place, each)
        case list() | tuple():
            for each in value:
                _check_leaves(place, each)
