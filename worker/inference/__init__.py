"""The pipeline in a thread of its own, and the replacement of its model while it serves.

May import: system, errors, backoff, interfaces, metrics, executor, config, logging, pipeline.
"""
