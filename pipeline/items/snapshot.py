"""Snapshots of the catalogue in chunks: a process that applies them has the item metadata of the one that made them.

Chunks hold the records' facts and hashes; vectors follow from those and the artifact. They also hold items that are
only known from events, so that tokens are assigned in the same order.
"""

from dataclasses import dataclass

import msgspec
import numpy as np

from pipeline.items.catalogue import COLUMN_DTYPES, Catalogue

# The arrays of Catalogue.state, and which items have a record.
DTYPES = {"hashes": np.uint32, "offsets": np.int64, "recorded": bool} | COLUMN_DTYPES


class SnapshotChunk(msgspec.Struct, frozen=True):
    """Some items in the order of their admission. columns: arrays of DTYPES as bytes, little endian."""

    item_ids: list[str]
    columns: dict[str, bytes]
    delisted: list[str]


@dataclass(frozen=True, slots=True)
class CatalogueVersion:
    """State of a catalogue: counts of admissions and of record updates, and the vocabulary's version."""

    admitted: int = 0
    records: int = 0
    delistings: int = 0


@dataclass(frozen=True, slots=True)
class CatalogueChanges:
    """Changes since a version: tokens int64 [n] in the order of their admission, and delisted items."""

    tokens: np.ndarray
    delisted: list[str]
    version: CatalogueVersion

    def __len__(self) -> int:
        return len(self.tokens) + len(self.delisted)


def changes_since(catalogue: Catalogue, since: CatalogueVersion) -> CatalogueChanges:
    """Return the items admitted, updated or delisted after a version."""
    vocabulary = catalogue.vocabulary
    changed = vocabulary.admitted_at[: len(vocabulary)] > since.admitted
    changed[np.flatnonzero(catalogue.changed_at[: len(vocabulary)] > since.records)] = True
    tokens = np.flatnonzero(changed)
    tokens = tokens[np.argsort(vocabulary.admitted_at[tokens])]
    now = CatalogueVersion(vocabulary.admitted_count, catalogue.version, vocabulary.version)
    return CatalogueChanges(tokens, vocabulary.delisted_since(since.delistings), now)


def snapshot_chunk(catalogue: Catalogue, tokens: np.ndarray, delisted: list[str]) -> SnapshotChunk:
    """Return a chunk of these tokens, int64 [n], without those that have been evicted since."""
    tokens = tokens[catalogue.vocabulary.hashes[tokens] != 0]
    state = catalogue.state(tokens) | {"recorded": catalogue.has_records(tokens)}
    columns = {name: column.astype(DTYPES[name]).tobytes() for name, column in state.items()}
    return SnapshotChunk([catalogue.vocabulary.item_ids[token] for token in tokens.tolist()], columns, delisted)


def apply_chunk(catalogue: Catalogue, chunk: SnapshotChunk) -> None:
    """Merge the chunk into the catalogue; items that a full vocabulary rejects are left out."""
    state = {name: np.frombuffer(column, DTYPES[name]) for name, column in chunk.columns.items()}
    tokens = catalogue.vocabulary.admit(chunk.item_ids)
    catalogue.restore(tokens, state, state["recorded"])
    catalogue.delist(chunk.delisted)
