"""Index arithmetic of jagged arrays, against plain Python."""

from itertools import pairwise

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from pipeline.jagged import find_rows, last_runs, ranges, row_starts


@given(st.lists(st.integers(0, 5), max_size=20))
def test_row_starts_are_those_of_the_rows_that_hold_the_positions(lengths: list[int]) -> None:
    offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    starts = row_starts(offsets)
    assert starts.tolist() == [sum(lengths[:row]) for row, length in enumerate(lengths) for _ in range(length)]
    assert np.array_equal(starts, offsets[find_rows(offsets, np.arange(offsets[-1]))])


@given(st.lists(st.lists(st.integers(), max_size=6), max_size=20), st.integers(1, 7))
def test_last_runs_cut_the_end_of_each_row(rows: list[list[int]], longest: int) -> None:
    offsets = np.concatenate([[0], np.cumsum([len(row) for row in rows], dtype=np.int64)])
    positions, cut = ranges(*last_runs(offsets, longest))
    values = [value for row in rows for value in row]
    ends = [values[position] for position in positions]
    assert [ends[start:stop] for start, stop in pairwise(cut)] == [row[-longest:] for row in rows]
