"""What this operator refuses, with the argument, its shape, and what was expected. All raise ValueError."""

import math

import torch
from torch import Tensor

from kernels.fused_attention_layernorm.fp8 import DTYPE as FP8
from kernels.fused_attention_layernorm.fp8 import Fp8Scales
from kernels.validation import FLOATS, INTEGERS, MAX_ROWS, offset_faults, require, require_values

MAX_THRESHOLDS = 255  # a bucket is a byte
WIDTHS = (16, 32, 64, 128, 256)  # of a head, that the kernels know
HALVES = (torch.bfloat16, torch.float16)


def check_rows(q: Tensor, k: Tensor, v: Tensor, u: Tensor, total: int, queries: int, device: torch.device) -> None:
    require(q.dtype in (*FLOATS, FP8) and q.dim() == 3 and q.shape[0] == queries and q.device == device,
            "q", q, f"float32, bfloat16, float16 or float8_e4m3fn [{queries}, heads, d_qk] on {device}")  # fmt: skip
    require(q.shape[1] > 0, "q", q, "a head at least")
    heads, d_qk, d_v = q.shape[1], q.shape[2], v.shape[-1]
    gates = HALVES if q.dtype == FP8 else (q.dtype,)
    for name, part, dtypes, wanted in (
        ("k", k, (q.dtype,), (total, heads, d_qk)),
        ("v", v, (q.dtype,), (total, heads, d_v)),
        ("u", u, gates, (queries, heads, d_v)),
    ):
        require(part.dtype in dtypes and part.shape == wanted and part.device == device,
                name, part, f"{' or '.join(map(str, dtypes))} {list(wanted)} on {device}")  # fmt: skip


def check_tables(heads: int, d_v: int, max_events: int, times: int, position_bias: Tensor, time_bias: Tensor,
                 norm_weight: Tensor, norm_bias: Tensor, device: torch.device) -> None:  # fmt: skip
    tables = (("position_bias", position_bias, (heads, max_events)), ("time_bias", time_bias, (heads, times)))
    norms = (("norm_weight", norm_weight, (heads * d_v,)), ("norm_bias", norm_bias, (heads * d_v,)))
    for name, table, wanted in tables + norms:
        require(table.dtype == torch.float32 and table.shape == wanted and table.device == device,
                name, table, f"torch.float32 {list(wanted)} on {device}")  # fmt: skip


def check_numbers(eps: float, alpha: float) -> None:
    if not (0.0 < eps < math.inf and math.isfinite(alpha)):
        raise ValueError(f"eps is {eps} and alpha {alpha}, wanted a finite eps above 0 and a finite alpha")


def check_plan(dtype: torch.dtype, max_length: int, contextual: int) -> None:
    if dtype not in (*FLOATS, FP8):
        raise ValueError(f"dtype is {dtype}, wanted float32, bfloat16, float16 or float8_e4m3fn")
    if max_length < 0 or contextual < 0:
        raise ValueError(f"max_length is {max_length} and contextual {contextual}, wanted numbers of rows")


def check_encoder(x: Tensor, width: int, dtype: torch.dtype, total: int, device: torch.device, kernels: bool) -> None:
    """width, dtype: of the encoder's weights; the others: of the plan."""
    require(x.dtype == dtype and x.shape == (total, width) and x.device == device,
            "x", x, f"{dtype} [{total}, {width}] on {device}")  # fmt: skip
    if not kernels:
        raise ValueError("the plan is for the reference, wanted one with kernels=True")


def check_length(max_length: int, max_events: int) -> None:
    """A longer user's rows would lie beyond the position table."""
    if max_length > max_events:
        raise ValueError(f"the plan's max_length is {max_length}, wanted at most max_events, {max_events}")


def check_batch(seconds: Tensor, offsets: Tensor, thresholds: Tensor, targets: Tensor | None) -> None:
    """Types, shapes and devices alone: nothing here waits for the device."""
    device = seconds.device
    require(seconds.dtype == torch.int32 and seconds.dim() == 1, "seconds", seconds, "torch.int32 [total]")
    require(offsets.dtype in INTEGERS and offsets.dim() == 1 and len(offsets) > 0 and
            offsets.device == device, "offsets", offsets, f"int32 or int64 [users + 1] on {device}")  # fmt: skip
    require(thresholds.dtype == torch.int32 and thresholds.dim() == 1 and len(thresholds) <= MAX_THRESHOLDS and
            thresholds.device == device,
            "thresholds", thresholds, f"torch.int32 of at most {MAX_THRESHOLDS} on {device}")  # fmt: skip
    if targets is not None:
        users = len(offsets) - 1
        require(targets.dtype == torch.int32 and targets.shape == (users,) and targets.device == device,
                "targets", targets, f"torch.int32 [{users}] on {device}")  # fmt: skip


def check_values(seconds: Tensor, offsets: Tensor, thresholds: Tensor, targets: Tensor | None, max_length: int) -> None:
    """Waits for the device."""
    lengths = offsets.diff()
    longest = lengths.max() if len(lengths) else offsets.new_zeros(())
    too_long = {f"must leave no user more than the {max_length} rows of the position table": longest > max_length,
                f"must end with at most {MAX_ROWS} rows": offsets[-1] > MAX_ROWS}  # fmt: skip
    require_values("offsets", offsets, offset_faults(offsets, len(seconds)) | too_long)
    require_values("thresholds", thresholds, {"must not decrease": (thresholds.diff() < 0).any()})
    if targets is not None:
        wrong = ((targets < 0) | (targets > lengths)).any()
        require_values("targets", targets, {"must be between 0 and the user's rows": wrong})


def seed_of(dropout: float, seed: Tensor | int | None, device: torch.device) -> Tensor | None:
    """int64 [] on the device, None without dropout."""
    if not 0.0 <= dropout < 1.0:  # NaN too
        raise ValueError(f"dropout is {dropout}, wanted a probability from 0 up to but not 1")
    if not dropout:
        return None
    if seed is None:
        raise ValueError(f"seed is None with dropout {dropout}, wanted an int64 tensor [] on {device} or an int")
    if isinstance(seed, int):
        if not -(2**63) <= seed < 2**63:
            raise ValueError(f"seed is {seed}, wanted 64 bits")
        return torch.full((), seed, dtype=torch.int64, device=device)
    if not isinstance(seed, Tensor):
        raise ValueError(f"seed is {seed!r}, wanted an int64 tensor [] on {device} or an int")
    require(seed.dtype == torch.int64 and seed.dim() == 0 and seed.device == device,
            "seed", seed, f"torch.int64 [] on {device}")  # fmt: skip
    return seed


def check_fp8(q: Tensor, scales: Fp8Scales | None, *others: Tensor) -> None:
    if q.dtype != FP8 and scales is not None:
        raise ValueError(f"scales are for q, k and v of {FP8}, wanted none with {q.dtype}")
    if q.dtype == FP8 and torch.is_grad_enabled() and any(part.requires_grad for part in (q, *others)):
        raise ValueError(f"q, k and v of {FP8} are for inference, wanted torch.no_grad() around the call")


def check_last(targets: Tensor | None, contextual: int, dropout: float) -> None:
    if targets is not None or contextual:
        raise ValueError("last=True knows neither targets nor contextual rows, wanted a plan without them")
    if dropout:
        raise ValueError(f"last=True is for inference, wanted no dropout instead of {dropout}")


def check_finite(**parts: Tensor) -> None:
    """For debugging; waits for the device."""
    for name, part in parts.items():
        require_values(name, part, {"holds NaN or infinity": ~part.float().isfinite().all()})
