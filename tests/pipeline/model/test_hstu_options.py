"""HSTU's options on packed users against the paper's equations 1 to 3 on padded users, written out one by one."""

from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from msgspec.structs import replace
from torch import Tensor, nn

from pipeline.features.event_features import TIME_THRESHOLDS, EncoderInputs
from pipeline.model.config import PRESETS, HstuConfig
from pipeline.model.hstu import HstuLayer
from pipeline.model.padding import PaddedBlocks

SMALL = HstuConfig(layers=1, width=12, heads=2, d_qk=5, d_v=4, max_events=30, dropout=0.0, attention_dropout=0.0)
OPTIONS: list[dict[str, Any]] = [
    *({"norm_in": norm_in, "norm_out": norm_out} for norm_in, norm_out in product(("layer", "rms", "none"), repeat=2)),
    {"time_bias": False, "position_bias": True},
    {"time_bias": True, "position_bias": False},
    {"time_bias": False, "position_bias": False},
    {"attention_scale": "length"},
    {"attention_scale": "length", "norm_in": "rms", "norm_out": "none", "time_bias": False},
]


def make_layer(options: dict[str, Any]) -> HstuLayer:
    torch.manual_seed(7)
    layer = HstuLayer(replace(SMALL, **options))
    for parameter in layer.parameters():  # biases start at zero, which would hide errors
        nn.init.normal_(parameter, std=0.4)
    return layer


def make_inputs(lengths: list[int]) -> tuple[Tensor, EncoderInputs]:
    """Return packed rows [total, width] and their times."""
    rng = np.random.default_rng(len(lengths))
    seconds = [np.cumsum(rng.choice([0, 1, 40, 5_000, 3_000_000], length)) for length in lengths]
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    total = int(offsets[-1])
    inputs = EncoderInputs(
        item_rows=np.zeros(total, np.int32),
        feature_ids=np.zeros((total, 1), np.int32),
        seconds=np.concatenate(seconds).astype(np.int32),
        offsets=offsets,
    )
    return torch.randn(total, SMALL.width), inputs


def specified_norm(kind: str, norm: nn.Module, x: Tensor) -> Tensor:
    weights = dict(norm.named_parameters())
    if kind == "rms":
        return x / (x.square().mean(-1, keepdim=True) + SMALL.eps).sqrt() * weights["weight"]
    if kind == "layer":
        centred = x - x.mean(-1, keepdim=True)
        deviation = (centred.square().mean(-1, keepdim=True) + SMALL.eps).sqrt()
        return centred / deviation * weights["weight"] + weights["bias"]
    return x


def specified_layer(layer: HstuLayer, x: Tensor, inputs: EncoderInputs) -> Tensor:
    """Apply the layer to packed rows [total, width] by padded users: [users, length, ...] throughout."""
    config = layer.config
    lengths = torch.from_numpy(np.diff(inputs.offsets))
    slots = torch.arange(int(lengths.max()))
    is_real = slots < lengths[:, None]
    padded = x.new_zeros(*is_real.shape, config.width).masked_scatter(is_real[..., None], x)
    seconds = torch.zeros(is_real.shape, dtype=torch.int64)
    seconds = seconds.masked_scatter(is_real, torch.from_numpy(inputs.seconds).long())
    projected = F.silu(layer.project_in(specified_norm(config.norm_in, layer.norm_in, padded)))
    u, q, v, k = projected.split([config.heads * d for d in (config.d_v, config.d_qk, config.d_v, config.d_qk)], dim=2)
    attended = []
    for head in range(config.heads):
        qk_columns = slice(head * config.d_qk, (head + 1) * config.d_qk)
        v_columns = slice(head * config.d_v, (head + 1) * config.d_v)
        scores = q[..., qk_columns] @ k[..., qk_columns].transpose(1, 2)  # [users, length, length]
        if config.position_bias:
            scores = scores + layer.position_bias[head, (slots[:, None] - slots).clamp(min=0)]
        if config.time_bias:
            elapsed = seconds[:, :, None] - seconds[:, None, :]
            scores = scores + layer.time_bias[head, (elapsed[..., None] >= torch.tensor(TIME_THRESHOLDS)).sum(-1)]
        sums = torch.tril(F.silu(scores)) @ v[..., v_columns]
        attended.append(sums / (1 + slots[:, None] if config.attention_scale == "length" else config.max_events))
    gated = specified_norm(config.norm_out, layer.norm_out, torch.cat(attended, dim=2)) * u
    return (padded + layer.project_out(gated))[is_real]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_option_equals_the_padded_specification_in_states_and_gradients(options: dict[str, Any]) -> None:
    layer = make_layer(options)
    x, inputs = make_inputs([1, 6, 6, 6, 21, 30])
    direction = torch.randn(len(x), SMALL.width)
    packed = layer(x, PaddedBlocks.from_inputs(inputs))
    expected = specified_layer(layer, x, inputs)
    torch.testing.assert_close(packed, expected, rtol=1e-4, atol=1e-5)
    last = layer(x, PaddedBlocks.from_inputs(inputs), last=True)
    torch.testing.assert_close(last, expected[inputs.offsets[1:] - 1], rtol=1e-4, atol=1e-5)
    gradients = []
    for states in (packed, expected):
        layer.zero_grad()
        (states * direction).sum().backward()
        gradients.append({name: part.grad.clone() for name, part in layer.named_parameters() if part.grad is not None})
    unused = {bias for bias in ("time_bias", "position_bias") if not getattr(layer.config, bias)}
    assert gradients[0].keys() == gradients[1].keys() == dict(layer.named_parameters()).keys() - unused
    for name, expected_gradient in gradients[1].items():
        torch.testing.assert_close(gradients[0][name], expected_gradient, rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.parametrize("scale", ["max_events", "length"])
def test_later_events_never_change_an_earlier_row(scale: str) -> None:
    layer = make_layer({"attention_scale": scale, "norm_out": "none"})
    x, inputs = make_inputs([30])
    prefix = inputs.gather_runs(np.array([0]), np.array([11]))
    of_full = layer(x, PaddedBlocks.from_inputs(inputs))[:11]
    of_prefix = layer(x[:11], PaddedBlocks.from_inputs(prefix))
    torch.testing.assert_close(of_full, of_prefix, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("name", "parameters"), [("tiny", 43e3), ("1m", 1e6), ("10m", 1e7), ("100m", 1e8)])
def test_preset_has_as_many_layer_parameters_as_its_name_says(name: str, parameters: float) -> None:
    with torch.device("meta"):
        layers = [HstuLayer(PRESETS[name]) for _ in range(PRESETS[name].layers)]
    counted = sum(part.numel() for layer in layers for part in layer.parameters())
    assert abs(counted / parameters - 1) < 0.07


def test_smallest_preset_is_the_default() -> None:
    assert PRESETS["tiny"] == HstuConfig()


@pytest.mark.parametrize("wrong", [{"recent_events": 200}, {"recent_events": 20, "history_events": 199}], ids=str)
def test_sessions_without_rows_are_rejected(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="want them in ascending order"):
        HstuConfig(**wrong)
