"""Runtimes that turn packed histories into user states: an interface, a module per runtime, the manifest of exports.

May import: arrays, errors, files, items, features, model, artifact, kernels.
"""
