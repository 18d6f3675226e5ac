"""Q, K and V in FP8: attention against the specification on what the FP8 values stand for, and their scales."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import msgspec
import pytest
import torch
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from triton.runtime import interpreter

from kernels.fused_attention_layernorm.fp8 import DTYPE, FP8_MAX, Fp8Scales, compute_scale
from kernels.fused_attention_layernorm.launch import SAFE_CONFIG, KernelConfig
from kernels.fused_attention_layernorm.plan import AttentionPlan
from kernels.fused_attention_layernorm.projection import ProjectionTiles, project_in, project_in_fp8, compute_row_stats
from pipeline.backends.fused import encoder_of
from pipeline.features.event_features import TIME_THRESHOLDS
from tests.kernels.fused_attention_layernorm.test_op import DEVICE, Case, case_of, error
from tests.kernels.fused_attention_layernorm.test_op_reference import CONFIG, inputs_of_lengths, model

# Weights are float16 (2^-11) and the result waits for its norm in bfloat16, which the interpreter cuts off (2^-8).
TOLERANCE = 2**-8 + 2**-10
SCALES = Fp8Scales(q=0.01, k=0.02, v=0.03)
WIDE = msgspec.structs.replace(CONFIG, width=48, d_qk=32, d_v=32)


@pytest.fixture(autouse=True, scope="module")
def _rounded() -> Iterator[None]:
    """The interpreter loses the carry when it rounds to FP8: torch does it there."""
    cast = interpreter._convert_float

    def convert(values: Any, source: Any, wanted: Any, mode: Any) -> Any:
        if source == tl.float32 and wanted == tl.float8e4nv:
            return torch.from_numpy(values.copy()).clamp(-FP8_MAX, FP8_MAX).to(DTYPE).view(torch.uint8).numpy()
        return cast(values, source, wanted, mode)

    interpreter._convert_float = convert
    yield
    interpreter._convert_float = cast


def narrow(case: Case) -> tuple[Case, Case]:
    """q, k, v in FP8, over SCALES, and the case that they stand for, in float32."""
    scales = (SCALES.q, SCALES.k, SCALES.v)
    held = tuple((part / scale).to(DTYPE) for part, scale in zip(case.rows, scales, strict=False))
    meant = tuple(part.float() * scale for part, scale in zip(held, scales, strict=True))
    gate = case.rows[3].half()
    return replace(case, rows=(*held, gate)), replace(case, rows=(*meant, gate.float()))


@pytest.mark.parametrize(
    ("lengths", "launch"),
    [
        ([1], SAFE_CONFIG),
        ([0, 0, 3], SAFE_CONFIG),
        ([63, 64, 65], SAFE_CONFIG),
        ([150, 1, 1, 0, 2, 1], SAFE_CONFIG),
        ([5, 129], KernelConfig(64, 64, 2)),
    ],
)
def test_attention_in_fp8_equals_the_specification_on_what_its_values_stand_for(
    lengths: list[int], launch: KernelConfig
) -> None:
    held, meant = narrow(case_of(lengths, d=32))
    result = held.kernel(held.plan(launch=launch), scales=SCALES)
    assert result.dtype == torch.float16
    assert error(result, meant.specification()) < TOLERANCE


@settings(max_examples=10, deadline=None)
@given(st.lists(st.integers(0, 90), min_size=1, max_size=5), st.integers(0, 1000))
def test_any_lengths_with_candidates_and_contextual_rows_do(lengths: list[int], seed: int) -> None:
    held, meant = narrow(case_of(lengths, seed, heads=1, d=32))
    targets = torch.tensor([length // 4 for length in lengths], dtype=torch.int32, device=DEVICE)
    result = held.kernel(held.plan(targets=targets, contextual=2), scales=SCALES)
    wanted = meant.specification(targets, 2)
    assert not len(wanted) or error(result, wanted) < TOLERANCE


def test_the_newest_rows_and_the_reference_do() -> None:
    held, meant = narrow(case_of([1, 70, 33], d=32))
    newest = held.offsets[1:] - 1
    q, k, v, u = held.rows
    wanted, alone = meant.specification(), replace(held, rows=(q[newest], k, v, u[newest]))
    for kernels in (True, False):
        plan = held.plan(kernels=kernels)
        assert error(held.kernel(plan, scales=SCALES), wanted) < TOLERANCE
        assert error(alone.kernel(plan, scales=SCALES, last=True), wanted[newest]) < TOLERANCE


def test_heads_too_narrow_for_an_fp8_product_get_the_reference() -> None:
    held, meant = narrow(case_of([20, 3], d=16))
    assert error(held.kernel(held.plan(), scales=SCALES), meant.specification()) < TOLERANCE


def test_a_neighbours_nan_stays_with_the_neighbour_in_fp8() -> None:
    held, _ = narrow(case_of([40, 40], d=32))
    for part in held.rows:
        part[40:] = torch.full_like(part[40:].float(), float("nan")).to(part.dtype)
    result = held.kernel(held.plan())
    assert result[:40].isfinite().all()
    assert result[40:].isnan().any()


@pytest.mark.parametrize(
    ("message", "change"),
    [
        (r"is torch.float8_e5m2, wanted float32, bfloat16, float16 or float8_e4m3fn", lambda q, k, v, u: (
            q.to(torch.float8_e5m2), k, v, u)),
        ("k is torch.float16 .* wanted torch.float8_e4m3fn", lambda q, k, v, u: (q, k.half(), v, u)),
        ("u is torch.float32 .* wanted torch.bfloat16 or torch.float16", lambda q, k, v, u: (q, k, v, u.float())),
        ("u is torch.float8_e4m3fn .* wanted torch.bfloat16", lambda q, k, v, u: (q, k, v, u.to(DTYPE))),
        ("scales are for q, k and v of torch.float8_e4m3fn, wanted none with torch.float16", lambda q, k, v, u: (
            q.half(), k.half(), v.half(), u)),
        ("are for inference, wanted torch.no_grad", lambda q, k, v, u: (q, k, v, u.clone().requires_grad_())),
    ],
)  # fmt: skip
def test_what_fp8_does_not_know_is_named(message: str, change: Callable[..., tuple[Tensor, ...]]) -> None:
    held, _ = narrow(case_of([3], d=32))
    wrong = replace(held, rows=change(*held.rows))
    with pytest.raises(ValueError, match=message):
        wrong.kernel(wrong.plan(), scales=SCALES)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1000), st.floats(0.01, 100), st.sampled_from([8, 48, 512]))
def test_no_row_reaches_beyond_the_largest_fp8_value(seed: int, size: float, width: int) -> None:
    random = torch.Generator().manual_seed(seed)
    weight, bias = (torch.randn(*shape, generator=random) * size for shape in ((16, width), (16,)))
    rows = torch.cat([weight, -weight, torch.randn(50, width, generator=random)])  # along a weight z is largest
    normed = torch.nn.functional.layer_norm(rows, (width,))
    values = torch.nn.functional.silu(normed @ weight.T + bias) / compute_scale(weight, bias)
    assert float(values.abs().max()) <= FP8_MAX * (1 + 1e-5)
    if width > 8 and size > 1:  # and the bound is no looser than the mean of a weight's row makes it
        assert float(values.max()) > FP8_MAX / 2


@pytest.mark.parametrize(("rows", "split"), [(1, 64), (70, 64), (70, 0), (130, 16)])
def test_a_projection_narrows_what_it_else_writes(rows: int, split: int) -> None:
    random = torch.Generator().manual_seed(rows)
    x, weight, bias = (torch.randn(*shape, generator=random).to(DEVICE) for shape in ((rows, 48), (192, 48), (192,)))
    factors, moments = torch.linspace(0.5, 20, 192, device=DEVICE), compute_row_stats(x)
    rest = (weight, weight.sum(1), bias)
    wanted = project_in(x, moments, *rest, 1e-6)
    out, out8 = project_in_fp8(x, moments, *rest, factors, split, 1e-6, ProjectionTiles(64, 64, 16, 4, 2))
    torch.testing.assert_close(out, wanted[:, :split])
    assert out8.dtype == DTYPE
    held = (wanted * factors)[:, split:].clamp(max=FP8_MAX).to(DTYPE).float()
    # A sum in another order may cross the middle between two FP8 values: one step, an eighth, of a few.
    torch.testing.assert_close(out8.float(), held, rtol=0.13, atol=2**-9)
    assert float((out8.float() != held).float().mean()) < 1e-3


def test_an_encoder_in_fp8_stays_near_the_one_without() -> None:
    hstu, inputs = model(1, WIDE), inputs_of_lengths([1, 7, 39, 23], seed=1)
    x = torch.randn(70, WIDE.width, generator=torch.Generator().manual_seed(1)).half().to(DEVICE)
    columns = (inputs.seconds, inputs.offsets, TIME_THRESHOLDS)
    seconds, offsets, thresholds = (torch.as_tensor(column).int().to(DEVICE) for column in columns)
    exact, encode = make_kernel_encoder(hstu, torch.float16), make_kernel_encoder(hstu, torch.float16, fp8=True)
    plan = AttentionPlan.from_batch(
        seconds, offsets, thresholds, WIDE.max_events, encode.qkv_dtype(x.dtype), kernels=True
    )
    wanted, states = exact(x, plan), encode(x, plan)
    # An FP8 value is off by 2^-4 at most and by 2.6 % in the mean; three of them meet in a score and its value.
    assert 1e-4 < error(states, wanted.float()) < 0.05
    torch.testing.assert_close(encode(x, plan, last=True), states[offsets[1:].long() - 1], rtol=1e-2, atol=2e-2)
