import numpy as np
import pytest
import torch

from pipeline.items.catalogue import Catalogue
from pipeline.items.content import ItemContent, PriceScale
from pipeline.items.metadata import ItemMetadata
from pipeline.items.vocabulary import Vocabulary
from pipeline.model.item_embedding import ItemEmbedding
from pipeline.records import Item

RECORDS = [
    Item("a", title="red shoe", category=["shoes"], brand="x", price=10.0, tags=["new"]),
    Item("b", title="blue boot", category=["shoes"], price=90.0),
    Item("c"),
    Item("d", text="a lamp"),
]
EVENTS = np.array([0, 3, 5, 1000])


@pytest.fixture
def known() -> ItemMetadata:
    catalogue = Catalogue(Vocabulary([item.item_id for item in RECORDS]))
    catalogue.upsert(RECORDS)
    return ItemMetadata.from_catalogue(catalogue, np.arange(1, 5), EVENTS)


@pytest.fixture
def items(known: ItemMetadata) -> ItemEmbedding:
    torch.manual_seed(0)
    model = ItemEmbedding(5, 8, 64, 1e-6).requires_grad_(False)
    model.item_content = known.content()
    return model


def test_vectors_have_length_one_and_those_of_some_rows_are_those_of_all(items: ItemEmbedding) -> None:
    torch.testing.assert_close(items().norm(dim=1), torch.ones(5))
    rows = np.array([4, 0, 2, 2])
    torch.testing.assert_close(items(rows), items()[torch.from_numpy(rows)])


def test_the_more_training_events_the_less_content_counts(items: ItemEmbedding) -> None:
    own = torch.nn.functional.normalize(items.embedding.weight, dim=1)
    content = items.from_content(items.item_content)
    vectors = items()
    assert (vectors[1] - content[1]).norm() < 0.05, "an item without events is its content"
    assert 0.1 < (vectors[2] - content[2]).norm() < (own[2] - content[2]).norm()
    torch.testing.assert_close(vectors[4], own[4], atol=0.01, rtol=0)
    torch.testing.assert_close(vectors[[0, 3]], own[[0, 3]], msg="of an item without a record only itself is known")


def test_items_taken_as_new_are_their_content_alone(items: ItemEmbedding) -> None:
    cold = np.array([True, False, True, True, True])
    vectors, content = items(cold=cold), items.from_content(items.item_content)
    torch.testing.assert_close(vectors[[2, 4]], content[[2, 4]])
    torch.testing.assert_close(vectors[[0, 1, 3]], items()[[0, 1, 3]])


def test_a_new_items_vector_is_a_function_of_its_record_alone(items: ItemEmbedding, known: ItemMetadata) -> None:
    vectors = []
    for others in ([], [Item("z", title="other")], RECORDS):
        catalogue = Catalogue(Vocabulary([item.item_id for item in others]))
        catalogue.upsert([*others, Item("new", title="red boot", price=20.0)])
        token = np.array([catalogue.vocabulary.token("new")])
        vectors.append(items.from_content(known.new_item_content(catalogue, token)))
    torch.testing.assert_close(vectors[0], vectors[1], rtol=0, atol=0)
    torch.testing.assert_close(vectors[0], vectors[2], rtol=0, atol=0)


def test_what_an_artifact_knows_of_items_survives_its_file(known: ItemMetadata) -> None:
    again = ItemMetadata.from_arrays(known.arrays())
    for one, two in zip(contents_columns(known.content()), contents_columns(again.content()), strict=True):
        assert torch.equal(one, two)
    assert again.scale == known.scale != PriceScale()


def contents_columns(contents: ItemContent) -> list[torch.Tensor]:
    return [contents.ids, contents.lengths, contents.numbers, contents.counts]


def test_gradients_reach_the_words_of_what_is_taken_as_new(items: ItemEmbedding) -> None:
    items.requires_grad_(True)
    items(cold=np.array([False, True, False, False, False]))[1].sum().backward()
    assert items.content_encoder.words.weight.grad is not None
    assert items.content_encoder.words.weight.grad.abs().sum() > 0
    assert items.embedding.weight.grad is None or items.embedding.weight.grad[1].abs().sum() == 0
