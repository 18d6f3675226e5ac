"""Rows of a model's table and the process's tokens name the same items."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import ArtifactError
from pipeline.items import change_log
from pipeline.items.row_index import RowIndex
from pipeline.items.vocabulary import Vocabulary


def moved(index: RowIndex) -> list[int]:
    """Return the rows that the index attached or detached to follow its vocabulary."""
    return index.sync()[0].tolist()


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
    assert moved(index) == [1]
    assert index.rows(np.array([1, 2])).tolist() == [0, 2]
    assert np.flatnonzero(index.blocked).tolist() == [0, 1]
    vocabulary.evict(np.array([2]))
    vocabulary.admit(["a"])
    assert moved(index) == [1, 2]
    assert index.rows(np.array([1, 2])).tolist() == [0, 1]
    assert index.tokens(np.array([1, 2])).tolist() == [2, 0]
    assert moved(index) == []


def test_sync_notices_a_return_without_another_eviction():
    vocabulary = Vocabulary(["a", "b"])
    index = RowIndex(vocabulary, ["a", "b"])
    vocabulary.evict(np.array([1]))
    assert moved(index) == [1]
    vocabulary.admit(["a"])
    assert moved(index) == [1]
    assert np.flatnonzero(index.blocked).tolist() == [0]


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
    assert moved(index) == []
    assert np.flatnonzero(index.blocked).tolist() == [0, 2]
    assert index.rows(np.array([2])).tolist() == [2]


NAMES = [f"i{number}" for number in range(8)]
steps = st.lists(
    st.tuples(st.sampled_from(["admit", "evict", "delist", "relist", "allocate", "sync"]), st.sampled_from(NAMES)),
    max_size=40,
)


@pytest.mark.parametrize("kept", [1, 1 << 16])
@given(steps=steps)
def test_index_that_follows_equals_a_look_up_of_every_row(kept: int, steps: list[tuple[str, str]]) -> None:
    """With few kept changes the index falls behind and looks at everything."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(change_log, "KEPT", kept)
        vocabulary = Vocabulary(NAMES[:4])
        index = RowIndex(vocabulary, NAMES[:4])
        items = dict(enumerate(NAMES[:4], 1))  # by row
        for step, name in [*steps, ("sync", "")]:
            token = vocabulary.token(name)
            if step == "admit":
                vocabulary.admit([name])
            elif step == "evict" and token:
                vocabulary.evict(np.array([token]))
            elif step == "delist":
                vocabulary.delist([name])
            elif step == "relist":
                vocabulary.relist([name], vocabulary.tokens_of_ids([name]))
            elif step in ("allocate", "sync"):
                index.sync()
                items = {row: item for row, item in items.items() if row <= 4 or vocabulary.token(item)}
                if step == "allocate" and token and not index.rows(np.array([token]))[0]:
                    items[int(index.allocate(np.array([token]))[0])] = name
        tokens = {row: vocabulary.token(item) for row, item in items.items()}
        assert index.tokens(np.arange(len(index))).tolist() == [tokens.get(row, 0) for row in range(len(index))]
        assert index.blocked.tolist() == [bool(vocabulary.blocked[tokens.get(row, 0)]) for row in range(len(index))]
        by_token = {token: row for row, token in tokens.items() if token}
        every = np.arange(len(vocabulary) + 3)
        assert index.rows(every).tolist() == [by_token.get(token, 0) for token in every]
