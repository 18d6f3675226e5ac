"""CUDA graphs of a function of packed batches, one for each bucket of sizes, within a memory budget.

Without a graph a small batch's dozens of launches wait for Python. A batch is copied into tensors that all graphs read,
users without rows fill up its bucket. All graphs take their memory from one pool, for one runs at a time: a result is
valid until the next call.
"""

import gc
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor

from kernels.launch import ceil_div, next_power_of_2

WARM_UPS = 2  # calls before a capture: kernels are compiled and loaded
STEPS = 16  # sizes of a bucket between one power of two and the next: a sixteenth of the rows at most is padding
MIN_ROWS = 256  # rows; a batch of fewer takes as long
MAX_NODE_BYTES = 16 << 20  # that a graph's own nodes are taken to hold
HALF_LIFE_CALLS = 10_000  # calls, after which those before count half
MIN_CALLS = 3  # calls of a bucket without a graph before it gets one: a capture takes longer than a call

# One capture at a time in the process; its other threads go on launching, but must not synchronise the whole device.
CAPTURING = threading.Lock()

Run = Callable[[Sequence[Tensor], Tensor, int], Tensor]


@dataclass(frozen=True, slots=True)
class Bucket:
    """longest: the most rows of a user, as the caller classes them."""

    users: int
    rows: int
    longest: int

    @classmethod
    def of(cls, users: int, rows: int, longest: int) -> "Bucket":
        """The smallest that takes them."""
        return cls(next_power_of_2(users), bucket_rows(rows), longest)


def buckets(max_users: int, max_rows: int, classes: Sequence[int]) -> Iterator[Bucket]:
    """Of all batches up to these sizes whose users all have rows, the largest first. classes: the most rows of a user,
    ascending."""
    sizes = [0, bucket_rows(1)]
    while sizes[-1] < max_rows:
        sizes.append(bucket_rows(sizes[-1] + 1))
    powers = [1 << exponent for exponent in range(next_power_of_2(max_users).bit_length())]
    for below, size in reversed(list(pairwise(sizes))):
        for users in reversed(powers):
            for shorter, longest in zip([0, *classes], classes, strict=False):
                fewest = users // 2 + 1 + shorter  # rows: one each, and one user who is of this class
                if fewest <= size and below < users * longest:
                    yield Bucket(users, size, longest)


@dataclass(slots=True)
class CapturedGraph:
    """A graph, called, and the memory that it holds beside the pool's."""

    replay: Callable[[], Tensor]
    nbytes: int


class BatchGraphs:
    """Calls `run` by graphs, on one device, from one thread. On a CPU a graph is the call on the tensors it would read.

    run(columns, offsets, longest) -> [users, ...] or [rows, ...]: a function of packed columns [rows, ...], offsets
    int32 [users + 1] and the most rows of a user. It does not wait for the device, and minds nothing that rows beyond
    the last offset hold.
    like: the columns of any batch, for their shapes; max_users, max_rows: a larger batch has no graph.
    budget_bytes: of all graphs together. When it is full, a bucket takes the place of the graph that is asked for
    least, once it comes twice as often: graphs are not made over and over for more buckets than have room.
    """

    def __init__(
        self, run: Run, like: Sequence[Tensor], max_users: int, max_rows: int, budget_bytes: int = 8 << 30
    ) -> None:
        self._run, self._budget_bytes = run, budget_bytes
        self._max_users, self._max_rows = next_power_of_2(max_users), bucket_rows(max_rows)
        self._columns = [column.new_zeros((self._max_rows, *column.shape[1:])) for column in like]
        self._offsets = like[0].new_zeros(self._max_users + 1, dtype=torch.int32)
        self.clear()

    def __call__(self, columns: Sequence[Tensor], offsets: Tensor, longest: int) -> Tensor:
        """Of a batch on the device, as `run`; by a graph the result goes on to the bucket's end."""
        users, rows = len(offsets) - 1, len(columns[0])
        bucket = Bucket.of(users, rows, longest)
        self._count(bucket)
        held = self._graphs.get(bucket) or self._maybe_capture(bucket)
        if held is None:
            return self._run(columns, offsets, longest)
        for static, column in zip(self._columns, columns, strict=True):
            static[:rows].copy_(column)
        self._offsets[: users + 1].copy_(offsets)
        self._offsets[users + 1 : bucket.users + 1].fill_(rows)
        return held.replay()

    def warm(self, classes: Sequence[int]) -> int:
        """Makes graphs for what batches can need, the largest first, until the budget is full; returns how many there
        are. classes: see `buckets`."""
        for bucket in buckets(self._max_users, self._max_rows, classes):
            wanted = self._takes(bucket) and bucket not in self._graphs
            if wanted and self._capture_within_budget(bucket) is None and self._graphs:
                break
        return len(self._graphs)

    def capture(self, bucket: Bucket) -> CapturedGraph:
        """Makes its graph, whatever the budget."""
        columns = [column[: bucket.rows] for column in self._columns]
        offsets = self._offsets[: bucket.users + 1]
        offsets.copy_(torch.arange(bucket.users + 1).clamp(max=bucket.rows))  # any batch does
        held = self._graphs[bucket] = self._captured(partial(self._run, columns, offsets, bucket.longest))
        return held

    def clear(self) -> None:
        """Forgets all graphs: for when a tensor that `run` reads has moved."""
        self._graphs: dict[Bucket, CapturedGraph] = {}
        self._hits: Counter[Bucket] = Counter()
        self._pool = torch.cuda.graph_pool_handle() if self._offsets.is_cuda else None
        self._pool_bytes, self._full = 0, False

    @property
    def nbytes(self) -> int:
        return self._pool_bytes + sum(held.nbytes for held in self._graphs.values())

    def __len__(self) -> int:
        return len(self._graphs)

    def _takes(self, bucket: Bucket) -> bool:
        return bucket.rows <= self._max_rows and bucket.users <= self._max_users

    def _count(self, bucket: Bucket) -> None:
        self._hits[bucket] += 1
        if self._hits.total() > HALF_LIFE_CALLS:  # what was asked for long ago counts less and less
            self._hits = Counter({each: asked // 2 for each, asked in self._hits.items() if asked > 1})

    def _maybe_capture(self, bucket: Bucket) -> CapturedGraph | None:
        """A graph for what is asked for again and again, if there is room, or another is asked for less."""
        if not self._takes(bucket):
            return None
        least = min(self._graphs, key=self._hits.__getitem__, default=None) if self._full else None
        if self._hits[bucket] <= MIN_CALLS + (0 if least is None else 2 * self._hits[least]):
            return None
        if least is not None:
            self._drop(least)
        return self._capture_within_budget(bucket)

    def _capture_within_budget(self, bucket: Bucket) -> CapturedGraph | None:
        """Its graph, within the budget; None where there is no room for it."""
        try:
            held = self.capture(bucket)
        except torch.OutOfMemoryError:
            self._max_rows = bucket.rows - 1
            return None
        if self._pool_bytes > self._budget_bytes:  # it alone is too large, and so are larger ones
            self.clear()
            self._max_rows = bucket.rows - 1
            return None
        if self.nbytes <= self._budget_bytes:
            return held
        self._full = True
        self._drop(bucket)
        return None

    def _drop(self, bucket: Bucket) -> None:
        del self._graphs[bucket]
        if not self._graphs:  # the last graph takes the pool with it
            self.clear()

    def _captured(self, call: Callable[[], Tensor]) -> CapturedGraph:
        device = self._offsets.device
        if device.type != "cuda":
            return CapturedGraph(call, 0)
        for _ in range(WARM_UPS):
            call()
        with CAPTURING, _gc_disabled():
            return self._recorded(call, device)

    def _recorded(self, call: Callable[[], Tensor], device: torch.device) -> CapturedGraph:
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
        free = torch.cuda.mem_get_info(device)[0]
        # Another thread may serve with another model meanwhile.
        with torch.cuda.graph(graph, self._pool, capture_error_mode="thread_local"):
            reserved = torch.cuda.memory_reserved(device)
            result = call()
            grown = torch.cuda.memory_reserved(device) - reserved
        self._pool_bytes += grown

        def replay() -> Tensor:
            graph.replay()
            return result

        # Other processes of the card are in this difference, too.
        own = free - torch.cuda.mem_get_info(device)[0] - grown
        return CapturedGraph(replay, min(max(0, own), MAX_NODE_BYTES))


@contextmanager
def _gc_disabled() -> Iterator[None]:
    """A collection that happens to free another graph ends the capture that is under way."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def bucket_rows(size: int) -> int:
    """Rounded up to a step of a STEPS-th of the power of two below, of SMALLEST at least."""
    step = max(MIN_ROWS, next_power_of_2(size + 1) // 2 // STEPS)
    return ceil_div(size, step) * step
