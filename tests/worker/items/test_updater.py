"""Item records applied one by one where they fail: the others of their chunk are unharmed."""

from collections.abc import Callable

import msgspec
import pytest
from aiokafka import ConsumerRecord

from pipeline.items.catalogue import Catalogue
from pipeline.items.vocabulary import Vocabulary
from pipeline.records import Item
from worker import metrics
from worker.clock import VirtualClock, WallClock
from worker.items.updater import ItemUpdater


@pytest.fixture
def catalogue() -> Catalogue:
    return Catalogue(Vocabulary())


@pytest.fixture
def count_invalid() -> Callable[[], float]:
    """Return a function that counts the invalid items since the test began."""
    before = metrics.INVALID_ITEMS._value.get()
    return lambda: metrics.INVALID_ITEMS._value.get() - before


def updater_of(catalogue: Catalogue, monotonic: Callable[[], float] | None = None) -> ItemUpdater:
    """Return an updater of this catalogue, which has a defect: it cannot apply the item named so."""

    async def update(items: list[Item], delisted: list[str], live: bool) -> None:
        if "defect" in [*(item.item_id for item in items), *delisted]:
            raise OverflowError("cannot convert float infinity to integer")
        catalogue.upsert(items)
        catalogue.delist(delisted)

    return ItemUpdater(update, VirtualClock(monotonic=monotonic) if monotonic else WallClock())


def record(offset: int, item_id: str, value: bytes | None, headers: tuple = ()) -> ConsumerRecord:
    return ConsumerRecord("items", 3, offset, 0, 0, item_id.encode(), value, 0, 1, 16, headers)


def item_record(offset: int, item_id: str) -> ConsumerRecord:
    return record(offset, item_id, msgspec.json.encode({"item_id": item_id, "title": "t"}))


@pytest.mark.parametrize("defect", [item_record(4, "defect"), record(4, "defect", None)], ids=["record", "tombstone"])
async def test_item_that_cannot_be_applied_leaves_all_others_of_its_chunk(
    catalogue: Catalogue, count_invalid: Callable[[], float], logged, defect: ConsumerRecord
):
    vocabulary = catalogue.vocabulary
    vocabulary.admit(["gone"])
    records = [item_record(number, f"i{number}") for number in range(9)]
    records[4] = defect
    records[6] = record(6, "gone", None)
    before = metrics.ITEMS._value.get()
    await updater_of(catalogue).apply(records, live=False)
    applied = vocabulary.tokens_of_ids([f"i{number}" for number in (0, 1, 2, 3, 5, 7, 8)])
    assert catalogue.has_records(applied).all()
    assert vocabulary.blocked[vocabulary.token("gone")]
    assert count_invalid() == 1
    assert metrics.ITEMS._value.get() == before + len(applied)
    [line] = logged()
    assert (line["partition"], line["offset"], line["error"]) == (3, 4, "cannot convert float infinity to integer")


async def test_lines_about_invalid_records_are_few_and_say_how_many_there_were(catalogue: Catalogue, logged):
    now_s = 0.0
    updater = updater_of(catalogue, lambda: now_s)
    await updater.apply([record(7, "a", b"no item")] * 30, live=True)
    now_s = 61.0
    await updater.apply([record(8, "a", b"no item")], live=True)
    assert [(line["offset"], line["not_logged"]) for line in logged()] == [(7, 0)] * 10 + [(8, 20)]


async def test_header_without_a_value_makes_an_invalid_item(catalogue: Catalogue, count_invalid: Callable[[], float]):
    await updater_of(catalogue).apply([record(7, "a", b'{"item_id": "a"}', (("content-type", None),))], live=False)
    assert not catalogue.vocabulary.token("a")
    assert count_invalid() == 1
