"""Output of the commands: tables and progress on the terminal, learning curves, checks of output paths.

May import: errors, pipeline.
"""
