"""Rolling windows over each user's latest events: sums, means and repeats for every event at once.

A window ends with the event itself and stays within its user, so later events never count. Its length is bounded, so
trimming a ring changes nothing as long as the ring holds that many more events than the model reads. Sums of integers
are exact, whatever precedes the window.
"""

from collections.abc import Iterator

import numpy as np

from pipeline.jagged import row_starts

WINDOW_EVENTS = 127
# A sort key is the user's number in its chunk, the low bits of the value, and the event's position in the chunk. Values
# that differ only in higher bits count as equal: two of 127 items collide in one of 17 million windows.
USER_BITS = 10
POSITION_BITS = 17
VALUE_BITS = 64 - USER_BITS - POSITION_BITS


class RollingWindows:
    """One window per event of packed histories: its user's latest `size` events up to it. offsets: int64 [users + 1]"""

    def __init__(self, offsets: np.ndarray, size: int = WINDOW_EVENTS) -> None:
        self._offsets = offsets
        positions = np.arange(offsets[-1])
        self._starts = np.maximum(row_starts(offsets), positions - (size - 1))
        self.lengths = positions - self._starts + 1  # int64 [total]: events in each window

    def sums(self, column: np.ndarray) -> np.ndarray:
        """Return the sums of a column [total] over each event's window: float64 [total]."""
        running = np.empty(len(column) + 1)
        running[0] = 0
        np.cumsum(column, out=running[1:])
        return running[1:] - running[self._starts]

    def means(self, column: np.ndarray, mask: np.ndarray) -> np.ndarray:
        """Return the means of a column's values where `mask` (bool [total]) is set: float64 [total]; NaN for none."""
        with np.errstate(invalid="ignore"):
            return self.sums(column * mask) / self.sums(mask)

    def repeats(self, values: np.ndarray) -> np.ndarray:
        """Return how often each event's value occurs earlier in its window: int64 [total].

        values: uint [total], compared by their low VALUE_BITS.
        """
        counts = np.empty(len(values), np.int64)
        for first, last in self._chunks():
            start = self._offsets[first]
            end = self._offsets[last]
            users = np.repeat(np.arange(last - first), np.diff(self._offsets[first : last + 1]))
            counts[start:end] = _repeats(values[start:end], users, self._starts[start:end] - start)
        return counts

    def _chunks(self) -> Iterator[tuple[int, int]]:
        """Yield ranges of users whose events fit the bits of a sort key; a user with more events is alone."""
        first = 0
        users = len(self._offsets) - 1
        while first < users:
            fitting = np.searchsorted(self._offsets, self._offsets[first] + (1 << POSITION_BITS), "right") - 1
            last = max(first + 1, min(int(fitting), first + (1 << USER_BITS)))
            yield first, last
            first = last


def _repeats(values: np.ndarray, users: np.ndarray, starts: np.ndarray) -> np.ndarray:
    fits = len(values) <= 1 << POSITION_BITS
    position_bits = POSITION_BITS if fits else POSITION_BITS + USER_BITS  # a user alone needs no number
    position_mask = np.uint64((1 << position_bits) - 1)
    keys = users.astype(np.uint64) << np.uint64(64 - USER_BITS) | np.arange(len(values), dtype=np.uint64)
    keys |= (values.astype(np.uint64) & np.uint64((1 << VALUE_BITS) - 1)) << np.uint64(position_bits)
    keys.sort()  # by user, value, position; keys that hold their position sort 5 times faster than an argsort
    order = (keys & position_mask).astype(np.int64)
    groups = keys & ~position_mask  # equal user and value
    index = np.arange(len(keys))
    starts_group = np.concatenate([[True], groups[1:] != groups[:-1]])[: len(keys)]
    earliest = np.maximum.accumulate(np.where(starts_group, index, 0))
    starts = starts[order]
    outside = np.flatnonzero(order[earliest] < starts)  # rows whose group begins before their window
    earliest[outside] = np.searchsorted(keys, groups[outside] | starts[outside].astype(np.uint64))
    counts = np.empty(len(keys), np.int64)
    counts[order] = index - earliest
    return counts
