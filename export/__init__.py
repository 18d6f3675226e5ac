"""Compares an encoder in another runtime's form with its reference.

May import: pipeline.
"""
