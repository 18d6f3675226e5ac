"""Item metadata as columns by token, read by the features and the content encoder.

Text is hashed as words and their character trigrams, so that no word vocabulary is needed and new words are close to
similar ones (Bojanowski et al., TACL 2017); categories, tags and brand are each hashed as one string. An item without a
record has no words, price 0, no category and no age: all of that is coded as missing.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import pairwise
from zlib import crc32

import numpy as np

from pipeline.arrays import grown
from pipeline.items.change_log import ChangeLog
from pipeline.items.vocabulary import Vocabulary
from pipeline.records import Item, encode_value

FIELDS = ("text", "category", "brand", "tags")
TEXT, CATEGORY, BRAND, TAGS = FIELDS
COLUMN_DTYPES = {"price_codes": np.uint16, "categories": np.int32, "created_ms": np.int64, "changed_at": np.int64}
NO_HASHES = bytes(len(FIELDS))
MAX_WORDS = 32  # per text; later words are ignored
MAX_HASHES = 96  # per field; their number is kept in a byte
_WORD = re.compile(r"\w+")


@dataclass(slots=True)
class ItemFacts:
    """Facts of n items, 0 = unknown.

    price_codes: uint16 [n], by records.encode_value; categories: int32 [n], a hash of the last, most specific category;
    created_ms: int64 [n]
    """

    price_codes: np.ndarray
    categories: np.ndarray
    created_ms: np.ndarray

    @classmethod
    def unknown(cls, n: int) -> "ItemFacts":
        return cls(*(np.zeros(n, COLUMN_DTYPES[field.name]) for field in fields(cls)))

    def select(self, index: np.ndarray | slice) -> "ItemFacts":
        """Return the facts at these positions, int [m] or a slice."""
        return ItemFacts(*(getattr(self, field.name)[index] for field in fields(self)))


class Catalogue:
    """Columns that grow with the vocabulary. One thread writes and reads.

    version: number of updates so far; changed_at: int64 [>= tokens], the version that wrote the item's record, 0 = none
    changes: tokens whose item's metadata were written or cleared
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.vocabulary = vocabulary
        self.version = 0
        self.changes = ChangeLog()
        # By token: one byte per field, its number of hashes, then the uint32 hashes of all fields. A record of 44
        # hashes takes 260 bytes in all; with an array per field it took 900 (`tests.benchmarks.items`).
        self._hashes: list[bytes] = []
        self._columns = {name: np.zeros(0, dtype) for name, dtype in COLUMN_DTYPES.items()}

    def upsert(self, items: Iterable[Item]) -> np.ndarray:
        """Store the records, the last one of each item; new items get tokens. Returns the distinct tokens, int64."""
        items = list(items)
        item_ids = [item.item_id for item in items]
        tokens = self.vocabulary.admit(item_ids)
        self.vocabulary.relist(item_ids, tokens)
        self._reserve(len(self.vocabulary))
        for token, item in zip(tokens.tolist(), items, strict=True):
            if token:  # a full vocabulary has none for a new item
                self._write(token, item)
        self.version += 1
        written = np.unique(tokens[tokens > 0]).astype(np.int64)
        self.changes.add(written.tolist())  # last: a reader in another thread that sees a change sees its record
        return written

    def delist(self, item_ids: Iterable[str]) -> None:
        """Clear these items' metadata and block them until they get a new record."""
        item_ids = list(item_ids)
        if not item_ids:
            return
        self._clear(self.vocabulary.tokens_of_ids(item_ids))
        self.vocabulary.delist(item_ids)

    def evict(self, tokens: np.ndarray) -> None:
        """Clear these tokens, int [n], and free them; see Vocabulary.evict."""
        self._clear(tokens)
        self.vocabulary.evict(tokens)

    def facts(self, tokens: np.ndarray) -> ItemFacts:
        """Return the facts of tokens, int [n]; unknown for a token admitted after the last update."""
        return ItemFacts(*(_lookup(self._columns[field.name], tokens) for field in fields(ItemFacts)))

    def state(self, tokens: np.ndarray) -> dict[str, np.ndarray]:
        """Return the metadata of these items as arrays.

        hashes: uint32 [m]; offsets: int64 [n * len(FIELDS) + 1], per item and field; price_codes, categories,
        created_ms: [n].
        """
        hashes, offsets = _joined_hashes([self._packed_hashes(token) for token in tokens.tolist()])
        return {"hashes": hashes, "offsets": offsets, **asdict(self.facts(tokens))}

    def restore_facts(self, tokens: np.ndarray, state: Mapping[str, np.ndarray]) -> None:
        """Restore the facts of these items, int [n], from `state` in the same order, unless they have a record.

        Their content hashes are not needed: the artifact that kept the state has vectors made from them. `changes` gets
        nothing: it is the artifact's own table that needs the facts, and a table of another one keeps those it has.
        """
        self._reserve(int(tokens.max(initial=0)) + 1)
        missing = self.changed_at[tokens] == 0
        restored = tokens[missing]
        for field in fields(ItemFacts):
            self._columns[field.name][restored] = state[field.name][missing]

    def restore(self, tokens: np.ndarray, state: Mapping[str, np.ndarray], recorded: np.ndarray) -> None:
        """Restore facts and content hashes from `state`, as if the items' records had just arrived.

        tokens: int [n], in the state's order, 0 = skip; recorded: bool [n], whether the item had a record.
        """
        self._reserve(len(self.vocabulary))
        index = np.flatnonzero(recorded & (tokens > 0))
        tokens = tokens[index]
        packed = _split_hashes(state["hashes"], state["offsets"])
        for i, token in zip(index.tolist(), tokens.tolist(), strict=True):
            self._hashes[token] = packed[i]
        for field in fields(ItemFacts):
            self._columns[field.name][tokens] = state[field.name][index]
        self.changed_at[tokens] = self.version + 1
        self.vocabulary.relist([self.vocabulary.item_ids[token] for token in tokens.tolist()], tokens)
        self.version += 1
        self.changes.add(tokens.tolist())

    def has_records(self, tokens: np.ndarray) -> np.ndarray:
        """Return which of these tokens have a record: bool [n]."""
        return _lookup(self.changed_at, tokens) > 0

    def content_hashes(self, token: int) -> tuple[np.ndarray, ...]:
        """Return the hashes of each field, uint32 [m] each."""
        hashes, offsets = _joined_hashes([self._packed_hashes(token)])
        return tuple(np.split(hashes, offsets[1:-1]))

    @property
    def changed_at(self) -> np.ndarray:
        return self._columns["changed_at"]

    def _write(self, token: int, item: Item) -> None:
        self._hashes[token] = _packed([sorted(set(hashes))[:MAX_HASHES] for hashes in _field_hashes(item)])
        self._columns["price_codes"][token] = encode_value(item.price)
        self._columns["categories"][token] = 1 + (_hash(CATEGORY, item.category[-1]) >> 2) if item.category else 0
        self._columns["created_ms"][token] = item.created_ms or 0
        self._columns["changed_at"][token] = self.version + 1

    def _clear(self, tokens: np.ndarray) -> None:
        self._reserve(len(self.vocabulary))
        for token in tokens.tolist():
            self._hashes[token] = NO_HASHES
        for column in self._columns.values():
            column[tokens] = 0
        self.changes.add(tokens.tolist())

    def _reserve(self, tokens: int) -> None:
        self._hashes += [NO_HASHES] * (tokens - len(self._hashes))
        for name, column in self._columns.items():
            self._columns[name] = grown(column, tokens, self.vocabulary.max_tokens)

    def _packed_hashes(self, token: int) -> bytes:
        return self._hashes[token] if token < len(self._hashes) else NO_HASHES


def _lookup(column: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    values = np.zeros(len(tokens), column.dtype)
    inside = tokens < len(column)
    values[inside] = column[tokens[inside]]
    return values


def _packed(fields: Sequence[Sequence[int]]) -> bytes:
    """Return an item's hashes as Catalogue keeps them."""
    return bytes(map(len, fields)) + np.array([hash_ for field in fields for hash_ in field], np.uint32).tobytes()


def _joined_hashes(packed: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray]:
    """Return the hashes of items as `Catalogue.state` has them: hashes, offsets."""
    counts = np.frombuffer(b"".join(item[: len(FIELDS)] for item in packed), np.uint8)
    hashes = np.frombuffer(b"".join(item[len(FIELDS) :] for item in packed), np.uint32)
    return hashes, np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])


def _split_hashes(hashes: np.ndarray, offsets: np.ndarray) -> list[bytes]:
    """Return each item's hashes as Catalogue keeps them."""
    counts = np.diff(offsets).astype(np.uint8).tobytes()
    content = hashes.astype(np.uint32).tobytes()
    bounds = (4 * offsets[:: len(FIELDS)]).tolist()  # of each item in `content`
    starts = range(0, len(counts), len(FIELDS))
    return [
        counts[start : start + len(FIELDS)] + content[first:last]
        for start, (first, last) in zip(starts, pairwise(bounds), strict=True)
    ]


def _field_hashes(item: Item) -> Iterator[list[int]]:
    """Yield the hashes of each of FIELDS."""
    text = " ".join(part for part in (item.title, item.text) if part)
    yield [_hash(TEXT, subword) for subword in _subwords(text)]
    yield [_hash(CATEGORY, name) for name in item.category]
    yield [_hash(BRAND, item.brand)] if item.brand else []
    yield [_hash(TAGS, name) for name in item.tags]


def _subwords(text: str) -> Iterator[str]:
    for word in _WORD.findall(text.lower())[:MAX_WORDS]:
        yield word
        marked = f"<{word}>"
        yield from (marked[start : start + 3] for start in range(len(marked) - 2))


def _hash(field: str, text: str) -> int:
    return crc32(f"{field}:{text}".encode())


EMPTY_CATALOGUE = Catalogue(Vocabulary())
