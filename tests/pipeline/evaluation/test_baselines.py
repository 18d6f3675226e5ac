"""Baselines against plain walks through the same log."""

import numpy as np
import pytest
import torch

from pipeline.data.event_log import event_log_from_blocks
from pipeline.data.sequences import UserSequences
from pipeline.evaluation.full_ranking import CatalogueScorer, FullRanking, column_top_k
from pipeline.evaluation.item_knn import ItemKnn, ItemKnnOptions
from pipeline.evaluation.popularity import Popularity, RecentPopularity
from pipeline.evaluation.ranking import (
    BATCH_USERS,
    HeldOutEvents,
    Recommender,
    StrategyRecommender,
    rank_among_negatives,
    recommend_slates,
)
from pipeline.items.catalogue import Catalogue
from pipeline.items.vocabulary import Vocabulary
from pipeline.records import DAY_MS, Event, EventSchema, Histories, Item
from pipeline.strategies.exclusion import Exclusion
from pipeline.strategies.options import PipelineOptions, new_counters
from pipeline.strategies.simple_strategy import SimpleStrategy
from tests.benchmarks.sasrec import SasRec, SasRecConfig, SasRecScorer

ITEMS = 25
DAYS = 30
SCHEMA = EventSchema()


def random_events(seed: int = 0, events: int = 400, users: int = 20) -> list[Event]:
    rng = np.random.default_rng(seed)
    items = np.minimum(rng.geometric(0.1, events), ITEMS - 1)
    times = np.sort(rng.integers(0, DAYS * DAY_MS, events)).tolist()
    return [
        Event(f"u{rng.integers(users)}", f"i{item}", "view", ts_ms) for item, ts_ms in zip(items, times, strict=True)
    ]


EVENTS = random_events()
VOCABULARY = Vocabulary(f"i{number}" for number in range(ITEMS))
TRAIN = UserSequences.from_log(event_log_from_blocks([EVENTS], SCHEMA), VOCABULARY)
SIZE = len(VOCABULARY)


def pack(*histories: list[Event]) -> Histories:
    return Histories.from_events(histories, SCHEMA)


def score(scorer: CatalogueScorer, *histories: list[Event]) -> np.ndarray:
    packed = pack(*histories)
    return scorer.score(packed, VOCABULARY.tokens(packed.items))


@pytest.fixture(scope="module")
def rankers() -> dict[str, Recommender]:
    torch.manual_seed(0)
    popularity = Popularity(TRAIN, SIZE)
    counters = new_counters(PipelineOptions(), VOCABULARY)
    counters.observe(TRAIN.histories, np.ones(len(TRAIN.histories.events), bool))
    scorers = [
        popularity,
        RecentPopularity(TRAIN, SIZE, 5.0),
        ItemKnn.from_users(TRAIN, SIZE, ItemKnnOptions(8)),
        SasRecScorer(SasRec(SasRecConfig(items=SIZE, width=8, max_events=20)), popularity),
    ]
    full: dict[str, Recommender] = {scorer.name: FullRanking(scorer, VOCABULARY, Exclusion()) for scorer in scorers}
    return full | {"cooccurrence": StrategyRecommender(SimpleStrategy(counters, Exclusion()))}


@pytest.mark.parametrize("name", ["popularity", "recent_popularity", "itemknn", "sasrec", "cooccurrence"])
def test_candidate_scores_order_items_as_the_full_ranking_does(rankers: dict[str, Recommender], name: str) -> None:
    ranker = rankers[name]
    events = [EVENTS[:7], [], EVENTS[40:41], EVENTS[100:130]]
    histories = pack(*events)
    slates = ranker.rank(histories, SIZE - 1).tokens
    scores = ranker.scores(histories, slates)
    is_item = slates > 0
    assert is_item.sum(1).tolist() == [SIZE - 1 - len({event.item_id for event in history}) for history in events]
    assert ((scores[:, 1:] <= scores[:, :-1]) | ~is_item[:, 1:]).all()
    assert np.isneginf(ranker.scores(histories, np.zeros((4, 1), np.int32))).all(), "an item outside the vocabulary"


@pytest.mark.parametrize("name", ["recent_popularity", "itemknn", "sasrec", "cooccurrence"])
def test_rank_among_all_untouched_items_equals_full_rank(rankers: dict[str, Recommender], name: str) -> None:
    """Sampled and full ranking agree where the sample is everything that serving does not exclude."""
    ranker = rankers[name]
    test = HeldOutEvents(TRAIN, np.flatnonzero(TRAIN.is_first_touch), 1000)
    slates = recommend_slates(ranker, test, SIZE)
    is_target = slates == test.targets[:, None]
    full_ranks = np.where(is_target.any(1), is_target.argmax(1) + 1, 0)
    for row in range(0, len(test), 9):
        one = HeldOutEvents(TRAIN, test.positions[row : row + 1], 1000)
        others = np.setdiff1d(slates[row], [0, test.targets[row]])
        assert rank_among_negatives(ranker, one, others[None].astype(np.int32)).tolist() == [full_ranks[row]]
    assert len(test) > BATCH_USERS // 2


def test_popularity_counts_every_training_event_equally() -> None:
    counts = np.bincount(TRAIN.tokens, minlength=SIZE)
    (scores,) = score(Popularity(TRAIN, SIZE), EVENTS[:3])
    assert np.argsort(-scores).tolist() == sorted(range(SIZE), key=lambda token: (-counts[token], token))


def test_recent_popularity_halves_per_half_life_and_ignores_later_events() -> None:
    half_life_days = 3.0
    histories = [EVENTS[:5], EVENTS[50:60], EVENTS[100:101], []]
    scores = score(RecentPopularity(TRAIN, SIZE, half_life_days), *histories)
    for row, history in zip(scores, histories, strict=True):
        now_ms = history[-1].ts_ms if history else EVENTS[-1].ts_ms
        weights = np.zeros(SIZE)
        for event in EVENTS:
            if event.ts_ms <= now_ms:
                age_days = (now_ms - event.ts_ms) / DAY_MS
                weights[VOCABULARY.token(event.item_id)] += 2 ** -(age_days / half_life_days)
        seen = (weights > 0).sum()
        assert np.argsort(-row)[:seen].tolist() == np.argsort(-weights, kind="stable")[:seen].tolist()


def test_recent_popularity_of_a_user_without_events_is_not_that_of_the_far_future() -> None:
    times = np.tile(np.arange(40) * DAY_MS, (5, 1)) + 1_700_000_000_000
    users = [
        [Event(f"u{row}", f"i{(row + day) % 7}", "view", int(ts)) for day, ts in enumerate(times[row])]
        for row in range(5)
    ]
    wrong = [*users, [Event("late", "i0", "view", int(times.max()) + 20 * 365 * DAY_MS)]]
    vocabulary = Vocabulary(f"i{item}" for item in range(7))
    slates = []
    for log in (users, wrong):
        histories = Histories.from_events(log, SCHEMA)
        train = UserSequences.from_columns(histories.events, vocabulary.tokens(histories.items), histories.users)
        popularity = RecentPopularity(train, len(vocabulary), half_life_days=3.0)
        nobody = Histories.from_events([[]], SCHEMA)
        slates.append(popularity.score(nobody, np.empty(0, np.int32))[0].argsort().tolist())
    assert slates[0] == slates[1] != sorted(slates[0], reverse=True)


def similarities(shrinkage: float) -> np.ndarray:
    """Return the similarity of every two items by its definition, 0 on the diagonal."""
    users = [{e.user_id for e in EVENTS if VOCABULARY.token(e.item_id) == token} for token in range(SIZE)]
    return np.array(
        [
            [len(a & b) / max(1e-9, (len(a) * len(b)) ** 0.5 + shrinkage) if i != j else 0 for j, b in enumerate(users)]
            for i, a in enumerate(users)
        ]
    )


@pytest.mark.parametrize("shrinkage", [0.0, 10.0])
def test_item_knn_sums_shrunk_cosines_weighted_by_recency(shrinkage: float) -> None:
    history = EVENTS[10:16]
    (scores,) = score(ItemKnn.from_users(TRAIN, SIZE, ItemKnnOptions(SIZE, shrinkage, 0.8)), history)
    tokens = [VOCABULARY.token(event.item_id) for event in reversed(history)]
    similarity = similarities(shrinkage)
    expected = np.sum([0.8**age * similarity[token] for age, token in enumerate(tokens)], axis=0)
    assert scores[expected > 0] == pytest.approx(expected[expected > 0], rel=1e-4)
    assert (scores[expected == 0] < 0).all(), "the rest follows by popularity"


def test_item_knn_keeps_only_each_items_nearest_neighbours() -> None:
    scorer = ItemKnn.from_users(TRAIN, SIZE, ItemKnnOptions(4, 10.0, 1.0))
    similarity = similarities(10.0)
    for event in EVENTS[:20]:
        (scores,) = score(scorer, [event])
        nearest = np.sort(similarity[VOCABULARY.token(event.item_id)])[-4:]
        assert np.sort(scores[scores > 0]) == pytest.approx(nearest[nearest > 0], rel=1e-4)


WORDS = ["red", "blue", "warm", "light"]
ITEM_WORDS = [{word for n, word in enumerate(WORDS) if number >> n & 1} for number in range(ITEMS - 1)]  # item 24: none


def test_content_knn_sums_cosines_of_idf_weighted_words() -> None:
    catalogue = Catalogue(VOCABULARY)
    catalogue.upsert(Item(f"i{number}", tags=sorted(words)) for number, words in enumerate(ITEM_WORDS))
    history = EVENTS[10:16]
    (scores,) = score(ItemKnn.from_content(catalogue, TRAIN, ItemKnnOptions(SIZE, 0.0, 0.8)), history)
    idf = {word: np.log(SIZE / sum(word in words for words in ITEM_WORDS)) for word in WORDS}

    def product(a: set[str], b: set[str]) -> float:
        return sum(idf[word] ** 2 for word in a & b)

    for other, words in enumerate(ITEM_WORDS):
        expected = 0.0
        for age, event in enumerate(reversed(history)):
            item = int(event.item_id[1:])
            if item not in (other, ITEMS - 1) and words & ITEM_WORDS[item]:
                norms = (product(words, words) * product(ITEM_WORDS[item], ITEM_WORDS[item])) ** 0.5
                expected += 0.8**age * product(words, ITEM_WORDS[item]) / norms
        value = scores[VOCABULARY.token(f"i{other}")]
        assert value == pytest.approx(expected, rel=1e-4) if expected else value < 0


def test_column_top_k_equals_a_full_sort_with_ties_by_column() -> None:
    scores = np.array([[3, 1, 3, 2, -np.inf], [-np.inf, 0, -np.inf, -np.inf, -np.inf]], np.float32)
    best, best_scores = column_top_k(scores, 4)
    assert best.tolist() == [[0, 2, 3, 1], [1, 0, 0, 0]]
    assert best_scores[0].tolist() == [3, 3, 2, 1]
    assert column_top_k(scores, 9)[0].shape == (2, 9)
