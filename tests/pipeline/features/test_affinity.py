"""Affinity features against plain loops, and in training against serving."""

from math import log1p

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.data.sequences import UserSequences
from pipeline.features.affinity import N_AFFINITY_FEATURES, WINDOWS, AffinityIndex
from pipeline.features.labels import engaged
from pipeline.items.catalogue import Catalogue
from pipeline.items.vocabulary import Vocabulary
from pipeline.records import Event, EventSchema, Histories, Item
from pipeline.training.batches import TrainingColumns, make_batch

SCHEMA = EventSchema()
ITEMS = [
    Item("a", category=["x", "red"], price=3.0),
    Item("b", category=["y", "red"], price=9.0),
    Item("c", category=["x", "blue"]),
    Item("d", price=40.0),
    Item("e"),
]
VOCABULARY = Vocabulary(item.item_id for item in ITEMS)
CATALOGUE = Catalogue(VOCABULARY)
CATALOGUE.upsert(ITEMS)
interactions = st.lists(
    st.tuples(st.integers(0, 4), st.sampled_from(["view", "cart", "like"])), min_size=1, max_size=320
)


def events_of(history: list[tuple[int, str]], user: str = "u") -> list[Event]:
    return [Event(user, ITEMS[item].item_id, action, 1000 * n) for n, (item, action) in enumerate(history)]


def index_of(histories: Histories) -> AffinityIndex:
    items = VOCABULARY.tokens(histories.items)
    return AffinityIndex.from_histories(histories, items, CATALOGUE.facts(items), engaged(histories, SCHEMA))


def features_at(histories: Histories, ends: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    return index_of(histories).at(ends, tokens, CATALOGUE.facts(tokens))


def expected_features(history: list[tuple[int, str]], item: Item) -> list[float]:
    """Compute the features of an item after the full history by their definitions."""

    def same_category(interaction: tuple[int, str]) -> bool:
        return bool(item.category) and ITEMS[interaction[0]].category[-1:] == item.category[-1:]

    windows = [history[-events:] for events in WINDOWS]
    fractions = [sum(map(same_category, window)) / (len(window) + 1) for window in windows]
    in_category = [interaction for interaction in windows[-1] if same_category(interaction)]
    n_engaged = sum(action != "view" for _, action in in_category)
    log_prices = [log1p(ITEMS[i].price or 0) for i, _ in windows[-1] if ITEMS[i].price is not None]
    comparable = bool(log_prices) and item.price is not None
    difference = log1p(item.price or 0) - sum(log_prices) / len(log_prices) if comparable else 0.0
    return [
        *fractions,
        fractions[-1] ** 0.5,
        (n_engaged + 0.5) / (len(in_category) + 2),
        same_category(history[-1]),
        (len(windows[-1]) + 1) ** -0.5,
        ITEMS[history[-1][0]] == item,
        max(difference, 0),
        max(-difference, 0),
        not comparable,
    ]


@given(interactions, interactions)
def test_features_equal_their_definitions_within_each_user(one, other) -> None:
    histories = Histories.from_events([events_of(one), events_of(other)], SCHEMA)
    for end, history in ((len(one) - 1, one), (len(one) + len(other) - 1, other)):
        tokens = np.array([VOCABULARY.token(item.item_id) for item in ITEMS])
        features = features_at(histories, np.full(len(ITEMS), end), tokens)
        assert features.shape == (len(ITEMS), N_AFFINITY_FEATURES)
        np.testing.assert_allclose(features, [expected_features(history, item) for item in ITEMS], atol=2e-4)


def test_unknown_item_has_no_affinity_to_any_category() -> None:
    histories = Histories.from_events([events_of([(0, "view"), (0, "cart")])], SCHEMA)
    (row,) = features_at(histories, np.array([1]), np.array([0]))
    assert not row[: len(WINDOWS)].any()
    assert row[-1] == 1


@pytest.mark.parametrize("seed", range(3))
def test_training_batch_features_equal_serving_features(seed: int) -> None:
    rng = np.random.default_rng(seed)
    lengths = [1, 7, 300]  # ascending: make_batch orders users by length
    log = [[(int(rng.integers(5)), str(rng.choice(["view", "cart"]))) for _ in range(n)] for n in lengths]
    histories = Histories.from_events([events_of(history) for history in log], SCHEMA)
    sequences = UserSequences.from_columns(histories.events, VOCABULARY.tokens(histories.items), histories.users)
    columns = TrainingColumns.from_sequences(sequences, SCHEMA, repeats=True, catalogue=CATALOGUE)
    batch = make_batch(columns, sequences.offsets[:-1], np.diff(sequences.offsets), 0.5, rng)
    for row in np.flatnonzero(batch.successors):
        start = int(sequences.user_starts(np.array([row]))[0])
        ring = Histories(histories.events[start : row + 1], np.array([0, row + 1 - start]))
        served = features_at(ring, np.array([row - start]), batch.successors[row : row + 1])
        np.testing.assert_array_equal(batch.affinity[row], served[0])


def test_latest_uses_each_users_last_event_and_zeros_without_events() -> None:
    log = [[(0, "view"), (2, "cart")], [], [(1, "like")]]
    histories = Histories.from_events([events_of(history) for history in log], SCHEMA)
    tokens = np.array([[1, 4], [2, 3], [5, 2]])
    features = index_of(histories).latest(tokens, CATALOGUE.facts(tokens.ravel()))
    assert not features[1].any()
    for user, end in ((0, 1), (2, 2)):
        expected = features_at(histories, np.array([end, end]), tokens[user])
        np.testing.assert_array_equal(features[user], expected)
