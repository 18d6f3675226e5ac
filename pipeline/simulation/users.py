"""The simulated shop's users: what they like, what they can pay, how often they come, what they had lately."""

from dataclasses import dataclass

import numpy as np

from pipeline.simulation.world import PRICE_LEVELS, SimulatorConfig

MEMORY = 128  # items that a user passes over: their last ones
DEVICES = ("mobile", "desktop", "tablet")


@dataclass(slots=True)
class RecentItems:
    """The users' last items. items: int32 [users, size], -1 = none; counts: int64 [users]."""

    items: np.ndarray
    counts: np.ndarray

    @classmethod
    def empty(cls, users: int, size: int) -> "RecentItems":
        return cls(np.full((users, size), -1, np.int32), np.zeros(users, np.int64))

    def append(self, who: np.ndarray, items: np.ndarray) -> None:
        self.items[who, self.counts[who] % self.items.shape[1]] = items
        self.counts[who] += 1


@dataclass(slots=True)
class SimulatedUsers:
    """interests: int [users, k] topics; taste: float [users, k], their weights; hour: float, of the day;
    last, action, topic: of the last event the item, what was done with it and the intent, -1 = none."""

    interests: np.ndarray
    interest_weights: np.ndarray
    level: np.ndarray
    hour: np.ndarray
    activity: np.ndarray
    usual: np.ndarray
    device: np.ndarray
    last: np.ndarray
    action: np.ndarray
    topic: np.ndarray
    seen: RecentItems

    @classmethod
    def from_config(cls, config: SimulatorConfig, dice: np.random.Generator) -> "SimulatedUsers":
        n = config.users
        activity = dice.lognormal(0, config.activity_sigma, n)
        activity *= _scale(activity, config.events / (n * config.days * config.session_events))
        return cls(
            interests=distinct_topics(config, dice, n),
            interest_weights=dice.dirichlet(np.full(config.interests, 1.5), n),
            level=dice.integers(PRICE_LEVELS, size=n),
            hour=dice.normal(17, 3, n),
            activity=activity,
            usual=activity.copy(),
            device=dice.choice(len(DEVICES), size=n, p=[0.6, 0.3, 0.1]),
            last=np.full(n, -1),
            action=np.full(n, -1),
            topic=np.full(n, -1),
            seen=RecentItems.empty(n, MEMORY),
        )


def distinct_topics(config: SimulatorConfig, dice: np.random.Generator, rows: int) -> np.ndarray:
    """int [rows, interests]: topics drawn without repetition, the popular ones more often (Gumbel's trick)."""
    fame = -config.topic_zipf * np.log(1 + np.arange(config.topics))
    return np.argsort(-(fame + dice.gumbel(size=(rows, config.topics))), axis=1)[:, : config.interests]


def _scale(activity: np.ndarray, wanted: float) -> float:
    """The factor that makes the mean probability of a session a day what is wanted (at most a half)."""
    low, high = 0.0, 1e6
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if -np.expm1(-middle * activity).mean() < min(wanted, 0.5) else (low, middle)
    return low
