"""Tools for the person on call: checks, ring rebuild, dead-letter requeue.

May import: errors, interfaces, clock, config, logging, stream, kafka, redis, inference, pipeline.
"""
