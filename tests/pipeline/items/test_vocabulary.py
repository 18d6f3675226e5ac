"""Tokens are dense, stable, found by hash as columns, and given to others only when they are given up."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.items.vocabulary import UNKNOWN, Vocabulary
from pipeline.records import item_hash


def hashes(ids: list[str]) -> np.ndarray:
    return np.array([item_hash(item) for item in ids], np.uint64)


@given(st.lists(st.text(min_size=1, max_size=8), max_size=50), st.lists(st.text(min_size=1, max_size=8), max_size=50))
def test_a_token_never_changes_its_meaning_when_items_are_admitted(first: list[str], later: list[str]):
    vocabulary = Vocabulary(first)
    before = {item: vocabulary.token(item) for item in first}
    vocabulary.admit(later)
    assert {item: vocabulary.token(item) for item in first} == before
    assert sorted({vocabulary.token(item) for item in first + later}) == list(range(1, len(vocabulary)))
    assert vocabulary.tokens(hashes(first + later)).tolist() == [vocabulary.token(item) for item in first + later]


def test_lookup_survives_the_growth_of_its_table():
    ids = [f"item-{number}" for number in range(20_000)]
    vocabulary = Vocabulary(ids)
    assert vocabulary.tokens(hashes(ids)).tolist() == list(range(1, 20_001))
    assert vocabulary.tokens(hashes(["nobody", "nothing"])).tolist() == [UNKNOWN, UNKNOWN]


def test_items_beyond_the_capacity_stay_unknown_and_are_counted():
    vocabulary = Vocabulary(["a", "b", "c"], max_items=2)
    assert [vocabulary.token(item) for item in "abc"] == [1, 2, UNKNOWN]
    assert (len(vocabulary), vocabulary.rejected_count) == (3, 1)


@given(st.lists(st.tuples(st.sampled_from(["admit", "retire", "withdraw", "restore"]), st.sampled_from("abcdefgh"))))
def test_a_token_means_its_item_until_it_is_retired_whatever_happens_to_others(steps: list[tuple[str, str]]):
    vocabulary, meaning, withdrawn = Vocabulary(max_items=5), {}, set()
    for step, item in steps:
        if step == "admit" and (token := int(vocabulary.admit([item])[0])):
            assert meaning.setdefault(item, token) == token
        elif step == "retire" and item in meaning:
            vocabulary.evict(np.array([meaning.pop(item)]))
        elif step == "withdraw":
            withdrawn.add(item)
            vocabulary.delist([item])
        elif step == "restore":
            withdrawn.discard(item)
            vocabulary.relist([item])
    assert len(set(meaning.values())) == len(meaning) == 5 - vocabulary.free_slots
    assert vocabulary.tokens(hashes(list("abcdefgh"))).tolist() == [meaning.get(item, UNKNOWN) for item in "abcdefgh"]
    assert [vocabulary.item_ids[token] for token in meaning.values()] == list(meaning)
    allowed = {vocabulary.item_ids[token] for token in np.flatnonzero(~vocabulary.blocked[: len(vocabulary)])}
    assert allowed == meaning.keys() - withdrawn


def test_whoever_looks_from_time_to_time_is_told_which_tokens_have_lost_their_item():
    vocabulary = Vocabulary("abc", max_items=3)
    before = vocabulary.version
    vocabulary.evict(np.array([2]))
    assert vocabulary.admit("d").tolist() == [2]
    assert vocabulary.evicted_since(before).tolist() == [2]
    assert vocabulary.evicted_since(vocabulary.version).tolist() == []


def test_no_token_is_retired_while_somebody_holds_them():
    vocabulary = Vocabulary("ab")
    vocabulary.pinned = True
    with pytest.raises(AssertionError, match="another thread holds tokens"):
        vocabulary.evict(np.array([1]))


def test_of_withdrawn_items_the_latest_are_remembered():
    vocabulary = Vocabulary(max_items=2)
    vocabulary.delist(["a", "b"])
    vocabulary.delist(["a", "c"])
    assert vocabulary.delisted_since(0) == ["a", "c"]
    assert vocabulary.delisted_since(1) == ["a", "c"]
    assert vocabulary.delisted_since(2) == []
