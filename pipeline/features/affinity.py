"""How an item lies to what its user did lately: what the heads read beside vectors, of every (event, item) asked.

Counts and means over the user's newest events up to the one that asks, by the item's most specific category and its
price. A softmax over the newest events cannot count, and a state counts only roughly. On the simulated log of
tests/benchmarks/heads.py (43 k events, 8 epochs, two cores) the engagement head came within 0.035 of the truth's AUC
with these columns, within 0.051 without. The same code in training and serving.
"""

from dataclasses import dataclass

import numpy as np

from pipeline.features.event_features import COUNT_CAP
from pipeline.items.catalogue import ItemFacts
from pipeline.jagged import row_of
from pipeline.records import VALUE_STEPS, Histories

WINDOWS = (32, COUNT_CAP)  # newest events counted; a ring shows as many, see HstuConfig.reach_events
# Shares of the windows in the item's category, the root of the longer one, its share that was engaged with; the newest
# event is of the category; 1 / root of the events; the newest event is of this very item; above and below the usual
# price, and that it is not known.
N_AFFINITY_FEATURES = len(WINDOWS) + 8
SAME_ITEM = len(WINDOWS) + 4


@dataclass(slots=True)
class AffinityIndex:
    """What was done in which category, made ready to be asked.

    items: int [total], the events' tokens; categories: int32 [total]
    names: int32 [c], ascending: the categories that occur; keys: int64 [total], ascending: (user, category, place)
    engaged: int64 [total + 1], running sum in the keys' order; prices, priced: the same of price codes and of their
    number, in the histories' order. Sums of whole numbers are exact, whatever came before a window
    """

    offsets: np.ndarray
    items: np.ndarray
    categories: np.ndarray
    names: np.ndarray
    keys: np.ndarray
    engaged: np.ndarray
    prices: np.ndarray
    priced: np.ndarray

    @classmethod
    def from_histories(
        cls, histories: Histories, items: np.ndarray, facts: ItemFacts, engaged: np.ndarray
    ) -> "AffinityIndex":
        """facts: of the events' items; engaged: bool [total], see labels.engaged."""
        names, users = np.unique(facts.categories), 0
        keys, liked = np.empty(len(items), np.int64), np.empty(len(items), bool)
        for place, part in histories.chunks():
            ranks = np.searchsorted(names, facts.categories[place])
            own = _keys(users + part.users, ranks, np.arange(place.start, place.stop), (len(names), len(items)))
            order = np.argsort(own)
            keys[place], liked[place] = own[order], engaged[place][order]
            users += len(part)
        sums = _running(liked), _running(facts.price_codes), _running(facts.price_codes > 0)
        return cls(histories.offsets, items, facts.categories, names, keys, *sums)

    def at(self, ends: np.ndarray, items: np.ndarray, facts: ItemFacts) -> np.ndarray:
        """float32 [q, AFFINITIES] of these items after these events, int [q]: places in the histories. facts: theirs"""
        users = row_of(self.offsets, ends)
        begins = [np.maximum(self.offsets[users], ends - events + 1) for events in WINDOWS]
        columns = [
            *self._of_category(users, begins, ends, facts.categories),
            (items > 0) & (self.items[ends] == items),
            *self._of_price(begins[-1], ends, facts.price_codes),
        ]
        return np.stack(columns, axis=1).astype(np.float32)

    def latest(self, items: np.ndarray, facts: ItemFacts) -> np.ndarray:
        """float32 [users, k, AFFINITIES] of each user's items [users, k] after their newest event, zeros where there is
        none. facts: of the items, in one row"""
        columns = np.zeros((*items.shape, N_AFFINITY_FEATURES), np.float32)
        present = np.diff(self.offsets) > 0
        ends = np.repeat(self.offsets[1:][present] - 1, items.shape[1])
        asked = np.flatnonzero(np.repeat(present, items.shape[1]))
        columns[present] = self.at(ends, items[present].ravel(), facts.select(asked)).reshape(-1, *columns.shape[1:])
        return columns

    def _of_category(
        self, users: np.ndarray, begins: list[np.ndarray], ends: np.ndarray, categories: np.ndarray
    ) -> list[np.ndarray]:
        known, lengths = categories > 0, [ends - each + 1 for each in begins]
        among = [self._among(users, each, ends, categories) for each in begins]
        counts = [(last - first) * known for first, last in among]
        shares = [some / (each + 1) for some, each in zip(counts, lengths, strict=True)]
        first, last = among[-1]
        liked = ((self.engaged[last] - self.engaged[first]) * known + 0.5) / (counts[-1] + 2)
        same = known & (self.categories[ends] == categories)
        return [*shares, np.sqrt(shares[-1]), liked, same, 1 / np.sqrt(lengths[-1] + 1)]

    def _of_price(self, begins: np.ndarray, ends: np.ndarray, codes: np.ndarray) -> list[np.ndarray]:
        """By how much log(1 + price) is above or below the mean of the window's."""
        priced = self.priced[ends + 1] - self.priced[begins]
        usual = (self.prices[ends + 1] - self.prices[begins]) / np.maximum(priced, 1)
        told = (priced > 0) & (codes > 0)
        above = np.where(told, codes - usual, 0) / VALUE_STEPS
        return [np.maximum(above, 0), np.maximum(-above, 0), ~told]

    def _among(
        self, users: np.ndarray, begins: np.ndarray, ends: np.ndarray, categories: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Where the users' events of these categories from `begins` to `ends` lie among the keys: int64 [q] each."""
        ranks = np.minimum(np.searchsorted(self.names, categories), len(self.names) - 1)
        met, sizes = self.names[ranks] == categories, (len(self.names), len(self.items))
        first = np.searchsorted(self.keys, _keys(users, ranks, begins, sizes))
        last = np.searchsorted(self.keys, _keys(users, ranks, ends, sizes), side="right")
        return first * met, last * met


def _keys(users: np.ndarray, ranks: np.ndarray, places: np.ndarray, sizes: tuple[int, int]) -> np.ndarray:
    """sizes: number of categories and of places"""
    return (users * sizes[0] + ranks) * sizes[1] + places


def _running(column: np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(column, dtype=np.int64)])
