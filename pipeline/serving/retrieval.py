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
from pipeline.items.vocabulary import UNKNOWN

CHUNK_SCORES = 1 << 24  # 64 MiB of float32 scores at a time
RESCORE_EXTRA = 64  # candidates beyond k that are rescored in float32
MIN_CANDIDATES = 128  # kernels are compiled for powers of two, and most slates need no more
# With fewer scores, computing all of them in memory is faster: the operator's launches take longer than the product
# (`tests.benchmarks.retrieval`).
FUSED_MIN_SCORES = 16_000_000


def make_retrieval(table: Tensor, fused: bool) -> "Retrieval | FusedRetrieval":
    """Return the retrieval from `table` [items, width]; with `fused`, by the operator where it supports the table."""
    supported = table.is_cuda and table.shape[1] * 4 <= MAX_ROW_BYTES
    return FusedRetrieval(table) if fused and supported else Retrieval(table)


class FusedRetrieval:
    """The interface of Retrieval on this project's operator, which never holds the scores of the full catalogue.

    Half precision finds k + 64 candidates or more, which float32 then rescores. One of the k best can be missed only
    where 64 other items score so close to it that half precision ranks them before it.
    """

    def __init__(self, table: Tensor, dtype: torch.dtype = torch.bfloat16) -> None:
        """table: float32 [items, width]; row 0 is not an item."""
        self._table = table
        self._in_memory = Retrieval(table)
        # A multiple of 16 rows: kernels specialise on divisibility by 16, so a new item does not recompile them.
        self._half = F.pad(table.to(dtype), (0, 0, 0, -len(table) % 16))
        self.block(np.array([UNKNOWN]))

    def block(self, rows: np.ndarray) -> None:
        """See Retrieval.block."""
        self._in_memory.block(rows)
        self._eligible = torch.arange(len(self._half), device=self._table.device) < len(self._table)
        self._eligible[torch.from_numpy(rows).to(self._table.device)] = False

    def top_k(self, states: Tensor, users: np.ndarray, item_rows: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """See Retrieval.top_k."""
        n_candidates = max(MIN_CANDIDATES, next_power_of_2(k + RESCORE_EXTRA))
        if n_candidates > MAX_K or len(states) * len(self._table) < FUSED_MIN_SCORES:
            return self._in_memory.top_k(states, users, item_rows, k)
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
        scores = candidate_interaction(states, self._table, candidates, check_values=False)
        scores, order = scores.sort(dim=1, descending=True, stable=True)
        found = candidates.gather(1, order[:, :k]).clamp(min=UNKNOWN)
        return found.int().cpu().numpy(), scores[:, :k].cpu().numpy()

    def _excluded_by_user(self, n_users: int, users: np.ndarray, item_rows: np.ndarray) -> tuple[Tensor, Tensor]:
        """Return the excluded rows within the table, ascending per user, and the users' offsets, [n_users + 1]."""
        items = len(self._table)
        device = self._table.device
        inside = item_rows < items
        pairs = torch.from_numpy(users[inside].astype(np.int64) * items + item_rows[inside]).to(device).sort().values
        return pairs % items, torch.searchsorted(pairs, torch.arange(n_users + 1, device=device) * items)


class Retrieval:
    """Exact maximum inner product over the item table, on the table's device."""

    def __init__(self, table: Tensor) -> None:
        """table: float32 [items, width]; row 0 is not an item."""
        self._columns = table.T if table.is_cuda else table.T.contiguous()
        self.block(np.array([UNKNOWN]))

    def block(self, rows: np.ndarray) -> None:
        """Keep these rows of the table, int64 [n], which must include row 0, out of all results from now on."""
        self._blocked = torch.from_numpy(rows).to(self._columns.device)

    def top_k(self, states: Tensor, users: np.ndarray, item_rows: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Return each user's best rows int32 [n, k] and their scores float32 [n, k], best first.

        Where no item is left the row is 0 and the score -inf.

        states: [n, width]; users, item_rows: int [m], excluded pairs (rows after the table's end are ignored)
        """
        n = len(states)
        items = self._columns.shape[1]
        found = np.zeros((n, k), np.int32)
        scores = np.full((n, k), -np.inf, np.float32)
        inside = item_rows < items
        users = users[inside]
        item_rows = item_rows[inside].astype(np.int64)
        step = max(1, CHUNK_SCORES // items)
        for start in range(0, n, step):
            chunk = (users >= start) & (users < start + step) if n > step else slice(None)
            excluded = torch.from_numpy(users[chunk] - start), torch.from_numpy(item_rows[chunk])
            best, index = self._top_k_of_chunk(states[start : start + step], excluded, min(k, items))
            scores[start : start + step, : best.shape[1]] = best
            found[start : start + step, : best.shape[1]] = np.where(np.isfinite(best), index, UNKNOWN)
        return found, scores

    def _top_k_of_chunk(self, states: Tensor, excluded: tuple[Tensor, Tensor], k: int) -> tuple[np.ndarray, np.ndarray]:
        scores = states @ self._columns  # [n, items]
        scores[:, self._blocked] = -torch.inf
        users, item_rows = (index.to(scores.device) for index in excluded)
        scores[users, item_rows] = -torch.inf
        best, index = scores.topk(k, dim=1)
        return best.cpu().numpy(), index.cpu().numpy()
