"""Every metric the worker exports, declared once. Names and units follow Prometheus' conventions."""

from prometheus_client import Counter, Gauge, Histogram

# From 1 ms to 10 s: the objective of 100 ms lies in the middle, a backlog stays visible.
LATENCY_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)

EVENTS = Counter("millrace_events_total", "Events decoded and in their rings")
REPLAYED = Counter("millrace_events_replayed_total", "Events that the user's ring had already (a restart's replay)")
ITEMS = Counter("millrace_items_total", "Records of items that were taken over")
WITHDRAWN = Counter("millrace_items_withdrawn_total", "Tombstones of items that were taken over")
STRANGE_ITEMS = Counter("millrace_items_unreadable_total", "Records of the items topic that are no item")
VOCABULARY = Gauge("millrace_vocabulary_items", "Items that have a token")
RETIRED_ITEMS = Counter("millrace_items_retired_total", "Items that lost their token to newer ones")
REFUSED_ITEMS = Counter("millrace_items_refused_total", "Times that a new item found no room: it stays unknown")
SLATES = Counter("millrace_slates_total", "Slates acknowledged by Kafka and Redis", ["strategy"])
FALLBACKS = Counter("millrace_fallbacks_total", "Batches that fell from a failing rung to the next", ["rung", "error"])
STRANGE_KEYS = Counter("millrace_strange_keys_total", "Events whose record's key is not their user's id")
DEAD_LETTERS = Counter("millrace_dead_letters_total", "Records that went to the dead-letter topic")
RETRIES = Counter("millrace_retries_total", "Attempts repeated after a retriable error", ["error"])
COMMITS = Counter("millrace_commits_total", "Offset commits sent")
RINGS_LOST = Counter("millrace_rings_lost_total", "Rings that Redis had lost when they were pushed to")
BATCH_USERS = Histogram("millrace_batch_users", "Users in a batch", buckets=(1, 2, 4, 8, 16, 32, 64, 128, 256, 512))
STAGE_SECONDS = Histogram("millrace_stage_seconds", "Time in a stage, by batch", ["stage"], buckets=LATENCY_BUCKETS)
SLATE_SECONDS = Histogram(
    "millrace_slate_seconds",
    "From the oldest covered event's poll to its slate",
    buckets=LATENCY_BUCKETS,
)
OPEN_EVENTS = Gauge("millrace_open_events", "Events admitted and not yet settled")
PAUSED = Gauge("millrace_paused", "1 while partitions are paused by backpressure")
LAG = Gauge("millrace_lag_records", "Records beyond the last polled one", ["topic", "partition"])
LAG_SECONDS = Gauge("millrace_lag_seconds", "Age of the oldest unsettled event since its poll")
MODEL = Gauge("millrace_model_info", "The serving artifact", ["version"])
SWAPS = Counter("millrace_model_swaps_total", "New artifacts that were adopted or refused while serving", ["outcome"])
VALUED_SLATES = Counter("millrace_valued_slates_total", "Slates whose model told what they are worth")
WORTH = Counter(
    "millrace_slate_worth_total",
    "What those slates are worth, see pipeline/evaluation/business_metrics.py",
    ["measure"],
)
