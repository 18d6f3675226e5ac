"""Tokens are dense, stable, and found by hash as columns."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from pipeline.records import item_hash
from pipeline.vocabulary import UNKNOWN, Vocabulary


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
    assert (len(vocabulary), vocabulary.refused) == (3, 1)
