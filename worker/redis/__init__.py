"""Everything that talks to Redis, together with its Lua functions.

May import: errors, interfaces, metrics, rate_limit, config, logging, pipeline.
"""
