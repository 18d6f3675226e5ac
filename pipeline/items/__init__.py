"""What the process knows of items: ids, tokens, metadata, content, the model's rows.

May import: errors, jagged, records.
"""
