"""The recommender without a model: decayed popularity and item-item co-occurrence.

May import: arrays, event_clock, jagged, records, items.
"""
