"""The stored form of shared counts (counters.lua): packs deltas for a merge, unpacks merged rows into tokens."""

import math
import struct
from collections.abc import Iterator, Sequence

import numpy as np

from pipeline.counters.counters import ItemCounts
from pipeline.counters.deltas import CountDeltas
from pipeline.counters.neighbours import pad_rows
from pipeline.items.vocabulary import Vocabulary

FORMATS = (1, 2)  # a row of format 1 has no marks
HEADER = struct.Struct("<BBHqd")  # format, bytes per pair, pairs, as_of_ms, popularity
PAIR_DTYPE = np.dtype([("item", "<u8"), ("count", "<f4")])
MARK_BYTES = 8


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


def row_fault(value: bytes) -> str | None:
    """Return why these bytes are not a row, None for a row."""
    if len(value) < HEADER.size:
        return f"a row of {len(value)} bytes, want at least {HEADER.size}"
    row_format, pair_bytes, pairs, as_of_ms, popularity = HEADER.unpack_from(value)
    if row_format not in FORMATS or pair_bytes != PAIR_DTYPE.itemsize:
        return f"a row of format {row_format}, this millrace reads {', '.join(map(str, FORMATS))}"
    marks_bytes = len(value) - HEADER.size - pairs * PAIR_DTYPE.itemsize
    if marks_bytes < 0 or marks_bytes % MARK_BYTES:
        return f"a row of {len(value)} bytes with {pairs} neighbours"
    if as_of_ms < 0 or not 0 <= popularity < math.inf:
        return f"a row with popularity {popularity} as of {as_of_ms} ms"
    return None


def unpack_rows(tokens: Sequence[int], values: Sequence[bytes], vocabulary: Vocabulary, slots: int) -> ItemCounts:
    """Return the stored rows of these items; `row_fault` of each is None.

    Drops token 0 (an item that the full vocabulary did not admit), counts that are not finite, and all but the heaviest
    `slots` pairs per row.
    """
    admitted = [(token, value) for token, value in zip(tokens, values, strict=True) if token]
    headers = [HEADER.unpack_from(value) for _, value in admitted]
    offsets = np.cumsum([0, *(header[2] for header in headers)])
    stops = [HEADER.size + header[2] * PAIR_DTYPE.itemsize for header in headers]
    content = b"".join([value[HEADER.size : stop] for (_, value), stop in zip(admitted, stops, strict=True)])
    pairs = np.frombuffer(content, PAIR_DTYPE)
    neighbours = np.where(np.isfinite(pairs["count"]), vocabulary.tokens(pairs["item"]), 0)
    columns, weights = pad_rows(offsets, neighbours, pairs["count"], slots)
    popularity = np.array([header[4] for header in headers], np.float64)
    as_of_ms = np.array([header[3] for header in headers], np.int64)
    return ItemCounts(np.array([token for token, _ in admitted], np.int32), popularity, as_of_ms, columns, weights)


def rows_as_deltas(rows: ItemCounts, as_of_ms: int) -> CountDeltas:
    """Return entire rows as deltas to merge. All rows must be as of the same time, tokens ascending."""
    filled = rows.weights > 0
    owners = np.repeat(rows.tokens, filled.sum(axis=1))
    return CountDeltas(as_of_ms, rows.tokens, rows.popularity, owners, rows.columns[filled], rows.weights[filled])
