"""Popularity baselines: training events counted equally, or decayed by age at the time of the request."""

import numpy as np

from pipeline.counters.counters import MAX_LEAD_HALF_LIVES
from pipeline.data.sequences import UserSequences
from pipeline.evaluation.full_ranking import popularity_scores
from pipeline.event_clock import latest_believed
from pipeline.records import DAY_MS, Histories


class Popularity:
    """Popularity in which every training event counts 1."""

    name = "popularity"

    def __init__(self, train: UserSequences, items: int) -> None:
        counts = np.bincount(train.tokens, minlength=items)
        self._scores = popularity_scores(counts[None])

    def score(self, histories: Histories, tokens: np.ndarray) -> np.ndarray:
        """Return the same scores for every user; see CatalogueScorer."""
        return np.repeat(self._scores, len(histories), axis=0)


class RecentPopularity:
    """Popularity in which a training event's count halves with every half-life before the user's latest event.

    Training events after that time do not count: serving would not have had them yet. A user without events is ranked
    as of the end of training, the latest time that is believed.
    """

    name = "recent_popularity"

    def __init__(self, train: UserSequences, items: int, half_life_days: float) -> None:
        ts_ms = train.histories.ts_ms
        order = np.argsort(ts_ms, kind="stable")
        self._ts_ms = ts_ms[order]
        self._tokens = train.tokens[order]
        self._items = items
        self._half_life_ms = half_life_days * DAY_MS
        self._end_ms = latest_believed(self._ts_ms, MAX_LEAD_HALF_LIVES * self._half_life_ms)

    def score(self, histories: Histories, tokens: np.ndarray) -> np.ndarray:
        """See CatalogueScorer."""
        request_ms, rows = np.unique(self._request_ms(histories), return_inverse=True)
        weights = np.zeros((len(request_ms), self._items))
        ends = np.searchsorted(self._ts_ms, request_ms, side="right")
        decayed = np.zeros(self._items)
        begin = 0
        before_ms = int(request_ms[0]) if len(request_ms) else 0
        for row, (end, now_ms) in enumerate(zip(ends.tolist(), request_ms.tolist(), strict=True)):
            decayed = decayed * self._decay(now_ms - before_ms) + self._decayed_counts(begin, end, now_ms)
            weights[row] = decayed
            begin = end
            before_ms = now_ms
        return popularity_scores(weights)[rows]

    def _request_ms(self, histories: Histories) -> np.ndarray:
        """Return int64 [n]: the time of each user's latest event."""
        request_ms = np.full(len(histories), self._end_ms)
        has_events = histories.lengths > 0
        request_ms[has_events] = histories.ts_ms[histories.offsets[1:][has_events] - 1]
        return request_ms

    def _decayed_counts(self, begin: int, end: int, now_ms: int) -> np.ndarray:
        """Return float64 [items]: the training events [begin, end), in time order, decayed to now."""
        events = slice(begin, end)
        return np.bincount(self._tokens[events], self._decay(now_ms - self._ts_ms[events]), self._items)

    def _decay(self, age_ms: np.ndarray | int) -> np.ndarray:
        return np.exp2(-np.asarray(age_ms) / self._half_life_ms)
