"""Items' usual values: the mean value of an item's carts and purchases in a log."""

import numpy as np

from pipeline.features.labels import MONETIZING, action_codes
from pipeline.items.vocabulary import UNKNOWN
from pipeline.records import EventSchema, Histories, decode_values


def item_values(histories: Histories, tokens: np.ndarray, schema: EventSchema, items: int) -> np.ndarray:
    """Return float32 [items]: mean value of each token's carts and purchases; 0 where none has one.

    tokens: int [total], of the histories' events
    """
    paid = np.isin(histories.actions, action_codes(MONETIZING, schema)) & (histories.events["value"] > 0)
    sums = np.bincount(tokens[paid], decode_values(histories.events["value"][paid]), minlength=items)
    counts = np.bincount(tokens[paid], minlength=items)
    values = (sums / np.maximum(counts, 1)).astype(np.float32)
    values[UNKNOWN] = 0
    return values
