"""What a process knows of items beyond its artifact, in pieces: another process that takes them over knows the same.

Pieces hold what records said, hashed: no vectors, since those follow from it and the artifact; and items that are known
by their events alone, so that tokens are given in the same order.
"""

from dataclasses import dataclass

import msgspec
import numpy as np

from pipeline.items.catalogue import COLUMNS, Catalogue

# Of Catalogue.state's arrays, and which items have a record.
KINDS = {"hashes": np.uint32, "offsets": np.int64, "recorded": bool} | COLUMNS


class SnapshotChunk(msgspec.Struct, frozen=True):
    """Some items, in the order in which they got their tokens. columns: arrays of KINDS as bytes, little endian."""

    item_ids: list[str]
    columns: dict[str, bytes]
    delisted: list[str]


@dataclass(frozen=True, slots=True)
class CatalogueVersion:
    """How far a catalogue had come: counts of admissions, of records, of withdrawals."""

    admitted: int = 0
    records: int = 0
    delistings: int = 0


@dataclass(frozen=True, slots=True)
class CatalogueChanges:
    """What has come since a mark: tokens int64 [n] in the order in which they were given, and withdrawn items."""

    tokens: np.ndarray
    delisted: list[str]
    version: CatalogueVersion

    def __len__(self) -> int:
        return len(self.tokens) + len(self.delisted)


def changes_since(catalogue: Catalogue, since: CatalogueVersion) -> CatalogueChanges:
    vocabulary = catalogue.vocabulary
    new = vocabulary.admitted_at[: len(vocabulary)] > since.admitted
    new[np.flatnonzero(catalogue.changed[: len(vocabulary)] > since.records)] = True
    tokens = np.flatnonzero(new)
    tokens = tokens[np.argsort(vocabulary.admitted_at[tokens])]
    now = CatalogueVersion(vocabulary.admitted_count, catalogue.version, vocabulary.version)
    return CatalogueChanges(tokens, vocabulary.delisted_since(since.delistings), now)


def snapshot_chunk(catalogue: Catalogue, tokens: np.ndarray, withdrawn: list[str]) -> SnapshotChunk:
    """tokens: int64 [n]; one that means nothing any more is left out."""
    tokens = tokens[catalogue.vocabulary.hashes[tokens] != 0]
    state = catalogue.state(tokens) | {"recorded": catalogue.has_records(tokens)}
    columns = {name: column.astype(KINDS[name]).tobytes() for name, column in state.items()}
    return SnapshotChunk([catalogue.vocabulary.item_ids[token] for token in tokens.tolist()], columns, withdrawn)


def apply_chunk(catalogue: Catalogue, chunk: SnapshotChunk) -> None:
    """Know what the piece knows, and nothing less; items that find no room are left out."""
    state = {name: np.frombuffer(column, KINDS[name]) for name, column in chunk.columns.items()}
    tokens = catalogue.vocabulary.admit(chunk.item_ids)
    catalogue.restore(tokens, state, state["recorded"])
    catalogue.delist(chunk.delisted)
