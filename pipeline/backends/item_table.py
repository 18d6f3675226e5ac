"""A model's items on its device, in step with the process's catalogue: vectors, facts, what may be recommended.

A strategy, its encoder and its retrieval share one table: there is one copy of the vectors, and they hold views of it.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pipeline.artifact import Artifact
from pipeline.errors import ArtifactError
from pipeline.items.catalogue import Catalogue, ItemFacts
from pipeline.items.metadata import new_item_content
from pipeline.items.row_index import NO_ROWS, RowIndex
from pipeline.items.vocabulary import UNKNOWN
from pipeline.model.affinity import ItemColumns
from pipeline.model.item_embedding import ItemEmbedding
from pipeline.tensors import to_device
from pipeline.weights import item_table_parts

GROWTH = 1.25  # a table of items has room for this many times its rows, so that most new items move nothing
MAX_SPARE_GPU_ROWS = 1 << 16  # spare rows take memory on a GPU; on a CPU they do so only once they are written
CHUNK_ITEMS = 4096  # encoded at a time: the content encoder holds several times their vectors
FACTS = 4  # int32 columns of a row's facts: token, category, price code, value
VALUE = 3  # the last of them: the bits of a float32, 0 = unknown


@dataclass(slots=True)
class TableChange:
    """The effect of a `sync`. rewritten: int64 [n], rows with new vectors; blocked: whether `blocked_rows` changed"""

    rewritten: np.ndarray
    blocked: bool


@dataclass(slots=True)
class TableItems:
    """Items of n users, k for each, on the device. tokens: int32 [n, k]; values: float32 [n, k], 0 = unknown"""

    tokens: Tensor
    columns: ItemColumns
    values: Tensor


class ItemTable:
    """Not thread-safe. Every call costs what has changed, not what the table holds."""

    @torch.inference_mode()
    def __init__(self, artifact: Artifact, catalogue: Catalogue, items: ItemEmbedding, device: torch.device) -> None:
        """Encode the items of the training. Raises ArtifactError when the vocabulary lacks one of them.

        catalogue: its vocabulary has the artifact's items, in any order; other items get rows if they have records
        """
        self._catalogue = catalogue
        self._trained_facts = artifact.metadata.facts
        self._price_scale = artifact.metadata.scale
        self._items = items
        self._device = device
        self._index = RowIndex(catalogue.vocabulary, artifact.item_ids)
        self._trained_rows = len(self._index)  # rows from this one on are of items that came after training
        self._followed = 0  # position in the catalogue's changes
        self._is_synced = True
        self._vectors = _encode_trained(artifact, items, device)  # float32 [>= rows, width]
        self._facts = _with_room(0, FACTS, torch.int32, device)  # int32 [>= rows, FACTS]
        self._reserve(self._trained_rows)
        trained = np.arange(self._trained_rows)
        self._write_facts(trained)
        self._write_values(trained, _trained_values(artifact, self._index, catalogue))
        items.item_content = None  # read once: content of new items comes from the catalogue

    def __len__(self) -> int:
        return len(self._index)

    @property
    def vectors(self) -> Tensor:
        """The items' unit vectors, row 0 of the unknown item: float32 [rows, width]."""
        return self._vectors[: len(self)]

    @property
    def values(self) -> np.ndarray:
        """Each item's usual value, 0 = unknown: float32 [rows]. Waits for the device."""
        return self._facts[: len(self), VALUE].view(torch.float32).cpu().numpy()

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

    def rows_of_hashes(self, hashes: np.ndarray) -> np.ndarray:
        """Return the rows, int32 [n], of item hashes, uint64 [n]."""
        return self.rows(self._catalogue.vocabulary.tokens(hashes))

    def look_up(self, hashes: np.ndarray) -> tuple[np.ndarray, ItemFacts]:
        """Return rows, int32 [n], and facts of item hashes, uint64 [n]; facts also of items that have no row."""
        tokens = self._catalogue.vocabulary.tokens(hashes)
        return self.rows(tokens), self._catalogue.facts(tokens)

    def items(self, rows: Tensor) -> TableItems:
        """Return what is known of these rows' items, as of the last `sync` before the call. rows: int64 [n, k]"""
        tokens, categories, price_codes, values = self._facts[rows].unbind(dim=2)
        return TableItems(tokens, ItemColumns(rows, categories, price_codes), values.view(torch.float32))

    @torch.inference_mode()
    def sync(self) -> TableChange:
        """Apply the vocabulary's and the catalogue's changes since the last call, all of them after one that failed."""
        was_synced = self._is_synced
        self._is_synced = False
        moved, blocked = self._index.sync()
        if not was_synced:
            self._followed = -1
            moved = np.arange(1, len(self))
        readmitted = moved[(moved < self._trained_rows) & (self._index.tokens(moved) != UNKNOWN)]
        if readmitted.size:
            self._restore_facts(readmitted)
        tokens = self._changed_tokens()
        rewritten = NO_ROWS
        if tokens.size and hasattr(self._items, "content_encoder"):
            rewritten = self._write_new_items(tokens[self._catalogue.has_records(tokens)])
        if moved.size or tokens.size:
            rows = np.union1d(moved, self.rows(tokens)).astype(np.int64)
            self._write_facts(rows[rows != UNKNOWN])
        self._is_synced = True
        return TableChange(rewritten, blocked.size > 0 or rewritten.size > 0 or not was_synced)

    def _changed_tokens(self) -> np.ndarray:
        """Return the tokens whose items' metadata have changed since the last call, int64 [n]."""
        end = self._catalogue.changes.end
        if end == self._followed:
            return NO_ROWS
        tokens = self._catalogue.changes.since(self._followed)
        self._followed = end
        return np.arange(len(self._catalogue.vocabulary)) if tokens is None else tokens

    def _restore_facts(self, rows: np.ndarray) -> None:
        """Restore the artifact's metadata of readmitted training items (rows int64 [n]) until they have a record."""
        facts = {name: column[rows - 1] for name, column in self._trained_facts.items()}
        self._catalogue.restore_facts(self._index.tokens(rows), facts)

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
            content = new_item_content(self._catalogue, tokens[came_after_training][part], self._price_scale)
            vectors = self._items.from_content(content.to(self._device))
            self._vectors[to_device(rows[part], self._device)] = vectors
        self._write_values(rows, np.zeros(len(rows), np.float32))
        return rows

    def _write_facts(self, rows: np.ndarray) -> None:
        """Copy token, category and price of these rows, int64 [n], to the device."""
        tokens = self._index.tokens(rows)
        facts = self._catalogue.facts(tokens)
        columns = np.stack([tokens, facts.categories, facts.price_codes.astype(np.int32)], axis=1)
        self._facts[to_device(rows, self._device), :VALUE] = to_device(columns, self._device)

    def _write_values(self, rows: np.ndarray, values: np.ndarray) -> None:
        """Write the values, float32 [n], of these rows, int64 [n]."""
        self._facts[to_device(rows, self._device), VALUE] = to_device(values.view(np.int32), self._device)

    def _reserve(self, rows: int) -> None:
        self._vectors = _grown(self._vectors, rows)
        self._facts = _grown(self._facts, rows)


def _with_room(rows: int, width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return [>= rows, width] with room for more, its content arbitrary."""
    spare = int(rows * GROWTH) - rows
    spare = spare if device.type == "cpu" else min(spare, MAX_SPARE_GPU_ROWS)
    return torch.empty(rows + spare, width, dtype=dtype, device=device)


def _grown(table: Tensor, rows: int) -> Tensor:
    """Return the table itself, or a copy with room for this many rows and more."""
    if rows <= len(table):
        return table
    larger = _with_room(rows, table.shape[1], table.dtype, table.device)
    larger[: len(table)] = table
    return larger


def _encode_trained(artifact: Artifact, items: ItemEmbedding, device: torch.device) -> Tensor:
    """Return the vectors of all training items, float32 [>= rows, width]. ArtifactError: the item table's shape."""
    shape = items.embedding.num_embeddings, items.embedding.embedding_dim
    vectors = _with_room(*shape, torch.float32, device)
    n = 0
    for first, part in item_table_parts(artifact.weights):
        for start in range(0, len(part), CHUNK_ITEMS):
            own = part[start : start + CHUNK_ITEMS]
            rows = np.arange(first + start, first + start + len(own))
            if part.shape[1] != shape[1] or rows[-1] >= shape[0]:
                break
            vectors[rows[0] : rows[-1] + 1] = items.vectors(own.to(device), rows)
            n += len(own)
    if n != shape[0]:
        raise ArtifactError(
            f"artifact {artifact.version}: its item table does not fit its config, which has {shape[0]} rows of"
            f" {shape[1]}; train again"
        )
    return vectors


def _trained_values(artifact: Artifact, index: RowIndex, catalogue: Catalogue) -> np.ndarray:
    """Return the artifact's item values, float32 [rows]."""
    values = np.zeros(len(index), np.float32)
    values[index.rows(catalogue.vocabulary.tokens(artifact.counters["items"]))] = artifact.counters["values"]
    values[UNKNOWN] = 0
    return values
