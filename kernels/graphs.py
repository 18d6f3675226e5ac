"""CUDA graphs of a function of packed batches, one per bucket of batch sizes, within a memory budget.

Without a graph, a small batch waits for Python to launch dozens of kernels. A batch is copied into static tensors that
all graphs read; users without rows pad it to its bucket.
"""

import gc
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor

from kernels.launch import ceil_div, next_power_of_2

WARM_UP_CALLS = 2  # before a capture, so that kernels are compiled and loaded
STEPS_PER_DOUBLING = 16  # bucket sizes between two powers of two: at most a sixteenth of the rows is padding
MIN_ROWS = 256  # rows; a smaller batch takes as long
MAX_NODE_BYTES = 16 << 20  # cap on the estimate of a graph's own nodes

# One capture at a time per process. Other threads may keep launching, but must not synchronise the entire device.
CAPTURE_LOCK = threading.Lock()

BatchFunction = Callable[[Sequence[Tensor], Tensor, int], Tensor]


@dataclass(frozen=True, slots=True)
class Bucket:
    """Sizes of the batches that share a graph. max_length: the length class, an upper bound of rows per user."""

    users: int
    rows: int
    max_length: int

    @classmethod
    def from_sizes(cls, users: int, rows: int, max_length: int) -> "Bucket":
        """Return the smallest bucket that holds a batch of these sizes."""
        return cls(next_power_of_2(users), bucket_rows(rows), max_length)


def possible_buckets(max_users: int, max_rows: int, length_classes: Sequence[int]) -> Iterator[Bucket]:
    """Yield the bucket of every batch up to these sizes in which each user has a row, largest first.

    length_classes: the upper bounds of rows per user that a batch is classed by, ascending.
    """
    sizes = [0, bucket_rows(1)]
    while sizes[-1] < max_rows:
        sizes.append(bucket_rows(sizes[-1] + 1))
    powers = [1 << exponent for exponent in range(next_power_of_2(max_users).bit_length())]
    for smaller_size, size in reversed(list(pairwise(sizes))):
        for users in reversed(powers):
            for shorter, max_length in zip([0, *length_classes], length_classes, strict=False):
                min_rows = users // 2 + 1 + shorter  # one row per user, and one user of this length class
                if min_rows <= size and smaller_size < users * max_length:
                    yield Bucket(users, size, max_length)


@dataclass(slots=True)
class CapturedGraph:
    """A graph's replay function, and the memory that it holds in addition to the shared pool."""

    replay: Callable[[], Tensor]
    nbytes: int


class BatchGraphs:
    """Calls `run` by graphs, on one device, from one thread. On a CPU a graph is the call on the static tensors.

    run(columns, offsets, max_length) -> [users, ...] or [rows, ...]: a function of packed columns [rows, ...], offsets
    int32 [users + 1] and an upper bound of rows per user. It must not wait for the device, and must ignore rows after
    the last offset.
    example: the columns of any batch, for their shapes and dtypes.
    max_users, max_rows: larger batches run without a graph.
    budget_bytes: limit on the memory of all graphs together. A bucket's graph is captured by `warm` or by the bucket's
    first call; once the budget is full, buckets without a graph run without one until `clear`.
    """

    def __init__(
        self, run: BatchFunction, example: Sequence[Tensor], max_users: int, max_rows: int, budget_bytes: int = 8 << 30
    ) -> None:
        self._run = run
        self._budget_bytes = budget_bytes
        self._max_users = next_power_of_2(max_users)
        self._max_rows = bucket_rows(max_rows)
        self._columns = [column.new_zeros((self._max_rows, *column.shape[1:])) for column in example]
        self._offsets = example[0].new_zeros(self._max_users + 1, dtype=torch.int32)
        self.clear()

    def __call__(self, columns: Sequence[Tensor], offsets: Tensor, max_length: int) -> Tensor:
        """Return `run` of a batch on the device. The result of a graph is padded to the bucket's size.

        All graphs share one memory pool, since one runs at a time: a graph's result is valid until the next call.
        """
        users = len(offsets) - 1
        rows = len(columns[0])
        bucket = Bucket.from_sizes(users, rows, max_length)
        graph = self._graphs.get(bucket)
        if graph is None and self._can_capture(bucket):
            graph = self._capture_within_budget(bucket)
        if graph is None:
            return self._run(columns, offsets, max_length)
        for static, column in zip(self._columns, columns, strict=True):
            static[:rows].copy_(column)
        self._offsets[: users + 1].copy_(offsets)
        self._offsets[users + 1 : bucket.users + 1].fill_(rows)
        return graph.replay()

    def warm(self, length_classes: Sequence[int]) -> int:
        """Capture graphs for all possible batches, largest first, until the budget is full; return how many there are.

        length_classes: see `possible_buckets`.
        """
        for bucket in possible_buckets(self._max_users, self._max_rows, length_classes):
            missing = bucket not in self._graphs and self._can_capture(bucket)
            if missing and self._capture_within_budget(bucket) is None and self._graphs:
                break
        return len(self._graphs)

    def capture(self, bucket: Bucket) -> CapturedGraph:
        """Capture the bucket's graph, ignoring the budget."""
        columns = [column[: bucket.rows] for column in self._columns]
        offsets = self._offsets[: bucket.users + 1]
        offsets.copy_(torch.arange(bucket.users + 1).clamp(max=bucket.rows))  # any valid batch will do
        graph = self._capture_call(partial(self._run, columns, offsets, bucket.max_length))
        self._graphs[bucket] = graph
        return graph

    def clear(self) -> None:
        """Drop all graphs, as when a tensor that `run` reads has moved."""
        self._graphs: dict[Bucket, CapturedGraph] = {}
        self._pool = torch.cuda.graph_pool_handle() if self._offsets.is_cuda else None
        self._pool_bytes = 0
        self._full = False
        self._row_limit = self._max_rows  # lowered by a bucket that does not fit: larger ones would not either

    @property
    def nbytes(self) -> int:
        """Memory of all graphs, the shared pool included."""
        return self._pool_bytes + sum(graph.nbytes for graph in self._graphs.values())

    def __len__(self) -> int:
        return len(self._graphs)

    def _can_capture(self, bucket: Bucket) -> bool:
        return not self._full and bucket.rows <= self._row_limit and bucket.users <= self._max_users

    def _capture_within_budget(self, bucket: Bucket) -> CapturedGraph | None:
        """Capture the bucket's graph; return None if it does not fit the budget or the device."""
        try:
            graph = self.capture(bucket)
        except torch.OutOfMemoryError:
            self._row_limit = bucket.rows - 1
            return None
        if self.nbytes <= self._budget_bytes:
            return graph
        del self._graphs[bucket]
        is_largest = all(other.rows < bucket.rows for other in self._graphs)
        if not self._graphs or (is_largest and self._pool_bytes > self._budget_bytes):
            self.clear()  # this bucket alone may fill the pool, which is freed with its last graph
            self._row_limit = bucket.rows - 1
        else:
            self._full = True
        return None

    def _capture_call(self, call: Callable[[], Tensor]) -> CapturedGraph:
        device = self._offsets.device
        if device.type != "cuda":
            return CapturedGraph(call, 0)
        for _ in range(WARM_UP_CALLS):
            call()
        with CAPTURE_LOCK, _gc_disabled():
            return self._record(call, device)

    def _record(self, call: Callable[[], Tensor], device: torch.device) -> CapturedGraph:
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
        free_bytes = torch.cuda.mem_get_info(device)[0]
        # thread_local: another thread may be serving with another model.
        with torch.cuda.graph(graph, self._pool, capture_error_mode="thread_local"):
            reserved_bytes = torch.cuda.memory_reserved(device)
            result = call()
            pool_growth = torch.cuda.memory_reserved(device) - reserved_bytes
        self._pool_bytes += pool_growth

        def replay() -> Tensor:
            graph.replay()
            return result

        # NOTE: other processes on the same GPU also change the free memory.
        node_bytes = free_bytes - torch.cuda.mem_get_info(device)[0] - pool_growth
        return CapturedGraph(replay, min(max(0, node_bytes), MAX_NODE_BYTES))


@contextmanager
def _gc_disabled() -> Iterator[None]:
    """Disable garbage collection: freeing another graph would abort the running capture."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def bucket_rows(size: int) -> int:
    """Round up to a multiple of 1/STEPS_PER_DOUBLING of the largest power of two <= size, at least MIN_ROWS."""
    step = max(MIN_ROWS, next_power_of_2(size + 1) // 2 // STEPS_PER_DOUBLING)
    return ceil_div(size, step) * step
