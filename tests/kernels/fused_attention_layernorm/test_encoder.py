"""The encoder of fused layers against the model's own layers, and its last rows against all rows."""

from collections.abc import Callable
from dataclasses import replace

import msgspec
import pytest
import torch
from torch import Tensor

from kernels.fused_attention_layernorm.encoder import KernelEncoder
from kernels.fused_attention_layernorm.plan import AttentionPlan
from pipeline.backends.fused import make_kernel_encoder
from pipeline.features.event_features import TIME_THRESHOLDS, EncoderInputs
from pipeline.model.padding import PaddedBlocks
from tests.kernels.fused_attention_layernorm.test_op_reference import CONFIG, DEVICE, make_inputs, make_model

WIDE = msgspec.structs.replace(CONFIG, width=48, d_qk=16, d_v=32)


def make_plan(inputs: EncoderInputs) -> AttentionPlan:
    columns = (inputs.seconds, inputs.offsets, TIME_THRESHOLDS)
    seconds, offsets, thresholds = (torch.as_tensor(column).int().to(DEVICE) for column in columns)
    return AttentionPlan.from_batch(seconds, offsets, thresholds, WIDE.max_events, torch.float32, kernels=True)


def make_encoder_and_input(lengths: list[int]) -> tuple[KernelEncoder, Tensor, AttentionPlan]:
    encoder = make_kernel_encoder(make_model(1, WIDE), torch.float32)
    x = torch.randn(sum(lengths), WIDE.width, device=DEVICE)
    return encoder, x, make_plan(make_inputs(lengths, seed=1))


def test_plan_of_longer_users_than_the_encoders_tables_is_rejected() -> None:
    seconds, thresholds = (torch.zeros(n, dtype=torch.int32, device=DEVICE) for n in (3, 4))
    plan = AttentionPlan.from_batch(
        seconds, torch.tensor([0, 3], device=DEVICE), thresholds, WIDE.max_events + 1, torch.float32
    )
    encoder = make_kernel_encoder(make_model(1, WIDE), torch.float32)
    message = f"max_length is {WIDE.max_events + 1}, expected at most .* {WIDE.max_events}$"
    with pytest.raises(ValueError, match=message):
        encoder(torch.zeros(3, WIDE.width, device=DEVICE), plan)


def test_encoder_gives_the_models_states_and_its_last_states() -> None:
    hstu = make_model(1, WIDE)
    inputs = make_inputs([1, 7, 39, 23], seed=1)
    x = torch.randn(70, WIDE.width, device=DEVICE)
    expected = x
    with torch.no_grad():
        for layer in hstu.layers:
            expected = layer(expected, PaddedBlocks.from_inputs(inputs, DEVICE))
    plan = make_plan(inputs)
    encoder = make_kernel_encoder(hstu, torch.float32)
    torch.testing.assert_close(encoder(x, plan), expected, rtol=1e-4, atol=1e-4)
    expected_last = expected[plan.offsets[1:].long() - 1]
    torch.testing.assert_close(encoder(x, plan, last=True), expected_last, rtol=1e-4, atol=1e-4)


def test_strided_and_misaligned_rows_have_equal_states() -> None:
    encoder, x, plan = make_encoder_and_input([3, 20])
    expected = encoder(x, plan)
    strided = torch.cat([x, torch.full_like(x, 77)], 1)[:, : WIDE.width]
    misaligned = torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)  # 4 bytes past an aligned address
    for rows in (strided, misaligned):
        torch.testing.assert_close(encoder(rows, plan), expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x[1:], r"x is torch.float32 \[22, 48\] on .*, expected torch.float32 \[23, 48\]"),
        (lambda x: x[:, 16:].contiguous(), r"x is torch.float32 \[23, 32\]"),
        (Tensor.half, r"x is torch.float16 \[23, 48\]"),
        (lambda x: x.to("meta"), "x is .* on meta"),
    ],
)
def test_rows_of_another_plan_or_encoder_are_rejected(change: Callable[[Tensor], Tensor], message: str) -> None:
    encoder, x, plan = make_encoder_and_input([3, 20])
    with pytest.raises(ValueError, match=message):
        encoder(change(x), plan)


def test_plan_without_kernels_is_rejected() -> None:
    encoder, x, plan = make_encoder_and_input([3, 20])
    with pytest.raises(ValueError, match="expected one with kernels=True"):
        encoder(x, replace(plan, kernels=False))
