"""Workloads of the encoder's benchmark, and how a call on one is measured."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pipeline.model.config import HstuConfig
from tests.benchmarks.kernel_rows import Row, device_ms, row

CONFIG = HstuConfig(items=2, layers=8, width=512, heads=4, d_qk=128, d_v=128, max_events=1024)
HEADS = CONFIG.heads
D = CONFIG.d_qk
WIDTH = CONFIG.width
WORKLOADS = ((256, 290, 1024), (64, 88, 256), (1, 256, 256))  # users, mean and largest number of events


@dataclass(frozen=True, slots=True)
class Work:
    """A batch. x: [tokens, width]; seconds: int32 [tokens]; offsets: int32 [users + 1]."""

    name: str
    max_length: int
    x: Tensor
    seconds: Tensor
    offsets: Tensor
    quick: bool

    @classmethod
    def generate(cls, users: int, mean: int, max_length: int, quick: bool) -> "Work":
        rng = np.random.default_rng(7)
        lengths = np.full(1, max_length) if users == 1 else _lengths(rng, users, mean, max_length)
        offsets = np.concatenate([[0], lengths.cumsum()])
        pauses = np.exp(rng.normal(4, 3, offsets[-1])).clip(0, 1e6).astype(np.int64)
        seconds = pauses.cumsum() - np.repeat((pauses.cumsum() - pauses)[offsets[:-1]], lengths)
        name = f"{users} users, mean {lengths.mean():.0f}, max {max_length} ({offsets[-1]:,} tokens)"
        columns = (torch.tensor(column, dtype=torch.int32, device="cuda") for column in (seconds, offsets))
        return cls(name, max_length, torch.randn(int(offsets[-1]), WIDTH, device="cuda").bfloat16(), *columns, quick)

    @property
    def users(self) -> int:
        return len(self.offsets) - 1

    @property
    def attention(self) -> tuple[float, float]:
        """Operations and bytes of attention in all layers: causal scores; Q, K, V and the result moved once."""
        lengths = self.offsets.diff().double()
        scores = float((lengths * (lengths + 1) / 2).sum())
        return CONFIG.layers * 4.0 * scores * HEADS * D, CONFIG.layers * 2.0 * len(self.x) * 4 * HEADS * D

    @property
    def products(self) -> tuple[float, float]:
        """Operations and bytes of the projections: inputs, weights and results once."""
        flop = 2.0 * len(self.x) * WIDTH * 5 * HEADS * D
        moved = 2.0 * len(self.x) * (2 * WIDTH + 5 * HEADS * D)
        return CONFIG.layers * flop, CONFIG.layers * (moved + 2.0 * WIDTH * 5 * HEADS * D)

    @property
    def encoder(self) -> tuple[float, float]:
        """Operations and bytes of the encoder, if nothing between products and attention leaves the chip twice."""
        flop, moved = (one + other for one, other in zip(self.attention, self.products, strict=True))
        return flop, moved + CONFIG.layers * 2.0 * len(self.x) * HEADS * D  # U is read again

    def measured(
        self,
        implementation: str,
        call: Callable[[], object],
        needed: tuple[float, float] | None = None,
        max_error: float | None = None,
    ) -> Row:
        """Measure the call. needed: operations and bytes, None if they are not counted."""
        ms = device_ms(call, warmup=1, rep=1) if self.quick else device_ms(call, warmup=30, rep=200)
        return row(self.name, implementation, ms, self.users, needed, max_error)


def _lengths(rng: np.random.Generator, users: int, mean: int, max_length: int) -> np.ndarray:
    """Draw log-normal lengths, clipped, scaled until they have this mean."""
    drawn = rng.lognormal(0, 0.8, users)
    scale = float(mean)
    for _ in range(50):
        lengths = np.clip(drawn * scale / drawn.mean(), 1, max_length)
        scale *= mean / lengths.mean()
    return np.clip(drawn * scale / drawn.mean(), 1, max_length).astype(np.int64)
