"""What is known of items, as columns over tokens: what features and the content encoder read.

Text is hashed, words and their letter triples, so that no vocabulary of words is needed and new words fall near old
ones (Bojanowski et al., TACL 2017); categories, tags and brand are hashed whole. An item without a record has no words,
price 0, no category and no age: all of that is coded as missing.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from zlib import crc32

import numpy as np

from pipeline.records import Item, encode_value
from pipeline.vocabulary import Vocabulary

TEXT, CATEGORY, BRAND, TAGS = FIELDS = ("text", "category", "brand", "tags")
NOTHING = tuple(np.empty(0, np.uint32) for _ in FIELDS)
MAX_WORDS = 32  # of a text: its first ones
MAX_IDS = 96  # of a field
_WORD = re.compile(r"\w+")


class Catalogue:
    """Columns that grow with the vocabulary. One thread writes and reads; `version` counts the changes."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.vocabulary = vocabulary
        self.version = 0
        self.words: list[tuple[np.ndarray, ...]] = []  # by token and field: uint32 hashes
        self._prices = np.zeros(0, np.uint16)
        self._categories = np.zeros(0, np.int32)
        self._created_ms = np.zeros(0, np.int64)

    def put(self, items: Iterable[Item]) -> np.ndarray:
        """Take over records, the later of one item counts; new items get tokens. Returns the tokens, int64 [n]."""
        items = list(items)
        self.vocabulary.admit(item.item_id for item in items)
        self._reserve(len(self.vocabulary))
        tokens = [self.vocabulary.token(item.item_id) for item in items]
        for token, item in zip(tokens, items, strict=True):
            if token:  # a full vocabulary knows no token for it
                self._put(token, item)
        self.version += 1
        return np.unique(np.array([token for token in tokens if token], np.int64))

    def price_codes(self, tokens: np.ndarray) -> np.ndarray:
        """uint16 [n], records.encode_value's codes, 0 = unknown. tokens: int [n]."""
        return _taken(self._prices, tokens)

    def categories(self, tokens: np.ndarray) -> np.ndarray:
        """int32 [n]: a number of the item's first category, 0 = unknown."""
        return _taken(self._categories, tokens)

    def created_ms(self, tokens: np.ndarray) -> np.ndarray:
        """int64 [n], 0 = unknown."""
        return _taken(self._created_ms, tokens)

    def state(self, item_ids: Iterable[str]) -> dict[str, np.ndarray]:
        """What is known of these items as arrays: hashes uint32 [m], offsets int64 [n * FIELDS + 1] of each item's each
        field, and price_codes, categories, created_ms [n]."""
        tokens = np.array([self.vocabulary.token(item_id) for item_id in item_ids], np.int64)
        words = [field for token in tokens for field in self.words_of(token)]
        lengths = [len(field) for field in words]
        return {
            "hashes": np.concatenate([np.empty(0, np.uint32), *words]),
            "offsets": np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]),
            "price_codes": self.price_codes(tokens),
            "categories": self.categories(tokens),
            "created_ms": self.created_ms(tokens),
        }

    def restore(self, item_ids: Iterable[str], state: Mapping[str, np.ndarray]) -> None:
        """Take over what `state` said of these items, in the same order; they must be in the vocabulary."""
        tokens = np.array([self.vocabulary.token(item_id) for item_id in item_ids], np.int64)
        self._reserve(len(self.vocabulary))
        words = np.split(state["hashes"], state["offsets"][1:-1])
        for number, token in enumerate(tokens.tolist()):
            self.words[token] = tuple(words[number * len(FIELDS) : (number + 1) * len(FIELDS)])
        self._prices[tokens], self._categories[tokens] = state["price_codes"], state["categories"]
        self._created_ms[tokens] = state["created_ms"]
        self.version += 1

    def words_of(self, token: int) -> tuple[np.ndarray, ...]:
        """The hashes of each field, uint32 [m] each."""
        return self.words[token] if token < len(self.words) else NOTHING

    def _put(self, token: int, item: Item) -> None:
        self.words[token] = tuple(np.array(sorted(set(ids))[:MAX_IDS], np.uint32) for ids in _hashes(item))
        self._prices[token] = encode_value(item.price)
        self._categories[token] = 1 + (_hash(CATEGORY, item.category[0]) >> 2) if item.category else 0
        self._created_ms[token] = item.created_ms or 0

    def _reserve(self, tokens: int) -> None:
        self.words += [NOTHING] * (tokens - len(self.words))
        for name in ("_prices", "_categories", "_created_ms"):
            column = getattr(self, name)
            if tokens > len(column):
                grown = np.zeros(max(tokens, 2 * len(column)), column.dtype)
                grown[: len(column)] = column
                setattr(self, name, grown)


def _taken(column: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    found = np.zeros(len(tokens), column.dtype)
    inside = tokens < len(column)
    found[inside] = column[tokens[inside]]
    return found


def _hashes(item: Item) -> Iterator[list[int]]:
    """Of each field."""
    text = " ".join(part for part in (item.title, item.text) if part)
    yield [_hash(TEXT, piece) for piece in _pieces(text)]
    yield [_hash(CATEGORY, name) for name in item.category]
    yield [_hash(BRAND, item.brand)] if item.brand else []
    yield [_hash(TAGS, name) for name in item.tags]


def _pieces(text: str) -> Iterator[str]:
    for word in _WORD.findall(text.lower())[:MAX_WORDS]:
        yield word
        marked = f"<{word}>"
        yield from (marked[at : at + 3] for at in range(len(marked) - 2))


def _hash(field: str, text: str) -> int:
    return crc32(f"{field}:{text}".encode())


EMPTY = Catalogue(Vocabulary())
