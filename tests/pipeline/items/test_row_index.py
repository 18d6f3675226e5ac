"""Rows of a model's table and the process's tokens name the same items."""

import numpy as np
import pytest

from pipeline.errors import ArtifactError
from pipeline.items.row_index import RowIndex
from pipeline.items.vocabulary import Vocabulary


def test_rows_and_tokens_map_to_each_other_in_any_vocabulary():
    vocabulary = Vocabulary(["new", "c", "x", "a", "y"])
    vocabulary.admit(["b"])
    index = RowIndex(vocabulary, ["a", "b", "c"])
    tokens = np.array([[vocabulary.token(item) for item in ("a", "b", "c")]])
    assert index.rows(tokens).tolist() == [[1, 2, 3]]
    assert index.tokens(np.array([[1, 2, 3]])).tolist() == tokens.tolist()
    assert index.tokens(np.array([0])).tolist() == [0]


def test_items_outside_the_model_have_row_0():
    vocabulary = Vocabulary(["x", "a"])
    index = RowIndex(vocabulary, ["a"])
    vocabulary.admit(f"late{number}" for number in range(50))
    assert index.rows(np.array([0, vocabulary.token("x"), vocabulary.token("late49")])).tolist() == [0, 0, 0]


def test_full_vocabulary_is_an_artifact_error():
    vocabulary = Vocabulary(["x", "y"], max_items=3)
    vocabulary.admit(["a", "b"])
    with pytest.raises(ArtifactError, match=r"1 of its 2 items .*counters\.max_items is 3: set it higher"):
        RowIndex(vocabulary, ["a", "b"])


def test_evicted_items_row_is_detached_and_reattached_on_return():
    vocabulary = Vocabulary(["a", "b"], max_items=2)
    index = RowIndex(vocabulary, ["a", "b"])
    vocabulary.evict(np.array([1]))
    vocabulary.admit(["other"])
    assert index.sync().tolist() == [1]
    assert index.rows(np.array([1, 2])).tolist() == [0, 2]
    assert index.blocked_rows.tolist() == [0, 1]
    vocabulary.evict(np.array([2]))
    vocabulary.admit(["a"])
    assert index.sync().tolist() == [1, 2]
    assert index.rows(np.array([1, 2])).tolist() == [0, 1]
    assert index.tokens(np.array([1, 2])).tolist() == [2, 0]
    assert not index.sync().size


def test_sync_notices_a_return_without_another_eviction():
    vocabulary = Vocabulary(["a", "b"])
    index = RowIndex(vocabulary, ["a", "b"])
    vocabulary.evict(np.array([1]))
    assert index.sync().tolist() == [1]
    vocabulary.admit(["a"])
    assert index.sync().tolist() == [1]
    assert index.blocked_rows.tolist() == [0]


def test_rows_of_evicted_new_items_are_reused():
    vocabulary = Vocabulary(["a", "new", "newer"])
    index = RowIndex(vocabulary, ["a"])
    assert index.allocate(np.array([2, 3])).tolist() == [2, 3]
    vocabulary.evict(np.array([2]))
    index.sync()
    vocabulary.admit(["x", "y"])
    assert index.allocate(vocabulary.admit(["x", "y"])).tolist() == [2, 4]
    assert index.rows(vocabulary.admit(["a", "newer", "x", "y"])).tolist() == [1, 3, 2, 4]
    assert len(index) == 5


def test_rows_of_delisted_items_are_blocked_but_still_mapped():
    vocabulary = Vocabulary(["a", "b"])
    index = RowIndex(vocabulary, ["a", "b"])
    vocabulary.delist(["b"])
    assert not index.sync().size
    assert index.blocked_rows.tolist() == [0, 2]
    assert index.rows(np.array([2])).tolist() == [2]
