"""Where a log is cut: what lies before teaches, what lies behind is scored."""

import hashlib

import msgspec
import numpy as np

from pipeline.data.event_log import EventLog
from pipeline.data.sequences import split_index
from pipeline.jagged import rank_in_run
from pipeline.types import Fraction, NonNegativeInt

DEFAULT_TRAIN_FRACTION = 0.8


class Split(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """By time: the first `share` of the events teaches, events of one millisecond all on one side. Or, with `last`
    above 0, by user: each user's newest `last` events are left out, whatever their time."""

    train_fraction: Fraction = DEFAULT_TRAIN_FRACTION
    leave_last_out: NonNegativeInt = 0

    def __str__(self) -> str:
        return (
            f"each user's newest {self.leave_last_out}"
            if self.leave_last_out
            else f"all behind {self.train_fraction:g} of the log"
        )

    def test_mask(self, log: EventLog) -> np.ndarray:
        """bool [n]: the log's events behind the cut."""
        if self.leave_last_out:
            return position_from_end(log.users) < self.leave_last_out
        return np.arange(len(log)) >= split_index(log.ts_ms, self.train_fraction)


class TrainingProvenance(msgspec.Struct, frozen=True):
    """What an artifact was taught, so that no evaluation takes for new what it has seen. `digest`: of those events."""

    split: Split
    events: int
    newest_ms: int
    digest: str

    @classmethod
    def from_log(cls, cut: Split, known: EventLog) -> "TrainingProvenance":
        """known: the part of a log before the cut."""
        return cls(cut, len(known), int(known.ts_ms.max(initial=0)), log_digest(known))

    def count_seen(self, log: EventLog, scored: np.ndarray) -> int | None:
        """How many of the events to score (bool [n]) taught it; None: this log is another one, or has changed, and
        does not begin after all that taught it, so that there is no telling."""
        known = ~self.split.test_mask(log)
        if log_digest(log.select(known)) == self.digest:
            return int((known & scored).sum())
        return 0 if (log.ts_ms[scored] > self.newest_ms).all() else None


def position_from_end(users: np.ndarray) -> np.ndarray:
    """int64 [n]: how many events of its user come after each event of a log; users: int [n]."""
    order = np.argsort(users[::-1], kind="stable")
    places = np.empty(len(users), np.int64)
    places[order] = rank_in_run(users[::-1][order])
    return places[::-1]


def log_digest(log: EventLog) -> str:
    """Of who did what when, 16 hex digits; the same for equal events, however the log was written."""
    digest = hashlib.sha256("\n".join(log.user_ids[user] for user in np.unique(log.users)).encode())
    digest.update(np.unique(log.users, return_inverse=True)[1].astype(np.int32).data)
    digest.update(np.ascontiguousarray(log.events).data)
    return digest.hexdigest()[:16]
