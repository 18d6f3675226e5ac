"""Offline evaluation: metrics, protocols, baselines, the report.

May import: errors, event_clock, jagged, types, records, items, data, features, counters, model, artifact, strategies.
"""
