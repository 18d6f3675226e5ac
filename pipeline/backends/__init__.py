"""Runtimes that turn packed histories into user states: an interface, and one module per runtime.

May import: errors, items, features, model, artifact, kernels.
"""
