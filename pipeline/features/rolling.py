"""What each user did lately, counted for every event at once: sums and repetitions over the events just before it.

A window ends with the event itself and never leaves its user, so nothing later counts. Its length is bounded, so that a
ring's trimming changes nothing where the ring reaches so much further than the model reads. Sums of whole numbers are
exact, whatever came before the window.
"""

from collections.abc import Iterator

import numpy as np

WINDOW_EVENTS = 127
# A sort key is the user's number in its chunk, some bits of what may repeat, and the event's place in the chunk. What
# differs in other bits alone counts as a repetition: two of 127 items are such a pair in one window of 17 million.
USER_BITS, PLACE_BITS = 10, 17
NAME_BITS = 64 - USER_BITS - PLACE_BITS


class RollingWindows:
    """Of every event of some packed histories, its user's newest `size` events up to it. offsets: int64 [users + 1]"""

    def __init__(self, offsets: np.ndarray, size: int = WINDOW_EVENTS) -> None:
        self._offsets = offsets
        places = np.arange(offsets[-1])
        self._begins = np.maximum(np.repeat(offsets[:-1], np.diff(offsets)), places - (size - 1))
        self.lengths = places - self._begins + 1  # int64 [total]: events in each window

    def sums(self, column: np.ndarray) -> np.ndarray:
        """float64 [total] of a column [total] over each event's window."""
        running = np.empty(len(column) + 1)
        running[0] = 0
        np.cumsum(column, out=running[1:])
        return running[1:] - running[self._begins]

    def means(self, column: np.ndarray, counts: np.ndarray) -> np.ndarray:
        """float64 [total] of a column's values where `counts` (bool [total]) says so; NaN where none is."""
        with np.errstate(invalid="ignore"):
            return self.sums(column * counts) / self.sums(counts)

    def repeats(self, names: np.ndarray) -> np.ndarray:
        """int64 [total]: how often the event's name (uint [total], its low NAME_BITS) came before it in its window."""
        counts = np.empty(len(names), np.int64)
        for first, last in self._chunks():
            begin, end = self._offsets[first], self._offsets[last]
            users = np.repeat(np.arange(last - first), np.diff(self._offsets[first : last + 1]))
            counts[begin:end] = _repeats(names[begin:end], users, self._begins[begin:end] - begin)
        return counts

    def _chunks(self) -> Iterator[tuple[int, int]]:
        """Ranges of users that a sort key has room for; one user with more events than that is alone."""
        first, users = 0, len(self._offsets) - 1
        while first < users:
            room = np.searchsorted(self._offsets, self._offsets[first] + (1 << PLACE_BITS), "right") - 1
            last = max(first + 1, min(int(room), first + (1 << USER_BITS)))
            yield first, last
            first = last


def _repeats(names: np.ndarray, users: np.ndarray, begins: np.ndarray) -> np.ndarray:
    place_bits = PLACE_BITS if len(names) <= 1 << PLACE_BITS else PLACE_BITS + USER_BITS  # one user needs no number
    place = np.uint64((1 << place_bits) - 1)
    keys = users.astype(np.uint64) << np.uint64(64 - USER_BITS) | np.arange(len(names), dtype=np.uint64)
    keys |= (names.astype(np.uint64) & np.uint64((1 << NAME_BITS) - 1)) << np.uint64(place_bits)
    keys.sort()  # by user, name, place; a sort of keys that hold their place is 5 times faster than an argsort
    order, groups, number = (keys & place).astype(np.int64), keys & ~place, np.arange(len(keys))
    begin_groups = np.concatenate([[True], groups[1:] != groups[:-1]])[: len(keys)]
    earliest = np.maximum.accumulate(np.where(begin_groups, number, 0))  # of the same user and name
    begins = begins[order]
    older = np.flatnonzero(order[earliest] < begins)  # rows whose group's first is outside of their window
    earliest[older] = np.searchsorted(keys, groups[older] | begins[older].astype(np.uint64))
    counts = np.empty(len(keys), np.int64)
    counts[order] = number - earliest
    return counts
