"""Comparison of an encoder exported to another runtime with its reference.

May import: pipeline.
"""
