"""Recorded logs and item files in; train/test splits and user sequences out. No model, no torch.

May import: errors, jagged, types, records, items.
"""
