"""The `hstu` rung: a trained model's answer."""

import time

import numpy as np
import torch
from torch import Tensor

from pipeline.artifact import Artifact
from pipeline.backends.torch import TorchEncoder
from pipeline.catalogue import Catalogue
from pipeline.exclusion import Exclusion
from pipeline.features import Inputs, inputs_of
from pipeline.records import Histories
from pipeline.retrieval import Retrieval
from pipeline.strategy import Ranked
from pipeline.tablerows import TableRows
from pipeline.vocabulary import UNKNOWN


class HstuRung:
    """HSTU's state of each user, the nearest items of the whole catalogue, the heads on those.

    A user without events gets what was popular in the training log.
    """

    name = "hstu"

    def __init__(
        self, artifact: Artifact, catalogue: Catalogue, exclusion: Exclusion, device: str = "auto", threads: int = 0
    ) -> None:
        """The catalogue's vocabulary has the artifact's items, in any order. Others are known by their records, those
        without one are unknown to the model.

        Raises ArtifactError where the vocabulary had no room for one of the artifact's items.
        """
        self._encoder = TorchEncoder(artifact, device, threads)
        self._retrieval = Retrieval(self._encoder.table)
        self._catalogue, self._vocabulary, self._exclusion = catalogue, catalogue.vocabulary, exclusion
        self._table, self._items, self._version = TableRows(catalogue.vocabulary, artifact.item_ids), artifact.items, 0
        popular = np.argsort(-artifact.counters["popularity"], kind="stable")
        self._popular = self._rows_of(artifact.counters["items"][popular])

    def rank(self, histories: Histories, k: int) -> Ranked:
        start = time.perf_counter()
        self._learn()
        inputs, excluded = self._inputs(histories), self._exclusion.mask(histories)
        pairs = histories.users[excluded], inputs.tokens[excluded]
        inputs = inputs.tail(self._encoder.max_events)
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
        states = self._states(histories)
        rows = self._table.rows(tokens)
        items = self._encoder.table[torch.from_numpy(rows).to(self._encoder.device)]
        logits = torch.einsum("nd,ncd->nc", states, items).cpu().numpy()
        scores = np.where(rows > UNKNOWN, logits, -np.inf)
        empty = histories.lengths == 0
        places = np.full(len(self._encoder.table), len(self._popular))
        places[self._popular] = np.arange(len(self._popular))
        scores[empty] = -places[rows[empty]]
        return scores.astype(np.float32)

    def odds(self, histories: Histories, tokens: np.ndarray) -> np.ndarray:
        """What the heads say of these items, int32 [n, k], as each user's next: float32 [n, k, 3]."""
        states = self._states(histories)
        return self._encoder.heads(states, self._table.rows(tokens))

    def _states(self, histories: Histories) -> Tensor:
        self._learn()
        return self._encoder.encode(self._inputs(histories).tail(self._encoder.max_events))

    def _inputs(self, histories: Histories) -> Inputs:
        """Of whole histories; a token is a row of the model's table."""
        tokens = self._vocabulary.tokens(histories.items)
        return inputs_of(histories, self._table.rows(tokens), len(self._encoder.table), self._catalogue.facts(tokens))

    def _learn(self) -> None:
        """Rows for the items whose records have come since the last batch and that training did not know."""
        if self._catalogue.version == self._version:
            return
        tokens = np.flatnonzero(self._catalogue.changed > self._version)
        self._version = self._catalogue.version
        new = tokens[self._table.rows(tokens) == UNKNOWN]
        if len(new) and self._encoder.reads_contents:
            self._encoder.extend(self._items.of_new(self._catalogue, new))
            self._table.extend(new)
            self._retrieval = Retrieval(self._encoder.table)

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
