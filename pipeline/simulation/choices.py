"""The choice model of simulated users: distributions of the next item and of the action, sampled or evaluated."""

from dataclasses import dataclass, replace
from math import log

import numpy as np

from pipeline.simulation.world import COMPLEMENT_WEIGHTS, PRICE_LEVELS, SEQUEL_WEIGHTS, World

ACTIONS = ("view", "click", "like", "cart", "purchase", "skip")
VIEW, CLICK, LIKE, CART, PURCHASE, SKIP = range(len(ACTIONS))
PRICE_FIT = np.array([1.0, 0.5, 0.2])  # weight of an item by the distance of its price level from the user's
MAX_DRAWS = 4  # then an item is taken even if the user has seen it recently
SKIP_SWITCH_FACTOR = 10  # how many times more often the topic changes after a skip
LONG_DWELL_MS = 30_000
DWELL_SIGMA = 0.8
SEQUEL_BOUNDS = np.cumsum(SEQUEL_WEIGHTS)
COMPLEMENT_BOUNDS = np.cumsum(COMPLEMENT_WEIGHTS)


@dataclass(slots=True)
class SessionStates:
    """The hidden state of n sessions before their next event, int [n] but for the interests and the seen items.

    price_level: the user's
    interests: int [n, k] topics; interest_weights: float [n, k]
    intent: topic of the session, -1 at the start
    last_item: -1 = none; last_action: what was done with it, -1 at the start
    seen: int [n, m] items that are not sampled again, -1 = none
    """

    price_level: np.ndarray
    interests: np.ndarray
    interest_weights: np.ndarray
    intent: np.ndarray
    last_item: np.ndarray
    last_action: np.ndarray
    seen: np.ndarray

    def select(self, rows: np.ndarray) -> "SessionStates":
        return SessionStates(*(getattr(self, name)[rows] for name in self.__dataclass_fields__))

    def after_session(self, ended: np.ndarray | bool = True) -> "SessionStates":
        """Return the states at the start of the next session, without an intent, where `ended`."""
        return replace(
            self,
            intent=np.where(ended, -1, self.intent),
            last_action=np.where(ended, -1, self.last_action),
        )


class ChoiceModel:
    """Choices among one day's catalogue: the items that exist already, by their current popularity."""

    def __init__(self, world: World, trend: np.ndarray, day: int) -> None:
        """trend: float [items], drift of log popularity so far."""
        config = world.config
        age_days = day - world.born_day
        self._world = world
        self._sequel_rates = np.array(config.sequel_rates)
        self._complement_rates = np.array(config.complement_rates)
        self.alive = age_days >= 0
        launch = config.launch_boost * np.exp(-np.maximum(age_days, 0) / config.launch_days) * (world.born_day > 0)
        weights = world.base_popularity * np.exp(trend) * (1 + launch) * self.alive
        price_fit = PRICE_FIT[np.abs(np.arange(PRICE_LEVELS)[:, None] - world.price_level)]  # [levels, items]
        self._weights = weights * price_fit  # [levels, items]
        self._order = np.argsort(world.topic, kind="stable")  # items by topic
        self._bounds = np.searchsorted(world.topic[self._order], np.arange(config.topics + 1))
        sums = np.cumsum(self._weights[:, self._order], axis=1)
        self._sums = np.concatenate([np.zeros((PRICE_LEVELS, 1)), sums], axis=1)  # [levels, items + 1]
        self._topic_weights = np.diff(self._sums[:, self._bounds], axis=1)  # [levels, topics]

    def sample(self, rng: np.random.Generator, states: SessionStates) -> tuple[np.ndarray, np.ndarray]:
        """Return next items and intents, int [n] each."""
        n = len(states.price_level)
        items = np.empty(n, np.int64)
        intents = np.empty(n, np.int64)
        rows = np.arange(n)  # still without a valid item
        bounds = np.cumsum(self._mixture(states)[:3], axis=0)
        remaining = states
        for _ in range(MAX_DRAWS):
            items[rows], intents[rows] = self._draw(rng, remaining, bounds)
            drawn = items[rows]
            is_rejected = (remaining.seen == drawn[:, None]).any(axis=1) | ~self.alive[drawn]
            rows = rows[is_rejected]
            bounds = bounds[:, is_rejected]
            remaining = remaining.select(is_rejected)
            if not rows.size:
                return items, intents
        rows = rows[~self.alive[items[rows]]]
        intents[rows] = _pick_interest(rng, states.interest_weights[rows], states.interests[rows])
        items[rows] = self._draw_from_topic(rng, states.price_level[rows], intents[rows])
        return items, intents

    def likelihood(self, states: SessionStates, end_probability: float = 0.0) -> np.ndarray:
        """Return float [n, items]: the probability of each item being next, zero for seen ones.

        end_probability: probability that the session has ended and the next event begins another one.
        """
        world = self._world
        rows = np.arange(len(states.price_level))
        continuing = self._mixture(states)
        ended = self._mixture(states.after_session())
        mixture = (1 - end_probability) * continuing + end_probability * ended
        sequel, complement, same_topic, new_topic = mixture
        topics = np.zeros((len(rows), world.config.topics))  # probability that an item is drawn from the topic
        np.add.at(topics, (rows[:, None], states.interests), new_topic[:, None] * states.interest_weights)
        has_intent = states.intent >= 0
        topics[rows[has_intent], states.intent[has_intent]] += same_topic[has_intent]
        topics /= self._topic_weights[states.price_level]
        probabilities = topics[:, world.topic] * self._weights[states.price_level]
        resumed = np.flatnonzero(states.last_item >= 0)
        for followers, weights, rate in (
            (world.sequels, SEQUEL_WEIGHTS, sequel),
            (world.complements, COMPLEMENT_WEIGHTS, complement),
        ):
            cells = resumed[:, None], followers[states.last_item[resumed]]
            np.add.at(probabilities, cells, rate[resumed, None] * weights)
        probabilities *= self.alive
        seen_rows, seen_columns = np.nonzero(states.seen >= 0)
        probabilities[seen_rows, states.seen[seen_rows, seen_columns]] = 0
        return probabilities

    def _mixture(self, states: SessionStates) -> np.ndarray:
        """Return float [4, n]: weights of a sequel, a complement, the intent's topic, a topic of the interests."""
        config = self._world.config
        has_started = states.last_action >= 0
        action = np.maximum(states.last_action, 0)
        resumes = np.where(states.last_item >= 0, config.resume_rate, 0.0)
        sequel = np.where(has_started, self._sequel_rates[action], resumes)
        complement = np.where(has_started, self._complement_rates[action], 0.0)
        is_skip = states.last_action == SKIP
        switch = np.where(is_skip, SKIP_SWITCH_FACTOR * config.topic_switch_rate, config.topic_switch_rate)
        rest = 1 - sequel - complement
        new_topic = np.where(has_started, rest * switch, rest)
        return np.stack([sequel, complement, rest - new_topic, new_topic])

    def _draw(
        self, rng: np.random.Generator, states: SessionStates, bounds: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return items and intents. bounds: float [3, n], cumulative weights of the mixture."""
        # Component of the mixture: 0 sequel, 1 complement, 2 the intent's topic, 3 a topic of the interests.
        component = (rng.random(len(states.price_level)) >= bounds).sum(axis=0)
        interests = _pick_interest(rng, states.interest_weights, states.interests)
        topics = np.where(component == 3, interests, states.intent)
        items = np.empty(len(component), np.int64)
        for index, followers, weight_bounds in (
            (0, self._world.sequels, SEQUEL_BOUNDS),
            (1, self._world.complements, COMPLEMENT_BOUNDS),
        ):
            rows = np.flatnonzero(component == index)
            columns = np.searchsorted(weight_bounds, rng.random(len(rows)), "right")
            items[rows] = followers[states.last_item[rows], columns]
        rows = np.flatnonzero(component >= 2)
        items[rows] = self._draw_from_topic(rng, states.price_level[rows], topics[rows])
        is_new_intent = (component == 1) | (topics < 0)  # a complement and a resumed session bring their own intent
        return items, np.where(is_new_intent, self._world.topic[items], topics)

    def _draw_from_topic(self, rng: np.random.Generator, price_level: np.ndarray, topic: np.ndarray) -> np.ndarray:
        """Return items, int [n], drawn by weight from each row's topic."""
        begin = self._bounds[topic]
        target = self._sums[price_level, begin] + rng.random(len(topic)) * self._topic_weights[price_level, topic]
        positions = np.empty(len(topic), np.int64)  # in self._order
        for level in range(PRICE_LEVELS):
            rows = price_level == level
            positions[rows] = np.searchsorted(self._sums[level], target[rows], "right") - 1
        return self._order[np.clip(positions, begin, self._bounds[topic + 1] - 1)]


@dataclass(slots=True)
class Outcomes:
    """Distribution of what is done with n items.

    actions: float [n, 6] probabilities; engaged, monetized: float [n] probabilities; dwell_log_ms: float [n], mean of
    the logarithm of the dwell time
    """

    actions: np.ndarray
    engaged: np.ndarray
    monetized: np.ndarray
    dwell_log_ms: np.ndarray


def appeal(world: World, states: SessionStates, items: np.ndarray) -> np.ndarray:
    """Return float [n, k], about -2 to 3: the appeal of items, int [n, k], to users in these states."""
    is_interest = states.interests[:, :, None] == world.topic[items][:, None]  # [n, interests, k]
    interest = (states.interest_weights[:, :, None] * is_interest).sum(axis=1)  # 0..1
    price_fit = PRICE_FIT[np.abs(states.price_level[:, None] - world.price_level[items])]
    return -0.9 + 2.0 * interest + 0.8 * world.quality[items] + 0.9 * (price_fit - 0.5)


def choose_from_slates(rng: np.random.Generator, world: World, states: SessionStates, slates: np.ndarray) -> np.ndarray:
    """Return the items that users take from their slates, int [n], -1 from an empty slate.

    slates: int [n, k] items, -1 = none. An item is seen with probability 1 / rank (position bias), and of those seen
    one is taken by exp(appeal).
    """
    position_bias = 1 / np.arange(1, slates.shape[1] + 1)
    weights = position_bias * np.exp(appeal(world, states, slates)) * (slates >= 0)
    bounds = np.cumsum(weights, axis=1)
    columns = (rng.random(len(slates))[:, None] * bounds[:, -1:] >= bounds[:, :-1]).sum(axis=1)
    return slates[np.arange(len(slates)), columns]


def outcomes(world: World, states: SessionStates, items: np.ndarray) -> Outcomes:
    """Return the distribution of what users in these states do with these items, int [n]."""
    item_appeal = appeal(world, states, items[:, None])[:, 0]
    skip = 0.4 * _sigmoid(-2 * item_appeal)
    rest = 1 - skip
    cart = rest * 0.3 * _sigmoid(1.5 * item_appeal - 1.2)
    like = rest * 0.3 * _sigmoid(1.5 * item_appeal - 0.3)
    browse = rest - cart - like
    actions = np.stack([0.6 * browse, 0.4 * browse, like, cart, np.zeros_like(cart), skip], axis=1)
    dwell_log_ms = log(8_000) + 0.6 * item_appeal
    # A logistic approximation of the normal's tail, within 0.01.
    long_dwell = _sigmoid(1.702 * (dwell_log_ms - log(LONG_DWELL_MS)) / DWELL_SIGMA)
    return Outcomes(actions, like + cart + browse * long_dwell, cart, dwell_log_ms)


def _pick_interest(rng: np.random.Generator, weights: np.ndarray, interests: np.ndarray) -> np.ndarray:
    """Return a topic of each row's interests, drawn by weight."""
    columns = (rng.random(len(weights))[:, None] > np.cumsum(weights, axis=1)[:, :-1]).sum(axis=1)
    return interests[np.arange(len(weights)), columns]


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))
