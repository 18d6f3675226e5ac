"""The encoder as CUDA graphs, one for each bucket of (users, tokens, longest user), within a memory budget.

A layer is four launches; without a graph a small batch waits for Python. Inputs are copied into a bucket's own
tensors, padded by users without rows; the least recently used graphs go when the budget is full.
"""

from collections import OrderedDict
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.fused_attention_layernorm.batch import Plan
from kernels.fused_attention_layernorm.encoder import Encoder
from kernels.launching import ceil_div, next_power_of_2

WARM_UPS = 2  # calls before a capture: kernels are compiled and loaded
STEPS = 32  # sizes of a bucket between one power of two and the next: a thirty-second at most is padding


@dataclass(frozen=True, slots=True)
class Bucket:
    users: int
    tokens: int
    longest: int
    last: bool

    @classmethod
    def of(cls, users: int, tokens: int, longest: int, last: bool) -> "Bucket":
        """The smallest that takes them."""
        return cls(next_power_of_2(users), stepped(tokens), max(64, next_power_of_2(longest)), last)


@dataclass(slots=True)
class Captured:
    """A graph, what it reads (x, seconds, offsets) and what it writes, and the memory that it holds."""

    graph: torch.cuda.CUDAGraph
    x: Tensor
    seconds: Tensor
    offsets: Tensor
    states: Tensor
    nbytes: int


class EncoderGraphs:
    """Calls `encoder` by graphs on one CUDA device, from one thread.

    thresholds: int32, of the time buckets; budget_bytes: of all graphs together, at least one is kept.
    """

    def __init__(self, encoder: Encoder, thresholds: Tensor, budget_bytes: int = 8 << 30) -> None:
        self._encoder, self._thresholds, self._budget_bytes = encoder, thresholds, budget_bytes
        self._held: OrderedDict[Bucket, Captured] = OrderedDict()

    def __call__(self, x: Tensor, seconds: Tensor, offsets: Tensor, longest: int, last: bool = False) -> Tensor:
        """x: [total, width]; seconds: int32 [total]; offsets: int32 [users + 1], on any device, pinned best; longest:
        the most rows of a user. -> states as `Encoder`, valid until the next call."""
        users, total = len(offsets) - 1, len(x)
        bucket = Bucket.of(users, total, longest, last)
        held = self._held.get(bucket) or self.capture(bucket, x.shape[1], x.dtype)
        self._held.move_to_end(bucket)
        held.x[:total].copy_(x, non_blocking=True)
        held.seconds[:total].copy_(seconds, non_blocking=True)
        held.offsets[: users + 1].copy_(offsets, non_blocking=True)
        held.offsets[users + 1 :].fill_(total)
        held.graph.replay()
        return held.states[: users if last else total]

    def capture(self, bucket: Bucket, width: int, dtype: torch.dtype) -> Captured:
        """A bucket's graph, made before it is needed or at its first call; the oldest ones beyond the budget go."""
        device = self._thresholds.device
        x = torch.zeros(bucket.tokens, width, dtype=dtype, device=device)
        seconds = torch.zeros(bucket.tokens, dtype=torch.int32, device=device)
        offsets = torch.zeros(bucket.users + 1, dtype=torch.int32, device=device)
        with torch.no_grad():
            for _ in range(WARM_UPS):
                self._encode(bucket, x, seconds, offsets)
            torch.cuda.synchronize(device)
            before, graph = torch.cuda.memory_reserved(device), torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                states = self._encode(bucket, x, seconds, offsets)
        nbytes = torch.cuda.memory_reserved(device) - before + x.nbytes + seconds.nbytes
        held = self._held[bucket] = Captured(graph, x, seconds, offsets, states, nbytes)
        while len(self._held) > 1 and self.nbytes > self._budget_bytes:
            self._held.popitem(last=False)
        return held

    @property
    def nbytes(self) -> int:
        return sum(held.nbytes for held in self._held.values())

    def __len__(self) -> int:
        return len(self._held)

    def _encode(self, bucket: Bucket, x: Tensor, seconds: Tensor, offsets: Tensor) -> Tensor:
        plan = Plan.of(seconds, offsets, self._thresholds, bucket.longest, x.dtype, trusted=True)
        return self._encoder(x, plan, bucket.last)


def stepped(size: int) -> int:
    """Rounded up to a step of a STEPS-th of the power of two below, of 64 at least."""
    step = max(64, next_power_of_2(size + 1) // 2 // STEPS)
    return ceil_div(size, step) * step
