"""Everything on the hot path that imports aiokafka: the source, the sink, the producer, the consumer group.

May import: errors, backoff, interfaces, clock, config, logging, pipeline.
"""
