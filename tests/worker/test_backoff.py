"""Delays double up to the cap, and each series of retries begins with the first one."""

from itertools import islice

import pytest

from worker.backoff import Backoff


@pytest.mark.parametrize(
    ("backoff", "delays"),
    [
        (Backoff(0.5, 4.0), [0.5, 1.0, 2.0, 4.0, 4.0]),
        (Backoff(1.0, 3.0), [1.0, 2.0, 3.0, 3.0, 3.0]),
        (Backoff(2.0, 2.0), [2.0, 2.0, 2.0, 2.0, 2.0]),
    ],
)
def test_delays_double_up_to_the_cap(backoff: Backoff, delays: list[float]):
    assert list(islice(backoff.delays(), 5)) == delays


def test_next_series_begins_with_the_first_delay_again():
    backoff = Backoff(0.5, 4.0)
    assert list(islice(backoff.delays(), 3)) == list(islice(backoff.delays(), 3))
