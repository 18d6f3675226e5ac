"""Items whose records came after training: their vectors, probabilities and ranks."""

import numpy as np
import pytest

from pipeline.artifact import Artifact
from pipeline.data.sequences import UserSequences
from pipeline.features.labels import LabelRules
from pipeline.items.catalogue import Catalogue
from pipeline.items.vocabulary import Vocabulary
from pipeline.records import Event, EventSchema, Histories, Item, encode_value
from pipeline.strategies.exclusion import Exclusion
from pipeline.strategies.hstu_strategy import HstuStrategy, load_hstu_strategy
from pipeline.strategies.options import PipelineOptions
from pipeline.strategies.rerank import RerankWeights
from pipeline.strategies.strategy import rank
from pipeline.training.batches import TrainingColumns, make_batch
from pipeline.training.multi_task_model import MultiTaskModel
from tests.artifacts import untrained

NOTHING_EXCLUDED = Exclusion(action_codes=())
IDS = [f"i{number}" for number in range(30)]
NEW = [Item("shoe", title="red shoe", price=5.0), Item("lamp", title="a lamp", brand="x", price=500.0)]
HISTORIES = Histories.from_events(
    [[Event(f"u{user}", f"i{user + step}", "view", 60_000 * step) for step in range(4)] for user in range(3)],
    EventSchema(),
)


@pytest.fixture(scope="module")
def model() -> Artifact:
    return untrained(IDS)


def load(model: Artifact, rerank: RerankWeights | None = None) -> tuple[HstuStrategy, Catalogue]:
    """Return a strategy with a vocabulary and a catalogue of its own."""
    catalogue = Catalogue(Vocabulary(IDS))
    model.load_into(catalogue)
    exclusion = PipelineOptions().exclusion
    return load_hstu_strategy(model, catalogue, exclusion, "cpu", 1, rerank or RerankWeights()), catalogue


def new_item_probabilities(strategy: HstuStrategy, catalogue: Catalogue) -> np.ndarray:
    tokens = np.array([catalogue.vocabulary.token(item.item_id) for item in NEW], np.int32)
    return strategy.probabilities(HISTORIES, np.tile(tokens, (len(HISTORIES), 1)))  # [users, new items, 3]


def test_probabilities_depend_only_on_a_new_items_record(model: Artifact) -> None:
    strategy, catalogue = load(model)
    catalogue.vocabulary.admit(item.item_id for item in NEW)
    without_records = new_item_probabilities(strategy, catalogue)
    np.testing.assert_array_equal(without_records[:, 0], without_records[:, 1])
    catalogue.upsert(NEW)
    with_records = new_item_probabilities(strategy, catalogue)
    assert (np.abs(with_records[:, 0] - with_records[:, 1]) > 1e-5).all()
    other_strategy, other_catalogue = load(model)
    other_catalogue.upsert([Item("z", title="other")])
    new_item_probabilities(other_strategy, other_catalogue)
    other_catalogue.upsert(reversed(NEW))
    np.testing.assert_allclose(new_item_probabilities(other_strategy, other_catalogue), with_records, rtol=1e-5)


@pytest.mark.parametrize(
    ("item_dropout", "trained_rows"), [(1.0, [0]), (0.0, [2, 3, 4, 5, 6])], ids=["all dropped", "none dropped"]
)
def test_item_dropout_trains_the_bias_of_the_unknown_item(
    model: Artifact, item_dropout: float, trained_rows: list[int]
) -> None:
    tokens = Vocabulary(IDS).tokens(HISTORIES.items)
    sequences = UserSequences.from_columns(HISTORIES.events, tokens, HISTORIES.users)
    rules = LabelRules.from_options(EventSchema())
    columns = TrainingColumns.from_sequences(sequences, rules, NOTHING_EXCLUDED, ring_events=512)
    rng = np.random.default_rng(0)
    columns.labels[:] = 1
    columns.labels[sequences.offsets[1:] - 1] = np.nan
    batch = make_batch(columns, sequences.offsets[:-1], np.diff(sequences.offsets), 0.0, rng)
    network = MultiTaskModel(model.config, model.metadata.content(), item_dropout)
    network.losses(batch, columns.target_frequency(model.config.items), rng)[1].sum().backward()
    gradient = network.heads.interaction.item_bias.weight.grad
    assert gradient is not None
    assert gradient.abs().sum(dim=1).nonzero()[:, 0].tolist() == trained_rows


def test_latest_record_replaces_an_earlier_one(model: Artifact) -> None:
    strategy, catalogue = load(model)
    catalogue.upsert([Item("shoe", title="a mistake"), NEW[1]])
    mistaken = new_item_probabilities(strategy, catalogue)
    catalogue.upsert(NEW)
    corrected = new_item_probabilities(strategy, catalogue)
    assert (np.abs(corrected - mistaken)[:, 0] > 1e-5).all()
    fresh_strategy, fresh_catalogue = load(model)
    fresh_catalogue.upsert(NEW)
    np.testing.assert_allclose(corrected, new_item_probabilities(fresh_strategy, fresh_catalogue), rtol=1e-5)


def test_delisted_items_are_not_ranked_until_a_new_record(model: Artifact) -> None:
    strategy, catalogue = load(model)
    catalogue.upsert(NEW)
    empty = Histories.from_events([[]], EventSchema())
    before = rank(strategy, HISTORIES, 100).tokens
    before_empty = rank(strategy, empty, 100).tokens
    catalogue.delist(["i0", "i29", "shoe"])
    delisted = [catalogue.vocabulary.token(item_id) for item_id in ("i0", "i29", "shoe")]
    after = rank(strategy, HISTORIES, 100).tokens
    after_empty = rank(strategy, empty, 100).tokens
    assert np.isin(before, delisted).any(axis=1).all()
    assert not np.isin(after, delisted).any()
    assert (np.isin(before_empty, delisted).sum(), np.isin(after_empty, delisted).sum()) == (2, 0)
    assert (after > 0).sum() + np.isin(before, delisted).sum() == (before > 0).sum()
    catalogue.upsert([Item("i0"), Item("i29"), NEW[0]])
    assert sorted(rank(strategy, HISTORIES, 100).tokens[0]) == sorted(before[0])


def test_item_on_an_evicted_token_inherits_nothing(model: Artifact) -> None:
    strategy, catalogue = load(model)
    catalogue.upsert(NEW)
    before = rank(strategy, HISTORIES, 100).tokens
    evicted = np.array([catalogue.vocabulary.token(item_id) for item_id in ("i20", "shoe")])
    assert (np.isin(before, evicted).sum(axis=1) == 2).all()
    catalogue.evict(evicted)
    assert sorted(catalogue.vocabulary.admit(["boot", "hat"])) == sorted(evicted)
    assert not np.isin(rank(strategy, HISTORIES, 100).tokens, evicted).any(), "they have no records"
    catalogue.upsert([Item("boot", title="a boot"), NEW[0]])
    tokens = catalogue.vocabulary.admit(["boot", "shoe"])
    assert np.isin(rank(strategy, HISTORIES, 100).tokens, tokens).sum(axis=1).tolist() == [2, 2, 2]
    probabilities = new_item_probabilities(strategy, catalogue)
    fresh_strategy, fresh_catalogue = load(model)
    fresh_catalogue.upsert(NEW)
    fresh = new_item_probabilities(fresh_strategy, fresh_catalogue)
    np.testing.assert_allclose(probabilities[:, 0], fresh[:, 0], rtol=1e-5)


def test_readmitted_training_item_gets_its_facts_and_row_back(model: Artifact) -> None:
    strategy, catalogue = load(model)
    token = catalogue.vocabulary.token("i20")
    before = strategy.probabilities(HISTORIES, np.full((3, 1), token, np.int32))
    catalogue.evict(np.array([token]))
    catalogue.vocabulary.admit(["another"])
    rank(strategy, HISTORIES, 5)
    back = catalogue.vocabulary.admit(["i20"])
    assert back != token
    rank(strategy, HISTORIES, 5)
    assert catalogue.facts(back).price_codes.tolist() == [encode_value(10.0)]
    np.testing.assert_array_equal(strategy.probabilities(HISTORIES, np.tile(back, (3, 1))), before)


def test_new_items_are_reranked_at_the_mean_value(model: Artifact) -> None:
    strategy, catalogue = load(model, RerankWeights(monetization=1.0, value=1.0))
    before = rank(strategy, HISTORIES, 100)
    catalogue.upsert(NEW)
    ranked = rank(strategy, HISTORIES, 100)
    tokens = [catalogue.vocabulary.token(item.item_id) for item in NEW]
    assert not np.isin(before.tokens, tokens).any()
    assert np.isin(ranked.tokens, tokens).sum(axis=1).tolist() == [2, 2, 2]
    assert ranked.heads is not None
    assert ranked.values is not None
    is_new = np.isin(ranked.tokens, tokens)
    filled = ranked.tokens > 0
    assert np.unique(ranked.values[is_new]).tolist() == [0]
    assert np.unique(ranked.values[~is_new & filled]).tolist() == [10]
    plain_strategy, plain_catalogue = load(model)
    plain_catalogue.upsert(NEW)
    retrieval_scores = plain_strategy.scores(HISTORIES, ranked.tokens)
    expected = retrieval_scores + np.log(ranked.heads[..., 2]) + np.log(10)
    np.testing.assert_allclose(ranked.scores[filled], expected[filled], rtol=1e-4)
