"""When dead letters mean that something upstream is broken: counted here, buried elsewhere."""

from collections import Counter, deque
from collections.abc import Sequence

from worker.config import DeadLetters
from worker.errors import DeadLetterLimit
from worker.interfaces import DeadLetter

REASONS = 3  # the most frequent of the last ones, named in the error
REMEMBERED = 100


class DeadLetterLimits:
    """Two limits: a share of the last `window` records, and a run of polls that held nothing but bad records.

    The share is of the whole window even while it fills, so the first bad record of a process does not halt it.
    """

    def __init__(self, config: DeadLetters) -> None:
        self._config = config
        self._polls: deque[tuple[int, int]] = deque()  # (records, bad ones), oldest first
        self._records = self._bad = self._run = 0
        self._reasons: deque[str] = deque(maxlen=REMEMBERED)

    def count(self, records: int, letters: Sequence[DeadLetter]) -> None:
        """Count a poll of `records`, these letters among them. DeadLetterLimit when a limit is passed."""
        bad = len(letters)
        self._reasons.extend(letter.reason for letter in letters)
        self._run = self._run + bad if bad == records else 0
        self._slide(records, bad)
        if self._bad > self._config.max_ratio * self._config.window:
            share = f"{self._bad} of the last {self._config.window} records"
            raise self._error(share, f"max_ratio is {self._config.max_ratio:g}")
        if self._run > self._config.max_consecutive:
            raise self._error(f"{self._run} records in a row", f"max_consecutive is {self._config.max_consecutive}")

    def _slide(self, records: int, bad: int) -> None:
        self._polls.append((records, bad))
        self._records, self._bad = self._records + records, self._bad + bad
        while self._records - self._polls[0][0] >= self._config.window:
            old_records, old_bad = self._polls.popleft()
            self._records, self._bad = self._records - old_records, self._bad - old_bad

    def _error(self, share: str, limit: str) -> DeadLetterLimit:
        frequent = Counter(self._reasons).most_common(REASONS)
        reasons = "; ".join(f"{reason} ({times} times)" for reason, times in frequent)
        return DeadLetterLimit(
            f"{share} were dead letters (dead_letters.{limit}), the last because: {reasons}. All are buried: see "
            f"`millrace dlq ls`, mend what produces them, then start again and `millrace dlq requeue`"
        )
