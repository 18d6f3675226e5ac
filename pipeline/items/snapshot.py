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


class Piece(msgspec.Struct, frozen=True):
    """Some items, in the order in which they got their tokens. columns: arrays of KINDS as bytes, little endian."""

    item_ids: list[str]
    columns: dict[str, bytes]
    withdrawn: list[str]


@dataclass(frozen=True, slots=True)
class Mark:
    """How far a catalogue had come: counts of admissions, of records, of withdrawals."""

    admitted: int = 0
    records: int = 0
    withdrawals: int = 0


@dataclass(frozen=True, slots=True)
class News:
    """What has come since a mark: tokens int64 [n] in the order in which they were given, and withdrawn items."""

    tokens: np.ndarray
    withdrawn: list[str]
    mark: Mark

    def __len__(self) -> int:
        return len(self.tokens) + len(self.withdrawn)


def news_since(catalogue: Catalogue, mark: Mark) -> News:
    vocabulary = catalogue.vocabulary
    new = vocabulary.born[: len(vocabulary)] > mark.admitted
    new[np.flatnonzero(catalogue.changed[: len(vocabulary)] > mark.records)] = True
    tokens = np.flatnonzero(new)
    tokens = tokens[np.argsort(vocabulary.born[tokens])]
    now = Mark(vocabulary.admitted, catalogue.version, vocabulary.version)
    return News(tokens, vocabulary.withdrawn_since(mark.withdrawals), now)


def piece_of(catalogue: Catalogue, tokens: np.ndarray, withdrawn: list[str]) -> Piece:
    """tokens: int64 [n]; one that means nothing any more is left out."""
    tokens = tokens[catalogue.vocabulary.hashes[tokens] != 0]
    state = catalogue.state(tokens) | {"recorded": catalogue.has_records(tokens)}
    columns = {name: column.astype(KINDS[name]).tobytes() for name, column in state.items()}
    return Piece([catalogue.vocabulary.item_ids[token] for token in tokens.tolist()], columns, withdrawn)


def take(catalogue: Catalogue, piece: Piece) -> None:
    """Know what the piece knows, and nothing less; items that find no room are left out."""
    state = {name: np.frombuffer(column, KINDS[name]) for name, column in piece.columns.items()}
    tokens = catalogue.vocabulary.admit(piece.item_ids)
    catalogue.remember(tokens, state, state["recorded"])
    catalogue.withdraw(piece.withdrawn)
