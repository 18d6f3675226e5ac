"""A log as its users' sequences: what training crops and evaluation walks through."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from pipeline.data.event_log import EventLog
from pipeline.items.vocabulary import Vocabulary
from pipeline.jagged import ranges, row_of
from pipeline.records import Histories


@dataclass(slots=True)
class UserSequences:
    """All users' events, user after user, each in the log's order.

    events:  EVENT_DTYPE [total]
    tokens:  int32 [total], 0 = an item that the vocabulary does not have
    offsets: int64 [users + 1]
    places:  int64 [total], each event's place in the log
    """

    events: np.ndarray
    tokens: np.ndarray
    offsets: np.ndarray
    log_positions: np.ndarray

    @classmethod
    def from_columns(cls, events: np.ndarray, tokens: np.ndarray, users: np.ndarray) -> "UserSequences":
        """From a log in event-time order. users: int [total], each event's user."""
        places = np.argsort(users, kind="stable")
        starts = np.flatnonzero(np.diff(users[places], prepend=-1))
        offsets = np.append(starts, len(places)).astype(np.int64)
        return cls(events[places], tokens[places], offsets, places)

    @classmethod
    def from_log(cls, log: EventLog, vocabulary: Vocabulary) -> "UserSequences":
        return cls.from_columns(log.events, vocabulary.tokens(log.events["item"]), log.users)

    def __len__(self) -> int:
        return len(self.events)

    @property
    def histories(self) -> Histories:
        return Histories(self.events, self.offsets)

    @property
    def starts(self) -> np.ndarray:
        """int64 [total]: where the run of each event's user begins."""
        return np.repeat(self.offsets[:-1], np.diff(self.offsets))

    def user_starts(self, positions: np.ndarray) -> np.ndarray:
        """int64 [n]: where the runs of these events' users begin."""
        return self.offsets[row_of(self.offsets, positions)]

    def chunks(self) -> Iterator[tuple[slice, "UserSequences"]]:
        """As Histories.parts: a part of the users' columns, and views of them."""
        for place, part in self.histories.chunks():
            yield place, UserSequences(part.events, self.tokens[place], part.offsets, self.log_positions[place])

    @property
    def is_first_touch(self) -> np.ndarray:
        """bool [total]: the user touches this item for the first time."""
        users = np.repeat(np.arange(len(self.offsets) - 1, dtype=np.uint64), np.diff(self.offsets))
        order = np.lexsort((self.events["item"], users))
        items, users = self.events["item"][order], users[order]
        first = np.ones(len(order), bool)
        first[1:] = (items[1:] != items[:-1]) | (users[1:] != users[:-1])
        new = np.empty(len(order), bool)
        new[order] = first  # lexsort is stable: the first of equal ones is the earliest
        return new

    def histories_before(self, positions: np.ndarray, max_events: int) -> Histories:
        """Their users' histories just before these events, at most the newest `cap_events`, as a ring keeps them.

        A history may be empty: a user's first event.
        """
        starts = np.maximum(self.user_starts(positions), positions - max_events)
        index, offsets = ranges(starts, positions - starts)
        return Histories(self.events[index], offsets)


def split_index(ts_ms: np.ndarray, share: float) -> int:
    """Where the part behind this share of a log begins; ts_ms: int64 [n], ascending.

    It begins with a new millisecond, all events of one time on one side: so a worker scores from a time on.
    """
    if share >= 1 or not len(ts_ms):
        return len(ts_ms)
    return int(np.searchsorted(ts_ms, ts_ms[int(share * len(ts_ms))], "left"))
