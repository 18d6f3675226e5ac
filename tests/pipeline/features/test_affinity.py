"""The columns against a plain walk, and what training asks against what serving asks."""

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
    Item("a", category=["x", "red"], price=3.0), Item("b", category=["y", "red"], price=9.0),
    Item("c", category=["x", "blue"]), Item("d", price=40.0), Item("e"),
]  # fmt: skip
VOCABULARY = Vocabulary(item.item_id for item in ITEMS)
CATALOGUE = Catalogue(VOCABULARY)
CATALOGUE.upsert(ITEMS)
touches = st.lists(st.tuples(st.integers(0, 4), st.sampled_from(["view", "cart", "like"])), min_size=1, max_size=320)


def events_of(history: list[tuple[int, str]], user: str = "u") -> list[Event]:
    return [Event(user, ITEMS[item].item_id, action, 1000 * n) for n, (item, action) in enumerate(history)]


def asked_of(histories: Histories, ends: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    items = VOCABULARY.tokens(histories.items)
    affinities = AffinityIndex.from_histories(histories, items, CATALOGUE.facts(items), engaged(histories, SCHEMA))
    return affinities.at(ends, tokens, CATALOGUE.facts(tokens))


def walked(history: list[tuple[int, str]], item: Item) -> list[float]:
    """By the definitions, for an item asked for after the whole history."""

    def alike(touch: tuple[int, str]) -> bool:
        return bool(item.category) and ITEMS[touch[0]].category[-1:] == item.category[-1:]

    shares = []
    for window in (history[-events:] for events in WINDOWS):
        shares.append(sum(map(alike, window)) / (len(window) + 1))
    window = history[-WINDOWS[-1] :]
    found = [touch for touch in window if alike(touch)]
    liked = sum(action != "view" for _, action in found)
    paid = [log1p(ITEMS[i].price or 0) for i, _ in window if ITEMS[i].price is not None]
    told = bool(paid) and item.price is not None
    above = log1p(item.price) - sum(paid) / len(paid) if paid and item.price is not None else 0.0
    return [
        *shares, shares[-1] ** 0.5, (liked + 0.5) / (len(found) + 2), alike(history[-1]),
        (len(window) + 1) ** -0.5, ITEMS[history[-1][0]] == item, max(above, 0), max(-above, 0), not told,
    ]  # fmt: skip


@given(touches, touches)
def test_the_columns_are_their_definitions_and_no_user_sees_anothers_events(one, other) -> None:
    histories = Histories.from_events([events_of(one), events_of(other)], SCHEMA)
    for end, history in ((len(one) - 1, one), (len(one) + len(other) - 1, other)):
        tokens = np.array([VOCABULARY.token(item.item_id) for item in ITEMS])
        got = asked_of(histories, np.full(len(ITEMS), end), tokens)
        assert got.shape == (len(ITEMS), N_AFFINITY_FEATURES)
        np.testing.assert_allclose(got, [walked(history, item) for item in ITEMS], atol=2e-4)


def test_an_item_that_nothing_is_known_of_lies_far_from_every_category() -> None:
    histories = Histories.from_events([events_of([(0, "view"), (0, "cart")])], SCHEMA)
    (row,) = asked_of(histories, np.array([1]), np.array([0]))
    assert not row[: len(WINDOWS)].any()
    assert row[-1] == 1


@pytest.mark.parametrize("seed", range(3))
def test_a_training_batch_asks_what_serving_asks_at_that_time(seed: int) -> None:
    random = np.random.default_rng(seed)
    lengths = [1, 7, 300]
    log = [[(int(random.integers(5)), str(random.choice(["view", "cart"]))) for _ in range(n)] for n in lengths]
    histories = Histories.from_events([events_of(history) for history in log], SCHEMA)
    corpus = UserSequences.from_columns(histories.events, VOCABULARY.tokens(histories.items), histories.users)
    examples = TrainingColumns.from_sequences(corpus, SCHEMA, repeats=True, catalogue=CATALOGUE)
    batch = make_batch(
        examples, corpus.offsets[:-1], np.diff(corpus.offsets), 0.5, random
    )  # in order of length: as here
    for row in np.flatnonzero(batch.successors):
        user = int(np.searchsorted(corpus.offsets, row, side="right")) - 1
        start = int(corpus.offsets[user])
        ring = Histories(histories.events[start : row + 1], np.array([0, row + 1 - start]))
        then = asked_of(ring, np.array([row - start]), batch.successors[row : row + 1])
        np.testing.assert_array_equal(batch.affinity[row], then[0])


def test_each_user_is_asked_after_their_newest_event_and_one_without_events_has_nothing() -> None:
    log = [[(0, "view"), (2, "cart")], [], [(1, "like")]]
    histories = Histories.from_events([events_of(history) for history in log], SCHEMA)
    items, asked = VOCABULARY.tokens(histories.items), np.array([[1, 4], [2, 3], [5, 2]])
    affinities = AffinityIndex.from_histories(histories, items, CATALOGUE.facts(items), engaged(histories, SCHEMA))
    columns = affinities.latest(asked, CATALOGUE.facts(asked.ravel()))
    assert not columns[1].any()
    for user, end in ((0, 1), (2, 2)):
        wanted = asked_of(histories, np.array([end, end]), asked[user])
        np.testing.assert_array_equal(columns[user], wanted)
