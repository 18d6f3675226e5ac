"""The story of one event: poll, decode, push, batch, rank, deliver, commit. Knows neither aiokafka nor redis-py.

May import: errors, interfaces, metrics, config, logging, pipeline.
"""
