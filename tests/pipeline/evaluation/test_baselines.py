"""Baselines against plain walks through the same log."""

import numpy as np
import pytest
import torch

from pipeline.data.event_log import event_log_from_blocks
from pipeline.data.sequences import UserSequences
from pipeline.evaluation.full_ranking import CatalogueScorer, FullRanking, column_top_k
from pipeline.evaluation.item_knn import ItemKnn, ItemKnnOptions
from pipeline.evaluation.popularity import Popularity, RecentPopularity
from pipeline.evaluation.ranking import BATCH_USERS, HeldOutEvents, Recommender, rank_among_negatives, recommend_slates
from pipeline.items.catalogue import Catalogue
from pipeline.items.vocabulary import Vocabulary
from pipeline.records import DAY_MS, Event, EventSchema, Histories, Item
from pipeline.serving.exclusion import Exclusion
from pipeline.serving.pipeline import PipelineOptions, new_counters
from pipeline.serving.simple_strategy import SimpleStrategy
from tests.benchmarks.sasrec import SasRec, SasRecConfig, SasRecScorer

ITEMS, DAYS = 25, 30
SCHEMA = EventSchema()


def events_of(seed: int = 0, events: int = 400, users: int = 20) -> list[Event]:
    random = np.random.default_rng(seed)
    items = np.minimum(random.geometric(0.1, events), ITEMS - 1)
    times = np.sort(random.integers(0, DAYS * DAY_MS, events)).tolist()
    return [
        Event(f"u{random.integers(users)}", f"i{item}", "view", ts_ms) for item, ts_ms in zip(items, times, strict=True)
    ]


EVENTS = events_of()
VOCABULARY = Vocabulary(f"i{number}" for number in range(ITEMS))
KNOWN = UserSequences.from_log(event_log_from_blocks([EVENTS], SCHEMA), VOCABULARY)
SIZE = len(VOCABULARY)


def histories_of(*histories: list[Event]) -> Histories:
    return Histories.from_events(histories, SCHEMA)


def scores_of(scorer: CatalogueScorer, *histories: list[Event]) -> np.ndarray:
    packed = histories_of(*histories)
    return scorer.score(packed, VOCABULARY.tokens(packed.items))


def rankers() -> dict[str, Recommender]:
    torch.manual_seed(0)
    popularity = Popularity(KNOWN, SIZE)
    counters = new_counters(PipelineOptions(), VOCABULARY)
    counters.observe(KNOWN.histories, KNOWN.histories.lengths)
    scorers = [
        popularity,
        RecentPopularity(KNOWN, SIZE, 5.0),
        ItemKnn.from_users(KNOWN, SIZE, ItemKnnOptions(8)),
        SasRecScorer(SasRec(SasRecConfig(items=SIZE, width=8, max_events=20)), popularity),
    ]
    made: dict[str, Recommender] = {each.name: FullRanking(each, VOCABULARY, Exclusion()) for each in scorers}
    return made | {"cooccurrence": SimpleStrategy(counters, Exclusion())}


@pytest.mark.parametrize("name", ["popularity", "recent_popularity", "itemknn", "sasrec", "cooccurrence"])
def test_chosen_items_are_scored_in_the_order_in_which_the_whole_catalogue_is_ranked(name: str) -> None:
    ranker = rankers()[name]
    histories = histories_of(EVENTS[:7], [], EVENTS[40:41], EVENTS[100:130])
    slates = ranker.rank(histories, SIZE - 1).tokens
    scores = ranker.scores(histories, slates)
    shown = slates > 0
    assert shown.sum(1).tolist() == [SIZE - 1 - len({e.item_id for e in part}) for part in
                                     (EVENTS[:7], [], EVENTS[40:41], EVENTS[100:130])]  # fmt: skip
    assert ((scores[:, 1:] <= scores[:, :-1]) | ~shown[:, 1:]).all()
    assert np.isneginf(ranker.scores(histories, np.zeros((4, 1), np.int32))).all(), "an item outside the vocabulary"


@pytest.mark.parametrize("name", ["recent_popularity", "itemknn", "sasrec", "cooccurrence"])
def test_a_rank_among_every_untouched_item_is_the_place_among_all_items(name: str) -> None:
    """Sampled and full ranking meet where the sample is everything that serving does not exclude."""
    ranker = rankers()[name]
    scored = HeldOutEvents(KNOWN, np.flatnonzero(KNOWN.is_first_touch), 1000)
    slates = recommend_slates(ranker, scored, SIZE)
    full = np.where((slates == scored.targets[:, None]).any(1), (slates == scored.targets[:, None]).argmax(1) + 1, 0)
    for row in range(0, len(scored), 9):
        one = HeldOutEvents(KNOWN, scored.positions[row : row + 1], 1000)
        others = np.setdiff1d(slates[row], [0, scored.targets[row]])
        assert rank_among_negatives(ranker, one, others[None].astype(np.int32)).tolist() == [full[row]]
    assert len(scored) > BATCH_USERS // 2


def test_popularity_counts_every_training_event_alike() -> None:
    counts = np.bincount(KNOWN.tokens, minlength=SIZE)
    (row,) = scores_of(Popularity(KNOWN, SIZE), EVENTS[:3])
    assert np.argsort(-row).tolist() == sorted(range(SIZE), key=lambda token: (-counts[token], token))


def test_recent_popularity_fades_by_half_lives_up_to_the_request_and_knows_nothing_later() -> None:
    half_life_days = 3.0
    histories = [EVENTS[:5], EVENTS[50:60], EVENTS[100:101], []]
    got = scores_of(RecentPopularity(KNOWN, SIZE, half_life_days), *histories)
    for row, history in zip(got, histories, strict=True):
        now_ms = history[-1].ts_ms if history else EVENTS[-1].ts_ms
        weights = np.zeros(SIZE)
        for event in EVENTS:
            if event.ts_ms <= now_ms:
                age_days = (now_ms - event.ts_ms) / DAY_MS
                weights[VOCABULARY.token(event.item_id)] += 2 ** -(age_days / half_life_days)
        seen = weights > 0
        assert np.argsort(-row)[: seen.sum()].tolist() == np.argsort(-weights, kind="stable")[: seen.sum()].tolist()


def similarities(shrinkage: float) -> np.ndarray:
    """Of every two items, by their definition; 0 of an item to itself."""
    users = [{e.user_id for e in EVENTS if VOCABULARY.token(e.item_id) == token} for token in range(SIZE)]
    return np.array(
        [
            [len(a & b) / max(1e-9, (len(a) * len(b)) ** 0.5 + shrinkage) if i != j else 0 for j, b in enumerate(users)]
            for i, a in enumerate(users)
        ]
    )


@pytest.mark.parametrize("shrinkage", [0.0, 10.0])
def test_item_knn_sums_shrunk_cosines_over_the_history_newer_events_counting_more(shrinkage: float) -> None:
    history = EVENTS[10:16]
    (got,) = scores_of(ItemKnn.from_users(KNOWN, SIZE, ItemKnnOptions(SIZE, shrinkage, 0.8)), history)
    tokens = [VOCABULARY.token(event.item_id) for event in reversed(history)]
    wanted = sum(0.8**age * similarities(shrinkage)[token] for age, token in enumerate(tokens))
    assert got[wanted > 0] == pytest.approx(wanted[wanted > 0], rel=1e-4)
    assert (got[wanted == 0] < 0).all(), "the rest follows by popularity"


def test_item_knn_keeps_each_items_nearest_neighbours_alone() -> None:
    scorer = ItemKnn.from_users(KNOWN, SIZE, ItemKnnOptions(4, 10.0, 1.0))
    for event in EVENTS[:20]:
        (got,) = scores_of(scorer, [event])
        nearest = np.sort(similarities(10.0)[VOCABULARY.token(event.item_id)])[-4:]
        assert np.sort(got[got > 0]) == pytest.approx(nearest[nearest > 0], rel=1e-4)


WORDS = ["red", "blue", "warm", "light"]
ITEM_WORDS = [{word for n, word in enumerate(WORDS) if number >> n & 1} for number in range(ITEMS - 1)]  # item 24: none


def test_content_knn_sums_cosines_of_words_that_count_by_their_rarity() -> None:
    catalogue = Catalogue(VOCABULARY)
    catalogue.upsert(Item(f"i{number}", tags=sorted(words)) for number, words in enumerate(ITEM_WORDS))
    history = EVENTS[10:16]
    (got,) = scores_of(ItemKnn.from_content(catalogue, KNOWN, ItemKnnOptions(SIZE, 0.0, 0.8)), history)
    worth = {word: np.log(SIZE / sum(word in words for words in ITEM_WORDS)) for word in WORDS}

    def product(a: set[str], b: set[str]) -> float:
        return sum(worth[word] ** 2 for word in a & b)

    for other, words in enumerate(ITEM_WORDS):
        wanted = 0.0
        for age, event in enumerate(reversed(history)):
            item = int(event.item_id[1:])
            if item not in (other, ITEMS - 1) and words & ITEM_WORDS[item]:
                norms = (product(words, words) * product(ITEM_WORDS[item], ITEM_WORDS[item])) ** 0.5
                wanted += 0.8**age * product(words, ITEM_WORDS[item]) / norms
        value = got[VOCABULARY.token(f"i{other}")]
        assert value == pytest.approx(wanted, rel=1e-4) if wanted else value < 0


def test_the_best_columns_are_those_of_a_full_sort_and_ties_go_by_column() -> None:
    scores = np.array([[3, 1, 3, 2, -np.inf], [-np.inf, 0, -np.inf, -np.inf, -np.inf]], np.float32)
    found, best = column_top_k(scores, 4)
    assert found.tolist() == [[0, 2, 3, 1], [1, 0, 0, 0]]
    assert best[0].tolist() == [3, 3, 2, 1]
    assert column_top_k(scores, 9)[0].shape == (2, 9)
