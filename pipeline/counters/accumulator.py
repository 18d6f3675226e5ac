"""Sum weighted votes for items row by row and pick the top k, without sorting the votes or scanning the catalogue.

160 k votes of 256 rows over 10 k items take 3 ms, against 14 ms for one numpy sort of as many keys
(python -m timeit, one core of an EPYC).
"""

import numpy as np

from pipeline.arrays import grown

RowTokenPairs = tuple[np.ndarray, np.ndarray]  # rows int [n], tokens int [n]

SCRATCH_CELLS = 1 << 22  # 32 MiB, allocated once: 256 rows at a time over 16 k items, 4 rows over a million
EXCLUDED_SCORE = np.float32(-1e30)  # no sum of votes outweighs it, and unlike -inf it survives a product with 0


class SparseAccumulator:
    """A dense scratch array, rows x items, all zero between calls, so the cost of a call is that of its votes.

    (Gilbert, Moler, Schreiber, SIAM J. Matrix Anal. Appl. 1992.)
    """

    def __init__(self) -> None:
        self._sums = np.zeros(0, np.float32)
        self._voters = np.zeros(0, np.int32)

    def max_rows(self, items: int) -> int:
        return max(1, SCRATCH_CELLS // items)

    def sums(self, votes: np.ndarray, weights: np.ndarray, excluded: RowTokenPairs, items: int) -> np.ndarray:
        """Return the sum of a row's votes for an item, at one of these votes; 0 at the others: float32 [n, m].

        votes: int32 [n, m] tokens < items; weights: float32 [n, m]; excluded pairs start from EXCLUDED_SCORE.
        """
        self._reserve(len(votes) * items)
        keys = (votes + np.arange(len(votes))[:, None] * items).ravel()  # int64 [n * m]
        excluded_keys = excluded[0] * items + excluded[1]
        self._sums[excluded_keys] = EXCLUDED_SCORE
        np.add.at(self._sums, keys, weights.ravel())
        numbers = np.arange(len(keys), dtype=np.int32)
        self._voters[keys] = numbers  # of equal keys one number remains
        sums = self._sums.take(keys)
        sums *= self._voters.take(keys) == numbers
        self._sums[keys] = 0
        self._sums[excluded_keys] = 0
        return sums.reshape(votes.shape)

    def sums_at(self, votes: np.ndarray, weights: np.ndarray, targets: np.ndarray, items: int) -> np.ndarray:
        """Return the sums of each row's votes for the target items, int [n, c]: float32 [n, c]; else as in `sums`."""
        self._reserve(len(votes) * items)
        rows = np.arange(len(votes))[:, None] * items
        keys = (votes + rows).ravel()
        np.add.at(self._sums, keys, weights.ravel())
        sums = self._sums.take(targets + rows)
        self._sums[keys] = 0
        return sums

    def _reserve(self, cells: int) -> None:
        if cells > len(self._sums):
            self._sums = grown(self._sums, max(cells, SCRATCH_CELLS))
            self._voters = grown(self._voters, max(cells, SCRATCH_CELLS))


def row_top_k(tokens: np.ndarray, scores: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the k highest positive scores per row, ties by token: tokens int32 and scores float32 [n, k], 0 = none.

    tokens: int32 [n, m], distinct in a row where the score is positive; scores: float32 [n, m].
    """
    cells = np.flatnonzero(scores > _lower_bounds(scores, k)[:, None])
    rows = cells // scores.shape[1]
    values = scores.ravel()[cells]
    items = tokens.ravel()[cells]
    order = np.lexsort((items, -values, rows))
    rows = rows[order]
    ranks = np.arange(len(rows)) - np.searchsorted(rows, rows)
    is_top = ranks < k
    top = rows[is_top], ranks[is_top]
    top_tokens = np.zeros((len(scores), k), np.int32)
    top_scores = np.zeros((len(scores), k), np.float32)
    top_tokens[top] = items[order][is_top]
    top_scores[top] = values[order][is_top]
    return top_tokens, top_scores


def _lower_bounds(scores: np.ndarray, k: int) -> np.ndarray:
    """Return bounds that each row's k-th best score exceeds: float32 [n].

    They are just below the k-th greatest maximum of blocks of columns. A partition would be exact, but with thousands
    of equal zeros numpy's takes 19 ms where this takes 0.4 ms.
    """
    width = scores.shape[1]
    maxima = np.maximum.reduceat(scores, np.arange(0, width, max(1, width // (8 * k))), axis=1)
    if maxima.shape[1] < k:
        return np.zeros(len(scores), np.float32)
    bounds = np.sort(maxima, axis=1)[:, -k]
    return np.maximum(np.nextafter(bounds, np.float32(-np.inf)), 0)
