"""Q, K and V in FP8: attention against the specification on the values that FP8 represents, and their scales."""

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

from kernels.fused_attention_layernorm.fp8 import FP8, FP8_MAX, Fp8Scales, compute_scale
from kernels.fused_attention_layernorm.launch import SAFE_CONFIG, KernelConfig, ProjectionTiles
from kernels.fused_attention_layernorm.plan import AttentionPlan
from kernels.fused_attention_layernorm.projection import compute_row_stats, project_in, project_in_fp8
from pipeline.backends.fused import make_kernel_encoder
from pipeline.features.event_features import TIME_THRESHOLDS
from tests.kernels.fused_attention_layernorm.test_op import DEVICE, Case, make_case, relative_error
from tests.kernels.fused_attention_layernorm.test_op_reference import CONFIG, make_inputs, make_model

# Weights are float16 (2^-11) and the result before its norm is bfloat16, which the interpreter truncates (2^-8).
TOLERANCE = 2**-8 + 2**-10
SCALES = Fp8Scales(q=0.01, k=0.02, v=0.03)
WIDE = msgspec.structs.replace(CONFIG, width=48, d_qk=32, d_v=32)


@pytest.fixture(autouse=True, scope="module")
def _exact_rounding() -> Iterator[None]:
    """Let torch round to FP8: the interpreter loses the carry."""
    original = interpreter._convert_float

    def convert(values: Any, source: Any, target: Any, mode: Any) -> Any:
        if source == tl.float32 and target == tl.float8e4nv:
            return torch.from_numpy(values.copy()).clamp(-FP8_MAX, FP8_MAX).to(FP8).view(torch.uint8).numpy()
        return original(values, source, target, mode)

    interpreter._convert_float = convert
    yield
    interpreter._convert_float = original


def to_fp8(case: Case) -> tuple[Case, Case]:
    """Return the case with q, k, v in FP8, divided by SCALES, and the case of the values they represent, in float32.

    A value beyond FP8's range becomes its largest: a cast makes it NaN on a GPU.
    """
    scales = (SCALES.q, SCALES.k, SCALES.v)
    scaled = (part / scale for part, scale in zip(case.rows, scales, strict=False))
    stored = tuple(part.clamp(-FP8_MAX, FP8_MAX).to(FP8) for part in scaled)
    exact = tuple(part.float() * scale for part, scale in zip(stored, scales, strict=True))
    gate = case.rows[3].half()
    return replace(case, rows=(*stored, gate)), replace(case, rows=(*exact, gate.float()))


@pytest.mark.parametrize(
    ("lengths", "config"),
    [
        ([1], SAFE_CONFIG),
        ([0, 0, 3], SAFE_CONFIG),
        ([63, 64, 65], SAFE_CONFIG),
        ([150, 1, 1, 0, 2, 1], SAFE_CONFIG),
        ([5, 129], KernelConfig(64, 64, 2)),
    ],
)
def test_fp8_attention_equals_the_specification_on_the_represented_values(
    lengths: list[int], config: KernelConfig
) -> None:
    case, exact = to_fp8(make_case(lengths, d=32))
    result = case.run(case.plan(config=config), scales=SCALES)
    assert result.dtype == torch.float16
    assert relative_error(result, exact.reference()) < TOLERANCE


@settings(max_examples=6)
@given(st.lists(st.integers(0, 70), min_size=1, max_size=4), st.integers(0, 1000))
def test_fp8_attention_with_targets_and_contextual_rows_equals_the_specification(lengths: list[int], seed: int) -> None:
    case, exact = to_fp8(make_case(lengths, seed=seed, heads=1, d=32))
    num_targets = torch.tensor([length // 4 for length in lengths], dtype=torch.int32, device=DEVICE)
    result = case.run(case.plan(num_targets=num_targets, num_contextual=2), scales=SCALES)
    expected = exact.reference(num_targets, 2)
    assert not len(expected) or relative_error(result, expected) < TOLERANCE


def test_fp8_last_rows_equal_the_specification_with_and_without_kernels() -> None:
    case, exact = to_fp8(make_case([1, 70, 33], d=32))
    expected = exact.reference()
    last_queries = case.with_last_queries()
    for kernels in (True, False):
        plan = case.plan(kernels=kernels)
        assert relative_error(case.run(plan, scales=SCALES), expected) < TOLERANCE
        assert relative_error(last_queries.run(plan, scales=SCALES, last=True), expected[case.last]) < TOLERANCE


def test_heads_too_narrow_for_an_fp8_product_use_the_reference() -> None:
    case, exact = to_fp8(make_case([20, 3], d=16))
    assert relative_error(case.run(case.plan(), scales=SCALES), exact.reference()) < TOLERANCE


def test_fp8_nan_of_a_neighbour_does_not_spread() -> None:
    case, _ = to_fp8(make_case([40, 40], d=32))
    for part in case.rows:
        part[40:] = torch.full_like(part[40:].float(), float("nan")).to(part.dtype)
    result = case.run(case.plan())
    assert result[:40].isfinite().all()
    assert result[40:].isnan().any()


@pytest.mark.parametrize(
    ("message", "change"),
    [
        (
            "is torch.float8_e5m2, expected float32, bfloat16, float16 or float8_e4m3fn",
            lambda q, k, v, u: (q.to(torch.float8_e5m2), k, v, u),
        ),
        ("k is torch.float16 .* expected torch.float8_e4m3fn", lambda q, k, v, u: (q, k.half(), v, u)),
        (
            "u is torch.float32 .* expected torch.bfloat16 or torch.float16",
            lambda q, k, v, u: (q, k, v, u.float()),
        ),
        ("u is torch.float8_e4m3fn .* expected torch.bfloat16", lambda q, k, v, u: (q, k, v, u.to(FP8))),
        (
            "scales are for q, k and v of torch.float8_e4m3fn, expected none with torch.float16",
            lambda q, k, v, u: (q.half(), k.half(), v.half(), u),
        ),
        ("are for inference, expected torch.no_grad", lambda q, k, v, u: (q, k, v, u.clone().requires_grad_())),
    ],
)
def test_unsupported_use_of_fp8_is_rejected(message: str, change: Callable[..., tuple[Tensor, ...]]) -> None:
    case, _ = to_fp8(make_case([3], d=32))
    invalid = replace(case, rows=change(*case.rows))
    with pytest.raises(ValueError, match=message):
        invalid.run(invalid.plan(), scales=SCALES)


@settings(max_examples=20)
@given(st.integers(0, 1000), st.floats(0.01, 100), st.sampled_from([8, 48, 512]))
def test_scale_keeps_every_row_within_the_fp8_maximum(seed: int, size: float, width: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    weight, bias = (torch.randn(*shape, generator=rng) * size for shape in ((16, width), (16,)))
    rows = torch.cat([weight, -weight, torch.randn(50, width, generator=rng)])  # along a weight z is largest
    normed = torch.nn.functional.layer_norm(rows, (width,))
    values = torch.nn.functional.silu(normed @ weight.T + bias) / compute_scale(weight, bias)
    assert float(values.abs().max()) <= FP8_MAX * (1 + 1e-5)
    if width > 8 and size > 1:  # the bound is no looser than the mean of a weight's row makes it
        assert float(values.max()) > FP8_MAX / 2


@pytest.mark.parametrize(("rows", "split"), [(1, 64), (70, 64), (70, 0), (130, 16)])
def test_fp8_projection_rounds_the_result_of_the_exact_one(rows: int, split: int) -> None:
    rng = torch.Generator().manual_seed(rows)
    x, weight, bias = (torch.randn(*shape, generator=rng).to(DEVICE) for shape in ((rows, 48), (192, 48), (192,)))
    factors = torch.linspace(0.5, 20, 192, device=DEVICE)
    row_stats = compute_row_stats(x)
    weights = (weight, weight.sum(1), bias)
    expected = project_in(x, row_stats, *weights, 1e-6)
    tiles = ProjectionTiles(64, 64, 16, 4, 2)
    out, out8 = project_in_fp8(x, row_stats, *weights, factors, split, 1e-6, tiles)
    torch.testing.assert_close(out, expected[:, :split])
    assert out8.dtype == FP8
    rounded = (expected * factors)[:, split:].clamp(max=FP8_MAX).to(FP8).float()
    # A sum in another order may cross the middle between two FP8 values: one step, an eighth, for a few values.
    torch.testing.assert_close(out8.float(), rounded, rtol=0.13, atol=2**-9)
    assert float((out8.float() != rounded).float().mean()) < 1e-3


def test_fp8_encoder_is_near_the_exact_one() -> None:
    hstu = make_model(1, WIDE)
    inputs = make_inputs([1, 7, 39, 23], seed=1)
    x = torch.randn(70, WIDE.width, generator=torch.Generator().manual_seed(1)).half().to(DEVICE)
    columns = (inputs.seconds, inputs.offsets, TIME_THRESHOLDS)
    seconds, offsets, thresholds = (torch.as_tensor(column).int().to(DEVICE) for column in columns)
    exact = make_kernel_encoder(hstu, torch.float16)
    encoder = make_kernel_encoder(hstu, torch.float16, fp8=True)
    plan = AttentionPlan.from_batch(
        seconds, offsets, thresholds, WIDE.max_events, encoder.qkv_dtype(x.dtype), kernels=True
    )
    expected = exact(x, plan)
    states = encoder(x, plan)
    # An FP8 value is off by 2^-4 at most and by 2.6 % on average; three of them meet in a score and its value.
    assert 1e-4 < relative_error(states, expected) < 0.05
    torch.testing.assert_close(encoder(x, plan, last=True), states[offsets[1:].long() - 1], rtol=1e-2, atol=2e-2)
