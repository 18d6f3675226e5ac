"""A trained artifact becomes deployable files, each verified against the encoder it came from."""
