"""The counters that all workers share: rows in Redis, merged exactly once and read back in rounds.

May import: errors, metrics, rate_limit, config, logging, pipeline.
"""
