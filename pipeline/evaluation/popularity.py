"""The baseline of what is popular: training events, all alike or fading with age as of the time of the request."""

import numpy as np

from pipeline.data.sequences import UserSequences
from pipeline.evaluation.full_ranking import popularity_scores
from pipeline.records import DAY_MS, Histories


class Popularity:
    """Every training event counts 1."""

    name = "popularity"

    def __init__(self, known: UserSequences, items: int) -> None:
        counts = np.bincount(known.tokens, minlength=items)
        self._scores = popularity_scores(counts[None])

    def score(self, histories: Histories, tokens: np.ndarray) -> np.ndarray:
        """See Scorer: the same for every user."""
        return np.repeat(self._scores, len(histories), axis=0)


class RecentPopularity:
    """A training event counts half as much for every half life that it lies before the user's newest event.

    Training events after that time do not count: it is what serving would have known then. A user without events is
    asked as of the end of training.
    """

    name = "recent_popularity"

    def __init__(self, known: UserSequences, items: int, half_life_days: float) -> None:
        ts_ms = known.histories.ts_ms
        order = np.argsort(ts_ms, kind="stable")
        self._ts_ms, self._tokens, self._items = ts_ms[order], known.tokens[order], items
        self._half_life_ms = half_life_days * DAY_MS

    def score(self, histories: Histories, tokens: np.ndarray) -> np.ndarray:
        """See Scorer."""
        asked_ms, rows = np.unique(self._asked_ms(histories), return_inverse=True)
        weights = np.zeros((len(asked_ms), self._items))
        ends = np.searchsorted(self._ts_ms, asked_ms, side="right")
        faded, begin, before_ms = np.zeros(self._items), 0, int(asked_ms[0]) if len(asked_ms) else 0
        for row, (end, now_ms) in enumerate(zip(ends.tolist(), asked_ms.tolist(), strict=True)):
            faded = faded * self._fading(now_ms - before_ms) + self._counted(begin, end, now_ms)
            weights[row], begin, before_ms = faded, end, now_ms
        return popularity_scores(weights)[rows]

    def _asked_ms(self, histories: Histories) -> np.ndarray:
        """int64 [n]: each user's newest event's time."""
        asked_ms = np.full(len(histories), self._ts_ms[-1] if len(self._ts_ms) else 0)
        known = histories.lengths > 0
        asked_ms[known] = histories.ts_ms[histories.offsets[1:][known] - 1]
        return asked_ms

    def _counted(self, begin: int, end: int, now_ms: int) -> np.ndarray:
        """float64 [items]: the training events from `begin` up to `end`, in time order, as of now."""
        part = slice(begin, end)
        return np.bincount(self._tokens[part], self._fading(now_ms - self._ts_ms[part]), self._items)

    def _fading(self, age_ms: np.ndarray | int) -> np.ndarray:
        return np.exp2(-np.asarray(age_ms) / self._half_life_ms)
