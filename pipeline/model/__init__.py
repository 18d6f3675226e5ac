"""The network and nothing else: HSTU, item embedding, task heads, calibration.

May import: errors, jagged, tensors, types, records, items, features, kernels.
"""
