"""A log grouped into its users' sequences, from which training takes crops and evaluation takes histories."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from pipeline.data.event_log import EventLog
from pipeline.items.vocabulary import Vocabulary
from pipeline.jagged import find_rows, latest_equal, ranges, row_starts
from pipeline.records import Histories


@dataclass(slots=True)
class UserSequences:
    """All users' events, user after user, each in the log's order.

    events:        EVENT_DTYPE [total]
    tokens:        int32 [total], 0 = an item outside the vocabulary
    offsets:       int64 [users + 1]
    log_positions: int64 [total], each event's position in the log
    """

    events: np.ndarray
    tokens: np.ndarray
    offsets: np.ndarray
    log_positions: np.ndarray

    @classmethod
    def from_columns(cls, events: np.ndarray, tokens: np.ndarray, users: np.ndarray) -> "UserSequences":
        """Group a log in event-time order. users: int [total], each event's user."""
        order = np.argsort(users, kind="stable")
        starts = np.flatnonzero(np.diff(users[order], prepend=-1))
        offsets = np.append(starts, len(order)).astype(np.int64)
        return cls(events[order], tokens[order], offsets, order)

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
        """Start of the run of each event's user: int64 [total]."""
        return row_starts(self.offsets)

    def user_starts(self, positions: np.ndarray) -> np.ndarray:
        """Return where the runs of these events' users begin: int64 [n]."""
        return self.offsets[find_rows(self.offsets, positions)]

    def chunks(self) -> Iterator[tuple[slice, "UserSequences"]]:
        """Yield chunks of complete users as Histories.chunks does: each with its slice and views of its columns."""
        for part, histories in self.histories.chunks():
            chunk = UserSequences(histories.events, self.tokens[part], histories.offsets, self.log_positions[part])
            yield part, chunk

    @property
    def is_first_touch(self) -> np.ndarray:
        """Whether the user touches this item for the first time: bool [total]."""
        return latest_equal(self.histories.users, self.events["item"], np.ones(len(self), bool)) < 0

    def histories_before(self, positions: np.ndarray, max_events: int) -> Histories:
        """Return their users' histories just before these events, the latest `max_events`, as a ring keeps them.

        A history is empty at a user's first event.
        """
        starts = np.maximum(self.user_starts(positions), positions - max_events)
        index, offsets = ranges(starts, positions - starts)
        return Histories(self.events[index], offsets)
