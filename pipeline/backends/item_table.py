"""A model's items on its device, in step with the process's catalogue: vectors, values, what may be recommended.

A strategy, its encoder and its retrieval share one table: there is one copy of the vectors, and they hold views of it.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pipeline.arrays import grown
from pipeline.artifact import Artifact
from pipeline.items.catalogue import Catalogue, ItemFacts
from pipeline.items.row_index import NO_ROWS, RowIndex
from pipeline.items.vocabulary import UNKNOWN
from pipeline.model.item_embedding import ItemEmbedding

GROWTH = 1.25  # a table of items has room for this many times its rows, so that most new items move nothing
MAX_SPARE_GPU_ROWS = 1 << 16  # spare rows take memory on a GPU; on a CPU they do so only once they are written
CHUNK_ITEMS = 4096  # encoded at a time: the content encoder holds several times their vectors
UNKNOWN_VALUE = 0.0


@dataclass(slots=True)
class TableChange:
    """The effect of a `sync`. rewritten: int64 [n], rows with new vectors; blocked: whether `blocked_rows` changed"""

    rewritten: np.ndarray
    blocked: bool


class ItemTable:
    """Not thread-safe. Every call costs what has changed, not what the table holds."""

    @torch.inference_mode()
    def __init__(self, artifact: Artifact, catalogue: Catalogue, items: ItemEmbedding, device: torch.device) -> None:
        """Encode the items of the training. Raises ArtifactError when the vocabulary lacks one of them.

        catalogue: its vocabulary has the artifact's items, in any order; other items get rows if they have records
        """
        self._catalogue = catalogue
        self._metadata = artifact.metadata
        self._items = items
        self._device = device
        self._index = RowIndex(catalogue.vocabulary, artifact.item_ids)
        self._trained_rows = len(self._index)  # rows from this one on are of items that came after training
        self._followed = 0  # position in the catalogue's records
        self._buffer = _encode_trained(items, device)  # float32 [>= rows, width]
        self._values = _trained_values(artifact, self._index, catalogue)  # float32 [>= rows]
        items.item_content = None  # read once: content of new items comes from the catalogue

    def __len__(self) -> int:
        return len(self._index)

    @property
    def vectors(self) -> Tensor:
        """The items' unit vectors, row 0 of the unknown item: float32 [rows, width]."""
        return self._buffer[: len(self)]

    @property
    def values(self) -> np.ndarray:
        """Each item's usual value, 0 = unknown: float32 [rows]."""
        return self._values[: len(self)]

    @property
    def blocked(self) -> np.ndarray:
        """Which rows must not be recommended: bool [rows]."""
        return self._index.blocked

    @property
    def blocked_rows(self) -> np.ndarray:
        """Rows that must not be recommended, ascending, row 0 first: int64."""
        return np.flatnonzero(self._index.blocked)

    def rows(self, tokens: np.ndarray) -> np.ndarray:
        """Return the rows of tokens, 0 for an item that the model does not have: int32 of the tokens' shape."""
        return self._index.rows(tokens)

    def tokens(self, rows: np.ndarray) -> np.ndarray:
        """Return the tokens of rows: int32 of the rows' shape."""
        return self._index.tokens(rows)

    def rows_of_hashes(self, hashes: np.ndarray) -> np.ndarray:
        """Return the rows, int32 [n], of item hashes, uint64 [n]."""
        return self.rows(self._catalogue.vocabulary.tokens(hashes))

    def look_up(self, hashes: np.ndarray) -> tuple[np.ndarray, ItemFacts]:
        """Return tokens, int32 [n], and facts of item hashes, uint64 [n]; also of items that have no row."""
        tokens = self._catalogue.vocabulary.tokens(hashes)
        return tokens, self._catalogue.facts(tokens)

    def facts(self, rows: np.ndarray) -> ItemFacts:
        """Return the facts of the items of rows, int [n]."""
        return self._catalogue.facts(self.tokens(rows))

    @torch.inference_mode()
    def sync(self) -> TableChange:
        """Apply the vocabulary's and the catalogue's changes since the last call."""
        moved, blocked = self._index.sync()
        position = self._catalogue.records.end
        rewritten = NO_ROWS
        is_blocked_changed = blocked.size > 0
        if position != self._followed and hasattr(self._items, "content_encoder"):
            tokens = self._catalogue.recorded_since(self._followed)
            rewritten = self._write_new_items(tokens)
            is_blocked_changed |= rewritten.size > 0
        self._followed = position
        readmitted = moved[(moved < self._trained_rows) & (self.tokens(moved) != UNKNOWN)]
        if readmitted.size:
            self._restore_facts(readmitted)
        return TableChange(rewritten, is_blocked_changed)

    def _restore_facts(self, rows: np.ndarray) -> None:
        """Restore the artifact's metadata of readmitted training items (rows int64 [n]) until they have a record."""
        facts = {name: column[rows - 1] for name, column in self._metadata.facts.items()}
        self._catalogue.restore_facts(self.tokens(rows), facts)

    def _write_new_items(self, tokens: np.ndarray) -> np.ndarray:
        """Write the vectors of those of these items, int64 [n], that came after training; return their rows, int64.

        A vector is a function of the artifact and the newest record, whatever came before.
        """
        rows = self.rows(tokens).astype(np.int64)
        is_new = rows == UNKNOWN
        rows[is_new] = self._index.allocate(tokens[is_new])
        came_after_training = rows >= self._trained_rows
        rows = rows[came_after_training]
        self._reserve(len(self))
        for start in range(0, len(rows), CHUNK_ITEMS):
            part = slice(start, start + CHUNK_ITEMS)
            content = self._metadata.new_item_content(self._catalogue, tokens[came_after_training][part])
            vectors = self._items.from_content(content.to(self._device))
            self._buffer[torch.from_numpy(rows[part]).to(self._device)] = vectors
        self._values[rows] = UNKNOWN_VALUE
        return rows

    def _reserve(self, rows: int) -> None:
        self._values = grown(self._values, rows)
        if rows > len(self._buffer):
            buffer = _empty_buffer(rows, self._buffer.shape[1], self._device)
            buffer[: len(self._buffer)] = self._buffer
            self._buffer = buffer


def _empty_buffer(rows: int, width: int, device: torch.device) -> Tensor:
    """Return float32 [>= rows, width] with room for more."""
    spare = int(rows * GROWTH) - rows
    return torch.empty(rows + (spare if device.type == "cpu" else min(spare, MAX_SPARE_GPU_ROWS)), width, device=device)


def _encode_trained(items: ItemEmbedding, device: torch.device) -> Tensor:
    """Return the vectors of all training items, float32 [>= rows, width]."""
    n = items.embedding.num_embeddings
    vectors = _empty_buffer(n, items.embedding.embedding_dim, device)
    for start in range(0, n, CHUNK_ITEMS):
        rows = np.arange(start, min(start + CHUNK_ITEMS, n))
        vectors[start : start + len(rows)] = items(rows)
    return vectors


def _trained_values(artifact: Artifact, index: RowIndex, catalogue: Catalogue) -> np.ndarray:
    """Return the artifact's item values, float32 [rows]."""
    values = np.zeros(len(index), np.float32)
    values[index.rows(catalogue.vocabulary.tokens(artifact.counters["items"]))] = artifact.counters["values"]
    values[UNKNOWN] = UNKNOWN_VALUE
    return values
