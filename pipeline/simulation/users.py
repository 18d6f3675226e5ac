"""The simulated shop's users: interests, price level, activity and recently seen items."""

from dataclasses import dataclass

import numpy as np

from pipeline.simulation.world import PRICE_LEVELS, SimulatorConfig

SEEN_ITEMS = 128  # most recent items that a user does not choose again
DEVICES = ("mobile", "desktop", "tablet")


@dataclass(slots=True)
class RecentItems:
    """Each user's last items in a ring. items: int32 [users, size], -1 = none; counts: int64 [users], ever appended."""

    items: np.ndarray
    counts: np.ndarray

    @classmethod
    def empty(cls, users: int, size: int) -> "RecentItems":
        return cls(np.full((users, size), -1, np.int32), np.zeros(users, np.int64))

    def append(self, users: np.ndarray, items: np.ndarray) -> None:
        """Append one item per user. users: int [n], distinct; items: int [n]"""
        self.items[users, self.counts[users] % self.items.shape[1]] = items
        self.counts[users] += 1


@dataclass(slots=True)
class SimulatedUsers:
    """State of all users, by user.

    interests: int [users, k] topics; interest_weights: float [users, k]
    hour: float, usual hour of the day; activity, usual_activity: float, rate of sessions per day
    last_item, last_action, intent: int, of the user's last event, -1 = none
    """

    interests: np.ndarray
    interest_weights: np.ndarray
    price_level: np.ndarray
    hour: np.ndarray
    activity: np.ndarray
    usual_activity: np.ndarray
    device: np.ndarray
    last_item: np.ndarray
    last_action: np.ndarray
    intent: np.ndarray
    seen: RecentItems

    @classmethod
    def from_config(cls, config: SimulatorConfig, rng: np.random.Generator) -> "SimulatedUsers":
        """Draw the users' initial state."""
        n = config.users
        activity = rng.lognormal(0, config.activity_sigma, n)
        activity *= _activity_scale(activity, config.events / (n * config.days * config.session_events))
        return cls(
            interests=distinct_topics(config, rng, n),
            interest_weights=rng.dirichlet(np.full(config.interests, 1.5), n),
            price_level=rng.integers(PRICE_LEVELS, size=n),
            hour=rng.normal(17, 3, n),
            activity=activity,
            usual_activity=activity.copy(),
            device=rng.choice(len(DEVICES), size=n, p=[0.6, 0.3, 0.1]),
            last_item=np.full(n, -1),
            last_action=np.full(n, -1),
            intent=np.full(n, -1),
            seen=RecentItems.empty(n, SEEN_ITEMS),
        )


def distinct_topics(config: SimulatorConfig, rng: np.random.Generator, rows: int) -> np.ndarray:
    """Return int [rows, interests]: topics without repetition, the popular ones more often (Gumbel-top-k trick)."""
    log_popularity = -config.topic_zipf * np.log(1 + np.arange(config.topics))
    return np.argsort(-(log_popularity + rng.gumbel(size=(rows, config.topics))), axis=1)[:, : config.interests]


def _activity_scale(activity: np.ndarray, target: float) -> float:
    """Return the factor that makes the mean probability of a session per day `target`, at most 0.5."""
    low = 0.0
    high = 1e6
    for _ in range(60):  # bisection
        middle = (low + high) / 2
        if -np.expm1(-middle * activity).mean() < min(target, 0.5):
            low = middle
        else:
            high = middle
    return low
