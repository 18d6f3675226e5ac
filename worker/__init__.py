"""The process: everything that knows Kafka, Redis, asyncio and time.

May import: export, pipeline, kernels.
"""
