"""Everything that talks to Redis, together with its Lua functions.

May import: errors, backoff, interfaces, metrics, config, logging, pipeline.
"""
