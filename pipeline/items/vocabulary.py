"""Item ids, their 64-bit hashes (stored in rings) and their process-local tokens (which index tables).

Token 0 is 'unknown' and padding; tokens are dense and start at 1.

    admit            the item gets a token
    delist, relist   the item may not be recommended, or may be again; its token keeps its meaning
    evict            the token loses its meaning and is free for another item

A token never changes its meaning while other code can hold it. Rings, slates, Redis and artifacts name items by hash or
id, so tokens live only in tables of this process, and only one thread uses those, the pipeline's: between two of its
calls no batch is partly ranked and no event partly counted. State that outlives a call either applies `evicted_since`
before its next use (counters, a model's rows) or is cleared with the token (the catalogue). Code that takes tokens out
of that thread, to merge counters or to validate a model, sets `pinned` meanwhile: then nothing may be evicted.
"""

from collections.abc import Iterable, Sequence

import numpy as np

from pipeline.arrays import grown
from pipeline.items.change_log import ChangeLog
from pipeline.items.hash_index import HashIndex
from pipeline.records import item_hash, uncached_item_hash

UNKNOWN = 0
CACHED_IDS = 1 << 14  # hashes of fewer items at a time go through the cache of `item_hash`
COLUMN_DTYPES = {"admitted_at": np.int64, "last_seen": np.int64, "evicted_at": np.int64, "blocked": bool}


class Vocabulary:
    """Tokens of items. One thread writes; others may look up meanwhile: they see an item or do not see it yet.

    item_ids: by token, "" for a free token; max_items: the most items with tokens at a time
    admitted_count, evicted_count, rejected_count: how often an item got a token, lost it, or found no free one
    version: grows when anything is delisted, relisted or evicted; pinned: another thread holds tokens
    changes: tokens that were given to an item, taken from it, blocked or unblocked
    """

    def __init__(self, item_ids: Iterable[str] = (), max_items: int = 1_000_000) -> None:
        self.max_items = max_items
        self.item_ids: list[str] = [""]
        self.admitted_count = 0
        self.evicted_count = 0
        self.rejected_count = 0
        self.version = 0
        self.pinned = False
        self.changes = ChangeLog()
        self._index = HashIndex(self.max_tokens)
        self._free: list[int] = []
        self._delisted: dict[str, int] = {}  # item id to the version that delisted it, in that order
        self._tick = 0
        self._columns = {name: np.zeros(0, dtype) for name, dtype in COLUMN_DTYPES.items()}
        self._reserve(len(self.item_ids))
        self.blocked[UNKNOWN] = True
        self.admit(item_ids)

    def __len__(self) -> int:
        """Return the number of tokens, including the unknown one: the minimum size of a table indexed by token."""
        return len(self.item_ids)

    @property
    def max_tokens(self) -> int:
        """The largest `len` there will be: tables indexed by token reserve room for it."""
        return self.max_items + 1

    @property
    def free_slots(self) -> int:
        """Number of items that can still be admitted."""
        return self.max_items - self._item_count

    @property
    def overflow_message(self) -> str:
        """Error text for commands that need a token for every item."""
        return (
            f"{self.rejected_count} items have no token: all {self._item_count} are taken; counters.max_items is"
            f" {self.max_items}: set it higher"
        )

    @property
    def hashes(self) -> np.ndarray:
        """Each token's item hash, 0 for a free token: uint64 [>= tokens]."""
        return self._index.hashes

    @property
    def blocked(self) -> np.ndarray:
        """Which tokens must not be recommended, those of delisted items and free ones: bool [>= tokens]."""
        return self._columns["blocked"]

    @property
    def admitted_at(self) -> np.ndarray:
        """Number of the admission that gave the token its item, 0 = none: int64 [>= tokens]."""
        return self._columns["admitted_at"]

    @property
    def last_seen(self) -> np.ndarray:
        """Number of the latest `touch` of the token, 0 = none: int64 [>= tokens]."""
        return self._columns["last_seen"]

    def admit(self, item_ids: Iterable[str]) -> np.ndarray:
        """Return each item's token, a new one for a new item, UNKNOWN when there is no free slot: int32 [n]."""
        item_ids = list(item_ids)
        hashes = _hashes(item_ids)
        tokens = self._tokens(item_ids, hashes)
        admitted: dict[str, int] = {}
        for i in np.flatnonzero(tokens == UNKNOWN).tolist():
            item_id = item_ids[i]
            admitted[item_id] = admitted.get(item_id) or self._admit(item_id, int(hashes[i]))
            tokens[i] = admitted[item_id]
        return tokens

    def token(self, item_id: str) -> int:
        """Return the item's token, UNKNOWN for an item outside the vocabulary; `tokens_of_ids` is faster for many."""
        for token in self._index.tokens_of_one(item_hash(item_id)):
            if self.item_ids[token] == item_id:
                return token
        return UNKNOWN

    def tokens_of_ids(self, item_ids: Sequence[str]) -> np.ndarray:
        """Return the tokens of items, UNKNOWN for items outside the vocabulary: int32 [n]."""
        return self._tokens(item_ids, _hashes(item_ids))

    def unknown(self, item_ids: Sequence[str]) -> list[str]:
        """Return those of these items that are outside the vocabulary."""
        tokens = self.tokens_of_ids(item_ids).tolist()
        return [item_id for item_id, token in zip(item_ids, tokens, strict=True) if token == UNKNOWN]

    def tokens(self, hashes: np.ndarray) -> np.ndarray:
        """Return the tokens of item hashes (uint64 [n]), UNKNOWN for items outside the vocabulary: int32 [n]."""
        return self._index.tokens(hashes)

    def touch(self, tokens: np.ndarray) -> None:
        """Mark these items, int [n], as just seen in an event or a record."""
        self._tick += 1
        self.last_seen[tokens] = self._tick

    def delist(self, item_ids: Iterable[str]) -> None:
        """Block these items, whether they have tokens now or later. The latest `max_items` are remembered."""
        for item_id in item_ids:
            self._delisted.pop(item_id, None)
            self._delisted[item_id] = self.version + 1
            token = self.token(item_id)
            self.blocked[token] = True
            self.changes.add([token])
        while len(self._delisted) > self.max_items:
            del self._delisted[next(iter(self._delisted))]
        self.version += 1  # last: a reader that sees the new version sees all of its changes

    def relist(self, item_ids: Sequence[str], tokens: np.ndarray) -> None:
        """Unblock those of these items that are delisted, also if that is no longer remembered.

        tokens: the items', int [n], UNKNOWN for items outside the vocabulary
        """
        was_remembered = np.array([self._delisted.pop(item_id, None) is not None for item_id in item_ids], bool)
        blocked = tokens[(tokens != UNKNOWN) & self.blocked[tokens]]
        if blocked.size or was_remembered.any():
            self.blocked[blocked] = False
            self.changes.add(blocked.tolist())
            self.version += 1

    def delisted_since(self, version: int) -> list[str]:
        """Return the items that were delisted after that version and still are."""
        return [item_id for item_id, delisted_at in self._delisted.items() if delisted_at > version]

    def evict(self, tokens: np.ndarray) -> None:
        """Free these tokens, int [n], each of an item. No other thread may hold them."""
        assert not self.pinned, "another thread holds tokens"
        self.version += 1
        self.evicted_count += len(tokens)
        self._index.remove(tokens)
        for token in tokens.tolist():
            self.item_ids[token] = ""
        self._free += tokens.tolist()
        evicted = {"admitted_at": 0, "last_seen": 0, "evicted_at": self.version, "blocked": True}
        for name, value in evicted.items():
            self._columns[name][tokens] = value
        self.changes.add(tokens.tolist())

    def evicted_since(self, version: int) -> np.ndarray:
        """Return the tokens that lost their item after that version, some of which may have a new one: int64."""
        return np.flatnonzero(self._columns["evicted_at"][: len(self)] > version)

    @property
    def _item_count(self) -> int:
        return len(self.item_ids) - 1 - len(self._free)

    def _tokens(self, item_ids: Sequence[str], hashes: np.ndarray) -> np.ndarray:
        """Return the tokens, int32 [n], of items with these hashes, uint64 [n]."""
        tokens = self._index.tokens(hashes)
        for i, (token, item_id) in enumerate(zip(tokens.tolist(), item_ids, strict=True)):
            if token and self.item_ids[token] != item_id:  # another item with the same hash
                tokens[i] = self.token(item_id)
        return tokens

    def _admit(self, item_id: str, key: int) -> int:
        """Give a new item, whose hash is `key`, a token."""
        if self.free_slots <= 0:
            self.rejected_count += 1
            return UNKNOWN
        token = self._free.pop() if self._free else self._new_token()
        self.item_ids[token] = item_id
        self.admitted_count += 1
        self.admitted_at[token] = self.admitted_count
        self.blocked[token] = item_id in self._delisted
        self._index.insert(key, token)  # last: a reader that finds the token sees all of this
        self.changes.add([token])
        return token

    def _new_token(self) -> int:
        token = len(self.item_ids)
        self._reserve(token + 1)
        self.item_ids.append("")
        return token

    def _reserve(self, tokens: int) -> None:
        if tokens > min(map(len, self._columns.values())):
            self._columns = {name: grown(column, tokens, self.max_tokens) for name, column in self._columns.items()}


def _hashes(item_ids: Sequence[str]) -> np.ndarray:
    """Return the items' hashes: uint64 [n]."""
    function = item_hash if len(item_ids) < CACHED_IDS else uncached_item_hash
    return np.fromiter(map(function, item_ids), np.uint64, len(item_ids))
