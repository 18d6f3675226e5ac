"""The `hstu` strategy: a trained model ranks the entire catalogue."""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from pipeline.artifact import Artifact
from pipeline.backends.choice import make_encoder
from pipeline.backends.encoder import Encoder, GraphOptions
from pipeline.backends.head_scorer import HeadScorer
from pipeline.backends.item_table import ItemTable
from pipeline.backends.torch import TorchModel
from pipeline.features.affinity import AffinityIndex
from pipeline.features.event_features import EncoderInputs, encoder_inputs
from pipeline.features.labels import engaged
from pipeline.features.visit_frequency import latest_visit_frequency
from pipeline.items.catalogue import Catalogue
from pipeline.items.vocabulary import UNKNOWN
from pipeline.records import EventSchema, Histories
from pipeline.serving.exclusion import Exclusion
from pipeline.serving.rerank import RerankWeights, blend_scores, log_item_values, median_value
from pipeline.serving.retrieval import FusedRetrieval, Retrieval, make_retrieval
from pipeline.serving.strategy import RankedItems
from pipeline.serving.warm_up import synthetic_histories, warm_up_lengths

NOT_RERANKED = RerankWeights()


@dataclass(slots=True)
class _Features:
    """A batch of n users as the model reads it.

    full: inputs of the full histories; recent: of their newest `max_events` events; is_empty: bool [n], no events
    """

    histories: Histories
    full: EncoderInputs
    recent: EncoderInputs
    is_empty: np.ndarray


@dataclass(slots=True)
class _Candidates:
    """Retrieved items, best first: rows int32 [n, c] of the item table, 0 = none; scores float32 [n, c].

    source: as in RankedItems
    """

    rows: np.ndarray
    scores: np.ndarray
    source: np.ndarray | str


class HstuStrategy:
    """Encodes each user's history, retrieves the best items of the entire catalogue, applies the heads, reranks.

    A user without events gets the popular items of the training log.
    """

    name = "hstu"

    def __init__(
        self,
        table: ItemTable,
        encoder: Encoder,
        heads: HeadScorer,
        retrieval: Retrieval | FusedRetrieval,
        popular_rows: np.ndarray,
        schema: EventSchema,
        exclusion: Exclusion,
        rerank: RerankWeights = NOT_RERANKED,
    ) -> None:
        """Rank by these parts, which share the table. popular_rows: int [n], the training items, most popular first"""
        self._table = table
        self._encoder = encoder
        self.backend = encoder.backend
        self._heads = heads
        self._retrieval = retrieval
        self._popular_rows = popular_rows
        self._median_value = median_value(table.values)
        self._schema = schema
        self._exclusion = exclusion
        self._rerank_weights = rerank
        retrieval.block(table.blocked_rows)

    @property
    def max_events(self) -> int:
        """Number of newest events that the model reads."""
        return self._encoder.max_events

    @property
    def on_gpu(self) -> bool:
        return self._table.vectors.is_cuda

    def warm(self, item_ids: Sequence[str], graphs: GraphOptions) -> None:
        """Capture the CUDA graphs and compile every kernel, so that no batch waits.

        It ranks synthetic histories of these items in batches of all sizes up to the graphs' limits.
        """
        self._encoder.warm()
        for lengths in warm_up_lengths(graphs.max_users, self.max_events):
            self.rank(synthetic_histories(item_ids, lengths), graphs.slate_size)

    def rank(self, histories: Histories, k: int) -> RankedItems:
        """See Strategy."""
        start_s = time.perf_counter()
        features = self._extract_features(histories)
        features_s = time.perf_counter()
        states = self._encoder.encode(features.recent)
        encoded_s = time.perf_counter()
        candidates = self._retrieve(features, states, k)
        probabilities = self._predict_heads(features, states, candidates.rows)
        ranked = self._rerank(features, candidates, probabilities).first(k)
        ranked.features_ms = 1e3 * (features_s - start_s)
        ranked.encode_ms = 1e3 * (encoded_s - features_s)
        ranked.rank_ms = 1e3 * (time.perf_counter() - encoded_s)
        return ranked

    def scores(self, histories: Histories, tokens: np.ndarray) -> np.ndarray:
        """Return scores float32 [n, c] of given items (tokens int32 [n, c]); -inf for items that the model lacks.

        Higher ones rank earlier. A user without events is scored by popularity in the training log, as in `rank`.
        """
        features = self._extract_features(histories)
        states = self._encoder.encode(features.recent)
        rows = self._table.rows(tokens)
        scores = np.where(rows > UNKNOWN, self._retrieval.scores(states, rows), -np.inf)
        popularity_ranks = np.full(len(self._table), len(self._popular_rows))
        popularity_ranks[self._popular_rows] = np.arange(len(self._popular_rows))
        scores[features.is_empty] = -popularity_ranks[rows[features.is_empty]]
        return scores.astype(np.float32)

    def probabilities(self, histories: Histories, tokens: np.ndarray) -> np.ndarray:
        """Return the heads' probabilities float32 [n, k, 3] if each item (tokens int32 [n, k]) is the user's next."""
        features = self._extract_features(histories)
        states = self._encoder.encode(features.recent)
        return self._predict_heads(features, states, self._table.rows(tokens))

    def _extract_features(self, histories: Histories) -> _Features:
        self._sync_items()
        tokens, facts = self._table.look_up(histories.items)
        full = encoder_inputs(histories, self._table.rows(tokens), len(self._table), facts)
        return _Features(histories, full, full.tail(self.max_events), histories.lengths == 0)

    def _retrieve(self, features: _Features, states: Tensor, k: int) -> _Candidates:
        """Return the best items of the catalogue that are not excluded; popular ones for users without events."""
        mask = self._exclusion.mask(features.histories)
        users = features.histories.users[mask]
        item_rows = features.full.item_rows[mask]
        rows, scores = self._retrieval.top_k(states, users, item_rows, self._rerank_weights.n_candidates(k))
        empty = features.is_empty
        if not empty.any():
            return _Candidates(rows, scores, "hstu")
        popular = self._popular(rows.shape[1])
        rows[empty] = UNKNOWN
        rows[empty, : len(popular)] = popular
        scores[empty] = 0.0
        return _Candidates(rows, scores, np.where(empty[:, None], "popular", np.full(rows.shape, "hstu")))

    def _popular(self, k: int) -> np.ndarray:
        """Return the k most popular rows that may be recommended, fewer where there are none left."""
        blocked = self._table.blocked
        examined = k
        while True:
            rows = self._popular_rows[:examined]
            rows = rows[~blocked[rows]]
            if len(rows) >= k or examined >= len(self._popular_rows):
                return rows[:k]
            examined *= 2

    def _predict_heads(self, features: _Features, states: Tensor, rows: np.ndarray) -> np.ndarray:
        """Return probabilities float32 [n, k, 3] of item rows int32 [n, k]."""
        histories = features.histories
        item_rows = features.full.item_rows
        index = AffinityIndex.from_histories(
            histories, item_rows, self._table.facts(item_rows), engaged(histories, self._schema)
        )
        affinity = index.latest(rows, self._table.facts(rows.ravel()))
        visit_frequency = latest_visit_frequency(histories)
        return self._heads.probabilities(states, features.recent, visit_frequency, affinity, rows)

    def _rerank(self, features: _Features, candidates: _Candidates, probabilities: np.ndarray) -> RankedItems:
        """Order the candidates by the rerank weights; popular items of users without events keep their order."""
        rows = candidates.rows
        scores = candidates.scores
        if self._rerank_weights.enabled:
            log_values = log_item_values(self._table.values[rows], self._median_value)
            blended = blend_scores(scores, probabilities, log_values, self._rerank_weights)
            scores = np.where(features.is_empty[:, None], scores, blended)
            order = np.argsort(-scores, axis=1, kind="stable")
            rows = np.take_along_axis(rows, order, axis=1)
            scores = np.take_along_axis(scores, order, axis=1)
            probabilities = np.take_along_axis(probabilities, order[..., None], axis=1)
        tokens = self._table.tokens(rows)
        return RankedItems(tokens, scores, probabilities, candidates.source, values=self._table.values[rows])

    def _sync_items(self) -> None:
        """Apply the catalogue's and the vocabulary's changes since the last batch."""
        change = self._table.sync()
        if change.rewritten.size:
            self._encoder.update_items(change.rewritten)
            self._retrieval.set_vectors(self._table.vectors, change.rewritten)
        if change.blocked:
            self._retrieval.block(self._table.blocked_rows)


def load_hstu_strategy(
    artifact: Artifact,
    catalogue: Catalogue,
    exclusion: Exclusion,
    device: str = "auto",
    threads: int = 0,
    rerank: RerankWeights = NOT_RERANKED,
    graphs: GraphOptions | None = None,
) -> HstuStrategy:
    """Load the artifact's model on the device.

    catalogue: its vocabulary has the artifact's items, in any order; other items are used if they have records.
    graphs: on a GPU, encode and retrieve with the kernels; None: torch, in float32.

    Raises ArtifactError when the vocabulary lacks one of the artifact's items, DeviceError.
    """
    model = TorchModel.from_artifact(artifact, device, threads)
    table = ItemTable(artifact, catalogue, model.hstu.items, model.device)
    popular = np.argsort(-artifact.counters["popularity"], kind="stable")
    return HstuStrategy(
        table,
        make_encoder(model.hstu, table, graphs),
        HeadScorer(model.hstu, model.heads, table),
        make_retrieval(table.vectors, artifact.config.temperature, fused=graphs is not None),
        table.rows_of_hashes(artifact.counters["items"][popular]),
        artifact.manifest.schema,
        exclusion,
        rerank,
    )
