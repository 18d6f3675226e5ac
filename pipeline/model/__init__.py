"""The network and nothing else: HSTU, item embedding, task heads, calibration.

May import: errors, jagged, types, items, features, kernels, records, tensors.
"""
