"""Rows of a model's table and the process's tokens name the same items."""

import numpy as np
import pytest

from pipeline.errors import ArtifactError
from pipeline.tablerows import TableRows
from pipeline.vocabulary import Vocabulary


def test_rows_and_tokens_lead_to_each_other_whatever_the_process_knew_before():
    vocabulary = Vocabulary(["new", "c", "x", "a", "y"])
    vocabulary.admit(["b"])
    table = TableRows(vocabulary, ["a", "b", "c"])
    tokens = np.array([[vocabulary.token(item) for item in ("a", "b", "c")]])
    assert table.rows(tokens).tolist() == [[1, 2, 3]]
    assert table.tokens(np.array([[1, 2, 3]])).tolist() == tokens.tolist()
    assert table.tokens(np.array([0])).tolist() == [0]


def test_an_item_that_the_model_does_not_know_has_row_0_however_late_it_came():
    vocabulary = Vocabulary(["x", "a"])
    table = TableRows(vocabulary, ["a"])
    vocabulary.admit(f"late{number}" for number in range(50))
    assert table.rows(np.array([0, vocabulary.token("x"), vocabulary.token("late49")])).tolist() == [0, 0, 0]


def test_a_vocabulary_without_room_for_the_models_items_is_one_sentence():
    vocabulary = Vocabulary(["x", "y"], max_items=3)
    vocabulary.admit(["a", "b"])
    with pytest.raises(ArtifactError, match=r"1 of its 2 items .*counters\.max_items is 3: set it higher"):
        TableRows(vocabulary, ["a", "b"])
