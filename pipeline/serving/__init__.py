"""The pipeline: batches through the strategies, items in and out, checks of a model before it serves.

May import: errors, slates, records, items, counters, manifest, artifact, strategies.
"""
