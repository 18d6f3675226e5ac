"""The simulated shop, its users and its ground truth.

May import: jagged, types, records, items, data, features, strategies, evaluation.
"""
