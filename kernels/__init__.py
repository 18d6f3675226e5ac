"""Fused operators, one folder each: the naive fp32 reference is the specification."""
