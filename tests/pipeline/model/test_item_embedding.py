import numpy as np
import pytest
import torch
import torch.nn.functional as F

from pipeline.items.catalogue import Catalogue
from pipeline.items.content import ItemContent, PriceScale
from pipeline.items.metadata import ItemMetadata, new_item_content
from pipeline.items.vocabulary import Vocabulary
from pipeline.model.item_embedding import ItemEmbedding
from pipeline.records import Item

RECORDS = [
    Item("a", title="red shoe", category=["shoes"], brand="x", price=10.0, tags=["new"]),
    Item("b", title="blue boot", category=["shoes"], price=90.0),
    Item("c"),
    Item("d", text="a lamp"),
]
EVENTS = np.array([0, 3, 5, 1000])  # training events of each


@pytest.fixture
def metadata() -> ItemMetadata:
    catalogue = Catalogue(Vocabulary([item.item_id for item in RECORDS]))
    catalogue.upsert(RECORDS)
    return ItemMetadata.from_catalogue(catalogue, np.arange(1, 5), EVENTS)


@pytest.fixture
def content(metadata: ItemMetadata) -> ItemContent:
    return metadata.content()


@pytest.fixture
def items(content: ItemContent) -> ItemEmbedding:
    torch.manual_seed(0)
    model = ItemEmbedding(5, 8, 64, 1e-6).requires_grad_(False)
    model.item_content = content
    return model


def test_vectors_have_unit_length_and_can_be_selected_by_row(items: ItemEmbedding) -> None:
    torch.testing.assert_close(items().norm(dim=1), torch.ones(5))
    rows = np.array([4, 0, 2, 2])
    torch.testing.assert_close(items(rows), items()[torch.from_numpy(rows)])


def test_content_counts_less_with_more_training_events(items: ItemEmbedding, content: ItemContent) -> None:
    own = F.normalize(items.embedding.weight, dim=1)
    of_content = items.from_content(content)
    vectors = items()
    assert (vectors[1] - of_content[1]).norm() < 0.05, "an item without events is its content"
    assert 0.1 < (vectors[2] - of_content[2]).norm() < (own[2] - of_content[2]).norm()
    torch.testing.assert_close(vectors[4], own[4], atol=0.01, rtol=0)
    torch.testing.assert_close(vectors[[0, 3]], own[[0, 3]], msg="an item without a record is its own embedding")


def test_cold_items_are_their_content_alone(items: ItemEmbedding, content: ItemContent) -> None:
    vectors = items(cold=np.array([True, False, True, True, True]))
    torch.testing.assert_close(vectors[[2, 4]], items.from_content(content)[[2, 4]])
    torch.testing.assert_close(vectors[[0, 1, 3]], items()[[0, 1, 3]])


def test_new_items_vector_depends_on_its_record_alone(items: ItemEmbedding, metadata: ItemMetadata) -> None:
    vectors = []
    for others in ([], [Item("z", title="other")], RECORDS):
        catalogue = Catalogue(Vocabulary([item.item_id for item in others]))
        catalogue.upsert([*others, Item("new", title="red boot", price=20.0)])
        token = np.array([catalogue.vocabulary.token("new")])
        vectors.append(items.from_content(new_item_content(catalogue, token, metadata.scale)))
    torch.testing.assert_close(vectors[0], vectors[1], rtol=0, atol=0)
    torch.testing.assert_close(vectors[0], vectors[2], rtol=0, atol=0)


def test_metadata_survives_its_arrays(metadata: ItemMetadata) -> None:
    restored = ItemMetadata.from_arrays(metadata.arrays())
    for one, two in zip(content_columns(metadata.content()), content_columns(restored.content()), strict=True):
        assert torch.equal(one, two)
    assert restored.scale == metadata.scale != PriceScale()


def content_columns(content: ItemContent) -> list[torch.Tensor]:
    return [content.ids, content.lengths, content.numbers, content.counts]


def test_gradients_of_cold_items_reach_the_words_and_not_the_embedding(items: ItemEmbedding) -> None:
    items.requires_grad_(True)
    items(cold=np.array([False, True, False, False, False]))[1].sum().backward()
    assert items.content_encoder.words.weight.grad is not None
    assert items.content_encoder.words.weight.grad.abs().sum() > 0
    assert items.embedding.weight.grad is None or items.embedding.weight.grad[1].abs().sum() == 0
