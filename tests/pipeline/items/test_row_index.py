"""Rows of a model's table and the process's tokens name the same items."""

import numpy as np
import pytest

from pipeline.errors import ArtifactError
from pipeline.items.row_index import RowIndex
from pipeline.items.vocabulary import Vocabulary


def test_rows_and_tokens_lead_to_each_other_whatever_the_process_knew_before():
    vocabulary = Vocabulary(["new", "c", "x", "a", "y"])
    vocabulary.admit(["b"])
    table = RowIndex(vocabulary, ["a", "b", "c"])
    tokens = np.array([[vocabulary.token(item) for item in ("a", "b", "c")]])
    assert table.rows(tokens).tolist() == [[1, 2, 3]]
    assert table.tokens(np.array([[1, 2, 3]])).tolist() == tokens.tolist()
    assert table.tokens(np.array([0])).tolist() == [0]


def test_an_item_that_the_model_does_not_know_has_row_0_however_late_it_came():
    vocabulary = Vocabulary(["x", "a"])
    table = RowIndex(vocabulary, ["a"])
    vocabulary.admit(f"late{number}" for number in range(50))
    assert table.rows(np.array([0, vocabulary.token("x"), vocabulary.token("late49")])).tolist() == [0, 0, 0]


def test_a_vocabulary_without_room_for_the_models_items_is_one_sentence():
    vocabulary = Vocabulary(["x", "y"], max_items=3)
    vocabulary.admit(["a", "b"])
    with pytest.raises(ArtifactError, match=r"1 of its 2 items .*counters\.max_items is 3: set it higher"):
        RowIndex(vocabulary, ["a", "b"])


def test_a_retired_items_row_is_cut_off_and_found_again_when_the_item_is_back():
    vocabulary = Vocabulary(["a", "b"], max_items=2)
    table = RowIndex(vocabulary, ["a", "b"])
    vocabulary.evict(np.array([1]))
    vocabulary.admit(["other"])
    assert table.sync().tolist() == [1]
    assert table.rows(np.array([1, 2])).tolist() == [0, 2]
    assert table.blocked_rows.tolist() == [0, 1]
    vocabulary.evict(np.array([2]))
    vocabulary.admit(["a"])
    assert table.sync().tolist() == [1, 2]
    assert table.rows(np.array([1, 2])).tolist() == [0, 1]
    assert table.tokens(np.array([1, 2])).tolist() == [2, 0]
    assert not table.sync().size


def test_an_item_that_is_back_is_noticed_though_nothing_was_retired_since():
    vocabulary = Vocabulary(["a", "b"])
    table = RowIndex(vocabulary, ["a", "b"])
    vocabulary.evict(np.array([1]))
    assert table.sync().tolist() == [1]
    vocabulary.admit(["a"])
    assert table.sync().tolist() == [1]
    assert table.blocked_rows.tolist() == [0]


def test_rows_of_retired_new_items_are_given_to_other_new_items():
    vocabulary = Vocabulary(["a", "new", "newer"])
    table = RowIndex(vocabulary, ["a"])
    assert table.allocate(np.array([2, 3])).tolist() == [2, 3]
    vocabulary.evict(np.array([2]))
    table.sync()
    vocabulary.admit(["x", "y"])
    assert table.allocate(vocabulary.admit(["x", "y"])).tolist() == [2, 4]
    assert table.rows(vocabulary.admit(["a", "newer", "x", "y"])).tolist() == [1, 3, 2, 4]
    assert len(table) == 5


def test_rows_of_withdrawn_items_are_barred_and_lead_to_them_still():
    vocabulary = Vocabulary(["a", "b"])
    table = RowIndex(vocabulary, ["a", "b"])
    vocabulary.delist(["b"])
    assert not table.sync().size
    assert table.blocked_rows.tolist() == [0, 2]
    assert table.rows(np.array([2])).tolist() == [2]
