import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.catalogue import FIELDS, Catalogue
from pipeline.records import Item, encode_value
from pipeline.vocabulary import Vocabulary

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


@settings(deadline=None)
@given(st.lists(items, max_size=8))
def test_what_is_saved_is_restored_into_another_vocabulary(records: list[Item]) -> None:
    first, second = Catalogue(Vocabulary(["a", "b", "c", "d"])), Catalogue(Vocabulary(["z", "d", "c", "b", "a"]))
    first.put(records)
    second.restore("abcd", first.state("abcd"))
    for item_id in "abcd":
        one, two = (np.array([each.vocabulary.token(item_id)]) for each in (first, second))
        for column in ("price_codes", "categories", "created_ms"):
            assert getattr(first, column)(one) == getattr(second, column)(two)
        pairs = zip(first.words_of(int(one[0])), second.words_of(int(two[0])), strict=True)
        assert all((left == right).all() for left, right in pairs)


def test_the_later_record_of_an_item_counts_and_new_items_get_tokens() -> None:
    catalogue = Catalogue(Vocabulary(["old"]))
    tokens = catalogue.put([Item("new", price=3.0), Item("old", brand="x"), Item("new", price=4.0, created_ms=9)])
    assert tokens.tolist() == [1, 2]
    assert catalogue.price_codes(np.array([0, 1, 2, 77])).tolist() == [0, 0, encode_value(4.0), 0]
    assert catalogue.created_ms(np.array([2])).tolist() == [9]


def test_a_text_is_known_by_its_words_and_their_letters() -> None:
    catalogue = Catalogue(Vocabulary())
    catalogue.put([Item("a", title="Red shoes"), Item("b", title="red SHOE"), Item("c", text="red shoes!"), Item("d")])
    a, b, c, d = (set(catalogue.words_of(token)[0].tolist()) for token in (1, 2, 3, 4))
    assert a == c
    assert len(a & b) > len(a) / 2
    assert a != b
    assert not d


def test_equal_names_of_different_fields_differ() -> None:
    catalogue = Catalogue(Vocabulary())
    catalogue.put([Item("a", title="x", category=["x"], brand="x", tags=["x"])])
    assert len({hash_ for field in catalogue.words_of(1) for hash_ in field.tolist()}) > len(FIELDS) - 1


def test_a_full_vocabulary_leaves_records_of_new_items_out() -> None:
    catalogue = Catalogue(Vocabulary(["a"], max_items=1))
    assert catalogue.put([Item("b", price=1.0), Item("a", price=2.0)]).tolist() == [1]
    assert catalogue.price_codes(np.array([0, 1])).tolist() == [0, encode_value(2.0)]
