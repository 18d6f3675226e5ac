"""Refused calls of the library: one sentence each, and nothing of the call stays."""

from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np
import pytest

from pipeline.records import Event, EventSchema, Histories, Item
from pipeline.serving.pipeline import Pipeline
from pipeline.strategies.options import PipelineOptions

GOOD = Event("u", "good", "view", 5, context={"page": "home"})
BAD_FIELDS: list[dict[str, Any]] = [
    {"item_id": 7},
    {"item_id": None},
    {"item_id": "half \ud83d"},
    {"item_id": ""},
    {"item_id": "x" * 257},
    {"item_id": ["i"]},
    {"user_id": 3},
    {"user_id": "\udc00"},
    {"action": "dance"},
    {"action": None},
    {"ts_ms": -1},
    {"ts_ms": 1 << 48},
    {"ts_ms": 5.0},
    {"ts_ms": None},
    {"value": float("nan")},
    {"value": float("inf")},
    {"value": -1.0},
    {"value": "3"},
    {"dwell_ms": -5},
    {"position": -1},
    {"device": 4},
    {"session_id": "\ud800"},
    {"context": {"a": [1]}},
    {"context": {1: "a"}},
    {"context": {"\ud83d": 1}},
    {"context": {"a": float("nan")}},
]
BAD_EVENTS = [msgspec.structs.replace(GOOD, **fields) for fields in BAD_FIELDS]
BAD_ITEMS = [
    Item(**fields)
    for fields in (
        {"item_id": 7},
        {"item_id": ""},
        {"item_id": "\ud83d"},
        {"item_id": "i", "title": 5},
        {"item_id": "i", "text": "\ud83d"},
        {"item_id": "i", "category": "shoes"},
        {"item_id": "i", "tags": ["a", "\ud83d"]},
        {"item_id": "i", "price": float("nan")},
        {"item_id": "i", "price": float("inf")},
        {"item_id": "i", "price": -1},
        {"item_id": "i", "created_ms": 1 << 50},
    )
]
BAD_IDS: list[Any] = [7, None, "", "x" * 257, "\ud83d"]


@pytest.fixture
def pipeline() -> Pipeline:
    """A full vocabulary with counts, a record and a delisted item: whatever is admitted evicts."""
    pipeline = Pipeline.load(None, PipelineOptions(max_items=3))
    pipeline.update_items([Item("a", title="an item", price=3.0), Item("b")], ["b"])
    events = [Event("u", item, "view", time) for time, item in enumerate("aca", 1)]
    pipeline.admit([event.item_id for event in events])
    pipeline.observe(Histories.from_events([events], EventSchema()), np.ones(3, bool))
    return pipeline


def state(pipeline: Pipeline) -> dict[str, Any]:
    """Return everything that a call can change."""
    vocabulary = pipeline.vocabulary
    tokens = np.arange(len(vocabulary))
    names = ("version", "admitted_count", "evicted_count", "rejected_count", "item_ids", "_delisted", "_tick", "_free")
    arrays = pipeline.counters.state() | pipeline.catalogue.state(tokens)
    arrays |= {name: column[tokens] for name, column in vocabulary._columns.items()}
    columns = {name: array.tolist() for name, array in arrays.items()}
    return (
        columns | {name: str(getattr(vocabulary, name)) for name in names} | {"catalogue": pipeline.catalogue.version}
    )


def assert_refused(pipeline: Pipeline, call: Callable[[], object], match: str) -> None:
    before = state(pipeline)
    with pytest.raises(ValueError, match=match) as refused:
        call()
    assert "\n" not in str(refused.value)
    assert state(pipeline) == before
    [slate] = pipeline.recommend([[Event("v", "a", "view", 9)]], 10)
    msgspec.json.encode(slate.items)  # every id can be sent
    assert {item.item_id for item in slate.items} <= {"c"}


@pytest.mark.parametrize("bad", [*BAD_EVENTS, "event", None, 7], ids=repr)
def test_recommending_for_an_invalid_event_names_it_and_leaves_nothing(pipeline: Pipeline, bad: Any) -> None:
    histories = [[], [msgspec.structs.replace(GOOD, item_id="new")], [GOOD, bad, GOOD]]
    assert_refused(pipeline, lambda: pipeline.recommend(histories), "^recommend: history 2, event 1: ")


@pytest.mark.parametrize("history", [GOOD, 7, None], ids=repr)
def test_history_that_is_not_one_is_refused(pipeline: Pipeline, history: Any) -> None:
    assert_refused(pipeline, lambda: pipeline.recommend([[GOOD], history]), "^recommend: history 1: ")


@pytest.mark.parametrize("bad", [*BAD_ITEMS, "item", None], ids=repr)
@pytest.mark.parametrize("method", ["load_items", "update_items"])
def test_loading_an_invalid_record_names_it_and_leaves_nothing(pipeline: Pipeline, method: str, bad: Any) -> None:
    call = getattr(pipeline, method)
    assert_refused(pipeline, lambda: call([Item("new", title="x"), bad], ["a"]), f"^{method}: item 1: ")


@pytest.mark.parametrize("bad", BAD_IDS, ids=repr)
def test_invalid_ids_are_refused_wherever_ids_are_given(pipeline: Pipeline, bad: Any) -> None:
    assert_refused(pipeline, lambda: pipeline.admit(["new", bad]), "^admit: item id 1: ")
    assert_refused(pipeline, lambda: pipeline.load_items([Item("new")], ["a", bad]), "^load_items: item id 1: ")
    assert_refused(pipeline, lambda: pipeline.update_items([Item("new")], ["a", bad]), "^update_items: item id 1: ")


@pytest.mark.parametrize("is_new", [np.array([3]), np.ones(1, bool), [True, True], np.ones((2, 1), bool)], ids=repr)
def test_observing_without_a_mark_per_event_is_refused(pipeline: Pipeline, is_new: Any) -> None:
    histories = Histories.from_events([[Event("u", "a", "view", 8), Event("u", "c", "view", 9)]], EventSchema())
    assert_refused(pipeline, lambda: pipeline.observe(histories, is_new), "^observe: is_new ")


@pytest.mark.parametrize("k", [True, 0, -1, "5", None, 1.5, 10**30])
def test_impossible_slate_size_is_refused_at_once_and_rests_no_strategy(pipeline: Pipeline, k: Any) -> None:
    histories = Histories.from_events([[GOOD], []], EventSchema())
    assert_refused(pipeline, lambda: pipeline.recommend([[GOOD]], k), "^recommend: k = ")
    assert_refused(pipeline, lambda: pipeline.rank(histories, k), "^rank: k = ")
    assert_refused(pipeline, lambda: pipeline.rank(histories, 5, "nope"), "no strategy 'nope'")
    assert [answer.why for answer in pipeline.recommend([[], []])] == ["best", "best"]


@pytest.mark.parametrize("bad", [None, 5, GOOD])
def test_histories_and_ids_that_are_no_lists_are_refused(pipeline: Pipeline, bad: Any) -> None:
    assert_refused(pipeline, lambda: pipeline.recommend(bad), "^recommend: the histories are ")
    assert_refused(pipeline, lambda: pipeline.admit(bad), "^admit: the item ids are ")
    assert_refused(pipeline, lambda: pipeline.load_items([], "abc"), "^load_items: the item ids are str")


def test_numbers_of_a_data_frame_are_numbers(pipeline: Pipeline) -> None:
    fields: dict[str, Any] = {"ts_ms": np.int64(5), "value": np.float64(3), "dwell_ms": np.int32(100)}
    event = msgspec.structs.replace(GOOD, **fields)
    plain = msgspec.structs.replace(GOOD, value=3.0, dwell_ms=100)
    assert [answer.items for answer in pipeline.recommend([[event]])] == [
        answer.items for answer in pipeline.recommend([[plain]])
    ]


def test_items_may_come_from_a_generator(pipeline: Pipeline) -> None:
    pipeline.update_items(Item(item_id, title="x") for item_id in ("d", "e"))
    assert pipeline.vocabulary.token("d")
    assert pipeline.vocabulary.token("e")
