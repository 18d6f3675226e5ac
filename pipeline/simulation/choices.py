"""What a simulated user takes next and does with it: what is drawn from, and what the truth knows."""

from dataclasses import dataclass, replace
from math import log

import numpy as np

from pipeline.simulation.world import COMPLEMENTS, PRICE_LEVELS, SUCCESSORS, World

ACTIONS = ("view", "click", "like", "cart", "purchase", "skip")
VIEW, CLICK, LIKE, CART, PURCHASE, SKIP = range(len(ACTIONS))
FIT = np.array([1.0, 0.5, 0.2])  # of an item's price level to the user's, by their distance
TRIES = 4  # draws before an item that the user had lately is taken all the same
AFTER_SKIP = 10  # times likelier that the topic changes
LONG_DWELL_MS = 30_000
DWELL_SIGMA = 0.8
SUCCESSORS_UPTO, COMPLEMENTS_UPTO = np.cumsum(SUCCESSORS), np.cumsum(COMPLEMENTS)


@dataclass(slots=True)
class SessionStates:
    """The hidden state of n sessions, before their next event. All int [n] but the two of the taste.

    topic: the intent, -1 at the start; last: item, -1 = none; action: what was done with it, -1 at the start.
    interests: int [n, k]; taste: float [n, k]; seen: int [n, m] items that are passed over
    """

    level: np.ndarray
    interests: np.ndarray
    interest_weights: np.ndarray
    topic: np.ndarray
    last: np.ndarray
    action: np.ndarray
    seen: np.ndarray

    def select(self, rows: np.ndarray) -> "SessionStates":
        return SessionStates(*(getattr(self, name)[rows] for name in self.__dataclass_fields__))

    def after_session(self, ended: np.ndarray | bool = True) -> "SessionStates":
        """Before another session, where this one has ended: no intent yet."""
        return replace(self, topic=np.where(ended, -1, self.topic), action=np.where(ended, -1, self.action))


class ChoiceModel:
    """One day's catalogue: popularity as it is, items that are there already."""

    def __init__(self, world: World, trend: np.ndarray, day: int) -> None:
        """trend: float [items], log of what popularity has drifted by."""
        config, age = world.config, day - world.born_day
        self._world = world
        self._sequels, self._complements = np.array(config.sequel_rates), np.array(config.complement_rates)
        self.alive = age >= 0
        boost = 1 + config.launch_boost * np.exp(-np.maximum(age, 0) / config.launch_days) * (world.born_day > 0)
        weights = world.base * np.exp(trend) * boost * self.alive
        fit = FIT[np.abs(np.arange(PRICE_LEVELS)[:, None] - world.level)]  # [levels, items]
        self._by_level = weights * fit
        self._order = np.argsort(world.topic, kind="stable")
        self._bounds = np.searchsorted(world.topic[self._order], np.arange(config.topics + 1))
        sums = np.cumsum(self._by_level[:, self._order], axis=1)
        self._sums = np.concatenate([np.zeros((PRICE_LEVELS, 1)), sums], axis=1)  # [levels, items + 1]
        self._totals = np.diff(self._sums[:, self._bounds], axis=1)  # [levels, topics]

    def draw(self, dice: np.random.Generator, states: SessionStates) -> tuple[np.ndarray, np.ndarray]:
        """Next items and intents, int [n] each."""
        n = len(states.level)
        items, topics, left = np.empty(n, np.int64), np.empty(n, np.int64), np.arange(n)
        bounds, tried = np.cumsum(self._mixture(states)[:3], axis=0), states
        for _ in range(TRIES):
            drawn, intent = self._try(dice, tried, bounds)
            items[left], topics[left] = drawn, intent
            again = (tried.seen == drawn[:, None]).any(axis=1) | ~self.alive[drawn]
            left, bounds, tried = left[again], bounds[:, again], tried.select(again)
            if not left.size:
                return items, topics
        gone = left[~self.alive[items[left]]]
        topics[gone] = _pick(dice, states.interest_weights[gone], states.interests[gone])
        items[gone] = self._of_topic(dice, states.level[gone], topics[gone])
        return items, topics

    def likelihood(self, states: SessionStates, over: float = 0.0) -> np.ndarray:
        """float [n, items]: the probability of each item being next, zero for those that are passed over.

        over: the chance that the session has ended and the next event begins another one.
        """
        world, rows = self._world, np.arange(len(states.level))
        sequel, complement, same, taste = (1 - over) * self._mixture(states) + over * self._mixture(
            states.after_session()
        )
        topics = np.zeros((len(rows), world.config.topics))  # the probability that the topic is drawn, and which
        np.add.at(topics, (rows[:, None], states.interests), taste[:, None] * states.interest_weights)
        begun = states.topic >= 0
        topics[rows[begun], states.topic[begun]] += same[begun]
        topics /= self._totals[states.level]
        dense = topics[:, world.topic] * self._by_level[states.level]
        after = np.flatnonzero(states.last >= 0)
        for followers, shares, weight in (
            (world.sequels, SUCCESSORS, sequel),
            (world.complements, COMPLEMENTS, complement),
        ):
            np.add.at(dense, (after[:, None], followers[states.last[after]]), weight[after, None] * shares)
        dense *= self.alive
        places = np.nonzero(states.seen >= 0)
        dense[places[0], states.seen[places]] = 0
        return dense

    def _mixture(self, states: SessionStates) -> np.ndarray:
        """float [4, n]: weights of a sequel, a complement, the intent's topic, a topic drawn anew from the taste."""
        config, started = self._world.config, states.action >= 0
        action = np.maximum(states.action, 0)
        resumes = np.where(states.last >= 0, config.resume_rate, 0.0)
        sequel = np.where(started, self._sequels[action], resumes)
        complement = np.where(started, self._complements[action], 0.0)
        change = np.where(states.action == SKIP, AFTER_SKIP * config.topic_switch_rate, config.topic_switch_rate)
        rest = 1 - sequel - complement
        taste = np.where(started, rest * change, rest)
        return np.stack([sequel, complement, rest - taste, taste])

    def _try(
        self, dice: np.random.Generator, states: SessionStates, bounds: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """bounds: float [3, n], where the parts of the mixture end."""
        part = (dice.random(len(states.level)) >= bounds).sum(axis=0)  # 0 sequel, 1 complement, 2 same topic, 3 taste
        topics = np.where(part == 3, _pick(dice, states.interest_weights, states.interests), states.topic)
        items = np.empty(len(part), np.int64)
        for which, followers, upto in (
            (0, self._world.sequels, SUCCESSORS_UPTO),
            (1, self._world.complements, COMPLEMENTS_UPTO),
        ):
            rows = np.flatnonzero(part == which)
            places = np.searchsorted(upto, dice.random(len(rows)), "right")
            items[rows] = followers[states.last[rows], places]
        rows = np.flatnonzero(part >= 2)
        items[rows] = self._of_topic(dice, states.level[rows], topics[rows])
        moved = (part == 1) | (topics < 0)  # a complement, or a resumed session, brings its own intent
        return items, np.where(moved, self._world.topic[items], topics)

    def _of_topic(self, dice: np.random.Generator, level: np.ndarray, topic: np.ndarray) -> np.ndarray:
        target = self._sums[level, self._bounds[topic]] + dice.random(len(topic)) * self._totals[level, topic]
        places = np.empty(len(topic), np.int64)
        for each in range(PRICE_LEVELS):
            rows = level == each
            places[rows] = np.searchsorted(self._sums[each], target[rows], "right") - 1
        return self._order[np.clip(places, self._bounds[topic], self._bounds[topic + 1] - 1)]


@dataclass(slots=True)
class Outcomes:
    """Probabilities of what is done with n items. actions: float [n, 6]; engaged, monetized: float [n];
    dwell_log_ms: float [n], mean of the logarithm of the dwell time."""

    actions: np.ndarray
    engaged: np.ndarray
    monetized: np.ndarray
    dwell_log_ms: np.ndarray


def appeal(world: World, states: SessionStates, items: np.ndarray) -> np.ndarray:
    """How much users in these states care for these items: int [n, k] -> float [n, k], about -2 to 3."""
    wanted = states.interests[:, :, None] == world.topic[items][:, None]  # [n, interests, k]
    liking = (states.interest_weights[:, :, None] * wanted).sum(axis=1)  # 0..1
    fit = FIT[np.abs(states.level[:, None] - world.level[items])]
    return -0.9 + 2.0 * liking + 0.8 * world.quality[items] + 0.9 * (fit - 0.5)


def choose_from_slates(
    dice: np.random.Generator, world: World, states: SessionStates, slates: np.ndarray
) -> np.ndarray:
    """What users take from the slates they are shown: int [n, k] items, -1 = none -> int [n], -1 from an empty slate.

    An item is seen with probability 1 / rank (position bias), and of those seen one is taken by exp(appeal).
    """
    seen = 1 / np.arange(1, slates.shape[1] + 1)
    weights = seen * np.exp(appeal(world, states, slates)) * (slates >= 0)
    upto = np.cumsum(weights, axis=1)
    places = (dice.random(len(slates))[:, None] * upto[:, -1:] >= upto[:, :-1]).sum(axis=1)
    return slates[np.arange(len(slates)), places]


def outcomes(world: World, states: SessionStates, items: np.ndarray) -> Outcomes:
    """What users in these states do with these items, int [n]."""
    cares = appeal(world, states, items[:, None])[:, 0]
    skip, rest = 0.4 * _sigmoid(-2 * cares), 1 - 0.4 * _sigmoid(-2 * cares)
    cart, like = rest * 0.3 * _sigmoid(1.5 * cares - 1.2), rest * 0.3 * _sigmoid(1.5 * cares - 0.3)
    browse = rest - cart - like
    actions = np.stack([0.6 * browse, 0.4 * browse, like, cart, np.zeros_like(cart), skip], axis=1)
    dwell_log_ms = log(8_000) + 0.6 * cares
    long = _sigmoid(1.702 * (dwell_log_ms - log(LONG_DWELL_MS)) / DWELL_SIGMA)  # of a normal's tail, within 0.01
    return Outcomes(actions, like + cart + browse * long, cart, dwell_log_ms)


def _pick(dice: np.random.Generator, taste: np.ndarray, interests: np.ndarray) -> np.ndarray:
    """A topic of each row's interests, by taste."""
    places = (dice.random(len(taste))[:, None] > np.cumsum(taste, axis=1)[:, :-1]).sum(axis=1)
    return interests[np.arange(len(taste)), places]


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))
