"""Every metric the worker exports, declared once. Names and units follow Prometheus' conventions."""

from bisect import bisect_left
from collections.abc import Sequence

from prometheus_client import Counter, Gauge, Histogram


class BatchHistogram(Histogram):
    """A histogram that takes a batch of values at once: one lock per bucket, where `observe` takes two per value."""

    def observe_all(self, values: Sequence[float]) -> None:
        """Count each of the values."""
        # NOTE: private in prometheus_client 0.26: `_upper_bounds`, `_buckets` and `_sum`, which `observe` uses so, too.
        counts = [0] * len(self._upper_bounds)
        for value in values:
            counts[bisect_left(self._upper_bounds, value)] += 1
        for bucket, count in zip(self._buckets, counts, strict=True):
            if count:
                bucket.inc(count)
        self._sum.inc(sum(values))


# From 1 ms to 10 s: the objective of 100 ms lies in the middle, a backlog stays visible.
LATENCY_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)

# Events
EVENTS = Counter("millrace_events_total", "Events decoded and stored in their users' rings")
REDELIVERED_EVENTS = Counter("millrace_events_redelivered_total", "Events that were already in the user's ring")
IN_FLIGHT_EVENTS = Gauge("millrace_in_flight_events", "Records polled and not yet completed")
KEY_MISMATCHES = Counter("millrace_key_mismatches_total", "Events whose record key is not their user id")
DEAD_LETTERS = Counter("millrace_dead_letters_total", "Records sent to the dead-letter topic")
SKIPPED_RECORDS = Counter(
    "millrace_records_skipped_total",
    "Records that were never read, because retention had deleted them or kafka.on_offset_out_of_range is latest",
    ["topic", "partition"],
)
LOST_RINGS = Counter("millrace_rings_lost_total", "Rings that Redis had lost when they were pushed to")
UNREADABLE_RINGS = Counter("millrace_rings_unreadable_total", "Keys of rings that held none and were renamed")

# Slates
SLATES = Counter(
    "millrace_slates_total",
    "Slates acknowledged by Kafka and Redis, by what ranked them and why (pipeline/slates.py)",
    ["strategy", "backend", "why"],
)
FALLBACKS = Counter(
    "millrace_fallbacks_total", "Batches that a failing strategy left to the next one", ["strategy", "error"]
)
SET_ASIDE_USERS = Counter(
    "millrace_users_set_aside_total",
    "Users whom a strategy that ranks others left to the next one",
    ["strategy", "error"],
)
BATCH_USERS = Histogram("millrace_batch_users", "Users per batch", buckets=(1, 2, 4, 8, 16, 32, 64, 128, 256, 512))
STAGE_SECONDS = Histogram("millrace_stage_seconds", "Time per batch in a stage", ["stage"], buckets=LATENCY_BUCKETS)
SLATE_SECONDS = BatchHistogram(
    "millrace_slate_seconds", "Time from the poll of the oldest covered event to its slate", buckets=LATENCY_BUCKETS
)
SLATES_WITH_EXPECTED_VALUE = Counter(
    "millrace_slates_with_expected_value_total", "Slates whose strategy predicts business metrics"
)
EXPECTED_VALUE = Counter(
    "millrace_expected_value_total",
    "Sum of those slates' business metrics (pipeline/evaluation/business_metrics.py)",
    ["metric"],
)

# Flow
LAG = Gauge("millrace_lag_records", "Records after the last polled one", ["topic", "partition"])
STALLED_SECONDS = Gauge(
    "millrace_partition_stalled_seconds",
    "Time for which a partition has stood still although records wait in it",
    ["topic", "partition"],
)
OLDEST_IN_FLIGHT_SECONDS = Gauge("millrace_oldest_in_flight_seconds", "Time since the oldest open record was polled")
PAUSED = Gauge("millrace_paused", "1 while partitions are paused by backpressure")
RETRIES = Counter("millrace_retries_total", "Attempts repeated after a retriable error", ["error"])
COMMITS = Counter("millrace_commits_total", "Offset commits sent")

# Items
ITEMS = Counter("millrace_items_total", "Item records applied")
DELISTED_ITEMS = Counter("millrace_items_delisted_total", "Item tombstones applied")
INVALID_ITEMS = Counter("millrace_items_invalid_total", "Records of the items topic that are not items")
VOCABULARY = Gauge("millrace_vocabulary_items", "Items that have a token")
EVICTED_ITEMS = Counter("millrace_items_evicted_total", "Items that lost their token to newer ones")
REJECTED_ITEMS = Counter(
    "millrace_items_rejected_total", "Times a new item found the vocabulary full and stayed unknown"
)

INVALID_COUNTERS = Counter(
    "millrace_counters_invalid_total", "Rows and index members of the shared counters that cannot be used"
)

# Model
MODEL = Gauge("millrace_model_info", "The serving artifact", ["version"])
SWAPS = Counter("millrace_model_swaps_total", "New artifacts that were accepted or rejected while serving", ["outcome"])

# Process
STALL_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5)
LOOP_STALL_SECONDS = Histogram(
    "millrace_loop_stall_seconds", "Time by which the event loop runs a due task late", buckets=STALL_BUCKETS
)
GC_SECONDS = Histogram(
    "millrace_gc_seconds", "Length of a scan by Python's garbage collector", ["generation"], buckets=STALL_BUCKETS
)

# Tasks beside the worker
BACKGROUND_FAILURES = Counter(
    "millrace_background_failures_total", "Failures of a task beside the worker, which was started again", ["task"]
)
