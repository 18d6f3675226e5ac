"""Tokens are dense, stable, looked up by hash a column at a time, and reused only after an eviction."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.items import vocabulary as module
from pipeline.items.vocabulary import CACHED_IDS, UNKNOWN, Vocabulary
from pipeline.records import item_hash


def hashes(ids: list[str]) -> np.ndarray:
    return np.array([item_hash(item) for item in ids], np.uint64)


@given(st.lists(st.text(min_size=1, max_size=8), max_size=50), st.lists(st.text(min_size=1, max_size=8), max_size=50))
def test_admitting_items_never_changes_a_token(first: list[str], later: list[str]):
    vocabulary = Vocabulary(first)
    before = {item: vocabulary.token(item) for item in first}
    vocabulary.admit(later)
    assert {item: vocabulary.token(item) for item in first} == before
    assert sorted({vocabulary.token(item) for item in first + later}) == list(range(1, len(vocabulary)))
    assert vocabulary.tokens(hashes(first + later)).tolist() == [vocabulary.token(item) for item in first + later]


def test_hash_lookup_survives_table_growth():
    ids = [f"item-{number}" for number in range(20_000)]
    vocabulary = Vocabulary(ids)
    assert vocabulary.tokens(hashes(ids)).tolist() == list(range(1, 20_001))
    assert vocabulary.tokens(hashes(["unknown", "missing"])).tolist() == [UNKNOWN, UNKNOWN]


def test_lookups_by_id_one_at_a_time_few_or_many_agree():
    ids = [f"item-{number}" for number in range(CACHED_IDS)]
    vocabulary = Vocabulary(ids[:-1])
    expected = [*range(1, CACHED_IDS), UNKNOWN]
    assert vocabulary.tokens_of_ids(ids).tolist() == expected
    assert vocabulary.tokens_of_ids(ids[-3:]).tolist() == expected[-3:]
    assert [vocabulary.token(item) for item in ids[-3:]] == expected[-3:]
    assert vocabulary.unknown(ids) == ids[-1:]


def test_items_with_one_hash_keep_their_own_tokens(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "item_hash", len)  # all of two letters have the hash 2
    vocabulary = Vocabulary(["aa", "bb", "c", "dd"])
    assert vocabulary.admit(["dd", "bb", "ee", "aa", "ee"]).tolist() == [4, 2, 5, 1, 5]
    vocabulary.evict(np.array([1, 4]))
    assert vocabulary.tokens_of_ids(["aa", "bb", "c", "dd", "ee"]).tolist() == [UNKNOWN, 2, 3, UNKNOWN, 5]
    assert vocabulary.admit(["aa", "dd"]).tolist() == [4, 1]
    assert [vocabulary.token(item) for item in ("aa", "bb", "c", "dd", "ee", "ff")] == [4, 2, 3, 1, 5, UNKNOWN]
    assert vocabulary.tokens(np.array([2], np.uint64))[0] in (1, 2, 4, 5)


def test_repeated_new_item_is_admitted_once_and_rejected_each_time():
    vocabulary = Vocabulary(max_items=1)
    assert vocabulary.admit(["a", "b", "a", "b"]).tolist() == [1, UNKNOWN, 1, UNKNOWN]
    assert (vocabulary.admitted_count, vocabulary.rejected_count) == (1, 2)


def test_items_beyond_capacity_stay_unknown_and_are_counted():
    vocabulary = Vocabulary(["a", "b", "c"], max_items=2)
    assert [vocabulary.token(item) for item in "abc"] == [1, 2, UNKNOWN]
    assert (len(vocabulary), vocabulary.rejected_count) == (3, 1)


@given(st.lists(st.tuples(st.sampled_from(["admit", "evict", "delist", "relist"]), st.sampled_from("abcdefgh"))))
def test_token_keeps_its_item_until_evicted(steps: list[tuple[str, str]]):
    vocabulary = Vocabulary(max_items=5)
    tokens: dict[str, int] = {}
    delisted: set[str] = set()
    for step, item in steps:
        if step == "admit" and (token := int(vocabulary.admit([item])[0])):
            assert tokens.setdefault(item, token) == token
        elif step == "evict" and item in tokens:
            vocabulary.evict(np.array([tokens.pop(item)]))
        elif step == "delist" and len(delisted | {item}) <= vocabulary.max_items:  # it remembers max_items
            delisted.add(item)
            vocabulary.delist([item])
        elif step == "relist":
            delisted.discard(item)
            vocabulary.relist([item], vocabulary.tokens_of_ids([item]))
    assert len(set(tokens.values())) == len(tokens) == 5 - vocabulary.free_slots
    assert vocabulary.tokens(hashes(list("abcdefgh"))).tolist() == [tokens.get(item, UNKNOWN) for item in "abcdefgh"]
    assert [vocabulary.item_ids[token] for token in tokens.values()] == list(tokens)
    allowed = {vocabulary.item_ids[token] for token in np.flatnonzero(~vocabulary.blocked[: len(vocabulary)])}
    assert allowed == tokens.keys() - delisted


def test_evicted_since_reports_tokens_that_lost_their_item():
    vocabulary = Vocabulary("abc", max_items=3)
    before = vocabulary.version
    vocabulary.evict(np.array([2]))
    assert vocabulary.admit("d").tolist() == [2]
    assert vocabulary.evicted_since(before).tolist() == [2]
    assert vocabulary.evicted_since(vocabulary.version).tolist() == []


def test_eviction_while_tokens_are_pinned_fails():
    vocabulary = Vocabulary("ab")
    vocabulary.pinned = True
    with pytest.raises(AssertionError, match="another thread holds tokens"):
        vocabulary.evict(np.array([1]))


def test_latest_delisted_items_are_remembered():
    vocabulary = Vocabulary(max_items=2)
    vocabulary.delist(["a", "b"])
    vocabulary.delist(["a", "c"])
    assert vocabulary.delisted_since(0) == ["a", "c"]
    assert vocabulary.delisted_since(1) == ["a", "c"]
    assert vocabulary.delisted_since(2) == []


def test_item_whose_delisting_is_forgotten_is_relisted_by_its_next_record() -> None:
    vocabulary = Vocabulary(["a"], max_items=3)
    vocabulary.delist(["a"])
    vocabulary.delist(["x1", "x2", "x3"])  # the latest three are remembered
    assert vocabulary.blocked[vocabulary.token("a")]
    vocabulary.relist(["a", "unknown"], vocabulary.tokens_of_ids(["a", "unknown"]))
    assert not vocabulary.blocked[vocabulary.token("a")]
    assert vocabulary.blocked[0]
