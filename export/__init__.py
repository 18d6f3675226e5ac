"""An encoder in another runtime's form, compared with the one it came from.

May import: pipeline.
"""
