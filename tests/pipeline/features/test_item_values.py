"""Values of items, from what users paid for them."""

import numpy as np
import pytest

from pipeline.features.item_values import item_values
from pipeline.features.labels import LabelRules
from pipeline.records import Event, EventSchema, Histories

SCHEMA = EventSchema()


def test_item_value_is_the_mean_of_its_cart_and_purchase_values() -> None:
    events = [
        Event("u", "a", "cart", 1, value=10.0),
        Event("u", "a", "purchase", 2, value=20.0),
        Event("u", "a", "view", 3, value=500.0),
        Event("u", "b", "purchase", 4),
        Event("u", "c", "view", 5),
        Event("u", "unknown", "purchase", 6, value=3.0),
    ]
    histories = Histories.from_events([events], SCHEMA)
    values = item_values(histories, np.array([1, 1, 1, 2, 3, 0]), LabelRules.from_options(SCHEMA), 4)
    assert values.tolist() == pytest.approx([0, 15, 0, 0], rel=1e-3)
