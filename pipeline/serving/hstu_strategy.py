"""The `hstu` strategy: a trained model ranks the entire catalogue."""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pipeline.artifact import Artifact
from pipeline.backends.encoder import GraphOptions
from pipeline.backends.torch import TorchEncoder
from pipeline.errors import DeviceError
from pipeline.features.affinity import AffinityIndex
from pipeline.features.event_features import EncoderInputs, encoder_inputs
from pipeline.features.labels import engaged
from pipeline.features.visit_frequency import latest_visit_frequency
from pipeline.items.catalogue import Catalogue, ItemFacts
from pipeline.items.row_index import RowIndex
from pipeline.items.vocabulary import UNKNOWN
from pipeline.records import Histories
from pipeline.serving.exclusion import Exclusion
from pipeline.serving.rerank import RerankWeights, blend_scores, log_item_values
from pipeline.serving.retrieval import make_retrieval
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
        artifact: Artifact,
        catalogue: Catalogue,
        exclusion: Exclusion,
        device: str = "auto",
        threads: int = 0,
        rerank: RerankWeights = NOT_RERANKED,
        graphs: GraphOptions | None = None,
    ) -> None:
        """Load the artifact's model on the device.

        catalogue: its vocabulary has the artifact's items, in any order; other items are used if they have records.
        graphs: on a GPU, encode and retrieve with the kernels; None: torch, in float32.

        Raises ArtifactError when the vocabulary lacks one of the artifact's items.
        """
        self._encoder = TorchEncoder(artifact, device, threads, graphs)
        self._graphs = graphs
        self._retrieval = make_retrieval(self._encoder.table, fused=graphs is not None)
        self._catalogue = catalogue
        self._vocabulary = catalogue.vocabulary
        self._exclusion = exclusion
        self._row_index = RowIndex(catalogue.vocabulary, artifact.item_ids)
        self._metadata = artifact.metadata
        self._n_trained = len(self._row_index)  # rows from this one on are of items that came after training
        self._synced_version = 0  # of the catalogue
        popular = np.argsort(-artifact.counters["popularity"], kind="stable")
        self._popular_rows = self._rows_of_hashes(artifact.counters["items"][popular])
        self._rerank_weights = rerank
        self._schema = artifact.manifest.schema
        self._set_values(self._trained_values(artifact))
        self._block_rows()

    @property
    def max_events(self) -> int:
        """Number of newest events that the model reads."""
        return self._encoder.max_events

    def warm(self, item_ids: Sequence[str]) -> int:
        """Capture the CUDA graphs and compile every kernel, so that no batch waits; return the number of graphs.

        It ranks synthetic histories of these items in batches of all sizes. On a CPU, or without graphs, it does
        nothing. Raises DeviceError when the kernels do not run.
        """
        if self._graphs is None or self._encoder.device.type != "cuda":
            return 0
        try:
            n_graphs = self._encoder.warm()
            for lengths in warm_up_lengths(self._graphs.max_users, self.max_events):
                self.rank(synthetic_histories(item_ids, lengths), self._graphs.slate_size)
        except Exception as error:  # from a compiler, a driver, or for lack of memory
            reason = str(error).partition("\n")[0]
            raise DeviceError(
                f"pipeline.device '{self._encoder.device}': the kernels do not run on this card: {reason}; set"
                " pipeline.custom_kernels = false, or less pipeline.cuda_graph_mib if its memory is too small"
            ) from error
        return n_graphs

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
        rows = self._row_index.rows(tokens)
        items = self._encoder.table[torch.from_numpy(rows).to(self._encoder.device)]
        logits = torch.einsum("nd,ncd->nc", states, items).cpu().numpy()
        scores = np.where(rows > UNKNOWN, logits, -np.inf)
        popularity_ranks = np.full(len(self._encoder.table), len(self._popular_rows))
        popularity_ranks[self._popular_rows] = np.arange(len(self._popular_rows))
        scores[features.is_empty] = -popularity_ranks[rows[features.is_empty]]
        return scores.astype(np.float32)

    def probabilities(self, histories: Histories, tokens: np.ndarray) -> np.ndarray:
        """Return the heads' probabilities float32 [n, k, 3] if each item (tokens int32 [n, k]) is the user's next."""
        features = self._extract_features(histories)
        states = self._encoder.encode(features.recent)
        return self._predict_heads(features, states, self._row_index.rows(tokens))

    def _extract_features(self, histories: Histories) -> _Features:
        self._sync_items()
        tokens = self._vocabulary.tokens(histories.items)
        item_rows = self._row_index.rows(tokens)
        full = encoder_inputs(histories, item_rows, len(self._encoder.table), self._catalogue.facts(tokens))
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
        popular = self._recommendable_popular[: rows.shape[1]]
        rows[empty] = UNKNOWN
        rows[empty, : len(popular)] = popular
        scores[empty] = 0.0
        return _Candidates(rows, scores, np.where(empty[:, None], "popular", np.full(rows.shape, "hstu")))

    def _predict_heads(self, features: _Features, states: Tensor, rows: np.ndarray) -> np.ndarray:
        """Return probabilities float32 [n, k, 3] of item rows int32 [n, k]."""
        histories = features.histories
        item_rows = features.full.item_rows
        index = AffinityIndex.from_histories(
            histories, item_rows, self._facts(item_rows), engaged(histories, self._schema)
        )
        affinity = index.latest(rows, self._facts(rows.ravel()))
        visit_frequency = latest_visit_frequency(histories)
        return self._encoder.head_probabilities(states, features.recent, visit_frequency, affinity, rows)

    def _rerank(self, features: _Features, candidates: _Candidates, probabilities: np.ndarray) -> RankedItems:
        """Order the candidates by the rerank weights; popular items of users without events keep their order."""
        rows = candidates.rows
        scores = candidates.scores
        if self._rerank_weights.enabled:
            blended = blend_scores(scores, probabilities, self._log_values[rows], self._rerank_weights)
            scores = np.where(features.is_empty[:, None], scores, blended)
            order = np.argsort(-scores, axis=1, kind="stable")
            rows = np.take_along_axis(rows, order, axis=1)
            scores = np.take_along_axis(scores, order, axis=1)
            probabilities = np.take_along_axis(probabilities, order[..., None], axis=1)
        tokens = self._row_index.tokens(rows)
        return RankedItems(tokens, scores, probabilities, candidates.source, values=self._values[rows])

    def _sync_items(self) -> None:
        """Apply the catalogue's and the vocabulary's changes since the last batch."""
        moved_rows = self._row_index.sync()
        version = self._catalogue.version
        if version != self._synced_version and self._encoder.reads_content:
            self._add_item_vectors(np.flatnonzero(self._catalogue.changed_at > self._synced_version))
        self._synced_version = version
        if moved_rows.size:
            is_readmitted = self._row_index.tokens(moved_rows) != UNKNOWN
            self._restore_facts(moved_rows[(moved_rows < self._n_trained) & is_readmitted])
        if moved_rows.size or self._blocked_version != self._vocabulary.version:
            self._block_rows()

    def _restore_facts(self, rows: np.ndarray) -> None:
        """Restore the artifact's metadata of readmitted training items (rows int64 [n]) until they have a record."""
        facts = {name: column[rows - 1] for name, column in self._metadata.facts.items()}
        self._catalogue.restore_facts(self._row_index.tokens(rows), facts)

    def _add_item_vectors(self, tokens: np.ndarray) -> None:
        """Compute vectors of items with new records (tokens int64 [n]) that came after training.

        A vector is a function of the artifact and the newest record, whatever came before.
        """
        rows = self._row_index.rows(tokens).astype(np.int64)
        is_new = rows == UNKNOWN
        rows[is_new] = self._row_index.allocate(tokens[is_new])
        came_after_training = rows >= self._n_trained
        if not came_after_training.any():
            return
        content = self._metadata.new_item_content(self._catalogue, tokens[came_after_training])
        self._encoder.set_item_vectors(rows[came_after_training], content)
        self._retrieval = make_retrieval(self._encoder.table, fused=self._graphs is not None)
        self._set_values(np.append(self._values, np.zeros(len(self._row_index) - len(self._values), np.float32)))
        self._block_rows()

    def _block_rows(self) -> None:
        """Keep delisted and evicted items out of retrieval and out of the popular items."""
        self._blocked_version = self._vocabulary.version
        blocked = self._row_index.blocked_rows
        self._retrieval.block(blocked)
        self._recommendable_popular = self._popular_rows[~np.isin(self._popular_rows, blocked)]

    def _set_values(self, values: np.ndarray) -> None:
        """Set the items' values, float32 [rows of the table], 0 = unknown."""
        self._values = values
        self._log_values = log_item_values(values)

    def _trained_values(self, artifact: Artifact) -> np.ndarray:
        """Return the artifact's item values, float32 [rows of the table]."""
        values = np.zeros(len(self._encoder.table), np.float32)
        values[self._rows_of_hashes(artifact.counters["items"])] = artifact.counters["values"]
        values[UNKNOWN] = 0
        return values

    def _rows_of_hashes(self, hashes: np.ndarray) -> np.ndarray:
        """Return the rows of the item table, int32 [n], of item hashes, uint64 [n]."""
        return self._row_index.rows(self._vocabulary.tokens(hashes))

    def _facts(self, rows: np.ndarray) -> ItemFacts:
        return self._catalogue.facts(self._row_index.tokens(rows))
