"""Checks of this operator's arguments. All raise ValueError that names the argument and what was expected."""

import math

import torch
from torch import Tensor

from kernels.validation import FLOAT_DTYPES, INT_DTYPES, MAX_ROWS, offset_faults, require, require_values

MAX_THRESHOLDS = 255  # a bucket index is a byte
HEAD_WIDTHS = (16, 32, 64, 128, 256)  # widths of a head that the kernels support


def check_rows(q: Tensor, k: Tensor, v: Tensor, u: Tensor, total: int, queries: int, device: torch.device) -> None:
    """Check q and u of `queries` rows, k and v of `total` rows: dtypes, shapes and device."""
    require(
        q.dtype in FLOAT_DTYPES and q.dim() == 3 and q.shape[0] == queries and q.device == device,
        "q",
        q,
        f"float32, bfloat16 or float16 [{queries}, heads, d_qk] on {device}",
    )
    require(q.shape[1] > 0, "q", q, "at least one head")
    heads, d_qk = q.shape[1:]
    d_v = v.shape[-1]
    for name, part, shape in (
        ("k", k, (total, heads, d_qk)),
        ("v", v, (total, heads, d_v)),
        ("u", u, (queries, heads, d_v)),
    ):
        require(
            part.dtype == q.dtype and part.shape == shape and part.device == device,
            name,
            part,
            f"{q.dtype} {list(shape)} on {device}",
        )


def check_tables(
    heads: int,
    d_v: int,
    max_events: int,
    times: int,
    position_bias: Tensor,
    time_bias: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    device: torch.device,
) -> None:
    """Check the bias tables and the norm's parameters: float32, their shapes and device."""
    for name, table, shape in (
        ("position_bias", position_bias, (heads, max_events)),
        ("time_bias", time_bias, (heads, times)),
        ("norm_weight", norm_weight, (heads * d_v,)),
        ("norm_bias", norm_bias, (heads * d_v,)),
    ):
        require(
            table.dtype == torch.float32 and table.shape == shape and table.device == device,
            name,
            table,
            f"torch.float32 {list(shape)} on {device}",
        )


def check_numbers(eps: float, alpha: float) -> None:
    """Check that eps is above 0 and both are finite."""
    if not (0.0 < eps < math.inf and math.isfinite(alpha)):
        raise ValueError(f"eps is {eps} and alpha {alpha}, expected a finite eps above 0 and a finite alpha")


def check_plan(dtype: torch.dtype, max_length: int, num_contextual: int) -> None:
    """Check a plan's dtype and numbers of rows."""
    if dtype not in FLOAT_DTYPES:
        raise ValueError(f"dtype is {dtype}, expected float32, bfloat16 or float16")
    if max_length < 0 or num_contextual < 0:
        raise ValueError(
            f"max_length is {max_length} and num_contextual {num_contextual}, expected numbers of rows, at least 0"
        )


def check_encoder(x: Tensor, width: int, dtype: torch.dtype, total: int, device: torch.device, kernels: bool) -> None:
    """Check the input of an encoder. width, dtype: of its weights; total, device, kernels: of the plan."""
    require(
        x.dtype == dtype and x.shape == (total, width) and x.device == device,
        "x",
        x,
        f"{dtype} [{total}, {width}] on {device}",
    )
    if not kernels:
        raise ValueError("the plan is for the reference, expected one with kernels=True")


def check_length(max_length: int, max_events: int) -> None:
    """Check that no user's rows can reach past the position table."""
    if max_length > max_events:
        raise ValueError(f"the plan's max_length is {max_length}, expected at most max_events, {max_events}")


def check_batch(seconds: Tensor, offsets: Tensor, thresholds: Tensor) -> None:
    """Check dtypes, shapes and devices only; does not wait for the device."""
    device = seconds.device
    require(seconds.dtype == torch.int32 and seconds.dim() == 1, "seconds", seconds, "torch.int32 [total]")
    require(
        offsets.dtype in INT_DTYPES and offsets.dim() == 1 and len(offsets) > 0 and offsets.device == device,
        "offsets",
        offsets,
        f"int32 or int64 [users + 1] on {device}",
    )
    require(
        thresholds.dtype == torch.int32
        and thresholds.dim() == 1
        and len(thresholds) <= MAX_THRESHOLDS
        and thresholds.device == device,
        "thresholds",
        thresholds,
        f"torch.int32 of at most {MAX_THRESHOLDS} on {device}",
    )


def check_values(seconds: Tensor, offsets: Tensor, thresholds: Tensor, max_length: int) -> None:
    """Check the values; waits for the device."""
    lengths = offsets.diff()
    longest = lengths.max() if len(lengths) else offsets.new_zeros(())
    too_long = {
        f"must leave no user more than the {max_length} rows of the position table": longest > max_length,
        f"must end with at most {MAX_ROWS} rows": offsets[-1] > MAX_ROWS,
    }
    require_values("offsets", offsets, offset_faults(offsets, len(seconds)) | too_long)
    require_values("thresholds", thresholds, {"must not decrease": (thresholds.diff() < 0).any()})


def resolve_seed(dropout: float, seed: Tensor | int | None, device: torch.device) -> Tensor | None:
    """Return the seed as int64 [] on the device, None without dropout."""
    if not 0.0 <= dropout < 1.0:  # rejects NaN too
        raise ValueError(f"dropout is {dropout}, expected a probability from 0 up to but not 1")
    if not dropout:
        return None
    if seed is None:
        raise ValueError(f"seed is None with dropout {dropout}, expected an int64 tensor [] on {device} or an int")
    if isinstance(seed, int):
        if not -(2**63) <= seed < 2**63:
            raise ValueError(f"seed is {seed}, expected 64 bits")
        return torch.full((), seed, dtype=torch.int64, device=device)
    if not isinstance(seed, Tensor):
        raise ValueError(f"seed is {seed!r}, expected an int64 tensor [] on {device} or an int")
    require(
        seed.dtype == torch.int64 and seed.dim() == 0 and seed.device == device,
        "seed",
        seed,
        f"torch.int64 [] on {device}",
    )
    return seed


def check_last(num_contextual: int, dropout: float) -> None:
    """Check that the batch and the options are ones that `last` supports."""
    if num_contextual:
        raise ValueError(f"last=True supports no contextual rows, expected a plan without its {num_contextual}")
    if dropout:
        raise ValueError(f"last=True is for inference, expected no dropout instead of {dropout}")


def check_finite(**parts: Tensor) -> None:
    """Check that all values are finite, for debugging; waits for the device."""
    for name, part in parts.items():
        require_values(name, part, {"holds NaN or infinity": ~part.float().isfinite().all()})
