"""The `hstu` rung: a trained model's answer."""

import time
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from pipeline.artifact import Artifact
from pipeline.backends import GraphOptions
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
from pipeline.serving.model_validation import synthetic_histories
from pipeline.serving.rerank import RerankWeights, blend_scores, log_item_values
from pipeline.serving.retrieval import make_retrieval
from pipeline.serving.strategy import RankedItems

NOT_RERANKED = RerankWeights()


def warm_up_lengths(max_users: int, max_events: int) -> Iterator[list[int]]:
    """Lengths of made-up users: batches of every power of two of users, of short ones and with a long one among them.
    Kernels are compiled once more for multiples of 16 rows: both kinds of sums are there, where there can be."""
    for exponent in range(max_users.bit_length()):
        others = [1] * ((1 << exponent) - 1)
        beyond = (len(others) + max_events) % 16 or 1  # without these the sum is such a multiple, or is none any more
        for newest in sorted({1, min(2, max_events), max(1, max_events - beyond), max_events}):
            yield [*others, newest]


class HstuStrategy:
    """HSTU's state of each user, the nearest items of the whole catalogue, the heads on those.

    A user without events gets what was popular in the training log.
    """

    name = "hstu"

    def __init__(
        self, artifact: Artifact, catalogue: Catalogue, exclusion: Exclusion, device: str = "auto", threads: int = 0,
        rerank: RerankWeights = NOT_RERANKED, graphs: GraphOptions | None = None,
    ) -> None:  # fmt: skip
        """The catalogue's vocabulary has the artifact's items, in any order. Others are known by their records, those
        without one are unknown to the model. graphs: on a GPU the kernels encode and retrieve; None: torch, in float32.

        Raises ArtifactError where the vocabulary had no room for one of the artifact's items.
        """
        self._encoder, self._graphs = TorchEncoder(artifact, device, threads, graphs), graphs
        self._retrieval = make_retrieval(self._encoder.table, self._graphs is not None)
        self._catalogue, self._vocabulary, self._exclusion = catalogue, catalogue.vocabulary, exclusion
        self._rows, self._metadata = RowIndex(catalogue.vocabulary, artifact.item_ids), artifact.metadata
        self._trained, self._synced_version = len(self._rows), 0  # version of the catalogue
        popular = np.argsort(-artifact.counters["popularity"], kind="stable")
        self._popular = self._rows_of(artifact.counters["items"][popular])
        self._rerank, self._schema = rerank, artifact.manifest.schema
        self._set_values(self._values_of(artifact))
        self._block()

    @property
    def max_events(self) -> int:
        """The newest events that the model reads."""
        return self._encoder.max_events

    def warm(self, item_ids: Sequence[str]) -> int:
        """Makes what batches would wait for, on a GPU: the graphs, see TorchEncoder.warm, and every kernel, by answers
        of all sizes to made-up histories of these items. Returns the number of graphs.

        DeviceError where the kernels do not run.
        """
        if self._graphs is None or self._encoder.device.type != "cuda":
            return 0
        try:
            made = self._encoder.warm()
            for lengths in warm_up_lengths(self._graphs.max_users, self.max_events):
                self.rank(synthetic_histories(item_ids, lengths), self._graphs.slate_size)
        except Exception as error:  # a compiler's or a driver's; too little memory
            reason = str(error).partition("\n")[0]
            raise DeviceError(
                f"pipeline.device '{self._encoder.device}': the kernels do not run on this card: {reason}; set"
                " pipeline.custom_kernels = false, or less pipeline.cuda_graph_mib if its memory is too small"
            ) from error
        return made

    def rank(self, histories: Histories, k: int) -> RankedItems:
        start = time.perf_counter()
        self._sync_items()
        whole, excluded = self._inputs(histories), self._exclusion.mask(histories)
        pairs = histories.users[excluded], whole.item_rows[excluded]
        inputs = whole.tail(self.max_events)
        featured = time.perf_counter()
        states = self._encoder.encode(inputs)
        encoded = time.perf_counter()
        rows, scores = self._retrieval.top_k(states, *pairs, self._rerank.n_candidates(k))
        source = self._fill_empty(histories, rows, scores)
        heads = self._probabilities(histories, whole, states, rows)
        if self._rerank.enabled:
            rows, scores, heads = self._reranked(rows, scores, heads, histories.lengths == 0)
        ranked = time.perf_counter()
        times_ms = 1e3 * np.diff([start, featured, encoded, ranked])
        answer = RankedItems(
            self._rows.tokens(rows), scores, heads, source, *times_ms.tolist(), values=self._values[rows]
        )
        return answer.first(k)

    def scores(self, histories: Histories, tokens: np.ndarray) -> np.ndarray:
        """float32 [n, c] of chosen items, int32 [n, c]: a row's higher ones rank earlier; -inf: the model knows none.

        A user without events has what was popular in the training log, as in `rank`.
        """
        _, states = self._encoded(histories)
        rows = self._rows.rows(tokens)
        items = self._encoder.table[torch.from_numpy(rows).to(self._encoder.device)]
        logits = torch.einsum("nd,ncd->nc", states, items).cpu().numpy()
        scores = np.where(rows > UNKNOWN, logits, -np.inf)
        empty = histories.lengths == 0
        places = np.full(len(self._encoder.table), len(self._popular))
        places[self._popular] = np.arange(len(self._popular))
        scores[empty] = -places[rows[empty]]
        return scores.astype(np.float32)

    def probabilities(self, histories: Histories, tokens: np.ndarray) -> np.ndarray:
        """What the heads say of these items, int32 [n, k], as each user's next: float32 [n, k, 3]."""
        whole, states = self._encoded(histories)
        return self._probabilities(histories, whole, states, self._rows.rows(tokens))

    def _probabilities(
        self, histories: Histories, whole: EncoderInputs, states: Tensor, rows: np.ndarray
    ) -> np.ndarray:
        """float32 [n, k, 3]. whole: of the whole histories; rows: int32 [n, k] of the model's table"""
        affinities = AffinityIndex.from_histories(
            histories, whole.item_rows, self._facts(whole.item_rows), engaged(histories, self._schema)
        )
        affinity = affinities.latest(rows, self._facts(rows.ravel()))
        return self._encoder.head_probabilities(
            states, whole.tail(self.max_events), latest_visit_frequency(histories), affinity, rows
        )

    def _facts(self, rows: np.ndarray) -> ItemFacts:
        return self._catalogue.facts(self._rows.tokens(rows))

    def _encoded(self, histories: Histories) -> tuple[EncoderInputs, Tensor]:
        """The whole histories as inputs, and the states of their newest events, [n, width]."""
        self._sync_items()
        whole = self._inputs(histories)
        return whole, self._encoder.encode(whole.tail(self.max_events))

    def _inputs(self, histories: Histories) -> EncoderInputs:
        """Of whole histories; a token is a row of the model's table."""
        tokens = self._vocabulary.tokens(histories.items)
        return encoder_inputs(
            histories, self._rows.rows(tokens), len(self._encoder.table), self._catalogue.facts(tokens)
        )

    def _sync_items(self) -> None:
        """Take over what has come to pass with items since the last batch."""
        moved, version = self._rows.sync(), self._catalogue.version
        if version != self._synced_version and self._encoder.reads_content:
            self._add_item_vectors(np.flatnonzero(self._catalogue.changed > self._synced_version))
        self._synced_version = version
        if moved.size:
            self._restore_facts(moved[(moved < self._trained) & (self._rows.tokens(moved) != UNKNOWN)])
        if moved.size or self._blocked_version != self._vocabulary.version:
            self._block()

    def _restore_facts(self, rows: np.ndarray) -> None:
        """Of items that training knew and that are back: what the artifact says of them, int64 [n], until a record."""
        facts = {name: column[rows - 1] for name, column in self._metadata.facts.items()}
        self._catalogue.restore_facts(self._rows.tokens(rows), facts)

    def _add_item_vectors(self, tokens: np.ndarray) -> None:
        """The vectors of items with new records, int64 [n], are those that the records say, unless training knew the
        item: a vector is a function of the artifact and the newest record, whatever came before."""
        rows = self._rows.rows(tokens)
        self._rows.allocate(tokens[rows == UNKNOWN])
        tokens = tokens[(rows == UNKNOWN) | (rows >= self._trained)]
        if not len(tokens):
            return
        self._encoder.set_item_vectors(
            self._rows.rows(tokens).astype(np.int64), self._metadata.new_item_content(self._catalogue, tokens)
        )
        self._retrieval = make_retrieval(self._encoder.table, self._graphs is not None)
        self._set_values(np.append(self._values, np.zeros(len(self._rows) - len(self._values), np.float32)))
        self._block()

    def _block(self) -> None:
        """Withdrawn and retired items are found no more, nor shown to users without events."""
        self._blocked_version, barred = self._vocabulary.version, self._rows.blocked_rows
        self._retrieval.block(barred)
        self._popular_shown = self._popular[~np.isin(self._popular, barred)]

    def _set_values(self, values: np.ndarray) -> None:
        """values: float32 [rows of the table], 0 = unknown"""
        self._values, self._log_values = values, log_item_values(values)

    def _values_of(self, artifact: Artifact) -> np.ndarray:
        """float32 [rows of the table]; an artifact that tells none knows no item's value."""
        values = np.zeros(len(self._encoder.table), np.float32)
        values[self._rows_of(artifact.counters["items"])] = artifact.counters["values"]
        values[UNKNOWN] = 0
        return values

    def _reranked(
        self, rows: np.ndarray, scores: np.ndarray, odds: np.ndarray, empty: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The same, in the order of the shop's wishes; popular items stay as they are."""
        wanted = np.where(empty[:, None], scores, blend_scores(scores, odds, self._log_values[rows], self._rerank))
        order = np.argsort(-wanted, axis=1, kind="stable")
        rows, wanted = (np.take_along_axis(column, order, axis=1) for column in (rows, wanted))
        return rows, wanted, np.take_along_axis(odds, order[..., None], axis=1)

    def _rows_of(self, hashes: np.ndarray) -> np.ndarray:
        """uint64 [n] item hashes -> int32 [n] rows of the model's table"""
        return self._rows.rows(self._vocabulary.tokens(hashes))

    def _fill_empty(self, histories: Histories, rows: np.ndarray, scores: np.ndarray) -> np.ndarray | str:
        empty = histories.lengths == 0
        if not empty.any():
            return "hstu"
        popular = self._popular_shown[: rows.shape[1]]
        rows[empty], scores[empty] = 0, 0.0
        rows[empty, : len(popular)] = popular
        return np.where(empty[:, None], "popular", np.full(rows.shape, "hstu"))
