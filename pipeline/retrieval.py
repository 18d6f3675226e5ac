"""The k best items of the whole catalogue for each user state, without the items that are excluded."""

import numpy as np
import torch
from torch import Tensor

from pipeline.vocabulary import UNKNOWN

CHUNK_SCORES = 1 << 24  # 64 MiB of float32 scores at a time


class Retrieval:
    """Exact maximum inner product over the item table, on the table's device."""

    def __init__(self, table: Tensor) -> None:
        """table: float32 [items, width]; row 0 is no item."""
        self._columns = table.T.contiguous()
        self.bar(np.array([UNKNOWN]))

    def bar(self, rows: np.ndarray) -> None:
        """From now on these rows of the table, int64 [n], are nobody's; row 0 is one of them."""
        self._barred = torch.from_numpy(rows).to(self._columns.device)

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
        logits[:, self._barred] = -torch.inf
        device = logits.device
        logits[excluded[0].to(device), excluded[1].to(device)] = -torch.inf
        best, index = logits.topk(k, dim=1)
        return best.cpu().numpy(), index.cpu().numpy()
