"""The users' rings: their bytes, how events are appended on the server and here, and how they are checked.

May import: interfaces, errors, metrics, config, logging, pipeline.
"""
