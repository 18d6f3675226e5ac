"""A hash index finds what a dict would, at any size, with equal hashes and after removals."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.items import hash_index
from pipeline.items.hash_index import HashIndex

FEW_SLOTS = 4
# Hashes that collide in tables of few slots, and equal ones.
keys = st.sampled_from([1, 2, 5, 1 + (1 << 32), 1 + (1 << 63), (1 << 64) - 1, 1 << 63])


@pytest.fixture(scope="module", autouse=True)
def small_tables() -> None:
    """Let tables begin with so few slots that a handful of items moves them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hash_index, "FIRST_SLOTS", FEW_SLOTS)
        patch.setattr(hash_index, "MAX_MOVED_SLOTS", 4 * FEW_SLOTS)
        yield


@given(st.lists(keys, max_size=40), st.sets(st.integers(1, 40)), st.lists(keys, max_size=10))
def test_index_finds_every_token_by_its_hash(first: list[int], removed: set[int], later: list[int]) -> None:
    index = HashIndex(max_tokens=60)
    expected: dict[int, set[int]] = {}
    for token, key in enumerate(first, 1):
        index.insert(key, token)
        expected.setdefault(key, set()).add(token)
    removed = {token for token in removed if token <= len(first)}
    index.remove(np.array(sorted(removed), np.int64))
    for tokens in expected.values():
        tokens -= removed
    for token, key in enumerate(later, len(first) + 1):
        index.insert(key, token)
        expected.setdefault(key, set()).add(token)
    queries = [*expected, 3, 0]
    for key, token in zip(queries, index.tokens(np.array(queries, np.uint64)).tolist(), strict=True):
        assert set(index.tokens_of_one(key)) == expected.get(key, set())
        assert token in (expected.get(key) or {0})


def test_table_made_for_all_tokens_does_not_move_again() -> None:
    index = HashIndex(max_tokens=1000)
    index.insert(1, 1)
    hashes = index.hashes
    for token in range(2, 6):
        index.insert(token, token)
    slots = index._slots
    for token in range(6, 1000):
        index.insert(token, token)
    assert index._slots is slots
    assert index.hashes is hashes
    assert index.tokens(np.arange(1, 1000).astype(np.uint64)).tolist() == list(range(1, 1000))
