"""Index arithmetic of jagged arrays, against plain Python."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from pipeline.jagged import find_rows, row_starts


@given(st.lists(st.integers(0, 5), max_size=20))
def test_row_starts_are_those_of_the_rows_that_hold_the_positions(lengths: list[int]) -> None:
    offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    starts = row_starts(offsets)
    assert starts.tolist() == [sum(lengths[:row]) for row, length in enumerate(lengths) for _ in range(length)]
    assert np.array_equal(starts, offsets[find_rows(offsets, np.arange(offsets[-1]))])
