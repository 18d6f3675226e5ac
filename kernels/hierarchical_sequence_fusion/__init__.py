"""Event embeddings summed from their features, old sessions pooled into one row each.

May import: launch, validation.
"""
