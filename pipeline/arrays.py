"""Arrays that grow."""

import numpy as np


def grown(array: np.ndarray, size: int) -> np.ndarray:
    """Return the array, or where it is smaller than `size` a copy of at least double its length, zeros at its end."""
    if size <= len(array):
        return array
    larger = np.zeros((max(size, 2 * len(array)), *array.shape[1:]), array.dtype)
    larger[: len(array)] = array
    return larger
