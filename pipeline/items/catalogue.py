"""What is known of items, as columns over tokens: what features and the content encoder read.

Text is hashed, words and their letter triples, so that no vocabulary of words is needed and new words fall near old
ones (Bojanowski et al., TACL 2017); categories, tags and brand are hashed whole. An item without a record has no words,
price 0, no category and no age: all of that is coded as missing.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from zlib import crc32

import numpy as np

from pipeline.items.vocabulary import Vocabulary
from pipeline.records import Item, encode_value

TEXT, CATEGORY, BRAND, TAGS = FIELDS = ("text", "category", "brand", "tags")
COLUMNS = {"price_codes": np.uint16, "categories": np.int32, "created_ms": np.int64, "changed": np.int64}
NOTHING = tuple(np.empty(0, np.uint32) for _ in FIELDS)
MAX_WORDS = 32  # of a text: its first ones
MAX_IDS = 96  # of a field
_WORD = re.compile(r"\w+")


@dataclass(slots=True)
class ItemFacts:
    """Of n items, 0 = unknown: prices by records.encode_value's codes uint16 [n], a number of the last, most
    specific category int32 [n], when it came int64 [n] ms."""

    price_codes: np.ndarray
    categories: np.ndarray
    created_ms: np.ndarray

    @classmethod
    def unknown(cls, n: int) -> "ItemFacts":
        return cls(*(np.zeros(n, COLUMNS[field.name]) for field in fields(cls)))

    def select(self, index: np.ndarray | slice) -> "ItemFacts":
        """int [m], or a part -> of these."""
        return ItemFacts(*(getattr(self, field.name)[index] for field in fields(self)))


class Catalogue:
    """Columns that grow with the vocabulary. One thread writes and reads.

    version: counts the calls of `put`; changed: int64 [>= tokens], the version at which an item's record came, 0 = none
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.vocabulary = vocabulary
        self.version = 0
        self._words: list[tuple[np.ndarray, ...]] = []  # by token and field: uint32 hashes
        self._columns = {name: np.zeros(0, kind) for name, kind in COLUMNS.items()}

    def upsert(self, items: Iterable[Item]) -> np.ndarray:
        """Take over records, the later of one item counts; new items get tokens. Returns the tokens, int64 [n]."""
        items = list(items)
        tokens = self.vocabulary.admit(item.item_id for item in items)
        self.vocabulary.relist(item.item_id for item in items)
        self._reserve(len(self.vocabulary))
        for token, item in zip(tokens.tolist(), items, strict=True):
            if token:  # a full vocabulary knows no token for it
                self._put(token, item)
        self.version += 1  # at the end: a reader in another thread that has seen it has seen all that it counts
        return np.unique(tokens[tokens > 0]).astype(np.int64)

    def delist(self, item_ids: Iterable[str]) -> None:
        """Nothing is known of these items any more, and they are barred until a record of theirs comes."""
        item_ids = list(item_ids)
        if not item_ids:
            return
        self._clear(np.array([self.vocabulary.token(item_id) for item_id in item_ids], np.int64))
        self.vocabulary.delist(item_ids)

    def evict(self, tokens: np.ndarray) -> None:
        """Give up these tokens, int [n], see Vocabulary."""
        self._clear(tokens)
        self.vocabulary.evict(tokens)

    def facts(self, tokens: np.ndarray) -> ItemFacts:
        """tokens: int [n]; of one that came later than all records nothing is known."""
        return ItemFacts(*(_lookup(self._columns[field.name], tokens) for field in fields(ItemFacts)))

    def state(self, tokens: np.ndarray) -> dict[str, np.ndarray]:
        """What is known of these items as arrays: hashes uint32 [m], offsets int64 [n * FIELDS + 1] of each item's each
        field, and price_codes, categories, created_ms [n]."""
        words = [field for token in tokens.tolist() for field in self.content_hashes(token)]
        return {
            "hashes": np.concatenate([np.empty(0, np.uint32), *words]),
            "offsets": np.concatenate([[0], np.cumsum([len(field) for field in words], dtype=np.int64)]),
            **asdict(self.facts(tokens)),
        }

    def restore_facts(self, tokens: np.ndarray, state: Mapping[str, np.ndarray]) -> None:
        """Take over the facts of these items, int [n], from `state`, in the same order, where no record has come
        meanwhile. Their words are not needed: who kept the state has vectors of them."""
        self._reserve(int(tokens.max(initial=0)) + 1)
        new = self.changed[tokens] == 0
        for field in fields(ItemFacts):
            self._columns[field.name][tokens[new]] = state[field.name][new]

    def restore(self, tokens: np.ndarray, state: Mapping[str, np.ndarray], recorded: np.ndarray) -> None:
        """Take over the facts and the words of these items, int [n], 0 = left out, from `state`, in the same order, as
        if their records had come now. recorded: bool [n], false: it never had one."""
        self._reserve(len(self.vocabulary))
        places = np.flatnonzero(recorded & (tokens > 0))
        words, tokens = np.split(state["hashes"], state["offsets"][1:-1]), tokens[places]
        for place, token in zip(places.tolist(), tokens.tolist(), strict=True):
            self._words[token] = tuple(words[place * len(FIELDS) : (place + 1) * len(FIELDS)])
        for field in fields(ItemFacts):
            self._columns[field.name][tokens] = state[field.name][places]
        self.changed[tokens] = self.version + 1
        self.vocabulary.relist(self.vocabulary.item_ids[token] for token in tokens.tolist())
        self.version += 1

    def has_records(self, tokens: np.ndarray) -> np.ndarray:
        """bool [n]"""
        return _lookup(self.changed, tokens) > 0

    def content_hashes(self, token: int) -> tuple[np.ndarray, ...]:
        """The hashes of each field, uint32 [m] each."""
        return self._words[token] if token < len(self._words) else NOTHING

    @property
    def changed(self) -> np.ndarray:
        return self._columns["changed"]

    def _put(self, token: int, item: Item) -> None:
        self._words[token] = tuple(np.array(sorted(set(ids))[:MAX_IDS], np.uint32) for ids in _hashes(item))
        self._columns["price_codes"][token] = encode_value(item.price)
        self._columns["categories"][token] = 1 + (_hash(CATEGORY, item.category[-1]) >> 2) if item.category else 0
        self._columns["created_ms"][token] = item.created_ms or 0
        self._columns["changed"][token] = self.version + 1

    def _clear(self, tokens: np.ndarray) -> None:
        self._reserve(len(self.vocabulary))
        for token in tokens.tolist():
            self._words[token] = NOTHING
        for column in self._columns.values():
            column[tokens] = 0

    def _reserve(self, tokens: int) -> None:
        self._words += [NOTHING] * (tokens - len(self._words))
        for name, column in self._columns.items():
            if tokens > len(column):
                grown = np.zeros(max(tokens, 2 * len(column)), column.dtype)
                grown[: len(column)] = column
                self._columns[name] = grown


def _lookup(column: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    found = np.zeros(len(tokens), column.dtype)
    inside = tokens < len(column)
    found[inside] = column[tokens[inside]]
    return found


def _hashes(item: Item) -> Iterator[list[int]]:
    """Of each field."""
    text = " ".join(part for part in (item.title, item.text) if part)
    yield [_hash(TEXT, piece) for piece in _text_pieces(text)]
    yield [_hash(CATEGORY, name) for name in item.category]
    yield [_hash(BRAND, item.brand)] if item.brand else []
    yield [_hash(TAGS, name) for name in item.tags]


def _text_pieces(text: str) -> Iterator[str]:
    for word in _WORD.findall(text.lower())[:MAX_WORDS]:
        yield word
        marked = f"<{word}>"
        yield from (marked[at : at + 3] for at in range(len(marked) - 2))


def _hash(field: str, text: str) -> int:
    return crc32(f"{field}:{text}".encode())


EMPTY = Catalogue(Vocabulary())
