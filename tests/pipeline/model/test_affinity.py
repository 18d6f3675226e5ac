"""Affinity on the device against plain loops, and in training against serving."""

from math import log1p

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.data.sequences import UserSequences
from pipeline.features.affinity import N_AFFINITY_FEATURES, WINDOWS
from pipeline.features.event_features import COUNT_CAP
from pipeline.features.inputs import encode
from pipeline.features.labels import LabelRules
from pipeline.items.catalogue import Catalogue
from pipeline.items.vocabulary import Vocabulary
from pipeline.model import affinity
from pipeline.model.affinity import AffinityColumns, ItemColumns, LatestEvents
from pipeline.records import Event, EventSchema, Histories, Item
from pipeline.strategies.exclusion import Exclusion
from pipeline.training.batches import TrainingColumns, make_batch
from pipeline.training.multi_task_model import successor_affinity

NOTHING_EXCLUDED = Exclusion(action_codes=())
SCHEMA = EventSchema()
RULES = LabelRules.from_options(SCHEMA)
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


def affinity_of(histories: Histories, tokens: np.ndarray, max_events: int = COUNT_CAP) -> np.ndarray:
    """Return the features of items, tokens int [users, k], as serving computes them."""
    rows = VOCABULARY.tokens(histories.items)
    events = encode(histories, rows, CATALOGUE.facts(rows), RULES).affinity.tail(max_events)
    columns = AffinityColumns(*map(torch.from_numpy, events.columns))
    latest = LatestEvents.of_users(columns, torch.from_numpy(events.offsets), events.longest)
    facts = CATALOGUE.facts(tokens.ravel())
    columns_of_items = tokens.astype(np.int32), facts.categories, facts.price_codes.astype(np.int32)
    items = ItemColumns(*(torch.from_numpy(column.reshape(tokens.shape)) for column in columns_of_items))
    return latest.affinity(items).numpy()


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
    tokens = np.array([[VOCABULARY.token(item.item_id) for item in ITEMS]] * 2)
    features = affinity_of(histories, tokens)
    assert features.shape == (2, len(ITEMS), N_AFFINITY_FEATURES)
    for found, history in zip(features, (one, other), strict=True):
        np.testing.assert_allclose(found, [expected_features(history, item) for item in ITEMS], atol=2e-4)


def test_unknown_item_has_no_affinity_to_any_category() -> None:
    histories = Histories.from_events([events_of([(0, "view"), (0, "cart")])], SCHEMA)
    row = affinity_of(histories, np.array([[0]]))[0, 0]
    assert not row[: len(WINDOWS)].any()
    assert row[-1] == 1


@pytest.mark.parametrize("seed", range(3))
def test_training_batch_features_equal_serving_features(seed: int) -> None:
    rng = np.random.default_rng(seed)
    lengths = [1, 7, 300]  # ascending: make_batch orders users by length
    log = [[(int(rng.integers(5)), str(rng.choice(["view", "cart"]))) for _ in range(n)] for n in lengths]
    histories = Histories.from_events([events_of(history) for history in log], SCHEMA)
    sequences = UserSequences.from_columns(histories.events, VOCABULARY.tokens(histories.items), histories.users)
    columns = TrainingColumns.from_sequences(sequences, RULES, NOTHING_EXCLUDED, ring_events=512, catalogue=CATALOGUE)
    batch = make_batch(columns, sequences.offsets[:-1], np.diff(sequences.offsets), 0.5, rng)
    trained = successor_affinity(batch, torch.device("cpu")).numpy()
    for row in np.flatnonzero(batch.successors):
        start = int(sequences.user_starts(np.array([row]))[0])
        ring = Histories(histories.events[start : row + 1], np.array([0, row + 1 - start]))
        served = affinity_of(ring, batch.successors[row : row + 1, None])
        np.testing.assert_array_equal(trained[row], served[0])


def test_user_without_events_has_zeros_and_changes_no_other_user() -> None:
    log = [[(0, "view"), (2, "cart")], [], [(1, "like")]]
    histories = Histories.from_events([events_of(history) for history in log], SCHEMA)
    tokens = np.array([[1, 4], [2, 3], [5, 2]])
    features = affinity_of(histories, tokens)
    assert not features[1].any()
    for user in (0, 2):
        alone = affinity_of(histories.select(np.array([user])), tokens[user : user + 1])
        np.testing.assert_array_equal(features[user], alone[0])
    assert not affinity_of(histories.select(np.array([1])), tokens[1:2]).any(), "a batch without any event"


def test_events_beyond_the_longer_window_do_not_count() -> None:
    history = [(0, "cart")] * 10 + [(1, "view")] * COUNT_CAP
    full = Histories.from_events([events_of(history)], SCHEMA)
    tokens = np.array([[1, 2, 3]])
    expected = affinity_of(Histories.from_events([events_of(history[10:])], SCHEMA), tokens)
    np.testing.assert_array_equal(affinity_of(full, tokens), expected)
    np.testing.assert_array_equal(affinity_of(full, tokens, max_events=1000), expected)


@pytest.mark.parametrize("users", [1, 7, 40])
def test_counting_a_few_users_at_a_time_changes_nothing(users: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(users)
    log = [[(int(rng.integers(5)), "view") for _ in range(rng.integers(0, 60))] for _ in range(users)]
    histories = Histories.from_events([events_of(history) for history in log], SCHEMA)
    tokens = rng.integers(0, 6, (users, 9))
    at_once = affinity_of(histories, tokens)
    monkeypatch.setattr(affinity, "CHUNK_PAIRS", 1000)
    np.testing.assert_array_equal(affinity_of(histories, tokens), at_once)
