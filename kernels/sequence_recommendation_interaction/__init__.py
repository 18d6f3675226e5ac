"""Exact top-k of a catalogue for each user, without the scores of the whole catalogue in memory.

May import: launch, validation.
"""
