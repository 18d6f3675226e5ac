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

from collections.abc import Iterable

import numpy as np

from pipeline.arrays import grown
from pipeline.items.change_log import ChangeLog
from pipeline.items.hash_index import HashIndex
from pipeline.records import item_hash

UNKNOWN = 0
COLUMN_DTYPES = {
    "hash": np.uint64,
    "admitted_at": np.int64,
    "last_seen": np.int64,
    "evicted_at": np.int64,
    "blocked": bool,
}


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
        self._tokens: dict[str, int] = {}
        self._index = HashIndex()
        self._free: list[int] = []
        self._delisted: dict[str, int] = {}  # item id to the version that delisted it, in that order
        self._tick = 0
        self._columns = {name: np.zeros(1024, dtype) for name, dtype in COLUMN_DTYPES.items()}
        self.blocked[UNKNOWN] = True
        self.admit(item_ids)

    def __len__(self) -> int:
        """Return the number of tokens, including the unknown one: the minimum size of a table indexed by token."""
        return len(self.item_ids)

    @property
    def free_slots(self) -> int:
        """Number of items that can still be admitted."""
        return self.max_items - len(self._tokens)

    @property
    def overflow_message(self) -> str:
        """Error text for commands that need a token for every item."""
        return (
            f"{self.rejected_count} items have no token: all {len(self._tokens)} are taken; counters.max_items is"
            f" {self.max_items}: set it higher"
        )

    @property
    def hashes(self) -> np.ndarray:
        """Each token's item hash, 0 for a free token: uint64 [>= tokens]."""
        return self._columns["hash"]

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
        return np.array([self._tokens.get(item_id) or self._admit(item_id) for item_id in item_ids], np.int32)

    def token(self, item_id: str) -> int:
        return self._tokens.get(item_id, UNKNOWN)

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

    def relist(self, item_ids: Iterable[str]) -> None:
        """Unblock those of these items that are delisted."""
        relisted = [item_id for item_id in item_ids if self._delisted.pop(item_id, None)]
        if relisted:
            tokens = [token for token in map(self.token, relisted) if token]
            self.blocked[tokens] = False
            self.changes.add(tokens)
            self.version += 1

    def delisted_since(self, version: int) -> list[str]:
        """Return the items that were delisted after that version and still are."""
        return [item_id for item_id, delisted_at in self._delisted.items() if delisted_at > version]

    def evict(self, tokens: np.ndarray) -> None:
        """Free these tokens, int [n], each of an item. No other thread may hold them."""
        assert not self.pinned, "another thread holds tokens"
        self.version += 1
        self.evicted_count += len(tokens)
        for token in tokens.tolist():
            del self._tokens[self.item_ids[token]]
            self.item_ids[token] = ""
        self._free += tokens.tolist()
        self._index.remove(tokens)
        evicted = {"hash": 0, "admitted_at": 0, "last_seen": 0, "evicted_at": self.version, "blocked": True}
        for name, value in evicted.items():
            self._columns[name][tokens] = value
        self.changes.add(tokens.tolist())

    def evicted_since(self, version: int) -> np.ndarray:
        """Return the tokens that lost their item after that version, some of which may have a new one: int64."""
        return np.flatnonzero(self._columns["evicted_at"][: len(self)] > version)

    def _admit(self, item_id: str) -> int:
        if self.free_slots <= 0:
            self.rejected_count += 1
            return UNKNOWN
        token = self._free.pop() if self._free else self._new_token()
        key = item_hash(item_id)
        self.item_ids[token] = item_id
        self.admitted_count += 1
        self.hashes[token] = key
        self.admitted_at[token] = self.admitted_count
        self.blocked[token] = item_id in self._delisted
        self._tokens[item_id] = token
        self._index.insert(key, token)
        self.changes.add([token])
        return token

    def _new_token(self) -> int:
        token = len(self.item_ids)
        if token == len(self.hashes):
            self._columns = {name: grown(column, token + 1) for name, column in self._columns.items()}
        self.item_ids.append("")
        return token
