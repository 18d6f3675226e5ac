"""Kafka clients: the source with its consumer group, the sink with its producer, reads of a topic to given offsets.

May import: errors, backoff, interfaces, clock, metrics, config, system, deadline, logging, pipeline.
"""
