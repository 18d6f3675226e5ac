"""Features of histories: event features, visit frequency, user-item affinity, labels. numpy only.

May import: jagged, records, items.
"""
