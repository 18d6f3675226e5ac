"""The `hstu` rung: a trained model's answer."""

import time

import numpy as np
import torch
from torch import Tensor

from pipeline.artifact import Artifact
from pipeline.backends.torch import TorchEncoder
from pipeline.exclusion import Exclusion
from pipeline.features import inputs_of
from pipeline.records import Histories
from pipeline.retrieval import Retrieval
from pipeline.strategy import Ranked
from pipeline.tablerows import TableRows
from pipeline.vocabulary import UNKNOWN, Vocabulary


class HstuRung:
    """HSTU's state of each user, the nearest items of the whole catalogue, the heads on those.

    A user without events gets what was popular in the training log.
    """

    name = "hstu"

    def __init__(
        self, artifact: Artifact, vocabulary: Vocabulary, exclusion: Exclusion, device: str = "auto", threads: int = 0
    ) -> None:
        """The vocabulary has the artifact's items, in any order; others are unknown to the model.

        Raises ArtifactError where it had no room for one of them.
        """
        self._encoder = TorchEncoder(artifact, device, threads)
        self._retrieval = Retrieval(self._encoder.table)
        self._vocabulary, self._exclusion = vocabulary, exclusion
        self._table = TableRows(vocabulary, artifact.item_ids)
        popular = np.argsort(-artifact.counters["popularity"], kind="stable")
        self._popular = self._rows_of(artifact.counters["items"][popular])

    def rank(self, histories: Histories, k: int) -> Ranked:
        start = time.perf_counter()
        history, excluded = self._rows_of(histories.items), self._exclusion.mask(histories)
        pairs = histories.users[excluded], history[excluded]
        inputs = inputs_of(histories, history, len(self._encoder.table)).tail(self._encoder.max_events)
        featured = time.perf_counter()
        states = self._encoder.encode(inputs)
        encoded = time.perf_counter()
        rows, scores = self._retrieval.top_k(states, *pairs, k)
        source = self._fill_empty(histories, rows, scores)
        heads = self._encoder.heads(states, rows)
        ranked = time.perf_counter()
        times_ms = 1e3 * np.diff([start, featured, encoded, ranked])
        return Ranked(self._table.tokens(rows), scores, heads, source, *times_ms.tolist())

    def scores(self, histories: Histories, tokens: np.ndarray) -> np.ndarray:
        """float32 [n, c] of chosen items, int32 [n, c]: a row's higher ones rank earlier; -inf: the model knows none.

        A user without events has what was popular in the training log, as in `rank`.
        """
        rows = self._table.rows(tokens)
        items = self._encoder.table[torch.from_numpy(rows).to(self._encoder.device)]
        logits = torch.einsum("nd,ncd->nc", self._states(histories), items).cpu().numpy()
        scores = np.where(rows > UNKNOWN, logits, -np.inf)
        empty = histories.lengths == 0
        places = np.full(len(self._encoder.table), len(self._popular))
        places[self._popular] = np.arange(len(self._popular))
        scores[empty] = -places[rows[empty]]
        return scores.astype(np.float32)

    def odds(self, histories: Histories, tokens: np.ndarray) -> np.ndarray:
        """What the heads say of these items, int32 [n, k], as each user's next: float32 [n, k, 3]."""
        return self._encoder.heads(self._states(histories), self._table.rows(tokens))

    def _states(self, histories: Histories) -> Tensor:
        inputs = inputs_of(histories, self._rows_of(histories.items), len(self._encoder.table))
        return self._encoder.encode(inputs.tail(self._encoder.max_events))

    def _rows_of(self, hashes: np.ndarray) -> np.ndarray:
        """uint64 [n] item hashes -> int32 [n] rows of the model's table"""
        return self._table.rows(self._vocabulary.tokens(hashes))

    def _fill_empty(self, histories: Histories, rows: np.ndarray, scores: np.ndarray) -> np.ndarray | str:
        empty = histories.lengths == 0
        if not empty.any():
            return "hstu"
        popular = self._popular[: rows.shape[1]]
        rows[empty], scores[empty] = 0, 0.0
        rows[empty, : len(popular)] = popular
        return np.where(empty[:, None], "popular", np.full(rows.shape, "hstu"))
