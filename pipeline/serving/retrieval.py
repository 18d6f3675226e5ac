"""The k best items of the whole catalogue for each user state, without the items that are excluded."""

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
RESCORE_EXTRA = 64  # candidates beyond k that are scored anew
MIN_CANDIDATES = 128  # candidates: kernels are compiled for powers of two, and most slates need no more
# Fewer scores than this are faster all in memory: the operator's launches take longer than the product
# (`tests.benchmarks.retrieval`).
FUSED_MIN_SCORES = 16_000_000


def make_retrieval(table: Tensor, fused: bool) -> "Retrieval | FusedRetrieval":
    """table: float32 [items, width]; row 0 is no item. fused: by the operator, where it can."""
    known = table.is_cuda and table.shape[1] * 4 <= MAX_ROW_BYTES
    return FusedRetrieval(table) if fused and known else Retrieval(table)


class FusedRetrieval:
    """As Retrieval, by this project's operator: no scores of the whole catalogue in memory.

    Half precision finds k and some more, whose scores are then those of float32: an item whose score is among the k
    best by less than half precision can tell may be missed, if 64 others lie between.
    """

    def __init__(self, table: Tensor, dtype: torch.dtype = torch.bfloat16) -> None:
        self._table, self._plain = table, Retrieval(table)
        # The kernels are compiled for a number of rows that 16 divides, and not anew when an item comes.
        self._half = F.pad(table.to(dtype), (0, 0, 0, -len(table) % 16))
        self.block(np.array([UNKNOWN]))

    def block(self, rows: np.ndarray) -> None:
        """See Retrieval."""
        self._plain.block(rows)
        self._eligible = torch.arange(len(self._half), device=self._table.device) < len(self._table)
        self._eligible[torch.from_numpy(rows).to(self._table.device)] = False

    def top_k(self, states: Tensor, rows: np.ndarray, tokens: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """See Retrieval."""
        wanted = max(MIN_CANDIDATES, next_power_of_2(k + RESCORE_EXTRA))
        if wanted > MAX_K or len(states) * len(self._table) < FUSED_MIN_SCORES:
            return self._plain.top_k(states, rows, tokens, k)
        seen, offsets = self._seen(len(states), rows, tokens)
        _, candidates = sequence_recommendation_interaction(
            states.to(self._half.dtype), self._half, wanted, seen=seen, seen_offsets=offsets,
            eligible=self._eligible, check_values=False,
        )  # fmt: skip
        scores = candidate_interaction(states, self._table, candidates, check_values=False)
        scores, order = scores.sort(dim=1, descending=True, stable=True)
        found = candidates.gather(1, order[:, :k]).clamp(min=UNKNOWN)
        return found.int().cpu().numpy(), scores[:, :k].cpu().numpy()

    def _seen(self, users: int, rows: np.ndarray, tokens: np.ndarray) -> tuple[Tensor, Tensor]:
        """The pairs within the table by user, ascending, and where each user's begin."""
        items, device = len(self._table), self._table.device
        within = tokens < items
        pairs = torch.from_numpy(rows[within].astype(np.int64) * items + tokens[within]).to(device).sort().values
        return pairs % items, torch.searchsorted(pairs, torch.arange(users + 1, device=device) * items)


class Retrieval:
    """Exact maximum inner product over the item table, on the table's device."""

    def __init__(self, table: Tensor) -> None:
        """table: float32 [items, width]; row 0 is no item."""
        self._columns = table.T if table.is_cuda else table.T.contiguous()
        self.block(np.array([UNKNOWN]))

    def block(self, rows: np.ndarray) -> None:
        """From now on these rows of the table, int64 [n], are nobody's; row 0 is one of them."""
        self._blocked = torch.from_numpy(rows).to(self._columns.device)

    def top_k(self, states: Tensor, rows: np.ndarray, tokens: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """states: [n, width]; rows, tokens: int [m], pairs that must not appear (tokens beyond the table are ignored).

        Returns tokens int32 [n, k] and scores float32 [n, k], best first; where the catalogue has no item left the
        token is 0 and the score -inf.
        """
        n, items = len(states), self._columns.shape[1]
        found, scores = np.zeros((n, k), np.int32), np.full((n, k), -np.inf, np.float32)
        within = tokens < items
        rows, tokens = rows[within], tokens[within].astype(np.int64)
        step = max(1, CHUNK_SCORES // items)
        for start in range(0, n, step):
            part = (rows >= start) & (rows < start + step) if n > step else slice(None)
            excluded = torch.from_numpy(rows[part] - start), torch.from_numpy(tokens[part])
            best, index = self._top(states[start : start + step], excluded, min(k, items))
            scores[start : start + step, : best.shape[1]] = best
            found[start : start + step, : best.shape[1]] = np.where(np.isfinite(best), index, UNKNOWN)
        return found, scores

    def _top(self, states: Tensor, excluded: tuple[Tensor, Tensor], k: int) -> tuple[np.ndarray, np.ndarray]:
        logits = states @ self._columns  # [n, items]
        logits[:, self._blocked] = -torch.inf
        device = logits.device
        logits[excluded[0].to(device), excluded[1].to(device)] = -torch.inf
        best, index = logits.topk(k, dim=1)
        return best.cpu().numpy(), index.cpu().numpy()
