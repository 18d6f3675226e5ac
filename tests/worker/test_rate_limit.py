"""Few of many equal lines, and how many were not written."""

from worker.rate_limit import RateLimit


def test_some_lines_per_interval_with_the_number_of_those_held_back():
    times_s = [0.0, 1.0, 2.0, 9.9, 10.0, 25.0, 26.0, 27.0, 35.0]
    limit = RateLimit(iter(times_s).__next__, max_lines=2, interval_s=10)
    assert [limit.admit() for _ in times_s] == [0, 0, None, None, 2, 0, 0, None, 1]
