"""Item ids, their 64-bit hashes (what rings hold) and their process-local tokens (what tables are indexed by).

Token 0 is 'unknown' and padding; tokens are dense and start at 1.

    admit                an item gets a token
    withdraw, restore    it is recommended no more, or again; its token means it all the while
    retire               its token means nothing any more and waits for another item

A token never changes its meaning while anybody can hold it. Rings, slates, Redis and artifacts name items by hash or
id, so a token lives only in tables of this process, and those are used in one thread, the pipeline's: between two of
its calls no batch is half ranked and no event half counted. What is kept from call to call follows `retired_since`
before it is used again (counters, a model's rows) or is cleared with the token (the catalogue). Whoever takes tokens
out of that thread, to merge counters or to judge a model, holds them meanwhile: nothing may be retired then.
"""

from collections.abc import Iterable

import numpy as np

from pipeline.items.hash_index import HashIndex
from pipeline.records import item_hash

UNKNOWN = 0
COLUMNS = {"hash": np.uint64, "born": np.int64, "seen": np.int64, "retired": np.int64, "barred": bool}


class Vocabulary:
    """One thread admits, withdraws and retires; others may look up meanwhile: they see an item or do not see it yet.

    item_ids: by token, "" where one means nothing; max_items: how many items may have tokens at a time
    admitted, retired, refused: how often an item got a token, lost it, or found no room
    version: grows when anything is withdrawn, restored or retired; held: somebody has tokens outside of that thread
    """

    def __init__(self, item_ids: Iterable[str] = (), max_items: int = 1_000_000) -> None:
        self.max_items = max_items
        self.item_ids: list[str] = [""]
        self.admitted_count = self.evicted_count = self.rejected_count = self.version = 0
        self.pinned = False
        self._tokens: dict[str, int] = {}
        self._index = HashIndex()
        self._free: list[int] = []
        self._delisted: dict[str, int] = {}  # and at which version, in this order
        self._tick = 0
        self._columns = {name: np.zeros(1024, kind) for name, kind in COLUMNS.items()}
        self.blocked[UNKNOWN] = True
        self.admit(item_ids)

    def __len__(self) -> int:
        """Number of tokens, the unknown one included: the first size a table over tokens needs."""
        return len(self.item_ids)

    @property
    def free_slots(self) -> int:
        """For so many items more."""
        return self.max_items - len(self._tokens)

    @property
    def overflow_message(self) -> str:
        """A sentence for whom some items' being unknown is an error."""
        return (
            f"{self.rejected_count} items have no place beside {len(self._tokens)} others; counters.max_items is"
            f" {self.max_items}: set it higher"
        )

    @property
    def hashes(self) -> np.ndarray:
        """uint64 [>= tokens]: of each token's item, 0 where it means nothing."""
        return self._columns["hash"]

    @property
    def blocked(self) -> np.ndarray:
        """bool [>= tokens]: tokens that must not be recommended: withdrawn items, and those that mean nothing."""
        return self._columns["barred"]

    @property
    def admitted_at(self) -> np.ndarray:
        """int64 [>= tokens]: which admission gave the token its meaning; 0 = none."""
        return self._columns["born"]

    @property
    def last_seen(self) -> np.ndarray:
        """int64 [>= tokens]: the turn of the latest `touch`; 0 = none."""
        return self._columns["seen"]

    def admit(self, item_ids: Iterable[str]) -> np.ndarray:
        """int32 [n]: each item's token, a new one for a new item; UNKNOWN where there is no room."""
        return np.array([self._tokens.get(item_id) or self._admit(item_id) for item_id in item_ids], np.int32)

    def token(self, item_id: str) -> int:
        return self._tokens.get(item_id, UNKNOWN)

    def tokens(self, hashes: np.ndarray) -> np.ndarray:
        """uint64 [n] item hashes -> int32 [n] tokens, UNKNOWN where there is none."""
        return self._index.tokens(hashes)

    def touch(self, tokens: np.ndarray) -> None:
        """These items, int [n], were just seen in an event or a record."""
        self._tick += 1
        self.last_seen[tokens] = self._tick

    def delist(self, item_ids: Iterable[str]) -> None:
        """Bar these items, whether they have tokens or get them later. At most `max_items` are remembered."""
        for item_id in item_ids:
            self._delisted.pop(item_id, None)
            self._delisted[item_id] = self.version + 1
            self.blocked[self.token(item_id)] = True
        while len(self._delisted) > self.max_items:
            del self._delisted[next(iter(self._delisted))]
        self.version += 1  # at the end: who has seen it has seen all that it counts

    def relist(self, item_ids: Iterable[str]) -> None:
        """Those that were withdrawn may be recommended again."""
        back = [item_id for item_id in item_ids if self._delisted.pop(item_id, None)]
        if back:
            self.blocked[[token for token in map(self.token, back) if token]] = False
            self.version += 1

    def delisted_since(self, version: int) -> list[str]:
        """The items that have been withdrawn since then and still are."""
        return [item_id for item_id, at in self._delisted.items() if at > version]

    def evict(self, tokens: np.ndarray) -> None:
        """Give up these tokens, int [n], each of an item. Nobody holds them outside of the calling thread."""
        assert not self.pinned, "somebody else has tokens"
        self.version += 1
        self.evicted_count += len(tokens)
        for token in tokens.tolist():
            del self._tokens[self.item_ids[token]]
            self.item_ids[token] = ""
        self._free += tokens.tolist()
        self._index.remove(tokens)
        for name, value in {"hash": 0, "born": 0, "seen": 0, "retired": self.version, "barred": True}.items():
            self._columns[name][tokens] = value

    def evicted_since(self, version: int) -> np.ndarray:
        """int64: the tokens that have lost their item since then; they may mean another one by now."""
        return np.flatnonzero(self._columns["retired"][: len(self)] > version)

    def _admit(self, item_id: str) -> int:
        if self.free_slots <= 0:
            self.rejected_count += 1
            return UNKNOWN
        token = self._free.pop() if self._free else self._new_token()
        self.item_ids[token] = item_id
        self.admitted_count += 1
        self.hashes[token], self.admitted_at[token] = key, _ = item_hash(item_id), self.admitted_count
        self.blocked[token] = item_id in self._delisted
        self._tokens[item_id] = token
        self._index.insert(key, token)
        return token

    def _new_token(self) -> int:
        token = len(self.item_ids)
        if token == len(self.hashes):
            self._columns = {name: np.append(column, np.zeros_like(column)) for name, column in self._columns.items()}
        self.item_ids.append("")
        return token
