"""The simulated shop: its configuration, its items, and who tends to follow whom. Everything here stands still."""

from dataclasses import dataclass

import msgspec
import numpy as np

from pipeline.records import DAY_MS, Item
from pipeline.types import Fraction, PositiveInt

PRICE_LEVELS = 3
SUCCESSORS = np.array([0.5, 0.25, 0.15, 0.1])  # how an item's four sequels share what goes to sequels
COMPLEMENTS = np.array([0.6, 0.4])
_TEXT = """
amber birch cedar dune ember flint grove heath iris jade kelp larch maple nettle ochre pearl quartz reed slate thyme
umber violet willow yarrow zinc brook cliff delta fjord glade harbor islet knoll lagoon meadow
"""
WORDS = _TEXT.split()


class SimulatorConfig(msgspec.Struct, frozen=True):
    """Committed before any model was trained on what it makes."""

    events: PositiveInt = 200_000
    users: PositiveInt = 5_000
    items: PositiveInt = 2_000
    seed: int = 7
    days: PositiveInt = 90  # the period over which the events are spread, about
    start_ms: int = 1_735_689_600_000  # 1 January 2025, UTC
    topics: PositiveInt = 40
    categories: PositiveInt = 8  # of topics
    zipf: float = 0.8  # exponent of popularity within a topic
    topic_zipf: float = 0.9  # of the topics' own popularity
    drift: float = 0.1  # of log popularity: standard deviation a week
    late_items: Fraction = 0.1  # that arrive during the period
    launch_boost: float = 3.0  # of a new item's popularity, fading with `launch_days`
    launch_days: float = 5.0
    interests: PositiveInt = 3  # topics of a user
    interest_change_rate: Fraction = (
        0.01  # a day: one interest is replaced by another, half of the time within its category
    )
    activity_sigma: float = 1.0  # of the log-normal activity of users
    session_events: float = 8.0  # mean length of a session
    gap_s: float = 60.0  # median time between two events of a session
    resume_rate: Fraction = 0.3  # sessions that go on from the last item of the session before
    topic_switch_rate: Fraction = 0.05  # change of topic at any step; after a skip ten times that
    sequel_rates: tuple[float, ...] = (0.35, 0.45, 0.5, 0.05, 0.05, 0.05)  # by last action (ACTIONS): goes to a sequel
    complement_rates: tuple[float, ...] = (0.0, 0.0, 0.05, 0.5, 0.6, 0.0)  # by last action: goes to a complement
    checkout_rate: Fraction = 0.4  # carts that are bought at once
    slate_take_rate: Fraction = 0.5  # where slates are shown: a user's next event is taken from the slate


@dataclass(slots=True)
class World:
    """Items 0..n-1 of topics; each has sequels (directed, mostly of its topic) and complements (of another topic).

    topic, level, born_day: [items]; base: float [items], popularity within the topic; quality: float [items]
    sequels: int [items, 4]; complements: int [items, 2]; price: float [items]
    """

    config: SimulatorConfig
    topic: np.ndarray
    category: np.ndarray  # [topics]
    level: np.ndarray
    born_day: np.ndarray
    base: np.ndarray
    quality: np.ndarray
    price: np.ndarray
    sequels: np.ndarray
    complements: np.ndarray

    @classmethod
    def from_config(cls, config: SimulatorConfig) -> "World":
        dice = np.random.default_rng([config.seed, 1])
        n = config.items
        topic = np.concatenate([np.arange(config.topics), dice.integers(config.topics, size=n)])[:n]  # none is empty
        category = np.arange(config.topics) % config.categories
        rank = np.empty(n)
        for each in range(config.topics):
            members = np.flatnonzero(topic == each)
            rank[members] = dice.permutation(len(members))
        late = dice.random(n) < config.late_items
        born = np.where(late, dice.integers(1, config.days, size=n), 0)
        born[: config.topics] = 0  # every topic has something from the first day on
        level = dice.integers(PRICE_LEVELS, size=n)
        price = np.round(np.exp(dice.normal(1.5 + level, 0.3)), 2)
        base = (1 + rank) ** -config.zipf
        sequels = _followers(dice, topic, category[topic], base, len(SUCCESSORS))
        complements = _elsewhere(dice, topic, config.topics, base, len(COMPLEMENTS))
        return cls(config, topic, category, level, born, base, dice.normal(size=n), price, sequels, complements)

    def records(self) -> list[Item]:
        """The items as the compacted topic would hold them."""
        dice = np.random.default_rng([self.config.seed, 2])
        return [self._record(dice, number) for number in range(self.config.items)]

    def _record(self, dice: np.random.Generator, number: int) -> Item:
        topic = int(self.topic[number])
        words = [WORDS[(7 * topic + offset) % len(WORDS)] for offset in dice.integers(5, size=3)]
        return Item(
            item_id(number),
            title=" ".join(words),
            text=" ".join(WORDS[at] for at in dice.integers(len(WORDS), size=8)) + " " + " ".join(words),
            category=[f"category-{self.category[topic]}", f"topic-{topic}"],
            brand=f"brand-{(topic * 3 + int(dice.integers(3))) % 60}",
            price=float(self.price[number]),
            created_ms=self.config.start_ms + int(self.born_day[number]) * DAY_MS,
        )


def item_id(number: int) -> str:
    return f"item-{number}"


def _followers(
    dice: np.random.Generator, topic: np.ndarray, category: np.ndarray, base: np.ndarray, count: int
) -> np.ndarray:
    """Sequels of each item: 7 of 10 of its topic, the rest of its category; popular ones more often."""
    found = np.empty((len(topic), count), np.int64)
    for item in range(len(topic)):
        same = topic == topic[item] if dice.random() < 0.7 else category == category[item]
        found[item] = _draw(dice, np.flatnonzero(same), base, count, item)
    return found


def _elsewhere(dice: np.random.Generator, topic: np.ndarray, topics: int, base: np.ndarray, count: int) -> np.ndarray:
    """Complements: items of the topic that goes with this one's."""
    partner = dice.permutation(topics)
    members = [np.flatnonzero(topic == each) for each in range(topics)]
    return np.stack([_draw(dice, members[partner[topic[item]]], base, count, item) for item in range(len(topic))])


def _draw(dice: np.random.Generator, pool: np.ndarray, base: np.ndarray, count: int, item: int) -> np.ndarray:
    pool = pool[pool != item] if (pool != item).any() else pool
    weights = base[pool] ** 0.5
    return dice.choice(pool, size=count, replace=len(pool) < count, p=weights / weights.sum())
