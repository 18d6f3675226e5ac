"""From a log to an artifact: preparation, training loop, losses, checkpoints, warm start.

May import: errors, jagged, tensors, types, records, items, data, features, counters, model, manifest, artifact,
backends, strategies, evaluation.
"""
