"""Exact top-k of the entire catalogue for each user state, without excluded and blocked items."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.launch import next_power_of_2
from kernels.sequence_recommendation_interaction.op import (
    MAX_K,
    MAX_ROW_BYTES,
    candidate_interaction,
    sequence_recommendation_interaction,
)
from pipeline.backends.item_table import GROWTH
from pipeline.items.vocabulary import UNKNOWN

CHUNK_SCORES = 1 << 24  # 64 MiB of float32 scores at a time
RESCORE_EXTRA = 64  # candidates beyond k that are rescored in float32
MIN_CANDIDATES = 128  # kernels are compiled for powers of two, and most slates need no more
# With fewer scores, computing all of them in memory is faster: the operator's launches take longer than the product
# (`tests.benchmarks.retrieval`).
FUSED_MIN_SCORES = 16_000_000


def make_retrieval(vectors: Tensor, temperature: float, fused: bool) -> "Retrieval | FusedRetrieval":
    """Return the retrieval from item vectors [items, width]; with `fused`, by the operator where it supports them."""
    supported = vectors.is_cuda and vectors.shape[1] * 4 <= MAX_ROW_BYTES
    return FusedRetrieval(vectors, temperature) if fused and supported else Retrieval(vectors, temperature)


class FusedRetrieval:
    """The interface of Retrieval on this project's operator, which never holds the scores of the full catalogue.

    Half precision finds k + 64 candidates or more, which float32 then rescores. One of the k best can be missed only
    where 64 other items score so close to it that half precision ranks them before it.
    """

    def __init__(self, vectors: Tensor, temperature: float = 1.0) -> None:
        """See Retrieval.__init__."""
        self._temperature = temperature
        self._vectors = vectors
        self._in_memory = Retrieval(vectors, temperature)
        self._half = self._half_table(vectors, len(vectors))
        self.block(np.array([UNKNOWN]))

    def set_vectors(self, vectors: Tensor, rows: np.ndarray) -> None:
        """See Retrieval.set_vectors."""
        self._vectors = vectors
        self._in_memory.set_vectors(vectors, rows)
        if len(vectors) > len(self._half):
            self._half = self._half_table(self._half, int(GROWTH * len(vectors)))
        index = torch.from_numpy(rows).to(vectors.device)
        self._half[index] = vectors[index].to(self._half.dtype)

    def block(self, rows: np.ndarray) -> None:
        """See Retrieval.block."""
        self._in_memory.block(rows)
        self._eligible = torch.arange(len(self._half), device=self._vectors.device) < len(self._vectors)
        self._eligible[torch.from_numpy(rows).to(self._vectors.device)] = False

    def top_k(self, states: Tensor, users: np.ndarray, item_rows: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """See Retrieval.top_k."""
        n_candidates = max(MIN_CANDIDATES, next_power_of_2(k + RESCORE_EXTRA))
        if n_candidates > MAX_K or len(states) * len(self._vectors) < FUSED_MIN_SCORES:
            return self._in_memory.top_k(states, users, item_rows, k)
        states = states / self._temperature
        seen, seen_offsets = self._excluded_by_user(len(states), users, item_rows)
        _, candidates = sequence_recommendation_interaction(
            states.to(self._half.dtype),
            self._half,
            n_candidates,
            seen=seen,
            seen_offsets=seen_offsets,
            eligible=self._eligible,
            check_values=False,
        )
        scores = candidate_interaction(states, self._vectors, candidates, check_values=False)
        scores, order = scores.sort(dim=1, descending=True, stable=True)
        found = candidates.gather(1, order[:, :k]).clamp(min=UNKNOWN)
        return found.int().cpu().numpy(), scores[:, :k].cpu().numpy()

    @staticmethod
    def _half_table(vectors: Tensor, rows: int) -> Tensor:
        """Return the vectors in half precision with room for this many rows, zeros at its end: [>= rows, width].

        It has a multiple of 16 rows: kernels specialise on divisibility by 16, so a new item does not recompile them.
        """
        return F.pad(vectors.bfloat16(), (0, 0, 0, rows + -rows % 16 - len(vectors)))

    def scores(self, states: Tensor, item_rows: np.ndarray) -> np.ndarray:
        """See Retrieval.scores."""
        return self._in_memory.scores(states, item_rows)

    def _excluded_by_user(self, n_users: int, users: np.ndarray, item_rows: np.ndarray) -> tuple[Tensor, Tensor]:
        """Return the excluded rows, ascending per user, and the users' offsets, [n_users + 1]."""
        items = len(self._vectors)
        device = self._vectors.device
        pairs = torch.from_numpy(users.astype(np.int64) * items + item_rows).to(device).sort().values
        return pairs % items, torch.searchsorted(pairs, torch.arange(n_users + 1, device=device) * items)


class Retrieval:
    """Exact maximum inner product over the item table, on the table's device."""

    def __init__(self, vectors: Tensor, temperature: float = 1.0) -> None:
        """vectors: float32 [items, width], of which a view is kept; row 0 is not an item. Scores are divided by the
        temperature."""
        self._vectors = vectors
        self._temperature = temperature
        self.block(np.array([UNKNOWN]))

    def set_vectors(self, vectors: Tensor, rows: np.ndarray) -> None:
        """Retrieve from these vectors from now on, of which only those of `rows`, int64 [n], are new."""
        self._vectors = vectors

    def block(self, rows: np.ndarray) -> None:
        """Keep these rows of the table, int64 [n], which must include row 0, out of all results from now on."""
        self._blocked = torch.from_numpy(rows).to(self._vectors.device)

    def top_k(self, states: Tensor, users: np.ndarray, item_rows: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Return each user's best rows int32 [n, k] and their scores float32 [n, k], best first.

        Where no item is left the row is 0 and the score -inf.

        states: [n, width]; users, item_rows: int [m], excluded pairs
        """
        n = len(states)
        items = len(self._vectors)
        found = np.zeros((n, k), np.int32)
        scores = np.full((n, k), -np.inf, np.float32)
        item_rows = item_rows.astype(np.int64)
        step = max(1, CHUNK_SCORES // items)
        for start in range(0, n, step):
            chunk = (users >= start) & (users < start + step) if n > step else slice(None)
            excluded = torch.from_numpy(users[chunk] - start), torch.from_numpy(item_rows[chunk])
            best, index = self._top_k_of_chunk(states[start : start + step], excluded, min(k, items))
            scores[start : start + step, : best.shape[1]] = best
            found[start : start + step, : best.shape[1]] = np.where(np.isfinite(best), index, UNKNOWN)
        return found, scores

    def scores(self, states: Tensor, item_rows: np.ndarray) -> np.ndarray:
        """Return each user's scores of given rows of the table: float32 [n, c]. item_rows: int [n, c]"""
        items = self._vectors[torch.from_numpy(item_rows).to(self._vectors.device)]
        return torch.einsum("nd,ncd->nc", states / self._temperature, items).cpu().numpy()

    def _top_k_of_chunk(self, states: Tensor, excluded: tuple[Tensor, Tensor], k: int) -> tuple[np.ndarray, np.ndarray]:
        scores = (states / self._temperature) @ self._vectors.T  # [n, items]
        scores[:, self._blocked] = -torch.inf
        users, item_rows = (index.to(scores.device) for index in excluded)
        scores[users, item_rows] = -torch.inf
        best, index = scores.topk(k, dim=1)
        return best.cpu().numpy(), index.cpu().numpy()
