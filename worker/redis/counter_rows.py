"""The stored form of shared counts (counters.lua): packs deltas for a merge, unpacks merged rows into tokens."""

import struct
from collections.abc import Iterator, Sequence

import numpy as np

from pipeline.counters.counters import ItemCounts
from pipeline.counters.deltas import CountDeltas
from pipeline.counters.neighbours import pad_rows
from pipeline.items.vocabulary import Vocabulary

HEADER = struct.Struct("<BBHqd")  # format, bytes per pair, pairs, as_of_ms, popularity
PAIR_DTYPE = np.dtype([("item", "<u8"), ("count", "<f4")])


def pack_rows(deltas: CountDeltas, hashes: np.ndarray) -> Iterator[tuple[int, float, bytes]]:
    """Yield (token, popularity, pairs) of every touched item, tokens ascending. hashes: uint64, by token."""
    tokens = deltas.touched()
    popularity = np.zeros(len(tokens))
    popularity[np.searchsorted(tokens, deltas.items)] = deltas.popularity
    pairs = np.empty(len(deltas.rows), PAIR_DTYPE)
    pairs["item"] = hashes[deltas.columns]
    pairs["count"] = deltas.weights
    content = pairs.tobytes()
    starts = np.searchsorted(deltas.rows, tokens) * PAIR_DTYPE.itemsize
    stops = np.searchsorted(deltas.rows, tokens, "right") * PAIR_DTYPE.itemsize
    columns = (tokens, popularity, starts, stops)
    for token, count, start, stop in zip(*(column.tolist() for column in columns), strict=True):
        yield token, count, content[start:stop]


def unpack_rows(tokens: Sequence[int], values: Sequence[bytes], vocabulary: Vocabulary, slots: int) -> ItemCounts:
    """Return the stored rows of these items.

    Drops token 0 (an item that the full vocabulary did not admit), and all but the heaviest `slots` pairs per row.
    """
    admitted = [(token, value) for token, value in zip(tokens, values, strict=True) if token]
    headers = [HEADER.unpack_from(value) for _, value in admitted]
    pairs = np.frombuffer(b"".join([value[HEADER.size :] for _, value in admitted]), PAIR_DTYPE)
    offsets = np.cumsum([0, *(header[2] for header in headers)])
    columns, weights = pad_rows(offsets, vocabulary.tokens(pairs["item"]), pairs["count"], slots)
    popularity = np.array([header[4] for header in headers], np.float64)
    as_of_ms = np.array([header[3] for header in headers], np.int64)
    return ItemCounts(np.array([token for token, _ in admitted], np.int32), popularity, as_of_ms, columns, weights)


def rows_as_deltas(rows: ItemCounts, as_of_ms: int) -> CountDeltas:
    """Return entire rows as deltas to merge. All rows must be as of the same time, tokens ascending."""
    filled = rows.weights > 0
    owners = np.repeat(rows.tokens, filled.sum(axis=1))
    return CountDeltas(as_of_ms, rows.tokens, rows.popularity, owners, rows.columns[filled], rows.weights[filled])
