"""Who loses their token when the vocabulary is full, and who never does."""

import numpy as np
import pytest

from pipeline.records import Event, EventSchema, Histories, Item
from pipeline.serving.eviction import eviction_order
from pipeline.serving.pipeline import Pipeline, PipelineOptions

SCHEMA = EventSchema()


def pipeline(max_items: int) -> Pipeline:
    return Pipeline.load(None, PipelineOptions(max_items=max_items))


def see(made: Pipeline, *item_ids: str) -> None:
    """One user's events, as a worker takes them."""
    made.admit(item_ids)
    events = [Event("u", item_id, "view", 1_000 * place) for place, item_id in enumerate(item_ids, 1)]
    made.observe(Histories.from_events([events], SCHEMA), np.array([len(events)]))


def known(made: Pipeline) -> set[str]:
    return set(made.vocabulary.item_ids) - {""}


def test_withdrawn_items_go_first_then_those_unseen_for_the_longest_then_those_counted_least():
    made = pipeline(100)
    made.vocabulary.admit(["counted", "never"])
    see(made, "counted")
    made.vocabulary.last_seen[:] = 0
    for item_id in ("early", "late", "withdrawn", "early-but-seen-again"):
        see(made, item_id)
    made.update_items([Item("early", title="its record is news, too")], ["withdrawn"])
    kept = made.vocabulary.admit(["early-but-seen-again"])
    order = [made.vocabulary.item_ids[token] for token in eviction_order(made.catalogue, made.counters, kept)]
    assert order == ["withdrawn", "never", "counted", "late", "early"]


def test_a_full_vocabulary_retires_a_sixteenth_for_a_new_item():
    made = pipeline(32)
    made.vocabulary.admit(f"i{number}" for number in range(32))
    see(made, "i0", "i1")
    see(made, "new")
    assert (made.vocabulary.evicted_count, made.vocabulary.free_slots) == (2, 1)
    assert {"new", "i0", "i1"} <= known(made)


def test_known_items_cost_nobody_their_token():
    made = pipeline(3)
    see(made, "a", "b", "c")
    see(made, *"abcabcabc")
    assert made.vocabulary.evicted_count == 0


def test_items_of_one_call_do_not_push_each_other_out_and_the_rest_stays_unknown():
    made = pipeline(3)
    see(made, "a", "b")
    made.admit(list("bcdef"))
    assert "b" in known(made)
    assert len(known(made)) == 3
    assert made.vocabulary.rejected_count == 2
    assert known(made) <= set("bcdef")


def test_while_somebody_holds_tokens_new_items_stay_unknown():
    made = pipeline(2)
    see(made, "a", "b")
    made.vocabulary.pinned = True
    see(made, "c")
    assert (known(made), made.vocabulary.rejected_count) == ({"a", "b"}, 1)
    made.vocabulary.pinned = False
    see(made, "c")
    assert "c" in known(made)


def test_what_is_read_at_the_start_retires_nobody():
    made = pipeline(2)
    made.load_items([Item("a"), Item("b"), Item("c")])
    assert known(made) == {"a", "b"}


def test_a_retired_items_record_is_not_its_successors():
    made = pipeline(1)
    made.update_items([Item("a", price=3.0, title="a thing")])
    see(made, "b")
    token = made.vocabulary.token("b")
    assert made.catalogue.facts(np.array([token])).price_codes.tolist() == [0]
    assert not any(map(len, made.catalogue.content_hashes(token)))
    assert made.catalogue.changed_at[token] == 0


@pytest.mark.parametrize("seed", range(3))
def test_slates_name_the_items_that_were_meant_whatever_was_retired_in_between(seed: int):
    """A small vocabulary under many items ranks as a large one does, where it knows the same."""
    small, large, dice = pipeline(12), pipeline(1000), np.random.default_rng(seed)
    for step in range(200):
        item_ids = [f"i{step // 20 + number}" for number in dice.permutation(6)]
        see(small, *item_ids)
        see(large, *item_ids)
        asked = [[Event("u", item_ids[0], "view", 10_000_000)]]
        ours, theirs = (each.recommend(asked, 3)[0].items for each in (small, large))
        wanted = [item.item_id for item in theirs if item.source == "cooccurrence" and item.item_id in known(small)]
        got = [item.item_id for item in ours if item.source == "cooccurrence"]
        assert set(got) >= set(wanted)
        assert set(got) <= known(small)
