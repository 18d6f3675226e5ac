"""Train/test split of a log, and the record of which events an artifact was trained on."""

import hashlib

import msgspec
import numpy as np

from pipeline.data.event_log import EventLog
from pipeline.jagged import rank_in_run
from pipeline.types import Fraction, NonNegativeInt

DEFAULT_TRAIN_FRACTION = 0.8


class Split(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A split by time or by user.

    By time: the first `train_fraction` of the events are for training; events of one millisecond stay together.
    By user, with `leave_last_out` above 0: each user's latest `leave_last_out` events are for testing, at any time.
    """

    train_fraction: Fraction = DEFAULT_TRAIN_FRACTION
    leave_last_out: NonNegativeInt = 0

    def __str__(self) -> str:
        if self.leave_last_out:
            return f"each user's newest {self.leave_last_out}"
        return f"all after the first {100 * self.train_fraction:g} %"

    def test_mask(self, log: EventLog) -> np.ndarray:
        """Return which of the log's events are for testing: bool [n]."""
        if self.leave_last_out:
            return position_from_end(log.users) < self.leave_last_out
        return np.arange(len(log)) >= split_index(log.ts_ms, self.train_fraction)


class TrainingProvenance(msgspec.Struct, frozen=True):
    """Identifies the events an artifact was trained on, so that no evaluation scores them as unseen.

    events: their number; newest_ms: the latest time; digest: see log_digest.
    """

    split: Split
    events: int
    newest_ms: int
    digest: str

    @classmethod
    def from_log(cls, split: Split, train_log: EventLog) -> "TrainingProvenance":
        """Describe the training part of a log that was split this way."""
        return cls(split, len(train_log), int(train_log.ts_ms.max(initial=0)), log_digest(train_log))

    def count_seen(self, log: EventLog, scored: np.ndarray) -> int | None:
        """Count the events to score (bool [n]) that the artifact was trained on.

        None: unknown, because this is a different or changed log and not all scored events are later than the
        training events.
        """
        train = ~self.split.test_mask(log)
        if log_digest(log.select(train)) == self.digest:
            return int((train & scored).sum())
        return 0 if (log.ts_ms[scored] > self.newest_ms).all() else None


def split_index(ts_ms: np.ndarray, fraction: float) -> int:
    """Return the position where the log's part after its first `fraction` begins; ts_ms: int64 [n], ascending.

    It begins with a new millisecond, so events of equal time are on one side: a worker scores from a given time.
    """
    if fraction >= 1 or not len(ts_ms):
        return len(ts_ms)
    return int(np.searchsorted(ts_ms, ts_ms[int(fraction * len(ts_ms))], "left"))


def position_from_end(users: np.ndarray) -> np.ndarray:
    """Return how many events of the same user follow each event of a log: int64 [n]; users: int [n]."""
    order = np.argsort(users[::-1], kind="stable")
    positions = np.empty(len(users), np.int64)
    positions[order] = rank_in_run(users[::-1][order])
    return positions[::-1]


def log_digest(log: EventLog) -> str:
    """Return a digest of the users and events, 16 hex digits; equal events give the same in any file format."""
    digest = hashlib.sha256("\n".join(log.user_ids[user] for user in np.unique(log.users)).encode())
    digest.update(np.unique(log.users, return_inverse=True)[1].astype(np.int32).data)
    digest.update(np.ascontiguousarray(log.events).data)
    return digest.hexdigest()[:16]
