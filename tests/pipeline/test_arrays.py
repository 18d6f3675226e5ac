"""Arrays grow by copies, or into room that was reserved for them."""

import numpy as np
import pytest

from pipeline.arrays import grown


@pytest.mark.parametrize("reserve", [0, 5, 1000])
def test_grown_array_keeps_its_rows_and_ends_in_zeros(reserve: int) -> None:
    array = np.arange(1, 7, dtype=np.int32).reshape(3, 2)
    larger = grown(array, 4, reserve)
    assert larger.dtype == np.int32
    assert larger.shape == (max(6, reserve), 2)
    assert larger[:3].tolist() == array.tolist()
    assert not larger[3:].any()
    larger[:] = 7
    assert grown(larger, len(larger), reserve) is larger


def test_growth_at_least_doubles() -> None:
    assert len(grown(np.zeros(100), 101)) == 200
    assert len(grown(np.zeros(100), 1000)) == 1000


@pytest.mark.parametrize("reserve", [1 << 45, 1 << 62, 1 << 80])
def test_array_doubles_where_its_reservation_is_refused(reserve: int) -> None:
    assert len(grown(np.ones(100), 101, reserve)) == 200


def test_reserved_room_takes_no_memory_before_it_is_written() -> None:
    array = grown(np.zeros((1, 64)), 2, 1 << 20)  # 512 MiB
    before = resident_bytes()
    array[:1000] = 1
    assert not array[1 << 19 :].any()
    assert resident_bytes() - before < 8 << 20


def resident_bytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096
