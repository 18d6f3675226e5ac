"""Exact top-k of a catalogue for each user, without the scores of the full catalogue in memory.

May import: launch, validation.
"""
