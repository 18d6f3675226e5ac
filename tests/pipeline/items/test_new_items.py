"""Items whose records came after training: what the model says of them."""

import numpy as np
import pytest

from pipeline.artifact import Artifact
from pipeline.data.sequences import UserSequences
from pipeline.items.catalogue import Catalogue
from pipeline.items.vocabulary import Vocabulary
from pipeline.records import Event, EventSchema, Histories, Item, encode_value
from pipeline.serving.hstu_strategy import HstuStrategy
from pipeline.serving.pipeline import PipelineOptions
from pipeline.serving.rerank import RerankWeights
from pipeline.training.batches import TrainingColumns, make_batch
from pipeline.training.trainer import MultiTaskModel
from tests.artifacts import untrained

ITEMS, OPTIONS = 30, PipelineOptions()
IDS = [f"i{number}" for number in range(ITEMS)]
NEW = [Item("shoe", title="red shoe", price=5.0), Item("lamp", title="a lamp", brand="x", price=500.0)]
HISTORIES = Histories.from_events(
    [[Event(f"u{user}", f"i{user + step}", "view", 60_000 * step) for step in range(4)] for user in range(3)],
    EventSchema(),
)


@pytest.fixture(scope="module")
def model() -> Artifact:
    return untrained(IDS)


def rung_of(model: Artifact, rerank: RerankWeights | None = None) -> tuple[HstuStrategy, Catalogue]:
    catalogue = Catalogue(Vocabulary(IDS))
    model.load_into(catalogue)
    return HstuStrategy(model, catalogue, OPTIONS.exclusion, "cpu", 1, rerank or RerankWeights()), catalogue


def odds_of(rung: HstuStrategy, catalogue: Catalogue) -> np.ndarray:
    tokens = np.array([catalogue.vocabulary.token(item.item_id) for item in NEW], np.int32)
    return rung.probabilities(HISTORIES, np.tile(tokens, (len(HISTORIES), 1)))  # [users, new items, 3]


def test_their_odds_are_their_own_and_the_same_whatever_came_before_their_records(model: Artifact) -> None:
    rung, catalogue = rung_of(model)
    catalogue.vocabulary.admit(item.item_id for item in NEW)
    unknown = odds_of(rung, catalogue)
    np.testing.assert_array_equal(unknown[:, 0], unknown[:, 1])
    catalogue.upsert(NEW)
    known = odds_of(rung, catalogue)
    assert (np.abs(known[:, 0] - known[:, 1]) > 1e-5).all()
    other, later = rung_of(model)
    later.upsert([Item("z", title="other")])
    odds_of(other, later)
    later.upsert(reversed(NEW))
    np.testing.assert_allclose(odds_of(other, later), known, rtol=1e-5)


@pytest.mark.parametrize(("cold_share", "learning"), [(1.0, [0]), (0.0, [2, 3, 4, 5, 6])], ids=["new", "known"])
def test_what_training_takes_as_new_learns_the_bias_of_the_unknown_item(
    model: Artifact, cold_share: float, learning: list[int]
) -> None:
    corpus = UserSequences.from_columns(HISTORIES.events, Vocabulary(IDS).tokens(HISTORIES.items), HISTORIES.users)
    examples, random = TrainingColumns.from_sequences(corpus, EventSchema(), repeats=True), np.random.default_rng(0)
    examples.labels[:] = 1
    examples.labels[corpus.offsets[1:] - 1] = np.nan
    batch = make_batch(examples, corpus.offsets[:-1], np.diff(corpus.offsets), 0.0, random)
    trained = MultiTaskModel(model.config, model.metadata.content(), cold_share)
    trained.losses(batch, examples.target_frequency(model.config.items), random)[1].sum().backward()
    gradient = trained.heads.interaction.item_bias.weight.grad
    assert gradient is not None
    assert gradient.abs().sum(dim=1).nonzero()[:, 0].tolist() == learning


def test_the_newest_record_counts_whatever_the_process_knew_before(model: Artifact) -> None:
    (rung, catalogue), (fresh, other) = rung_of(model), rung_of(model)
    catalogue.upsert([Item("shoe", title="a mistake"), NEW[1]])
    mistaken = odds_of(rung, catalogue)
    catalogue.upsert(NEW)
    other.upsert(NEW)
    assert (np.abs(odds_of(rung, catalogue) - mistaken)[:, 0] > 1e-5).all()
    np.testing.assert_allclose(odds_of(rung, catalogue), odds_of(fresh, other), rtol=1e-5)


def test_withdrawn_items_are_on_no_slate_until_a_record_brings_them_back(model: Artifact) -> None:
    rung, catalogue = rung_of(model)
    catalogue.upsert(NEW)
    empty = Histories.from_events([[]], EventSchema())
    before = [rung.rank(histories, 100).tokens for histories in (HISTORIES, empty)]
    catalogue.delist(["i0", "i29", "shoe"])
    gone = [catalogue.vocabulary.token(item_id) for item_id in ("i0", "i29", "shoe")]
    after = [rung.rank(histories, 100).tokens for histories in (HISTORIES, empty)]
    assert np.isin(before[0], gone).any(axis=1).all()
    assert not np.isin(after[0], gone).any()
    assert (np.isin(before[1], gone).sum(), np.isin(after[1], gone).sum()) == (2, 0)
    assert (after[0] > 0).sum() + np.isin(before[0], gone).sum() == (before[0] > 0).sum()
    catalogue.upsert([Item("i0"), Item("i29"), NEW[0]])
    assert sorted(rung.rank(HISTORIES, 100).tokens[0]) == sorted(before[0][0])


def test_an_item_that_takes_over_a_token_has_nothing_of_the_one_before(model: Artifact) -> None:
    rung, catalogue = rung_of(model)
    catalogue.upsert(NEW)
    before = rung.rank(HISTORIES, 100).tokens
    retired = np.array([catalogue.vocabulary.token(item_id) for item_id in ("i20", "shoe")])
    assert (np.isin(before, retired).sum(axis=1) == 2).all()
    catalogue.evict(retired)
    assert sorted(catalogue.vocabulary.admit(["boot", "hat"])) == sorted(retired)
    assert not np.isin(rung.rank(HISTORIES, 100).tokens, retired).any(), "nothing is known of them"
    catalogue.upsert([Item("boot", title="a boot"), NEW[0]])
    tokens = catalogue.vocabulary.admit(["boot", "shoe"])
    assert np.isin(rung.rank(HISTORIES, 100).tokens, tokens).sum(axis=1).tolist() == [2, 2, 2]
    fresh, other = rung_of(model)
    other.upsert(NEW)
    np.testing.assert_allclose(odds_of(rung, catalogue)[:, 0], odds_of(fresh, other)[:, 0], rtol=1e-5)


def test_an_item_of_the_model_that_comes_back_is_itself_again(model: Artifact) -> None:
    rung, catalogue = rung_of(model)
    token = catalogue.vocabulary.token("i20")
    before = rung.probabilities(HISTORIES, np.full((3, 1), token, np.int32))
    catalogue.evict(np.array([token]))
    catalogue.vocabulary.admit(["another"])
    rung.rank(HISTORIES, 5)
    back = catalogue.vocabulary.admit(["i20"])
    assert back != token
    rung.rank(HISTORIES, 5)
    assert catalogue.facts(back).price_codes.tolist() == [encode_value(10.0)]
    np.testing.assert_array_equal(rung.probabilities(HISTORIES, np.tile(back, (3, 1))), before)


def test_they_are_reranked_beside_the_others_and_count_as_of_usual_value(model: Artifact) -> None:
    rung, catalogue = rung_of(model, RerankWeights(monetization=1.0, value=1.0))
    before = rung.rank(HISTORIES, 100)
    catalogue.upsert(NEW)
    ranked = rung.rank(HISTORIES, 100)
    tokens = [catalogue.vocabulary.token(item.item_id) for item in NEW]
    assert not np.isin(before.tokens, tokens).any()
    assert np.isin(ranked.tokens, tokens).sum(axis=1).tolist() == [2, 2, 2]
    assert ranked.heads is not None
    assert ranked.values is not None
    new, nothing = np.isin(ranked.tokens, tokens), ranked.tokens == 0
    assert np.unique(ranked.values[new]).tolist() == [0]
    assert np.unique(ranked.values[~new & ~nothing]).tolist() == [10]
    plain = rung_of(model)
    plain[1].upsert(NEW)
    scores = plain[0].scores(HISTORIES, ranked.tokens)
    wanted = scores + np.log(ranked.heads[..., 2]) + np.log(10)
    np.testing.assert_allclose(ranked.scores[~nothing], wanted[~nothing], rtol=1e-4)
