"""Features of histories: event features, visit frequency, user-item affinity, item values, labels. numpy only.

May import: event_clock, jagged, records, items.
"""
