"""A recorded log through the worker: log source, local servers, display, online evaluation.

May import: errors, interfaces, clock, config, stream, kafka, inference, process, pipeline.
"""
