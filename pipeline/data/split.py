"""Where a log is cut: what lies before teaches, what lies behind is scored."""

import hashlib
from typing import Annotated

import msgspec
import numpy as np
from msgspec import Meta

from pipeline.counters.neighbours import rank_in_run
from pipeline.data.event_log import Log
from pipeline.data.sequences import place_of_share

DEFAULT_SHARE = 0.8


class Cut(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """By time: the first `share` of the events teaches, events of one millisecond all on one side. Or, with `last`
    above 0, by user: each user's newest `last` events are left out, whatever their time."""

    share: Annotated[float, Meta(ge=0, le=1)] = DEFAULT_SHARE
    last: Annotated[int, Meta(ge=0)] = 0

    def __str__(self) -> str:
        return f"each user's newest {self.last}" if self.last else f"all behind {self.share:g} of the log"

    def left_out(self, log: Log) -> np.ndarray:
        """bool [n]: the log's events behind the cut."""
        if self.last:
            return places_from_end(log.users) < self.last
        return np.arange(len(log)) >= place_of_share(log.ts_ms, self.share)


class Taught(msgspec.Struct, frozen=True):
    """What an artifact was taught, so that no evaluation takes for new what it has seen. `digest`: of those events."""

    cut: Cut
    events: int
    newest_ms: int
    digest: str

    @classmethod
    def of(cls, cut: Cut, known: Log) -> "Taught":
        """known: the part of a log before the cut."""
        return cls(cut, len(known), int(known.ts_ms.max(initial=0)), digest_of(known))

    def seen(self, log: Log, scored: np.ndarray) -> int | None:
        """How many of the events to score (bool [n]) taught it; None: this log is another one, or has changed, and
        does not begin after all that taught it, so that there is no telling."""
        known = ~self.cut.left_out(log)
        if digest_of(log.part(known)) == self.digest:
            return int((known & scored).sum())
        return 0 if (log.ts_ms[scored] > self.newest_ms).all() else None


def places_from_end(users: np.ndarray) -> np.ndarray:
    """int64 [n]: how many events of its user come after each event of a log; users: int [n]."""
    order = np.argsort(users[::-1], kind="stable")
    places = np.empty(len(users), np.int64)
    places[order] = rank_in_run(users[::-1][order])
    return places[::-1]


def digest_of(log: Log) -> str:
    """Of who did what when, 16 hex digits; the same for equal events, however the log was written."""
    digest = hashlib.sha256("\n".join(log.user_ids[user] for user in np.unique(log.users)).encode())
    digest.update(np.unique(log.users, return_inverse=True)[1].astype(np.int32).data)
    digest.update(np.ascontiguousarray(log.events).data)
    return digest.hexdigest()[:16]
