"""Limits on dead letters: above them something upstream is broken, and the worker halts."""

from collections import Counter, deque
from collections.abc import Sequence

from worker.config import DeadLettersConfig
from worker.errors import DeadLetterLimit
from worker.interfaces import DeadLetter

REASONS = 3  # named in the error: the most frequent of the kept ones
KEPT_REASONS = 100  # of the latest dead letters


class DeadLetterLimits:
    """Two limits: a ratio of the last `window_records`, and a run of polls that held nothing but bad records.

    The ratio is of the whole window even while it fills, so the first bad record of a process does not halt it.
    total: dead letters counted so far
    error: names the first limit that was exceeded; None: none was
    """

    def __init__(self, config: DeadLettersConfig) -> None:
        self.total = 0
        self.error: DeadLetterLimit | None = None
        self._config = config
        self._polls: deque[tuple[int, int]] = deque()  # (records, bad ones), oldest first
        self._records = 0  # in the window
        self._bad = 0  # in the window
        self._run = 0  # bad records in a row
        self._reasons: deque[str] = deque(maxlen=KEPT_REASONS)

    def count(self, records: int, dead_letters: Sequence[DeadLetter]) -> None:
        """Count a poll of `records`, among them these dead letters; set `error` when a limit is exceeded.

        Nothing is raised: the worker first answers and commits what it has read, or every start would read the same
        records and send the same dead letters again.
        """
        bad = len(dead_letters)
        self.total += bad
        self._reasons.extend(letter.reason for letter in dead_letters)
        self._run = self._run + bad if bad == records else 0
        self._slide(records, bad)
        if self.error is None:
            self.error = self._excess()

    def _excess(self) -> DeadLetterLimit | None:
        if self._bad > self._config.max_ratio * self._config.window_records:
            excess = f"{self._bad} of the last {self._config.window_records} records"
            return self._to_error(excess, f"max_ratio is {self._config.max_ratio:g}")
        if self._run > self._config.max_consecutive:
            return self._to_error(f"{self._run} records in a row", f"max_consecutive is {self._config.max_consecutive}")
        return None

    def _slide(self, records: int, bad: int) -> None:
        self._polls.append((records, bad))
        self._records += records
        self._bad += bad
        while self._records - self._polls[0][0] >= self._config.window_records:
            old_records, old_bad = self._polls.popleft()
            self._records -= old_records
            self._bad -= old_bad

    def _to_error(self, excess: str, limit: str) -> DeadLetterLimit:
        frequent = Counter(self._reasons).most_common(REASONS)
        reasons = "; ".join(f"{reason} ({times} times)" for reason, times in frequent)
        return DeadLetterLimit(
            f"{excess} were dead letters (dead_letters.{limit}); most frequent reasons: {reasons}. All are in the "
            f"dead-letter topic: see `millrace dlq ls`, fix their producer, restart, then `millrace dlq requeue`"
        )
