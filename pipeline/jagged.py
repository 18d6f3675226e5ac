"""Index arithmetic for jagged arrays: rows of different lengths stored one after the other, with offsets."""

import numpy as np


def ranges(starts: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the indices starts[i] .. starts[i] + lengths[i] - 1 of each range in turn, and the ranges' offsets.

    starts, lengths: int64 [n]. Returns int64 [sum of lengths] and int64 [n + 1].
    """
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    return np.repeat(starts - offsets[:-1], lengths) + np.arange(offsets[-1]), offsets


def last_runs(offsets: np.ndarray, longest: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the starts and lengths of each row's end, at most `longest` positions of it: int64 [rows] each.

    offsets: int64 [rows + 1]
    """
    lengths = np.minimum(np.diff(offsets), longest)
    return offsets[1:] - lengths, lengths


def find_rows(offsets: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Return the row that contains each position: int64 [n]. offsets: int64 [rows + 1]; positions: int [n]."""
    return np.searchsorted(offsets, positions, side="right") - 1


def row_starts(offsets: np.ndarray) -> np.ndarray:
    """Return where the row of each position begins: int64 [total]. offsets: int64 [rows + 1], from 0 to total."""
    return np.repeat(offsets[:-1], np.diff(offsets))


def run_starts(keys: np.ndarray) -> np.ndarray:
    """Return where each run of equal values begins: int64 [runs]."""
    return np.flatnonzero(np.concatenate([[True], keys[1:] != keys[:-1]])[: len(keys)])


def rank_in_run(keys: np.ndarray) -> np.ndarray:
    """Return each value's position within its run of equal values: int64 [n]."""
    starts = run_starts(keys)
    return np.arange(len(keys)) - np.repeat(starts, np.diff(np.append(starts, len(keys))))


def latest_equal(rows: np.ndarray, values: np.ndarray, selected: np.ndarray) -> np.ndarray:
    """Return each position's latest earlier one that is selected and has its row and value: int64 [total]; -1 = none.

    rows, values: [total], of integers; selected: bool [total]
    """
    total = len(selected)
    order = np.lexsort((values, rows))  # stable: a run of equal pairs is in the order of positions
    rows = rows[order]
    values = values[order]
    starts_run = np.ones(total, bool)
    starts_run[1:] = (rows[1:] != rows[:-1]) | (values[1:] != values[:-1])
    run_start = np.maximum.accumulate(np.where(starts_run, np.arange(total), 0))
    places = np.where(selected[order], np.arange(total), -1)
    before = np.maximum.accumulate(np.append(-1, places[:-1]))[:total]
    found = before >= run_start
    latest = np.full(total, -1)
    latest[order[found]] = order[before[found]]
    return latest
