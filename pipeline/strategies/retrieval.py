"""Exact top-k of the entire catalogue for each user state, without excluded and blocked items."""

from dataclasses import dataclass
from functools import cache
from importlib.metadata import version

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.launch import next_power_of_2
from kernels.sequence_recommendation_interaction.op import (
    MAX_K,
    MAX_ROW_BYTES,
    candidate_interaction,
    sequence_recommendation_interaction,
)
from pipeline.backends.item_table import GROWTH
from pipeline.errors import DeviceError
from pipeline.items.vocabulary import UNKNOWN
from pipeline.tensors import to_device

CHUNK_SCORES = 1 << 24  # 64 MiB of float32 scores at a time
RESCORE_EXTRA = 64  # candidates beyond k that are rescored in float32
MIN_CANDIDATES = 128  # kernels are compiled for powers of two, and most slates need no more
# With fewer scores, computing all of them in memory is faster: the operator's launches take longer than the product
# (`tests.benchmarks.retrieval`).
FUSED_MIN_SCORES = 16_000_000
# On a CPU the k best of a million scores of 16 users take 27 ms at once. By groups of 64 they take 7 ms for k = 10 and
# 14 for k = 500; by groups of 256, 5 and 20; of 1,000, 6 and 88 (an EPYC's core). Fewer groups than 2 k are slower.
# python -m timeit -s "import torch; from pipeline.strategies.retrieval import top_k_by_groups as top_k"
#   -s "torch.set_num_threads(1); x = torch.randn(16, 1_000_000)" "top_k(x, 10)"
GROUP_ITEMS = 64
CHECKED_USERS = 16
CHECKED_ITEMS = 40_000
# Of 16 users and 512 columns sums differ by 2e-6; a lost candidate moves a score by 3e-4 or more.
CHECK_TOLERANCE = 1e-4


@dataclass(slots=True)
class ExcludedItems:
    """Items that their users must not get: users, rows: int64 [m] on the device, by user, with rows of the item table.

    offsets: int64 [n + 1] on the host, where each user's rows begin
    """

    offsets: np.ndarray
    users: Tensor
    rows: Tensor

    def select(self, first: int, last: int) -> "ExcludedItems":
        """Return the items of the users from `first` to before `last`, who are numbered from 0."""
        offsets = self.offsets[first : last + 1]
        part = slice(int(offsets[0]), int(offsets[-1]))
        return ExcludedItems(offsets - offsets[0], self.users[part] - first, self.rows[part])


def make_retrieval(vectors: Tensor, temperature: float, fused: bool) -> "Retrieval | FusedRetrieval":
    """Return the retrieval from item vectors [items, width]; with `fused`, by the operator where it supports them."""
    supported = vectors.is_cuda and vectors.shape[1] * 4 <= MAX_ROW_BYTES
    return FusedRetrieval(vectors, temperature) if fused and supported else Retrieval(vectors, temperature)


class FusedRetrieval:
    """The interface of Retrieval on this project's operator, which never holds the scores of the full catalogue.

    Half precision finds k + 64 candidates or more, which float32 then rescores. One of the k best can be missed only
    where 64 other items score so close to it that half precision ranks them before it.
    """

    def __init__(self, vectors: Tensor, temperature: float = 1.0) -> None:
        """See Retrieval.__init__. Raises DeviceError when the operator's results are wrong on this GPU."""
        self._temperature = temperature
        self._vectors = vectors
        self._in_memory = Retrieval(vectors, temperature)
        if vectors.is_cuda:
            check_fused_retrieval(vectors.shape[1], vectors.device)
        self._half = self._half_table(vectors, len(vectors))
        self.block(np.array([UNKNOWN]))

    def set_vectors(self, vectors: Tensor, rows: np.ndarray) -> None:
        """See Retrieval.set_vectors."""
        self._vectors = vectors
        self._in_memory.set_vectors(vectors, rows)
        if len(vectors) > len(self._half):
            self._half = self._half_table(self._half, int(GROWTH * len(vectors)))
        index = to_device(rows, vectors.device)
        self._half[index] = vectors[index].to(self._half.dtype)

    def block(self, rows: np.ndarray) -> None:
        """See Retrieval.block."""
        self._in_memory.block(rows)
        self._eligible = torch.arange(len(self._half), device=self._vectors.device) < len(self._vectors)
        self._eligible[to_device(rows, self._vectors.device)] = False

    def top_k(self, states: Tensor, excluded: ExcludedItems, k: int) -> tuple[Tensor, Tensor]:
        """See Retrieval.top_k."""
        n_candidates = max(MIN_CANDIDATES, next_power_of_2(k + RESCORE_EXTRA))
        if n_candidates > MAX_K or len(states) * len(self._vectors) < FUSED_MIN_SCORES:
            return self._in_memory.top_k(states, excluded, k)
        states = states / self._temperature
        seen, seen_offsets = self._by_user(len(states), excluded)
        _, candidates = sequence_recommendation_interaction(
            states.to(self._half.dtype),
            self._half,
            n_candidates,
            seen=seen,
            seen_offsets=seen_offsets,
            eligible=self._eligible,
            check_values=False,
        )
        scores = candidate_interaction(states, self._vectors, candidates, check_values=False)
        scores, order = scores.sort(dim=1, descending=True, stable=True)
        return candidates.gather(1, order[:, :k]).clamp(min=UNKNOWN).long(), scores[:, :k]

    @staticmethod
    def _half_table(vectors: Tensor, rows: int) -> Tensor:
        """Return the vectors in half precision with room for this many rows, zeros at its end: [>= rows, width].

        It has a multiple of 16 rows: kernels specialise on divisibility by 16, so a new item does not recompile them.
        """
        return F.pad(vectors.bfloat16(), (0, 0, 0, rows + -rows % 16 - len(vectors)))

    def scores(self, states: Tensor, rows: Tensor) -> Tensor:
        """See Retrieval.scores."""
        return self._in_memory.scores(states, rows)

    def _by_user(self, n_users: int, excluded: ExcludedItems) -> tuple[Tensor, Tensor]:
        """Return the excluded rows, ascending per user, and the users' offsets, [n_users + 1]."""
        items = len(self._vectors)
        pairs = (excluded.users * items + excluded.rows).sort().values
        users = torch.arange(n_users + 1, device=pairs.device)
        return pairs % items, torch.searchsorted(pairs, users * items)


class Retrieval:
    """Exact maximum inner product over the item table, on the table's device."""

    def __init__(self, vectors: Tensor, temperature: float = 1.0) -> None:
        """vectors: float32 [items, width], of which a view is kept; row 0 is not an item. Scores are divided by the
        temperature."""
        self._vectors = vectors
        self._temperature = temperature
        self.block(np.array([UNKNOWN]))

    def set_vectors(self, vectors: Tensor, rows: np.ndarray) -> None:
        """Retrieve from these vectors from now on, of which only those of `rows`, int64 [n], are new."""
        self._vectors = vectors

    def block(self, rows: np.ndarray) -> None:
        """Keep these rows of the table, int64 [n], which must include row 0, out of all results from now on."""
        self._blocked = to_device(rows, self._vectors.device)

    def top_k(self, states: Tensor, excluded: ExcludedItems, k: int) -> tuple[Tensor, Tensor]:
        """Return each user's best rows int64 [n, k] and their scores float32 [n, k], best first.

        Where no item is left the row is 0 and the score -inf. states: [n, width]. It never waits for the device.
        """
        step = max(1, CHUNK_SCORES // len(self._vectors))
        chunks = [
            self._top_k_of_chunk(states[start : start + step], excluded.select(start, start + step), k)
            for start in range(0, max(1, len(states)), step)
        ]
        scores, rows = chunks[0] if len(chunks) == 1 else map(torch.cat, zip(*chunks, strict=True))
        return rows.where(scores.isfinite(), UNKNOWN), scores

    def scores(self, states: Tensor, rows: Tensor) -> Tensor:
        """Return each user's scores of given rows of the table: float32 [n, c]. rows: int64 [n, c]"""
        return torch.einsum("nd,ncd->nc", states / self._temperature, self._vectors[rows])

    def _top_k_of_chunk(self, states: Tensor, excluded: ExcludedItems, k: int) -> tuple[Tensor, Tensor]:
        scores = (states / self._temperature) @ self._vectors.T  # [n, items]
        scores.index_fill_(1, self._blocked, -torch.inf)
        scores.index_put_((excluded.users, excluded.rows), scores.new_full((), -torch.inf))  # a number would be copied
        length = min(k, scores.shape[1])
        best, rows = scores.topk(length, dim=1) if scores.is_cuda else top_k_by_groups(scores, length)
        missing = k - best.shape[1]
        if not missing:
            return best, rows
        return F.pad(best, (0, missing), value=-torch.inf), F.pad(rows, (0, missing))


@cache
def check_fused_retrieval(width: int, device: torch.device) -> None:
    """Compare the operator with torch on random vectors, more than it selects from without a bound. DeviceError."""
    generator = torch.Generator(device).manual_seed(0)
    states, table = (
        torch.randn(n, width, device=device, generator=generator).bfloat16() for n in (CHECKED_USERS, CHECKED_ITEMS)
    )
    best, _ = sequence_recommendation_interaction(states, table, MIN_CANDIDATES, check_values=False)
    expected = (states.float() @ table.float().T).topk(MIN_CANDIDATES, dim=1).values
    if not torch.allclose(best, expected, rtol=CHECK_TOLERANCE, atol=CHECK_TOLERANCE):
        raise DeviceError(
            f"the kernel that retrieves items gives wrong results on {torch.cuda.get_device_name(device)} with Triton"
            f" {version('triton')}; set pipeline.custom_kernels to false, or install the Triton of pyproject.toml"
        )


def top_k_by_groups(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return torch.topk(scores, k, dim=1): the k best scores of each user, best first, and their columns, [n, k].

    The k groups of columns with the highest maxima hold the k best scores: any other group's are at most as high as
    each of these k maxima. scores: [n, items], not NaN; which of equal scores come first is not specified, as in torch.
    """
    n, items = scores.shape
    n_groups = items // GROUP_ITEMS
    if n_groups < max(1, 2 * k):
        return scores.topk(k, dim=1)
    grouped = scores[:, : n_groups * GROUP_ITEMS].unflatten(1, (n_groups, GROUP_ITEMS))
    groups = grouped.amax(2).topk(k, dim=1).indices  # [n, k]
    within = torch.arange(GROUP_ITEMS, device=scores.device)
    rest = torch.arange(n_groups * GROUP_ITEMS, items, device=scores.device)  # columns after the last group
    columns = torch.cat([(groups[:, :, None] * GROUP_ITEMS + within).flatten(1), rest.expand(n, -1)], dim=1)
    best, order = scores.gather(1, columns).topk(k, dim=1)
    return best, columns.gather(1, order)
