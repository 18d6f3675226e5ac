"""Everything that talks to Redis, with the Lua functions beside it.

May import: errors, interfaces, metrics, config, logging, pipeline.
"""
