"""Who goes when the vocabulary is full: withdrawn items first, then those that no event and no record has named for the
longest.

Among equals those go that are counted least: after a start, when nothing has been named yet, counts tell who is alive,
for they decay and survive it. A sixteenth of all goes at once, since that takes passes over everything that is kept by
token: 3 s at a million items with 64 neighbours each (one core of an EPYC, busy with others), in which nothing ranks.
"""

from collections.abc import Collection

import numpy as np

from pipeline.counters.counters import Counters
from pipeline.items.catalogue import Catalogue
from pipeline.items.vocabulary import UNKNOWN

EVICTED_FRACTION = 16


def evict_for(item_ids: Collection[str], catalogue: Catalogue, counters: Counters) -> None:
    """Retire as many items as these need to have tokens, but none of these, and nothing while somebody holds tokens
    outside of the calling thread: then, as where all places are theirs, some of them stay unknown."""
    vocabulary = catalogue.vocabulary
    if vocabulary.free_slots >= len(item_ids) or vocabulary.pinned:
        return
    tokens = np.array([vocabulary.token(item_id) for item_id in set(item_ids)], np.int64)
    missing = int((tokens == UNKNOWN).sum()) - vocabulary.free_slots
    if missing > 0:
        kept = tokens[tokens != UNKNOWN]
        catalogue.evict(
            eviction_order(catalogue, counters, kept)[: max(missing, vocabulary.max_items // EVICTED_FRACTION)]
        )


def eviction_order(catalogue: Catalogue, counters: Counters, kept: np.ndarray) -> np.ndarray:
    """int64 [n]: the tokens of all items but those kept, int64 [k], in the order in which they go."""
    vocabulary = catalogue.vocabulary
    goes = vocabulary.hashes[: len(vocabulary)] != 0
    goes[kept] = False
    tokens = np.flatnonzero(goes)
    order = np.lexsort((counters.counts(tokens), vocabulary.last_seen[tokens], ~vocabulary.blocked[tokens]))
    return tokens[order]
