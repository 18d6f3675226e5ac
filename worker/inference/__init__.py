"""The pipeline in a thread of its own, and how its model is replaced while it serves.

May import: errors, interfaces, metrics, config, logging, pipeline.
"""
