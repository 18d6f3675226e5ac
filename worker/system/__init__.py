"""The process and what surrounds it: its interpreter, its allocator, the listeners that it connects to.

May import: metrics.
"""
