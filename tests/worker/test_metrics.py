"""A histogram that takes a batch at once shows what one by one would have shown."""

from prometheus_client import CollectorRegistry, Histogram, generate_latest

from worker.metrics import BatchHistogram


def test_batch_of_values_counts_as_its_values_one_by_one():
    values = [0.05, 0.1, 0.10001, 7.0, -1.0, 0.1]
    pages: list[bytes] = []
    for kind in (Histogram, BatchHistogram):
        registry = CollectorRegistry()
        histogram = kind("seconds", "Time", buckets=(0.1, 1.0), registry=registry)
        if isinstance(histogram, BatchHistogram):
            histogram.observe_all(values)
            histogram.observe_all([])
        else:
            for value in values:
                histogram.observe(value)
        pages.append(b"\n".join(line for line in generate_latest(registry).splitlines() if b"_created" not in line))
    assert pages[0] == pages[1]
