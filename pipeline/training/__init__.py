"""From a log to an artifact: preparation, training loop, losses, checkpoints, warm start.

May import: errors, event_clock, jagged, tensors, types, records, items, data, features, counters, model, manifest,
artifact, backends, strategies, evaluation.
"""
