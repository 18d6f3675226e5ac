"""Synthetic histories that bring a model every shape of batch before it serves."""

from collections.abc import Iterator, Sequence

import numpy as np

from pipeline.records import ACTION_SHIFT, EVENT_DTYPE, Histories, item_hash

_MINUTE_MS = 60_000
_FIRST_ACTION = 1 << ACTION_SHIFT  # action code 1, see EVENT_DTYPE


def synthetic_histories(item_ids: Sequence[str], lengths: Sequence[int], items_apart: int = 0) -> Histories:
    """Return histories of these lengths that go through the items in order, one event per minute.

    items_apart: by how many items each user begins after the user before
    """
    users = np.repeat(np.arange(len(lengths)), lengths)
    positions = np.concatenate([np.arange(length) for length in lengths])
    items, item_rows = np.unique((positions + items_apart * users) % len(item_ids), return_inverse=True)
    events = np.zeros(len(positions), EVENT_DTYPE)
    events["item"] = np.array([item_hash(item_ids[int(item)]) for item in items], np.uint64)[item_rows]
    events["ts_action_device"] = positions * _MINUTE_MS + _FIRST_ACTION
    return Histories(events, np.concatenate([[0], np.cumsum(lengths)]))


def warm_up_lengths(max_users: int, max_events: int) -> Iterator[list[int]]:
    """Yield history lengths of synthetic batches: each power of two of users, all short but at most one long history.

    Kernels are compiled separately for multiples of 16 rows: batches of both kinds are yielded, where possible.
    """
    for exponent in range(max_users.bit_length()):
        others = [1] * ((1 << exponent) - 1)
        excess = (len(others) + max_events) % 16 or 1  # without these rows the sum becomes, or ceases to be, a multiple
        for longest in sorted({1, min(2, max_events), max(1, max_events - excess), max_events}):
            yield [*others, longest]
