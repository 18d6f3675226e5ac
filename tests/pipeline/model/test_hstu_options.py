"""HSTU's options, packed, against the paper's equations 1 to 3 on padded users, written out one by one."""

from itertools import product
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.features.event_features import TIME_THRESHOLDS, EncoderInputs
from pipeline.model.config import PRESETS, HstuConfig
from pipeline.model.hstu import HstuLayer
from pipeline.model.padding import PaddedBlocks

SMALL = HstuConfig(layers=1, width=12, heads=2, d_qk=5, d_v=4, max_events=30, dropout=0.0, attention_dropout=0.0)
OPTIONS: list[dict[str, Any]] = [
    *({"norm_in": of_input, "norm_out": of_gate} for of_input, of_gate in product(("layer", "rms", "none"), repeat=2)),
    *({"time_bias": time, "position_bias": position} for time, position in ((False, True), (True, False))),
    {"time_bias": False, "position_bias": False},
    {"attention_scale": "length"},
    {"attention_scale": "length", "norm_in": "rms", "norm_out": "none", "time_bias": False},
]


def layer_of(options: dict[str, Any]) -> HstuLayer:
    torch.manual_seed(7)
    layer = HstuLayer(msgspec.structs.replace(SMALL, **options))
    for parameter in layer.parameters():  # biases begin at zero and would hide their errors
        nn.init.normal_(parameter, std=0.4)
    return layer


def users_of(lengths: list[int]) -> tuple[Tensor, EncoderInputs]:
    """Packed rows [total, width] and their times."""
    random = np.random.default_rng(len(lengths))
    seconds = [np.cumsum(random.choice([0, 1, 40, 5_000, 3_000_000], length)) for length in lengths]
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    nothing = np.zeros((int(offsets[-1]), 1), np.int32)
    return torch.randn(int(offsets[-1]), SMALL.width), EncoderInputs(
        nothing[:, 0], nothing, np.concatenate(seconds).astype(np.int32), offsets
    )


def normed(kind: str, norm: nn.Module, x: Tensor) -> Tensor:
    weights = dict(norm.named_parameters())
    if kind == "rms":
        return x / (x.square().mean(-1, keepdim=True) + SMALL.eps).sqrt() * weights["weight"]
    if kind == "layer":
        centred = x - x.mean(-1, keepdim=True)
        deviation = (centred.square().mean(-1, keepdim=True) + SMALL.eps).sqrt()
        return centred / deviation * weights["weight"] + weights["bias"]
    return x


def specified(layer: HstuLayer, x: Tensor, inputs: EncoderInputs) -> Tensor:
    """The layer on packed rows [total, width], by padded users: [users, length, ...] throughout."""
    config, lengths = layer.config, torch.from_numpy(np.diff(inputs.offsets))
    place = torch.arange(int(lengths.max()))
    own = place < lengths[:, None]
    padded = x.new_zeros(*own.shape, config.width).masked_scatter(own[..., None], x)
    seconds = torch.zeros(own.shape, dtype=torch.int64).masked_scatter(own, torch.from_numpy(inputs.seconds).long())
    projected = F.silu(layer.project_in(normed(config.norm_in, layer.norm_in, padded)))
    u, q, v, k = projected.split([config.heads * d for d in (config.d_v, config.d_qk, config.d_v, config.d_qk)], dim=2)
    of_heads = []
    for head in range(config.heads):
        of_qk, of_v = (slice(head * d, (head + 1) * d) for d in (config.d_qk, config.d_v))
        scores = q[..., of_qk] @ k[..., of_qk].transpose(1, 2)  # [users, length, length]
        if config.position_bias:
            scores = scores + layer.position_bias[head, (place[:, None] - place).clamp(min=0)]
        if config.time_bias:
            elapsed = seconds[:, :, None] - seconds[:, None, :]
            scores = scores + layer.time_bias[head, (elapsed[..., None] >= torch.tensor(TIME_THRESHOLDS)).sum(-1)]
        summed = torch.tril(F.silu(scores)) @ v[..., of_v]
        of_heads.append(summed / (1 + place[:, None] if config.attention_scale == "length" else config.max_events))
    y = normed(config.norm_out, layer.norm_out, torch.cat(of_heads, dim=2)) * u
    return (padded + layer.project_out(y))[own]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_every_option_equals_the_padded_specification_and_so_do_its_gradients(options: dict[str, Any]) -> None:
    layer = layer_of(options)
    x, inputs = users_of([1, 6, 6, 6, 21, 30])
    direction, gradients = torch.randn(len(x), SMALL.width), []
    packed, wanted = layer(x, PaddedBlocks.from_inputs(inputs)), specified(layer, x, inputs)
    torch.testing.assert_close(packed, wanted, rtol=1e-4, atol=1e-5)
    last = layer(x, PaddedBlocks.from_inputs(inputs), last=True)
    torch.testing.assert_close(last, wanted[inputs.offsets[1:] - 1], rtol=1e-4, atol=1e-5)
    for states in (packed, wanted):
        layer.zero_grad()
        (states * direction).sum().backward()
        gradients.append({name: part.grad.clone() for name, part in layer.named_parameters() if part.grad is not None})
    off = {bias for bias in ("time_bias", "position_bias") if not getattr(layer.config, bias)}
    assert gradients[0].keys() == gradients[1].keys() == dict(layer.named_parameters()).keys() - off
    for name, wanted_gradient in gradients[1].items():
        torch.testing.assert_close(gradients[0][name], wanted_gradient, rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.parametrize("scale", ["max_events", "length"])
def test_a_later_event_never_changes_an_earlier_row_whatever_attention_is_divided_by(scale: str) -> None:
    layer = layer_of({"attention_scale": scale, "norm_out": "none"})
    x, inputs = users_of([30])
    part = EncoderInputs(inputs.item_rows[:11], inputs.feature_ids[:11], inputs.seconds[:11], np.array([0, 11]))
    torch.testing.assert_close(
        layer(x, PaddedBlocks.from_inputs(inputs))[:11],
        layer(x[:11], PaddedBlocks.from_inputs(part)),
        rtol=1e-5,
        atol=1e-6,
    )


@pytest.mark.parametrize(("name", "parameters"), [("tiny", 43e3), ("1m", 1e6), ("10m", 1e7), ("100m", 1e8)])
def test_a_preset_has_as_many_parameters_in_its_layers_as_its_name_says(name: str, parameters: float) -> None:
    with torch.device("meta"):
        layers = [HstuLayer(PRESETS[name]) for _ in range(PRESETS[name].layers)]
    counted = sum(part.numel() for layer in layers for part in layer.parameters())
    assert abs(counted / parameters - 1) < 0.07


def test_the_smallest_preset_is_the_default() -> None:
    assert PRESETS["tiny"] == HstuConfig()


@pytest.mark.parametrize("wrong", [{"recent_events": 200}, {"recent_events": 20, "history_events": 199}], ids=str)
def test_sessions_without_room_are_refused_in_one_sentence(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="want them in ascending order"):
        HstuConfig(**wrong)
