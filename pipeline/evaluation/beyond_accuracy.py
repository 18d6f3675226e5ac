"""Qualities of slates beyond their hits: coverage of the catalogue, novelty, diversity."""

from collections.abc import Iterable

import msgspec
import numpy as np

from pipeline.data.sequences import UserSequences
from pipeline.items.vocabulary import UNKNOWN, Vocabulary
from pipeline.records import Item

SKETCH_DIM = 64  # numbers per item; a sketched cosine is off by 1/8, the mean over a thousand slates is nearly exact


class BeyondAccuracyMetrics(msgspec.Struct, frozen=True):
    """Metrics over the slates of all scored events.

    coverage:  fraction of the catalogue's items that are on any slate
    novelty:   mean -log2 of an item's fraction of the training events (add-one smoothing)
    diversity: mean over slates of 1 - the mean cosine of two of their items; None where no slate has two
    """

    coverage: float
    novelty: float
    diversity: float | None


def beyond_accuracy(slates: np.ndarray, counts: np.ndarray, vectors: np.ndarray) -> BeyondAccuracyMetrics:
    """Measure slates.

    slates: int [n, k] tokens, 0 = none; counts: int [items], training events by token; vectors: float [items, d], of
    unit length, or zero for an item without data, which is similar to no other.
    """
    shown = slates[slates > UNKNOWN]
    coverage = len(np.unique(shown)) / max(1, len(counts) - 1)
    bits = -np.log2((counts + 1) / (counts.sum() + len(counts)))
    novelty = float(bits[shown].mean()) if len(shown) else 0.0
    return BeyondAccuracyMetrics(coverage, novelty, _diversity(slates, vectors))


def _diversity(slates: np.ndarray, vectors: np.ndarray) -> float | None:
    """Return 1 - the mean cosine: for unit vectors v, the sum over pairs i != j of v_i v_j is |sum v|^2 - sum |v|^2."""
    sizes = (slates > UNKNOWN).sum(1)
    slates = slates[sizes > 1]
    sizes = sizes[sizes > 1]
    if not len(slates):
        return None
    squared_norms = (vectors**2).sum(1)
    sums = np.zeros((len(slates), vectors.shape[1]))
    for column in slates.T:  # one pass per rank: [n, d] at a time
        sums += vectors[column]
    similarity = ((sums**2).sum(1) - squared_norms[slates].sum(1)) / (sizes * (sizes - 1))
    return float(1 - similarity.mean())


def category_vectors(items: Iterable[Item], vocabulary: Vocabulary) -> np.ndarray:
    """Return float32 [items, SKETCH_DIM] whose cosines estimate those of the items' category sets."""
    numbers: dict[str, int] = {}
    pairs = [
        (vocabulary.token(item.item_id), numbers.setdefault(name, len(numbers)))
        for item in items
        for name in set(item.category)
    ]
    columns = np.array(pairs, np.int64).reshape(-1, 2)
    return _sketch(columns[:, 0], columns[:, 1], len(vocabulary))


def cooccurrence_vectors(train: UserSequences, items: int) -> np.ndarray:
    """Return float32 [items, SKETCH_DIM] whose cosines estimate those of the sets of users who touched the items."""
    users = np.repeat(np.arange(len(train.offsets) - 1), np.diff(train.offsets))
    is_first = train.is_first_touch
    return _sketch(train.tokens[is_first], users[is_first], items)


def _sketch(tokens: np.ndarray, members: np.ndarray, items: int) -> np.ndarray:
    """Return unit vectors whose dot products estimate the cosines of the items' sets, zeros for an empty set.

    tokens, members: int [pairs], distinct. A random sign projection (Achlioptas 2003) of the 0/1 set vectors.
    """
    rng = np.random.default_rng(0)
    signs = rng.choice(np.array([-1, 1], np.float32), (int(members.max(initial=-1)) + 1, SKETCH_DIM))
    vectors = np.zeros((items, SKETCH_DIM), np.float32)
    np.add.at(vectors, tokens, signs[members])
    vectors[UNKNOWN] = 0
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors / np.where(norms > 0, norms, 1)
