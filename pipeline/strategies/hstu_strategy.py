"""The `hstu` strategy: a trained model ranks the entire catalogue."""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pipeline.artifact import Artifact
from pipeline.backends.choice import make_encoder
from pipeline.backends.encoder import Encoder, GraphOptions
from pipeline.backends.head_scorer import HeadScorer
from pipeline.backends.item_table import ItemTable, TableChange, TableItems
from pipeline.backends.staging import HostCopy, Staging
from pipeline.backends.timing import Mark
from pipeline.backends.torch import TorchModel
from pipeline.features.inputs import encode
from pipeline.features.labels import LabelRules
from pipeline.items.catalogue import Catalogue
from pipeline.items.vocabulary import UNKNOWN
from pipeline.records import Histories
from pipeline.strategies.exclusion import Exclusion
from pipeline.strategies.hstu_batch import DeviceBatch, PreparedBatch
from pipeline.strategies.rerank import RerankWeights, blend_scores, log_item_values, median_value
from pipeline.strategies.retrieval import FusedRetrieval, Retrieval, make_retrieval
from pipeline.strategies.strategy import RankedItems, Request, rank
from pipeline.strategies.warm_up import synthetic_histories, warm_up_lengths
from pipeline.tensors import to_device

NOT_RERANKED = RerankWeights()


@dataclass(slots=True)
class PendingBatch:
    """A launched batch. answer: tokens, scores, probabilities and values, on their way to the host"""

    prepared: PreparedBatch
    answer: HostCopy
    start: Mark
    encoded: Mark
    ranked: Mark


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
        rules: LabelRules,
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
        self._rules = rules
        self._exclusion = exclusion
        self._rerank_weights = rerank
        self._device = table.vectors.device
        self._stage = Staging(self._device)
        self._is_synced = True
        retrieval.block(table.blocked_rows)

    @property
    def max_events(self) -> int:
        """Number of newest events that the model reads."""
        return self._encoder.max_events

    @property
    def on_gpu(self) -> bool:
        return self._device.type == "cuda"

    def warm(self, item_ids: Sequence[str], graphs: GraphOptions) -> None:
        """Capture the CUDA graphs and compile every kernel, so that no batch waits.

        It ranks synthetic histories of these items in batches of all sizes up to the graphs' limits.
        """
        self._encoder.warm()
        for lengths in warm_up_lengths(graphs.max_users, self.max_events):
            rank(self, synthetic_histories(item_ids, lengths), graphs.slate_size)

    def prepare(self, request: Request) -> PreparedBatch:
        """See Strategy."""
        start_s = time.perf_counter()
        histories = request.histories
        self._sync_items()
        inputs = encode(histories, *self._table.look_up(histories.items), self._rules)
        read = inputs.events.tail(self.max_events)
        excluded = self._exclusion.mask(histories)
        popular = self._popular(self._rerank_weights.n_candidates(request.k) if (read.lengths == 0).any() else 0)
        return PreparedBatch(request, inputs, read, excluded, popular, 1e3 * (time.perf_counter() - start_s))

    @torch.inference_mode()
    def launch(self, prepared: PreparedBatch) -> PendingBatch:
        """See Strategy."""
        k = prepared.request.k
        batch = DeviceBatch.from_prepared(prepared, self._stage)
        start = Mark(self._device)
        states = self._encode(batch)
        encoded = Mark(self._device)
        rows, scores = self._retrieve(batch, states, k)
        items = self._table.items(rows)
        probabilities = self._heads.probabilities(states, batch.events, batch.heads, items.columns)
        ranked = self._rerank(batch, items, scores, probabilities, k)
        return PendingBatch(prepared, HostCopy(*ranked), start, encoded, Mark(self._device))

    def finish(self, pending: PendingBatch) -> RankedItems:
        """See Strategy."""
        tokens, scores, probabilities, values = pending.answer.wait()
        is_empty = pending.prepared.is_empty
        source = "hstu"
        if is_empty.any():
            source = np.where(is_empty[:, None], "popular", np.full(tokens.shape, "hstu"))
        return RankedItems(
            tokens=tokens,
            scores=scores,
            heads=probabilities,
            source=source,
            values=values,
            features_ms=pending.prepared.features_ms,
            encode_ms=pending.start.ms_until(pending.encoded),
            rank_ms=pending.encoded.ms_until(pending.ranked),
        )

    def close(self) -> None:
        """See Strategy."""
        self._encoder.close()

    @torch.inference_mode()
    def scores(self, histories: Histories, tokens: np.ndarray) -> np.ndarray:
        """Return scores float32 [n, c] of given items (tokens int32 [n, c]); -inf for items that the model lacks.

        Higher ones rank earlier. A user without events is scored by popularity in the training log, as when ranking.
        """
        prepared = self.prepare(Request(histories, 0))
        states = self._encode(DeviceBatch.from_prepared(prepared, self._stage))
        rows = self._table.rows(tokens)
        (scores,) = HostCopy(self._retrieval.scores(states, to_device(rows, self._device).long())).wait()
        scores = np.where(rows > UNKNOWN, scores, -np.inf)
        popularity_ranks = np.full(len(self._table), len(self._popular_rows))
        popularity_ranks[self._popular_rows] = np.arange(len(self._popular_rows))
        scores[prepared.is_empty] = -popularity_ranks[rows[prepared.is_empty]]
        return scores.astype(np.float32)

    @torch.inference_mode()
    def probabilities(self, histories: Histories, tokens: np.ndarray) -> np.ndarray:
        """Return the heads' probabilities float32 [n, k, 3] if each item (tokens int32 [n, k]) is the user's next."""
        batch = DeviceBatch.from_prepared(self.prepare(Request(histories, 0)), self._stage)
        states = self._encode(batch)
        items = self._table.items(to_device(self._table.rows(tokens), self._device).long())
        (probabilities,) = HostCopy(self._heads.probabilities(states, batch.events, batch.heads, items.columns)).wait()
        return probabilities

    def _encode(self, batch: DeviceBatch) -> Tensor:
        """Return states float32 [n, width]; zeros for users without events."""
        present = len(batch.events.inputs)
        if present == batch.n > 0:
            return self._encoder.encode(batch.events)
        states = torch.zeros(batch.n, self._table.vectors.shape[1], device=self._device)
        return states.index_copy_(0, batch.users, self._encoder.encode(batch.events)) if present else states

    def _retrieve(self, batch: DeviceBatch, states: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Return the rows, int64 [n, c], of the best items that are not excluded, and their scores, float32 [n, c].

        Popular ones, with a score of 0, for users without events.
        """
        rows, scores = self._retrieval.top_k(states, batch.excluded, self._rerank_weights.n_candidates(k))
        if not len(batch.popular):
            return rows, scores
        is_empty = batch.is_empty[:, None]
        return rows.where(~is_empty, batch.popular), scores.masked_fill(is_empty, 0.0)

    def _rerank(
        self, batch: DeviceBatch, items: TableItems, scores: Tensor, probabilities: Tensor, k: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return the k best candidates by the rerank weights: tokens, scores, probabilities and values, [n, k, ...].

        Popular items of users without events keep their order.
        """
        if not self._rerank_weights.enabled:  # there are k candidates, best first
            return items.tokens, scores, probabilities, items.values
        log_values = log_item_values(items.values, self._median_value)
        blended = blend_scores(scores, probabilities, log_values, self._rerank_weights)
        blended = blended.where(~batch.is_empty[:, None], scores)
        best, order = blended.sort(dim=1, descending=True, stable=True)
        order = order[:, :k]
        per_task = order[..., None].expand(*order.shape, probabilities.shape[2])
        return (
            items.tokens.gather(1, order),
            best[:, :k],
            probabilities.gather(1, per_task),
            items.values.gather(1, order),
        )

    def _popular(self, k: int) -> np.ndarray:
        """Return the k most popular rows that may be recommended, int64 [k], 0 where there are none left."""
        popular = np.zeros(k, np.int64)
        examined = k
        while True:
            rows = self._popular_rows[:examined]
            rows = rows[~self._table.blocked[rows]][:k]
            if len(rows) == k or examined >= len(self._popular_rows):
                popular[: len(rows)] = rows
                return popular
            examined *= 2

    def _sync_items(self) -> None:
        """Apply the catalogue's and the vocabulary's changes since the last batch, all of them after a failure."""
        was_synced = self._is_synced
        self._is_synced = False
        change = self._table.sync()
        if not was_synced:
            change = TableChange(np.arange(len(self._table)), blocked=True)
        if change.rewritten.size:
            self._encoder.update_items(change.rewritten)
            self._retrieval.set_vectors(self._table.vectors, change.rewritten)
        if change.blocked:
            self._retrieval.block(self._table.blocked_rows)
        self._is_synced = True


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
        artifact.label_rules,
        exclusion,
        rerank,
    )
