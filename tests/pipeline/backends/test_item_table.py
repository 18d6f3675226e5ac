"""The item table follows vocabulary and catalogue: vectors, values and blocked rows, in place where there is room."""

from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline import weights
from pipeline.artifact import Artifact, draft
from pipeline.backends import item_table
from pipeline.backends.item_table import ItemTable
from pipeline.backends.torch import TorchModel
from pipeline.items import change_log
from pipeline.items.catalogue import Catalogue
from pipeline.items.metadata import ItemMetadata
from pipeline.items.vocabulary import Vocabulary
from pipeline.model.config import HstuConfig
from pipeline.model.item_embedding import ItemEmbedding
from pipeline.records import EventSchema, Item, encode_value, item_hash
from pipeline.training.multi_task_model import MultiTaskModel

ITEM_IDS = [f"i{number}" for number in range(10)]
CONFIG = HstuConfig(items=11, layers=1, width=8, heads=1, d_qk=8, d_v=8, max_events=5, content_rows=50)
CPU = torch.device("cpu")


@pytest.fixture
def artifact() -> Artifact:
    """An untrained model, whose items i0 to i4 have records."""
    torch.manual_seed(1)
    catalogue = Catalogue(Vocabulary(ITEM_IDS))
    tokens = catalogue.upsert(Item(item_id, title=f"title {item_id}", price=3.0) for item_id in ITEM_IDS[:5])
    counters = {
        "items": np.array([item_hash(item_id) for item_id in ("i3", "gone", "i7")], np.uint64),
        "popularity": np.array([3.0, 2.0, 1.0]),
        "values": np.array([30.0, 1.0, 70.0], np.float32),
    }
    every = catalogue.vocabulary.admit(ITEM_IDS)
    metadata = ItemMetadata.from_catalogue(catalogue, every, np.arange(10))
    assert tokens.size
    return draft(CONFIG, EventSchema(), MultiTaskModel(CONFIG).state_dict(), ITEM_IDS, counters, metadata)


@pytest.fixture
def catalogue() -> Catalogue:
    """The process's, with other items than the model's."""
    return Catalogue(Vocabulary(["other", *reversed(ITEM_IDS)], max_items=100))


@pytest.fixture
def items(artifact: Artifact) -> ItemEmbedding:
    return TorchModel.from_artifact(artifact, "cpu").hstu.items


@pytest.fixture
def table(artifact: Artifact, catalogue: Catalogue, items: ItemEmbedding) -> ItemTable:
    return ItemTable(artifact, catalogue, items, CPU)


def facts_of(table: ItemTable) -> list[tuple[int, int, int, float]]:
    """Return token, category, price code and value of every row, as they are on the device."""
    items = table.items(torch.arange(len(table))[None])
    columns = items.tokens, items.columns.categories, items.columns.price_codes, items.values
    return list(zip(*(column[0].tolist() for column in columns), strict=True))


def expected_vectors(artifact: Artifact) -> torch.Tensor:
    """Return what the trained model itself computes."""
    model = MultiTaskModel(CONFIG, artifact.metadata.content()).eval()
    model.load_state_dict(dict(artifact.weights))
    return model.hstu.items().detach()


def test_rows_are_the_models_items_with_their_vectors_and_values(
    artifact: Artifact, catalogue: Catalogue, items: ItemEmbedding
) -> None:
    expected = expected_vectors(artifact)
    table = ItemTable(artifact, catalogue, items, CPU)
    torch.testing.assert_close(table.vectors, expected)
    assert table.values.tolist() == [0, 0, 0, 0, 30, 0, 0, 0, 70, 0, 0]
    assert table.blocked_rows.tolist() == [0]
    assert table.rows_of_hashes(np.array([item_hash("i2"), item_hash("other")], np.uint64)).tolist() == [3, 0]


def test_encoding_in_chunks_changes_no_vector(
    artifact: Artifact, catalogue: Catalogue, items: ItemEmbedding, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(item_table, "CHUNK_ITEMS", 3)
    monkeypatch.setattr(weights, "PART_BYTES", 5 * 4 * CONFIG.width)
    expected = expected_vectors(artifact)
    torch.testing.assert_close(ItemTable(artifact, catalogue, items, CPU).vectors, expected)


def test_new_record_writes_its_row_alone_in_place(table: ItemTable, catalogue: Catalogue) -> None:
    before = table.vectors.clone()
    place = table.vectors.data_ptr()
    catalogue.upsert([Item("new", title="a new thing")])
    assert table.sync().rewritten.tolist() == [11]
    assert len(table) == len(table.vectors) == len(table.values) == 12
    assert table.vectors.data_ptr() == place
    assert torch.equal(table.vectors[:11], before)
    assert float(table.vectors[11].norm()) == pytest.approx(1)
    assert table.sync().rewritten.size == 0


def test_table_without_room_moves_and_keeps_its_vectors(table: ItemTable, catalogue: Catalogue) -> None:
    before = table.vectors.clone()
    catalogue.upsert(Item(f"new-{number}", title=f"thing {number}") for number in range(30))
    assert table.sync().rewritten.tolist() == list(range(11, 41))
    assert torch.equal(table.vectors[:11], before)
    assert table.values[11:].tolist() == [0.0] * 30


def test_vector_is_a_function_of_the_newest_record(table: ItemTable, catalogue: Catalogue) -> None:
    catalogue.upsert([Item("one", title="red shoe"), Item("two", title="green hat")])
    table.sync()
    first = table.vectors[11:].clone()
    catalogue.upsert([Item("one", title="green hat")])
    assert table.sync().rewritten.tolist() == [11]
    assert torch.equal(table.vectors[11], first[1])


def test_record_of_a_training_item_leaves_its_vector(table: ItemTable, catalogue: Catalogue) -> None:
    before = table.vectors.clone()
    catalogue.upsert([Item("i8", title="renamed")])
    assert table.sync().rewritten.size == 0
    assert torch.equal(table.vectors, before)


def test_delisted_and_relisted_items_change_the_blocked_rows(table: ItemTable, catalogue: Catalogue) -> None:
    catalogue.delist(["i1", "other"])
    assert table.sync().blocked
    assert table.blocked_rows.tolist() == [0, 2]
    catalogue.upsert([Item("i1", title="back")])
    assert table.sync().blocked
    assert table.blocked_rows.tolist() == [0]
    catalogue.delist(["other"])
    assert not table.sync().blocked


def test_readmitted_training_item_has_its_facts_again(
    artifact: Artifact, catalogue: Catalogue, items: ItemEmbedding
) -> None:
    artifact.load_into(catalogue)
    table = ItemTable(artifact, catalogue, items, CPU)
    before = facts_of(table)[1]
    catalogue.evict(np.array([catalogue.vocabulary.token("i0")]))
    table.sync()
    assert facts_of(table)[1] == (0, 0, 0, 0.0)
    catalogue.vocabulary.admit(["i0"])
    table.sync()
    assert facts_of(table)[1] == before
    assert before[2] == encode_value(3.0)


def test_metadata_of_a_coming_model_leave_the_table_of_the_serving_one(
    table: ItemTable, artifact: Artifact, catalogue: Catalogue
) -> None:
    before = facts_of(table)
    artifact.load_into(catalogue)
    table.sync()
    assert facts_of(table) == before


def test_changes_before_a_failure_are_applied_after_it(
    table: ItemTable, catalogue: Catalogue, monkeypatch: pytest.MonkeyPatch
) -> None:
    catalogue.delist(["i1"])
    catalogue.upsert([Item("new", title="a new thing", price=2.0)])
    with monkeypatch.context() as patch:
        patch.setattr(ItemEmbedding, "from_content", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            table.sync()
    change = table.sync()
    assert change.blocked
    assert 11 in change.rewritten.tolist()
    assert float(table.vectors[11].norm()) == pytest.approx(1)
    assert facts_of(table)[11][2] == encode_value(2.0)
    assert table.blocked_rows.tolist() == [0, 2]
    assert table.sync().rewritten.size == 0


IDS_OF_CHANGES = [*ITEM_IDS, "other", "new-1", "new-2", "new-3"]
changes = st.lists(
    st.tuples(st.sampled_from(["record", "delist", "evict", "admit", "sync"]), st.sampled_from(IDS_OF_CHANGES)),
    max_size=40,
)


@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=changes, kept=st.sampled_from([1, 1 << 16]))
def test_facts_on_the_device_follow_the_catalogue_through_any_changes(
    artifact: Artifact, changes: list[tuple[str, str]], kept: int
) -> None:
    catalogue = Catalogue(Vocabulary(["other", *reversed(ITEM_IDS)], max_items=100))
    table = ItemTable(artifact, catalogue, TorchModel.from_artifact(artifact, "cpu").hstu.items, CPU)
    with mock.patch.object(change_log, "KEPT", kept):
        for n, (change, item_id) in enumerate(changes):
            token = catalogue.vocabulary.token(item_id)
            match change:
                case "record":
                    catalogue.upsert([Item(item_id, title="a thing", price=1.0 + n, category=[f"c{n % 3}"])])
                case "delist":
                    catalogue.delist([item_id])
                case "evict" if token:
                    catalogue.evict(np.array([token]))
                case "admit":
                    catalogue.vocabulary.admit([item_id])
                case "sync":
                    table.sync()
        table.sync()
    for row, (token, category, price_code, value) in enumerate(facts_of(table)):
        expected = catalogue.facts(np.array([token]))
        assert (category, price_code) == (expected.categories[0], expected.price_codes[0])
        assert value == {4: 30.0, 8: 70.0}.get(row, 0.0) or not token
        assert token == 0 or table.rows(np.array([token])) == row
        assert table.blocked[row] == (row == 0 or not token or catalogue.vocabulary.blocked[token])


def test_model_without_content_has_no_rows_for_new_items(catalogue: Catalogue) -> None:
    config = HstuConfig(items=11, layers=1, width=8, heads=1, d_qk=8, d_v=8, max_events=5, content_rows=0)
    counters = {"items": np.zeros(0, np.uint64), "popularity": np.zeros(0), "values": np.zeros(0, np.float32)}
    plain = draft(config, EventSchema(), MultiTaskModel(config).state_dict(), ITEM_IDS, counters)
    table = ItemTable(plain, catalogue, TorchModel.from_artifact(plain, "cpu").hstu.items, CPU)
    catalogue.upsert([Item("new", title="a new thing")])
    assert table.sync().rewritten.size == 0
    assert len(table) == 11
