"""The stored form of shared counts (counters.lua): packing deltas for a merge, unpacking merged rows into tokens."""

import struct
from collections.abc import Iterator, Sequence

import numpy as np

from pipeline.counters.counters import ItemCounts
from pipeline.counters.deltas import CountDeltas
from pipeline.counters.neighbours import pad_rows
from pipeline.items.vocabulary import Vocabulary

HEADER = struct.Struct("<BBHqd")  # format, bytes a pair, pairs, as_of_ms, popularity
PAIR_DTYPE = np.dtype([("item", "<u8"), ("count", "<f4")])


def pack_rows(deltas: CountDeltas, hashes: np.ndarray) -> Iterator[tuple[int, float, bytes]]:
    """(token, popularity, pairs) of every touched item, tokens ascending. hashes: uint64, by token"""
    tokens = deltas.touched()
    popularity = np.zeros(len(tokens))
    popularity[np.searchsorted(tokens, deltas.items)] = deltas.popularity
    pairs = np.empty(len(deltas.rows), PAIR_DTYPE)
    pairs["item"], pairs["count"] = hashes[deltas.columns], deltas.weights
    content = pairs.tobytes()
    starts = np.searchsorted(deltas.rows, tokens) * PAIR_DTYPE.itemsize
    stops = np.searchsorted(deltas.rows, tokens, "right") * PAIR_DTYPE.itemsize
    for token, count, start, stop in zip(*(each.tolist() for each in (tokens, popularity, starts, stops)), strict=True):
        yield token, count, content[start:stop]


def unpack_rows(tokens: Sequence[int], values: Sequence[bytes], vocabulary: Vocabulary, slots: int) -> ItemCounts:
    """Stored rows of these items; token 0 (an item beyond the vocabulary's limit) is left out, of a longer row the
    heaviest `slots` pairs stay."""
    known = [(token, value) for token, value in zip(tokens, values, strict=True) if token]
    headers = [HEADER.unpack_from(value) for _, value in known]
    pairs = np.frombuffer(b"".join([value[HEADER.size :] for _, value in known]), PAIR_DTYPE)
    offsets = np.cumsum([0, *(header[2] for header in headers)])
    columns, weights = pad_rows(offsets, vocabulary.tokens(pairs["item"]), pairs["count"], slots)
    popularity = np.array([header[4] for header in headers], np.float64)
    as_of_ms = np.array([header[3] for header in headers], np.int64)
    return ItemCounts(np.array([token for token, _ in known], np.int32), popularity, as_of_ms, columns, weights)


def rows_as_deltas(rows: ItemCounts, as_of_ms: int) -> CountDeltas:
    """Whole rows, all as of the same time, to be merged like deltas. Tokens ascend."""
    filled = rows.weights > 0
    owners = np.repeat(rows.tokens, filled.sum(axis=1))
    return CountDeltas(as_of_ms, rows.tokens, rows.popularity, owners, rows.columns[filled], rows.weights[filled])
