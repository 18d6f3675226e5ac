"""Item metadata is stored by token, saved and restored, and text is hashed."""

from dataclasses import asdict

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from pipeline.items.catalogue import FIELDS, Catalogue
from pipeline.items.vocabulary import Vocabulary
from pipeline.records import Item, encode_value

names = st.text(st.characters(codec="utf-8"), min_size=1, max_size=8)
items = st.builds(
    Item,
    item_id=st.sampled_from(["a", "b", "c", "d"]),
    title=st.none() | names,
    category=st.lists(names, max_size=3),
    brand=st.none() | names,
    price=st.none() | st.floats(0, 1e6),
    created_ms=st.none() | st.integers(0, 1 << 47),
)


def facts(catalogue: Catalogue, item_ids: str) -> dict[str, list[int]]:
    tokens = np.array([catalogue.vocabulary.token(item_id) for item_id in item_ids])
    return {name: column.tolist() for name, column in asdict(catalogue.facts(tokens)).items()}


@given(st.lists(items, max_size=8))
def test_saved_facts_are_restored_under_another_vocabulary(records: list[Item]) -> None:
    first = Catalogue(Vocabulary(["a", "b", "c", "d"]))
    second = Catalogue(Vocabulary(["z", "d", "c", "b", "a"]))
    first.upsert(records)
    second.restore_facts(np.array([5, 4, 3, 2]), first.state(np.array([1, 2, 3, 4])))
    assert facts(first, "abcd") == facts(second, "abcd")


def test_restored_facts_never_replace_a_record() -> None:
    old = Catalogue(Vocabulary(["a", "b"]))
    new = Catalogue(Vocabulary(["a", "b"]))
    old.upsert([Item("a", price=1.0, category=["x"]), Item("b", price=2.0)])
    new.upsert([Item("a", price=9.0)])
    new.restore_facts(np.array([1, 2]), old.state(np.array([1, 2])))
    assert facts(new, "ab")["price_codes"] == [encode_value(9.0), encode_value(2.0)]
    assert facts(new, "a")["categories"] == [0]


def test_upsert_keeps_the_last_record_and_admits_new_items() -> None:
    catalogue = Catalogue(Vocabulary(["old"]))
    tokens = catalogue.upsert([Item("new", price=3.0), Item("old", brand="x"), Item("new", price=4.0, created_ms=9)])
    assert tokens.tolist() == [1, 2]
    stored = catalogue.facts(np.array([0, 1, 2, 77]))
    assert stored.price_codes.tolist() == [0, 0, encode_value(4.0), 0]
    assert stored.created_ms.tolist() == [0, 0, 9, 0]
    assert (catalogue.changed_at[[0, 1, 2]] > 0).tolist() == [False, True, True]


@given(st.lists(items, max_size=8))
def test_restored_content_equals_that_of_the_records(records: list[Item]) -> None:
    first = Catalogue(Vocabulary(["a", "b", "c", "d"]))
    second = Catalogue(Vocabulary(["d", "c", "b", "a"]))
    first.upsert(records)
    tokens = np.array([1, 2, 3, 4])
    second.restore(np.array([4, 3, 0, 1]), first.state(tokens), first.has_records(tokens))  # c is left out
    for token, other in ((1, 4), (2, 3), (4, 1)):
        for field, restored in zip(first.content_hashes(token), second.content_hashes(other), strict=True):
            assert field.tolist() == restored.tolist()
    assert not any(map(len, second.content_hashes(2)))


def test_similar_texts_share_word_and_trigram_hashes() -> None:
    catalogue = Catalogue(Vocabulary())
    catalogue.upsert(
        [Item("a", title="Red shoes"), Item("b", title="red SHOE"), Item("c", text="red shoes!"), Item("d")]
    )
    a, b, c, d = (set(catalogue.content_hashes(token)[0].tolist()) for token in (1, 2, 3, 4))
    assert a == c
    assert len(a & b) > len(a) / 2
    assert a != b
    assert not d


def test_equal_names_in_different_fields_hash_differently() -> None:
    catalogue = Catalogue(Vocabulary())
    catalogue.upsert([Item("a", title="x", category=["x"], brand="x", tags=["x"])])
    assert len({hash_ for field in catalogue.content_hashes(1) for hash_ in field.tolist()}) > len(FIELDS) - 1


def test_full_vocabulary_skips_records_of_new_items() -> None:
    catalogue = Catalogue(Vocabulary(["a"], max_items=1))
    assert catalogue.upsert([Item("b", price=1.0), Item("a", price=2.0)]).tolist() == [1]
    assert facts(catalogue, "a")["price_codes"] == [encode_value(2.0)]
