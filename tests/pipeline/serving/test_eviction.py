"""Eviction from a full vocabulary."""

from collections.abc import Iterable

import numpy as np
import pytest

from pipeline.records import Event, EventSchema, Histories, Item
from pipeline.serving.eviction import eviction_order
from pipeline.serving.pipeline import Pipeline
from pipeline.strategies.options import PipelineOptions

SCHEMA = EventSchema()


def make_pipeline(max_items: int) -> Pipeline:
    return Pipeline.load(None, PipelineOptions(max_items=max_items))


def observe(pipeline: Pipeline, item_ids: Iterable[str]) -> None:
    """Admit and count one user's events, as a worker does."""
    item_ids = list(item_ids)
    pipeline.admit(item_ids)
    events = [Event("u", item_id, "view", 1_000 * number) for number, item_id in enumerate(item_ids, 1)]
    pipeline.observe(Histories.from_events([events], SCHEMA), np.ones(len(events), bool))


def admitted(pipeline: Pipeline) -> set[str]:
    return set(pipeline.vocabulary.item_ids) - {""}


def test_eviction_order_is_delisted_then_least_recently_seen_then_least_counted():
    pipeline = make_pipeline(100)
    pipeline.vocabulary.admit(["counted", "never"])
    observe(pipeline, ["counted"])
    pipeline.vocabulary.last_seen[:] = 0
    for item_id in ("early", "late", "delisted", "protected"):
        observe(pipeline, [item_id])
    pipeline.update_items([Item("early", title="a record counts as seen, too")], delisted=["delisted"])
    protected = pipeline.vocabulary.admit(["protected"])
    order = eviction_order(pipeline.catalogue, pipeline.counters, protected)
    names = [pipeline.vocabulary.item_ids[token] for token in order]
    assert names == ["delisted", "never", "counted", "late", "early"]


def test_full_vocabulary_evicts_a_sixteenth_for_a_new_item():
    pipeline = make_pipeline(32)
    pipeline.vocabulary.admit(f"i{number}" for number in range(32))
    observe(pipeline, ["i0", "i1"])
    observe(pipeline, ["new"])
    assert pipeline.vocabulary.evicted_count == 2
    assert pipeline.vocabulary.free_slots == 1
    assert {"new", "i0", "i1"} <= admitted(pipeline)


def test_admitted_items_evict_nothing():
    pipeline = make_pipeline(3)
    observe(pipeline, "abc")
    observe(pipeline, "abcabcabc")
    assert pipeline.vocabulary.evicted_count == 0


def test_items_of_one_call_do_not_evict_each_other_and_the_rest_stays_unknown():
    pipeline = make_pipeline(3)
    observe(pipeline, "ab")
    pipeline.admit(list("bcdef"))
    assert "b" in admitted(pipeline)
    assert len(admitted(pipeline)) == 3
    assert pipeline.vocabulary.rejected_count == 2
    assert admitted(pipeline) <= set("bcdef")


def test_new_items_stay_unknown_while_tokens_are_pinned():
    pipeline = make_pipeline(2)
    observe(pipeline, "ab")
    pipeline.vocabulary.pinned = True
    observe(pipeline, "c")
    assert admitted(pipeline) == {"a", "b"}
    assert pipeline.vocabulary.rejected_count == 1
    pipeline.vocabulary.pinned = False
    observe(pipeline, "c")
    assert "c" in admitted(pipeline)


def test_items_loaded_at_the_start_evict_nothing():
    pipeline = make_pipeline(2)
    pipeline.load_items([Item("a"), Item("b"), Item("c")])
    assert admitted(pipeline) == {"a", "b"}


def test_evicted_items_record_does_not_pass_to_the_tokens_next_item():
    pipeline = make_pipeline(1)
    pipeline.update_items([Item("a", price=3.0, title="a thing")])
    observe(pipeline, "b")
    token = pipeline.vocabulary.token("b")
    assert pipeline.catalogue.facts(np.array([token])).price_codes.tolist() == [0]
    assert not any(map(len, pipeline.catalogue.content_hashes(token)))
    assert pipeline.catalogue.changed_at[token] == 0


@pytest.mark.parametrize("seed", range(3))
def test_small_vocabulary_with_evictions_ranks_as_a_large_one(seed: int):
    """Among the items that both have, co-occurring items are the same."""
    small = make_pipeline(12)
    large = make_pipeline(1000)
    rng = np.random.default_rng(seed)
    for step in range(200):
        item_ids = [f"i{step // 20 + number}" for number in rng.permutation(6)]
        observe(small, item_ids)
        observe(large, item_ids)
        history = [Event("u", item_ids[0], "view", 10_000_000)]
        found, reference = (
            [item.item_id for item in pipeline.recommend([history], 3)[0].items if item.source == "cooccurrence"]
            for pipeline in (small, large)
        )
        assert set(found) >= set(reference) & admitted(small)
        assert set(found) <= admitted(small)
