"""Everything that talks to Redis, together with its Lua functions.

May import: errors, backoff, interfaces, metrics, rate_limit, config, system, logging, pipeline.
"""
