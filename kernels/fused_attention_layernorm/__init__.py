"""HSTU's pointwise SiLU attention with relative bias, gated layer norm included."""
