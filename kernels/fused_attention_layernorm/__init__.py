"""HSTU's attention with its biases, the norm and the gate in one operator, and the encoder built from it.

May import: launch, validation.
"""
