"""Offline evaluation: metrics, protocols, baselines, the report.

May import: errors, jagged, types, records, items, data, features, counters, model, artifact, strategies.
"""
