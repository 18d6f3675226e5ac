"""Items' usual values: the mean value of an item's paid events in a log, its carts and purchases by default."""

import numpy as np

from pipeline.features.labels import LabelRules, paid
from pipeline.items.vocabulary import UNKNOWN
from pipeline.records import Histories, decode_values


def item_values(histories: Histories, tokens: np.ndarray, rules: LabelRules, items: int) -> np.ndarray:
    """Return float32 [items]: mean value of each token's paid events; 0 where none has one.

    tokens: int [total], of the histories' events
    """
    valued = paid(histories, rules) & (histories.events["value"] > 0)
    sums = np.bincount(tokens[valued], decode_values(histories.events["value"][valued]), minlength=items)
    counts = np.bincount(tokens[valued], minlength=items)
    values = (sums / np.maximum(counts, 1)).astype(np.float32)
    values[UNKNOWN] = 0
    return values
