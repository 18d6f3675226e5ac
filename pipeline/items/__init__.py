"""Items as this process sees them: ids, tokens, metadata, content, the model's rows.

May import: arrays, errors, jagged, records.
"""
