"""Nothing that is kept per item moves when items are added: that would keep the pipeline from ranking for a second."""

import numpy as np
import pytest

from pipeline.counters.counters import Counters
from pipeline.items.catalogue import Catalogue
from pipeline.items.row_index import RowIndex
from pipeline.items.vocabulary import Vocabulary
from pipeline.records import Item

FIRST_ITEMS = 1 << 10
MAX_ITEMS = 5000


def addresses(catalogue: Catalogue, counters: Counters, index: RowIndex) -> list[int]:
    """Return where each array by token, row or rank begins."""
    vocabulary = catalogue.vocabulary
    order = counters._popularity_order()
    arrays = [
        vocabulary.hashes,
        *vocabulary._columns.values(),
        *catalogue._columns.values(),
        counters.popularity,
        counters.neighbours.tokens,
        counters.neighbours.weights,
        order.tokens,
        order.ranks,
        order.relative_popularity,
        order.event_norms,
        order.item_norms,
        index._tokens,
        index._hashes,
        index._rows,
        index.blocked,
    ]
    return [array.ctypes.data for array in arrays]


@pytest.mark.parametrize("batch", [1, 500])
def test_tables_stay_in_place_up_to_max_items(batch: int) -> None:
    ids = [f"item-{number}" for number in range(MAX_ITEMS)]
    vocabulary = Vocabulary(ids[:FIRST_ITEMS], MAX_ITEMS)
    catalogue = Catalogue(vocabulary)
    catalogue.upsert([Item(item_id) for item_id in ids[:FIRST_ITEMS]])
    counters = Counters(vocabulary, 10.0, neighbours=4, window_events=3)
    index = RowIndex(vocabulary, ids[: FIRST_ITEMS // 2])
    index.allocate(np.arange(FIRST_ITEMS // 2 + 1, FIRST_ITEMS + 1))
    before = addresses(catalogue, counters, index)
    for start in range(FIRST_ITEMS, MAX_ITEMS, batch):
        index.allocate(catalogue.upsert([Item(item_id) for item_id in ids[start : start + batch]]))
        assert addresses(catalogue, counters, index) == before
    assert vocabulary.free_slots == 0
    assert len(index) == len(vocabulary) == len(counters._order.ranks) == MAX_ITEMS + 1
