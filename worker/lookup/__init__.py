"""A user's slate, by library call and over HTTP.

May import: errors, config, logging, redis, pipeline.
"""
