"""Runtimes that turn packed histories into user states: an interface, a module per runtime, the manifest of exports.

May import: errors, files, jagged, tensors, items, features, model, manifest, weights, artifact, kernels.
"""
