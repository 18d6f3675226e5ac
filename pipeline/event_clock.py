"""The virtual clock of a log: its latest event time that is believed.

Logs are of any age, so no wall clock can tell a wrong time. But the times of a log follow each other, and a device
whose clock is years ahead sends a few events among many. Were it believed, every count would decay by those years.
"""

from dataclasses import dataclass, field

import numpy as np

# Votes that a leap needs: a hundredth of the times so far, within these bounds, and never more than there are. With
# fewer than MIN_VOTES times there is little to lose, and after a true pause that many events are dated too early.
MIN_VOTES = 32
MAX_VOTES = 10_000
VOTE_DIVISOR = 100
LONGEST_PAUSE_MS = 365 * 86_400_000  # of a log, where nothing decays


def latest_believed(ts_ms: np.ndarray, max_lead_ms: float = LONGEST_PAUSE_MS) -> int:
    """Return the latest time of a log's events, int64 [n] in any order, that is believed; 0 without any."""
    clock = EventClock(max_lead_ms)
    clock.advance(ts_ms)
    return clock.newest_ms


@dataclass(slots=True)
class EventClock:
    """Follows the latest time; a leap of more than `max_lead_ms` must be supported by many times beyond it.

    newest_ms: the latest time believed. It goes back only among the first MIN_VOTES times, which are judged together.
    """

    max_lead_ms: float
    newest_ms: int = 0
    _votes: int = 0  # times far ahead of `newest_ms`, less the others since then
    _times: int = 0
    _first: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))  # until there are MIN_VOTES

    def advance(self, ts_ms: np.ndarray) -> None:
        """Take the times of one call, int64 [n], in any order."""
        if self._times < MIN_VOTES:
            ts_ms = np.concatenate([self._first, ts_ms])
            self._first = ts_ms if len(ts_ms) < MIN_VOTES else ts_ms[:0]
            self.newest_ms = self._votes = self._times = 0
        ahead = np.sort(ts_ms[ts_ms > self.newest_ms])
        chain = np.concatenate([[self.newest_ms], ahead])
        leaps = np.flatnonzero(np.diff(chain) > self.max_lead_ms)
        self.newest_ms = int(chain[self._believed(leaps, len(ahead), len(ts_ms))])
        self._times += len(ts_ms)

    def _believed(self, leaps: np.ndarray, ahead: int, times: int) -> int:
        """Return how many of the times ahead are believed: those before the first leap without enough votes.

        leaps: int64 [n], numbers of times before each of them
        """
        for leap in leaps.tolist():
            against = times - (ahead - leap)
            self._votes = max(0, self._votes - against) + ahead - leap
            if self._votes < self._needed(self._times + against):
                return leap
            self._votes = 0
        if not len(leaps):
            self._votes = max(0, self._votes - times)
        return ahead

    @staticmethod
    def _needed(times: int) -> int:
        """Return the votes that a leap needs after so many times."""
        return min(times, max(MIN_VOTES, min(times // VOTE_DIVISOR, MAX_VOTES)))
