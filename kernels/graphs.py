"""CUDA graphs of a function of packed batches, one for each bucket of sizes, within a memory budget.

Without a graph a small batch's dozens of launches wait for Python. A batch is copied into tensors that all graphs read,
users without rows fill up its bucket. All graphs take their memory from one pool, for one runs at a time: a result is
valid until the next call.
"""

import gc
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from kernels.launching import ceil_div, next_power_of_2

WARM_UPS = 2  # calls before a capture: kernels are compiled and loaded
STEPS = 16  # sizes of a bucket between one power of two and the next: a sixteenth of the rows at most is padding
SMALLEST = 256  # rows; a batch of fewer takes as long
PATIENCE = 3  # calls of a bucket without a graph before it gets one: a capture takes longer than a call

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
        return cls(next_power_of_2(users), stepped(rows), longest)


def buckets(max_users: int, max_rows: int, classes: Sequence[int]) -> Iterator[Bucket]:
    """Of all batches up to these sizes whose users all have rows, the largest first. classes: the most rows of a user,
    ascending."""
    sizes = [0, stepped(1)]
    while sizes[-1] < max_rows:
        sizes.append(stepped(sizes[-1] + 1))
    powers = [1 << exponent for exponent in range(next_power_of_2(max_users).bit_length())]
    for below, size in reversed(list(pairwise(sizes))):
        for users in reversed(powers):
            for shorter, longest in zip([0, *classes], classes, strict=False):
                fewest = users // 2 + 1 + shorter  # rows: one each, and one user who is of this class
                if fewest <= size and below < users * longest:
                    yield Bucket(users, size, longest)


@dataclass(slots=True)
class Captured:
    """A graph, called, and the memory that it holds beside the pool's."""

    replay: Callable[[], Tensor]
    nbytes: int


class BatchGraphs:
    """Calls `run` by graphs, on one device, from one thread. On a CPU a graph is the call on the tensors it would read.

    run(columns, offsets, longest) -> [users, ...] or [rows, ...]: a function of packed columns [rows, ...], offsets
    int32 [users + 1] and the most rows of a user. It does not wait for the device, and minds nothing that rows beyond
    the last offset hold.
    like: the columns of any batch, for their shapes; max_users, max_rows: a larger batch has no graph; budget_bytes: of
    all graphs together; the least recently used ones go first.
    """

    def __init__(
        self, run: Run, like: Sequence[Tensor], max_users: int, max_rows: int, budget_bytes: int = 8 << 30
    ) -> None:
        self._run, self._budget_bytes = run, budget_bytes
        self._max_users, self._max_rows = next_power_of_2(max_users), stepped(max_rows)
        self._columns = [column.new_zeros((self._max_rows, *column.shape[1:])) for column in like]
        self._offsets = like[0].new_zeros(self._max_users + 1, dtype=torch.int32)
        self.clear()

    def __call__(self, columns: Sequence[Tensor], offsets: Tensor, longest: int) -> Tensor:
        """Of a batch on the device, as `run`; by a graph the result goes on to the bucket's end."""
        users, rows = len(offsets) - 1, len(columns[0])
        bucket = Bucket.of(users, rows, longest)
        held = self._held.get(bucket) or self._due(bucket)
        if held is None:
            return self._run(columns, offsets, longest)
        self._held.move_to_end(bucket)
        for static, column in zip(self._columns, columns, strict=True):
            static[:rows].copy_(column)
        self._offsets[: users + 1].copy_(offsets)
        self._offsets[users + 1 : bucket.users + 1].fill_(rows)
        return held.replay()

    def warm(self, classes: Sequence[int]) -> int:
        """Captures what batches can need, the largest first, until the budget is full; returns how many graphs there
        are. Then every kernel is compiled, and a batch waits for none. classes: see `buckets`."""
        for bucket in buckets(self._max_users, self._max_rows, classes):
            if self.nbytes > self._budget_bytes:
                break
            if self._takes(bucket):
                self.capture(bucket)
        return len(self._held)

    def capture(self, bucket: Bucket) -> Captured | None:
        """Its graph; None where the budget has no room for it alone: then it has none, nor have larger ones."""
        with CAPTURING, _uncollected():
            held = self._held[bucket] = self._captured(bucket)
        while len(self._held) > 1 and self.nbytes > self._budget_bytes:
            self._held.popitem(last=False)
        if self.nbytes <= self._budget_bytes:
            return held
        self.clear()
        self._max_rows = bucket.rows - 1
        return None

    def clear(self) -> None:
        """Forgets all graphs: for when a tensor that `run` reads has moved."""
        self._held: OrderedDict[Bucket, Captured] = OrderedDict()
        self._missed: Counter[Bucket] = Counter()
        self._pool = torch.cuda.graph_pool_handle() if self._offsets.is_cuda else None
        self._pool_bytes = 0

    @property
    def nbytes(self) -> int:
        return self._pool_bytes + sum(held.nbytes for held in self._held.values())

    def __len__(self) -> int:
        return len(self._held)

    def _takes(self, bucket: Bucket) -> bool:
        return bucket.rows <= self._max_rows and bucket.users <= self._max_users

    def _due(self, bucket: Bucket) -> Captured | None:
        """A graph for what is asked for again and again."""
        self._missed[bucket] += 1
        if self._missed[bucket] <= PATIENCE or not self._takes(bucket):
            return None
        del self._missed[bucket]
        return self.capture(bucket)

    def _captured(self, bucket: Bucket) -> Captured:
        columns = [column[: bucket.rows] for column in self._columns]
        offsets = self._offsets[: bucket.users + 1]
        offsets.copy_(torch.arange(bucket.users + 1).clamp(max=bucket.rows))  # any batch does

        def call() -> Tensor:
            return self._run(columns, offsets, bucket.longest)

        if not offsets.is_cuda:
            return Captured(call, 0)
        device, graph = offsets.device, torch.cuda.CUDAGraph()
        for _ in range(WARM_UPS):
            call()
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

        return Captured(replay, max(0, free - torch.cuda.mem_get_info(device)[0] - grown))


@contextmanager
def _uncollected() -> Iterator[None]:
    """A collection that happens to free another graph ends the capture that is under way."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def stepped(size: int) -> int:
    """Rounded up to a step of a STEPS-th of the power of two below, of SMALLEST at least."""
    step = max(SMALLEST, next_power_of_2(size + 1) // 2 // STEPS)
    return ceil_div(size, step) * step
