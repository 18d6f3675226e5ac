"""Item-kNN baselines: shrunk cosine similarity over users or over content, summed over the history.

    similarity(a, b) = sum_f w_af w_bf / (|w_a| |w_b| + shrinkage)

`itemknn`: f are the users of the training log, w is 1 where a user touched an item (Sarwar et al., WWW 2001; the
shrinkage of Bell and Koren, ICDM 2007). `contentknn`: f are the hashes of the items' texts, categories, brands and
tags, w is log(items / items that have it), so that rare words weigh more (IDF). It can rank items that no user has
touched.

Each item keeps its `neighbours` most similar ones; a candidate's score is the sum over the user's events of
similarity * recency^age, the latest event having age 0. Candidates without a vote follow by popularity.
"""

from typing import Annotated

import msgspec
import numpy as np
import torch
from msgspec import Meta
from torch import Tensor

from pipeline.data.sequences import UserSequences
from pipeline.evaluation.full_ranking import popularity_scores
from pipeline.items.catalogue import FIELDS, Catalogue
from pipeline.records import Histories
from pipeline.types import NonNegativeFloat, PositiveInt

CHUNK_CELLS = 1 << 24  # 64 MiB of float32 similarities at a time
CHUNK_USERS = 32  # of 512 events, each with 200 neighbours: 50 MiB of votes


class ItemKnnOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Options of an item-kNN; with `recency` 1 all events of a history count equally.

    The defaults are among the best of a search on a film-rating log.
    """

    neighbours: PositiveInt = 200
    shrinkage: NonNegativeFloat = 5.0
    recency: Annotated[float, Meta(gt=0, le=1)] = 0.8


class ItemKnn:
    """Implements pipeline.evaluation.full_ranking.CatalogueScorer."""

    def __init__(self, name: str, weights: Tensor, train: UserSequences, options: ItemKnnOptions) -> None:
        """weights: sparse float32 [items, features]; train: gives the items' popularity."""
        self.name = name
        self._recency = options.recency
        self._items = len(weights)
        self._tokens, self._similarities = _neighbours(weights, options)  # int64 and float32 [items, neighbours]
        self._popularity = popularity_scores(np.bincount(train.tokens, minlength=len(weights))[None])

    @classmethod
    def from_users(cls, train: UserSequences, items: int, options: ItemKnnOptions) -> "ItemKnn":
        return cls("itemknn", _user_weights(train, items), train, options)

    @classmethod
    def from_content(cls, catalogue: Catalogue, train: UserSequences, options: ItemKnnOptions) -> "ItemKnn":
        return cls("contentknn", _content_weights(catalogue), train, options)

    def score(self, histories: Histories, tokens: np.ndarray) -> np.ndarray:
        """See CatalogueScorer."""
        scores = np.empty((len(histories), self._items), np.float32)
        for start in range(0, len(histories), CHUNK_USERS):
            offsets = histories.offsets[start : start + CHUNK_USERS + 1]
            votes = self._votes(tokens[offsets[0] : offsets[-1]], offsets - offsets[0])
            scores[start : start + CHUNK_USERS] = np.where(votes > 0, votes, self._popularity)
        return scores

    def _votes(self, tokens: np.ndarray, offsets: np.ndarray) -> np.ndarray:
        """Return float64 [n, items]: the summed votes of each user's events."""
        lengths = np.diff(offsets)
        ages = np.repeat(offsets[1:], lengths) - 1 - np.arange(len(tokens))
        votes = self._similarities[tokens] * (self._recency**ages)[:, None]  # [total, neighbours]
        rows = np.repeat(np.arange(len(lengths)), lengths)
        cells = self._tokens[tokens] + rows[:, None] * self._items
        return np.bincount(cells.ravel(), votes.ravel(), len(lengths) * self._items).reshape(len(lengths), -1)


def _neighbours(weights: Tensor, options: ItemKnnOptions) -> tuple[np.ndarray, np.ndarray]:
    """Return each item's most similar items and their similarities, 0 where it has no more."""
    items, features = weights.shape
    norms = torch.sparse.sum(weights * weights, 1).to_dense().sqrt()
    k = min(options.neighbours, items)
    tokens = np.zeros((items, k), np.int64)
    similarities = np.zeros((items, k), np.float32)
    step = max(1, CHUNK_CELLS // max(items, features))
    for start in range(0, items, step):
        rows = torch.arange(start, min(start + step, items))
        products = torch.sparse.mm(weights, weights.index_select(0, rows).to_dense().T).T  # [rows, items]
        cosine = products / (norms[rows, None] * norms + options.shrinkage).clamp(min=1e-9)
        cosine[torch.arange(len(rows)), rows] = 0  # an item is not its own neighbour
        best, index = cosine.topk(k, dim=1)
        tokens[start : start + step] = index.numpy()
        similarities[start : start + step] = best.numpy()
    return tokens, similarities


def _user_weights(train: UserSequences, items: int) -> Tensor:
    """Return [items, users] of 0 and 1; the unknown item's row is empty."""
    is_pair = train.is_first_touch & (train.tokens > 0)
    users = train.histories.users[is_pair]
    tokens = train.tokens[is_pair].astype(np.int64)
    return _sparse(tokens, users, np.ones(len(tokens)), (items, max(1, len(train.offsets) - 1)))


def _content_weights(catalogue: Catalogue) -> Tensor:
    """Return [items, hashes], the inverse document frequencies of each item's content hashes."""
    items = len(catalogue.vocabulary)
    state = catalogue.state(np.arange(items))
    hashes, columns, item_counts = np.unique(state["hashes"], return_inverse=True, return_counts=True)
    rows = np.repeat(np.arange(items), np.diff(state["offsets"][:: len(FIELDS)]))
    return _sparse(rows, columns, np.log(items / item_counts)[columns], (items, max(1, len(hashes))))


def _sparse(rows: np.ndarray, columns: np.ndarray, values: np.ndarray, size: tuple[int, int]) -> Tensor:
    index = torch.from_numpy(np.stack([rows, columns]))
    return torch.sparse_coo_tensor(index, torch.from_numpy(values).float(), size, check_invariants=True).coalesce()
