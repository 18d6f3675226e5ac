"""The story of one event: poll, decode, push, batch, rank, deliver, commit. Imports neither aiokafka nor redis-py.

May import: errors, backoff, interfaces, metrics, config, deadline, logging, pipeline.
"""
