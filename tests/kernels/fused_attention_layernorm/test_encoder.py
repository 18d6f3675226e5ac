"""The encoder of fused layers against the model's own, and against the rows of all states."""

from collections.abc import Callable
from dataclasses import replace

import msgspec
import pytest
import torch
from torch import Tensor

from kernels.fused_attention_layernorm.encoder import KernelEncoder
from kernels.fused_attention_layernorm.plan import AttentionPlan
from pipeline.backends.fused import make_kernel_encoder
from pipeline.features.event_features import TIME_THRESHOLDS
from pipeline.model.padding import PaddedBlocks
from tests.kernels.fused_attention_layernorm.test_op_reference import CONFIG, DEVICE, inputs_of_lengths, model

WIDE = msgspec.structs.replace(CONFIG, width=48, d_qk=16, d_v=32)


def test_an_encoder_refuses_a_plan_of_longer_users_than_its_tables_have_columns() -> None:
    seconds, thresholds = (torch.zeros(n, dtype=torch.int32, device=DEVICE) for n in (3, 4))
    plan = AttentionPlan.from_batch(
        seconds, torch.tensor([0, 3], device=DEVICE), thresholds, WIDE.max_events + 1, torch.float32
    )
    with pytest.raises(ValueError, match=f"max_length is {WIDE.max_events + 1}, wanted at most .* {WIDE.max_events}$"):
        make_kernel_encoder(model(1, WIDE), torch.float32)(torch.zeros(3, WIDE.width, device=DEVICE), plan)


def test_fused_layers_give_the_models_states_and_its_newest_ones() -> None:
    hstu, inputs = model(1, WIDE), inputs_of_lengths([1, 7, 39, 23], seed=1)
    wanted = x = torch.randn(70, WIDE.width, device=DEVICE)
    with torch.no_grad():
        for layer in hstu.layers:
            wanted = layer(wanted, PaddedBlocks.from_inputs(inputs, DEVICE))
    columns = (inputs.seconds, inputs.offsets, TIME_THRESHOLDS)
    seconds, offsets, thresholds = (torch.as_tensor(column).int().to(DEVICE) for column in columns)
    plan = AttentionPlan.from_batch(seconds, offsets, thresholds, WIDE.max_events, torch.float32, kernels=True)
    encode = make_kernel_encoder(hstu, torch.float32)
    torch.testing.assert_close(encode(x, plan), wanted, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(encode(x, plan, last=True), wanted[offsets[1:].long() - 1], rtol=1e-4, atol=1e-4)


def encoder_and_plan(lengths: list[int]) -> tuple[KernelEncoder, Tensor, AttentionPlan]:
    inputs = inputs_of_lengths(lengths, seed=1)
    columns = (inputs.seconds, inputs.offsets, TIME_THRESHOLDS)
    seconds, offsets, thresholds = (torch.as_tensor(column).int().to(DEVICE) for column in columns)
    plan = AttentionPlan.from_batch(seconds, offsets, thresholds, WIDE.max_events, torch.float32, kernels=True)
    return (
        make_kernel_encoder(model(1, WIDE), torch.float32),
        torch.randn(sum(lengths), WIDE.width, device=DEVICE),
        plan,
    )


def test_rows_that_lie_apart_have_the_same_states() -> None:
    encode, x, plan = encoder_and_plan([3, 20])
    wanted = encode(x, plan)
    within = torch.cat([x, torch.full_like(x, 77)], 1)[:, : WIDE.width]
    shifted = torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)  # 4 bytes beyond an aligned address
    for strange in (within, shifted):
        torch.testing.assert_close(encode(strange, plan), wanted, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x[1:], r"x is torch.float32 \[22, 48\] on .*, wanted torch.float32 \[23, 48\]"),
        (lambda x: x[:, 16:].contiguous(), r"x is torch.float32 \[23, 32\]"),
        (Tensor.half, r"x is torch.float16 \[23, 48\]"),
        (lambda x: x.to("meta"), "x is .* on meta"),
    ],
)
def test_rows_of_another_plan_or_encoder_are_refused(change: Callable[[Tensor], Tensor], message: str) -> None:
    encode, x, plan = encoder_and_plan([3, 20])
    with pytest.raises(ValueError, match=message):
        encode(change(x), plan)
    with pytest.raises(ValueError, match="wanted one with kernels=True"):
        encode(x, replace(plan, kernels=False))
