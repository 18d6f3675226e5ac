"""Items by descending popularity, the norms derived from it, and filling short slates with popular items."""

from dataclasses import dataclass, field

import numpy as np

from pipeline.arrays import grown
from pipeline.counters.accumulator import RowTokenPairs

# c(a, b) / (p(a)^0.5 p(b)^0.35): an item exponent of 0 lets popular items crowd out the rest, 0.5 (the cosine) is 0.5
# points of hit rate@10 worse on MovieLens, where popular items are a little likelier than their co-occurrence suggests.
EVENT_EXPONENT = 0.5
ITEM_EXPONENT = 0.35
LEAST_POPULARITY = 1e-30  # for the norms, a hundred half-lives ago: those of smaller ones would not fit a float32
UNRANKED = 1 << 40  # the rank of a blocked token
MAX_GAPS = 1024  # tokens that were blocked since the last update; more of them are removed by an update


@dataclass(slots=True)
class PopularityOrder:
    """All tokens that are not blocked, most popular first, ties by token. [items + 1] arrays are indexed by token.

    A token that is blocked after an update leaves a gap, so that blocking one costs nothing per item.
    """

    max_tokens: int = 1  # the most tokens there will be, for which room is reserved
    age: int = 0  # events counted since the last update
    gaps: dict[int, int] = field(default_factory=dict)  # token to its rank, of those blocked since the last update
    tokens: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))  # [ranked]
    ranks: np.ndarray = field(default_factory=lambda: np.zeros(1, np.int64))  # [items + 1], or UNRANKED
    relative_popularity: np.ndarray = field(default_factory=lambda: np.empty(0, np.float32))  # [ranked], greatest = 1
    event_norms: np.ndarray = field(default_factory=lambda: np.zeros(1, np.float32))  # [items + 1], 0 = never seen
    item_norms: np.ndarray = field(default_factory=lambda: np.zeros(1, np.float32))  # 0 = never seen, or blocked
    _room: dict[str, np.ndarray] = field(default_factory=dict)  # larger arrays, which those above begin

    def refresh(self, popularity: np.ndarray, blocked: np.ndarray) -> None:
        """Update when enough events were counted, else append new items. Both: [items + 1]; token 0 is blocked."""
        # An update costs 0.13 us per item (10 k items, one core of an EPYC): once per items/8 events, 1 us per event.
        if 8 * self.age >= len(self.tokens):
            self._update(popularity, blocked)
        elif len(self.ranks) < len(popularity):
            self._append(np.flatnonzero(~blocked[len(self.ranks) :]) + len(self.ranks), len(popularity))

    def follow(self, tokens: np.ndarray, popularity: np.ndarray, blocked: np.ndarray) -> None:
        """Take these tokens, int64 [n], out of the order or back into it, as they are blocked now or not.

        popularity, blocked: [items + 1]
        """
        tokens = tokens[tokens < len(self.ranks)]
        tokens = tokens[blocked[tokens] != (self.ranks[tokens] == UNRANKED)]
        for token in tokens.tolist():
            if blocked[token]:
                self.gaps[token] = int(self.ranks[token])
                self.ranks[token] = UNRANKED
                self.item_norms[token] = 0
            elif token in self.gaps:
                self.ranks[token] = self.gaps.pop(token)
                if popularity[token] > 0:
                    self.item_norms[token] = max(popularity[token], LEAST_POPULARITY) ** -ITEM_EXPONENT
            else:
                self.age = len(self.tokens)  # blocked at the last update: its rank is not known
        if len(self.gaps) > MAX_GAPS:
            self.age = len(self.tokens)

    def top(self, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the `count` first ranks without gaps: tokens int64 [<= count] and their relative popularity."""
        reach = count + len(self.gaps)
        tokens = self.tokens[:reach]
        is_there = self.ranks[tokens] != UNRANKED
        return tokens[is_there][:count], self.relative(np.flatnonzero(is_there)[:count])

    def relative(self, ranks: np.ndarray) -> np.ndarray:
        """Return the popularity at these ranks relative to the first one that is no gap: float32 [n]."""
        first = 0
        gaps = set(self.gaps.values())
        while first in gaps:
            first += 1
        greatest = self.relative_popularity[first : first + 1].max(initial=0)
        return self.relative_popularity[ranks] / (greatest if greatest > 0 else np.float32(1))

    def _update(self, popularity: np.ndarray, blocked: np.ndarray) -> None:
        order = np.argsort(-popularity, kind="stable")
        tokens = order[~blocked[order]]
        ranks = np.full(len(popularity), UNRANKED)
        ranks[tokens] = np.arange(len(tokens))
        ordered = popularity[tokens]
        seen = np.where(popularity > 0, np.maximum(popularity, LEAST_POPULARITY), np.inf)
        self.tokens = self._stored("tokens", tokens)
        self.ranks = self._stored("ranks", ranks)
        relative = (ordered / max(ordered.max(initial=0), np.finfo(float).tiny)).astype(np.float32)
        self.relative_popularity = self._stored("relative_popularity", relative)
        self.event_norms = self._stored("event_norms", (seen**-EVENT_EXPONENT).astype(np.float32))
        self.item_norms = self._stored("item_norms", np.where(blocked, 0, seen**-ITEM_EXPONENT).astype(np.float32))
        self.gaps = {}
        self.age = 0

    def _append(self, new: np.ndarray, size: int) -> None:
        """Rank new items, tokens int64 [n], last: they have no popularity yet."""
        start = len(self.ranks)
        ranked = len(self.tokens)
        self.ranks = self._stored("ranks", np.full(size - start, UNRANKED), start)
        self.ranks[new] = ranked + np.arange(len(new))
        self.tokens = self._stored("tokens", new, ranked)
        self.relative_popularity = self._stored("relative_popularity", np.zeros(len(new), np.float32), ranked)
        self.event_norms = self._stored("event_norms", np.zeros(size - start, np.float32), start)
        self.item_norms = self._stored("item_norms", np.zeros(size - start, np.float32), start)

    def _stored(self, name: str, values: np.ndarray, start: int = 0) -> np.ndarray:
        """Return the array of this name with these values from `start` to its end, in place where there is room."""
        stop = start + len(values)
        room = grown(self._room.get(name, values[:0]), stop, self.max_tokens)
        room[start:stop] = values
        self._room[name] = room
        return room[:stop]


def fill_rows(order: PopularityOrder, excluded: RowTokenPairs, items: np.ndarray, scores: np.ndarray) -> None:
    """Fill the empty end of each row of items, int32 [n, k], with popular items, in place.

    Excluded (row, token) pairs are skipped. The scores continue below the row's last score (or 1), in proportion to
    the items' popularity.
    """
    k = items.shape[1]
    lengths = (items > 0).sum(axis=1)
    short = np.flatnonzero(lengths < k)  # rows
    if not len(short):
        return
    short_index = np.full(len(items), -1)
    short_index[short] = np.arange(len(short))
    rows, tokens = _unavailable(excluded, items, short_index)
    reach = min(len(order.tokens), k + len(order.gaps) + int(np.bincount(rows, minlength=1).max()))
    available = np.ones((len(short), reach), bool)
    available[:, [rank for rank in order.gaps.values() if rank < reach]] = False
    near = order.ranks[tokens] < reach
    available[rows[near], order.ranks[tokens[near]]] = False
    nth = np.cumsum(available, axis=1) + lengths[short, None]  # [short, reach]: an available item's column, from 1
    row, rank = np.nonzero(available & (nth <= k))
    column = nth[row, rank] - 1
    last_scores = np.where(lengths > 0, scores[np.arange(len(items)), lengths - 1], np.float32(1))
    items[short[row], column] = order.tokens[rank]
    scores[short[row], column] = last_scores[short[row]] * order.relative(rank)


def _unavailable(excluded: RowTokenPairs, items: np.ndarray, short_index: np.ndarray) -> RowTokenPairs:
    """Return (index of the short row, token) of all pairs that may not fill: excluded ones and items in the row."""
    cells = np.nonzero(items)
    rows = np.concatenate([short_index[excluded[0]], short_index[cells[0]]])
    tokens = np.concatenate([excluded[1], items[cells]])
    return rows[rows >= 0], tokens[rows >= 0]
