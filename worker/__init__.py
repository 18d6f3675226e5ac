"""The worker process: everything that depends on Kafka, Redis, asyncio and time.

May import: export, pipeline, kernels.
"""
