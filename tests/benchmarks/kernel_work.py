"""What the encoder's benchmark runs on: batches, and how a call on one is measured."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from triton.testing import do_bench

from pipeline.model.config import HstuConfig
from tests.benchmarks import results
from tests.benchmarks.kernel_rows import Row, row

CONFIG = HstuConfig(items=2, layers=8, width=512, heads=4, d_qk=128, d_v=128, max_events=1024)
HEADS, D, WIDTH = CONFIG.heads, CONFIG.d_qk, CONFIG.width
WORKLOADS = ((256, 290, 1024), (64, 88, 256), (1, 256, 256))  # users, mean and most events


@dataclass(frozen=True, slots=True)
class Work:
    """A batch. x: [tokens, width]; seconds: int32 [tokens]; offsets: int32 [users + 1]."""

    name: str
    cap: int
    x: Tensor
    seconds: Tensor
    offsets: Tensor
    quick: bool

    @classmethod
    def of(cls, users: int, mean: int, cap: int, quick: bool) -> "Work":
        random = np.random.default_rng(7)
        lengths = np.full(1, cap) if users == 1 else _lengths(random, users, mean, cap)
        offsets = np.concatenate([[0], lengths.cumsum()])
        pauses = np.exp(random.normal(4, 3, offsets[-1])).clip(0, 1e6).astype(np.int64)
        seconds = pauses.cumsum() - np.repeat((pauses.cumsum() - pauses)[offsets[:-1]], lengths)
        name = f"{users} users, mean {lengths.mean():.0f}, max {cap} ({offsets[-1]:,} tokens)"
        numbers = (torch.tensor(part, dtype=torch.int32, device="cuda") for part in (seconds, offsets))
        return cls(name, cap, torch.randn(int(offsets[-1]), WIDTH, device="cuda").bfloat16(), *numbers, quick)

    @property
    def users(self) -> int:
        return len(self.offsets) - 1

    @property
    def attention(self) -> tuple[float, float]:
        """Operations and bytes of attention in all layers: causal scores; Q, K, V read and the result written once."""
        lengths = self.offsets.diff().double()
        scores = float((lengths * (lengths + 1) / 2).sum())
        return CONFIG.layers * 4.0 * scores * HEADS * D, CONFIG.layers * 2.0 * len(self.x) * 4 * HEADS * D

    @property
    def products(self) -> tuple[float, float]:
        """Of the projections: their inputs, weights and results once."""
        flop, moved = 2.0 * len(self.x) * WIDTH * 5 * HEADS * D, 2.0 * len(self.x) * (2 * WIDTH + 5 * HEADS * D)
        return CONFIG.layers * flop, CONFIG.layers * (moved + 2.0 * WIDTH * 5 * HEADS * D)

    @property
    def whole(self) -> tuple[float, float]:
        """Of the encoder: as if nothing between two products, or a product and attention, left the chip twice."""
        flop, moved = (one + other for one, other in zip(self.attention, self.products, strict=True))
        return flop, moved + CONFIG.layers * 2.0 * len(self.x) * HEADS * D  # U is read once more

    def measured(
        self,
        implementation: str,
        call: Callable[[], object],
        needed: tuple[float, float] | None = None,
        max_error: float | None = None,
        **more: results.Cell,
    ) -> Row:
        """needed: operations and bytes; None where they are not counted."""
        rep = 1 if self.quick else 200
        ms = float(do_bench(call, warmup=1 if self.quick else 30, rep=rep, return_mode="median"))
        return row(self.name, implementation, ms, self.users, needed, max_error, **more)


def _lengths(random: np.random.Generator, users: int, mean: int, cap: int) -> np.ndarray:
    """Log-normal, cut at the cap, scaled until the mean is met."""
    drawn = random.lognormal(0, 0.8, users)
    scale = float(mean)
    for _ in range(50):
        lengths = np.clip(drawn * scale / drawn.mean(), 1, cap)
        scale *= mean / lengths.mean()
    return np.clip(drawn * scale / drawn.mean(), 1, cap).astype(np.int64)
