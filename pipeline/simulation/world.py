"""The simulated shop: its configuration, its items, and which items tend to follow which. Nothing here changes."""

from dataclasses import dataclass

import msgspec
import numpy as np

from pipeline.records import DAY_MS, Item
from pipeline.types import Fraction, PositiveInt

PRICE_LEVELS = 3
SEQUEL_WEIGHTS = np.array([0.5, 0.25, 0.15, 0.1])  # probabilities of an item's four sequels, given that one follows
COMPLEMENT_WEIGHTS = np.array([0.6, 0.4])
_TEXT = """
amber birch cedar dune ember flint grove heath iris jade kelp larch maple nettle ochre pearl quartz reed slate thyme
umber violet willow yarrow zinc brook cliff delta fjord glade harbor islet knoll lagoon meadow
"""
WORDS = _TEXT.split()


class SimulatorConfig(msgspec.Struct, frozen=True):
    """Parameters of the shop. They were committed before any model was trained on its logs."""

    events: PositiveInt = 200_000
    users: PositiveInt = 5_000
    items: PositiveInt = 2_000
    seed: int = 7
    days: PositiveInt = 90  # approximate number of days that the events span
    start_ms: int = 1_735_689_600_000  # 1 January 2025, UTC
    topics: PositiveInt = 40
    categories: PositiveInt = 8  # of topics
    zipf: float = 0.8  # exponent of popularity within a topic
    topic_zipf: float = 0.9  # exponent of the topics' popularity
    drift: float = 0.1  # standard deviation of log popularity's change per week
    late_items: Fraction = 0.1  # items that arrive during the period
    launch_boost: float = 3.0  # of a new item's popularity, fading with `launch_days`
    launch_days: float = 5.0
    interests: PositiveInt = 3  # topics per user
    interest_change_rate: Fraction = 0.01  # per day: one interest is replaced, half of the time within its category
    activity_sigma: float = 1.0  # of the log-normal activity of users
    session_events: float = 8.0  # mean length of a session
    gap_s: float = 60.0  # median time between two events of a session
    resume_rate: Fraction = 0.3  # sessions that continue from the last item of the session before
    topic_switch_rate: Fraction = 0.05  # per event; ten times that after a skip
    sequel_rates: tuple[float, ...] = (0.35, 0.45, 0.5, 0.05, 0.05, 0.05)  # probability of a sequel by last action
    complement_rates: tuple[float, ...] = (0.0, 0.0, 0.05, 0.5, 0.6, 0.0)  # the same of a complement (see ACTIONS)
    checkout_rate: Fraction = 0.4  # carts that are bought at once
    slate_take_rate: Fraction = 0.5  # events that are taken from the slate, where slates are shown


@dataclass(slots=True)
class World:
    """Items 0..n-1; each has a topic, sequels (directed, mostly of its topic) and complements (of another topic).

    topic, price_level, born_day: int [items]; base_popularity: float [items], within the topic
    quality, price: float [items]
    sequels: int [items, 4]; complements: int [items, 2]
    """

    config: SimulatorConfig
    topic: np.ndarray
    category: np.ndarray  # [topics]
    price_level: np.ndarray
    born_day: np.ndarray
    base_popularity: np.ndarray
    quality: np.ndarray
    price: np.ndarray
    sequels: np.ndarray
    complements: np.ndarray

    @classmethod
    def from_config(cls, config: SimulatorConfig) -> "World":
        """Draw the shop; the same configuration gives the same shop."""
        rng = np.random.default_rng([config.seed, 1])
        n = config.items
        # Every topic has an item.
        topic = np.concatenate([np.arange(config.topics), rng.integers(config.topics, size=n)])[:n]
        category = np.arange(config.topics) % config.categories
        rank = np.empty(n)
        for number in range(config.topics):
            members = np.flatnonzero(topic == number)
            rank[members] = rng.permutation(len(members))
        is_late = rng.random(n) < config.late_items
        born_day = np.where(is_late, rng.integers(1, config.days, size=n), 0)
        born_day[: config.topics] = 0  # every topic has an item from the first day on
        price_level = rng.integers(PRICE_LEVELS, size=n)
        price = np.round(np.exp(rng.normal(1.5 + price_level, 0.3)), 2)
        popularity = (1 + rank) ** -config.zipf
        sequels = _draw_sequels(rng, topic, category[topic], popularity, len(SEQUEL_WEIGHTS))
        complements = _draw_complements(rng, topic, config.topics, popularity, len(COMPLEMENT_WEIGHTS))
        return cls(
            config=config,
            topic=topic,
            category=category,
            price_level=price_level,
            born_day=born_day,
            base_popularity=popularity,
            quality=rng.normal(size=n),
            price=price,
            sequels=sequels,
            complements=complements,
        )

    def records(self) -> list[Item]:
        """Return the items as the compacted topic would hold them."""
        rng = np.random.default_rng([self.config.seed, 2])
        return [self._record(rng, number) for number in range(self.config.items)]

    def _record(self, rng: np.random.Generator, number: int) -> Item:
        topic = int(self.topic[number])
        title = " ".join(WORDS[(7 * topic + offset) % len(WORDS)] for offset in rng.integers(5, size=3))
        random_words = " ".join(WORDS[index] for index in rng.integers(len(WORDS), size=8))
        return Item(
            item_id(number),
            title=title,
            text=f"{random_words} {title}",
            category=[f"category-{self.category[topic]}", f"topic-{topic}"],
            brand=f"brand-{(topic * 3 + int(rng.integers(3))) % 60}",
            price=float(self.price[number]),
            created_ms=self.config.start_ms + int(self.born_day[number]) * DAY_MS,
        )


def item_id(number: int) -> str:
    return f"item-{number}"


def _draw_sequels(
    rng: np.random.Generator, topic: np.ndarray, category: np.ndarray, popularity: np.ndarray, count: int
) -> np.ndarray:
    """Return int [items, count]: 7 of 10 items have sequels of their topic, the rest of their category."""
    sequels = np.empty((len(topic), count), np.int64)
    for item in range(len(topic)):
        is_candidate = topic == topic[item] if rng.random() < 0.7 else category == category[item]
        sequels[item] = _draw(rng, np.flatnonzero(is_candidate), popularity, count, item)
    return sequels


def _draw_complements(
    rng: np.random.Generator, topic: np.ndarray, topics: int, popularity: np.ndarray, count: int
) -> np.ndarray:
    """Return int [items, count]: items of the topic that is paired with the item's."""
    partner = rng.permutation(topics)
    members = [np.flatnonzero(topic == number) for number in range(topics)]
    return np.stack([_draw(rng, members[partner[topic[item]]], popularity, count, item) for item in range(len(topic))])


def _draw(rng: np.random.Generator, pool: np.ndarray, popularity: np.ndarray, count: int, item: int) -> np.ndarray:
    """Return `count` items of the pool other than `item`, popular ones more often."""
    pool = pool[pool != item] if (pool != item).any() else pool
    weights = popularity[pool] ** 0.5
    return rng.choice(pool, size=count, replace=len(pool) < count, p=weights / weights.sum())
