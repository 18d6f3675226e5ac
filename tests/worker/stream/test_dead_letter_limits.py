"""Too many dead letters halt the worker: by their ratio in a window, or in a row."""

import re

from hypothesis import given
from hypothesis import strategies as st

from worker.config import DeadLettersConfig
from worker.errors import DeadLetterLimit
from worker.interfaces import DeadLetter, Partition, RecordOffset
from worker.stream.dead_letter_limits import DeadLetterLimits


def dead_letters(count: int, reason: str = "not an event") -> list[DeadLetter]:
    record_offset = RecordOffset(Partition("events", 0), 1, 0)
    return [DeadLetter(record_offset, None, b"", (), 0, reason) for _ in range(count)]


def test_first_bad_record_of_a_process_does_not_halt_it():
    limits = DeadLetterLimits(DeadLettersConfig(max_ratio=0.05, window_records=100))
    for _ in range(5):
        limits.count(1, dead_letters(1))
    assert limits.error is None
    limits.count(1, dead_letters(1))
    assert isinstance(limits.error, DeadLetterLimit)


def test_error_names_the_limit_and_the_frequent_reasons():
    limits = DeadLetterLimits(DeadLettersConfig(max_ratio=0.5, window_records=10))
    limits.count(10, dead_letters(2) + dead_letters(4, "unknown action"))
    error = str(limits.error)
    assert re.match(r"6 of the last 10 records.*max_ratio is 0.5.*unknown action \(4 times\)", error)
    limits.count(10, dead_letters(10, "another"))
    assert str(limits.error) == error, "the first error counts"


def test_run_of_bad_polls_halts_and_one_good_record_resets_it():
    limits = DeadLetterLimits(DeadLettersConfig(max_ratio=1.0, max_consecutive=10, window_records=10_000))
    limits.count(8, dead_letters(8))
    limits.count(8, dead_letters(7))
    limits.count(8, dead_letters(8))
    assert limits.error is None
    limits.count(3, dead_letters(3))
    assert "11 records in a row" in str(limits.error)


def test_empty_poll_changes_nothing():
    limits = DeadLetterLimits(DeadLettersConfig(max_ratio=1.0, max_consecutive=1, window_records=10))
    limits.count(1, dead_letters(1))
    limits.count(0, [])
    assert limits.error is None
    limits.count(1, dead_letters(1))
    assert isinstance(limits.error, DeadLetterLimit)


@given(st.lists(st.booleans(), max_size=200), st.integers(1, 20), st.floats(0, 1))
def test_ratio_is_of_the_last_window_after_every_record(stream: list[bool], window: int, ratio: float):
    limits = DeadLetterLimits(DeadLettersConfig(max_ratio=ratio, max_consecutive=10_000, window_records=window))
    for end, bad in enumerate(stream, 1):
        above = sum(stream[max(0, end - window) : end]) > ratio * window
        limits.count(1, dead_letters(int(bad)))
        assert (limits.error is not None) == above
        if above:
            return
