"""Eviction from a full vocabulary: delisted items first, then the least recently seen in an event or a record.

Ties go by the lowest count: after a start, when nothing has been seen yet, counts tell which items are in use, because
they decay and survive a restart. A sixteenth of all items is evicted at once, because it takes passes over everything
kept by token: 3 s at a million items with 64 neighbours each (one busy core of an EPYC), in which nothing is ranked.
"""

from collections.abc import Collection

import numpy as np

from pipeline.counters.counters import Counters
from pipeline.items.catalogue import Catalogue
from pipeline.items.vocabulary import UNKNOWN

EVICTED_AT_ONCE = 16  # one item in this many


def evict_for(item_ids: Collection[str], catalogue: Catalogue, counters: Counters) -> None:
    """Evict enough items that `item_ids` can have tokens, never one of these items.

    Nothing is evicted while tokens are pinned. Then, and when `item_ids` alone fill the vocabulary, some of them stay
    unknown.
    """
    vocabulary = catalogue.vocabulary
    if vocabulary.free_slots >= len(item_ids) or vocabulary.pinned:
        return
    tokens = vocabulary.tokens_of_ids(list(set(item_ids)))
    missing = int((tokens == UNKNOWN).sum()) - vocabulary.free_slots
    if missing > 0:
        protected = tokens[tokens != UNKNOWN]
        evicted = max(missing, vocabulary.max_items // EVICTED_AT_ONCE)
        catalogue.evict(eviction_order(catalogue, counters, protected)[:evicted])


def eviction_order(catalogue: Catalogue, counters: Counters, protected: np.ndarray) -> np.ndarray:
    """Return the tokens of all items but the protected ones, first to evict first: int64 [n]. protected: int [k]"""
    vocabulary = catalogue.vocabulary
    evictable = vocabulary.hashes[: len(vocabulary)] != 0
    evictable[protected] = False
    tokens = np.flatnonzero(evictable)
    order = np.lexsort((counters.counts(tokens), vocabulary.last_seen[tokens], ~vocabulary.blocked[tokens]))
    return tokens[order]
