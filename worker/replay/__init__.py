"""A recorded log through the worker: log source, local servers, display, prequential evaluation.

May import: errors, interfaces, clock, executor, config, output, stream, kafka, inference, process,
pipeline.
"""
