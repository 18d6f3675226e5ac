"""The specification against the model in torch, which computes packed users in padded blocks."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels.fused_attention_layernorm.reference import fused_attention_layernorm
from pipeline.features.event_features import N_FEATURE_IDS, N_FEATURES, TIME_THRESHOLDS, EncoderInputs
from pipeline.model.config import HstuConfig
from pipeline.model.hstu import Hstu, HstuLayer
from pipeline.model.padding import GPU_POLICY, BlockPolicy, PaddedBlocks

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CONFIG = HstuConfig(items=50, layers=2, width=16, heads=2, d_qk=8, d_v=4, max_events=40, dropout=0.0, content_rows=0)


def make_inputs(lengths: list[int], seed: int) -> EncoderInputs:
    """Random events of users with these lengths."""
    rng = np.random.default_rng(seed)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    total = int(offsets[-1])
    steps = rng.choice([0, 0, 1, 40, 5_000, 3_000_000], total)
    seconds = np.concatenate([np.cumsum(part) for part in np.split(steps, offsets[1:-1])])
    feature_ids = rng.integers(0, N_FEATURE_IDS, (total, N_FEATURES))
    tokens = rng.integers(0, CONFIG.items, total)
    return EncoderInputs(tokens.astype(np.int32), feature_ids.astype(np.int32), seconds.astype(np.int32), offsets)


def make_model(seed: int, config: HstuConfig = CONFIG) -> Hstu:
    torch.manual_seed(seed)
    hstu = Hstu(config).eval().to(DEVICE)
    for parameter in hstu.parameters():  # biases are initialised to zero, which would hide errors in them
        torch.nn.init.normal_(parameter, std=0.3)
    return hstu


def model_states(hstu: Hstu, inputs: EncoderInputs, last: bool = False) -> Tensor:
    return hstu(event_rows(hstu, inputs), PaddedBlocks.from_inputs(inputs, DEVICE), last)


def event_rows(hstu: Hstu, inputs: EncoderInputs) -> Tensor:
    tokens, feature_ids = (torch.from_numpy(column).to(DEVICE) for column in (inputs.item_rows, inputs.feature_ids))
    return hstu.event_rows(hstu.items()[tokens], feature_ids)


def reference_layer(layer: HstuLayer, x: Tensor, seconds: Tensor, lengths: Tensor) -> Tensor:
    config = layer.config
    projected = torch.nn.functional.silu(layer.project_in(layer.norm_in(x)))
    u, q, v, k = (part.unflatten(2, (config.heads, -1)) for part in projected.split(layer.sizes, dim=2))
    gated = fused_attention_layernorm(
        q,
        k,
        v,
        u,
        seconds,
        lengths,
        layer.position_bias,
        layer.time_bias,
        torch.tensor(TIME_THRESHOLDS, device=DEVICE),
        layer.norm_out.weight,
        layer.norm_out.bias,
        config.eps,
        config.max_events,
    )
    return x + layer.project_out(gated)


def reference_states(hstu: Hstu, inputs: EncoderInputs) -> Tensor:
    """Run the specification on padded users and pack the result again: [total, width]."""
    columns = (inputs.offsets, inputs.item_rows, inputs.feature_ids, inputs.seconds)
    offsets, tokens, feature_ids, seconds = (torch.from_numpy(column).to(DEVICE) for column in columns)
    lengths = offsets.diff()
    positions = torch.arange(int(lengths.max()), device=DEVICE)
    valid = positions < lengths[:, None]
    rows = torch.where(valid, offsets[:-1, None] + positions, 0)
    feature_ids = feature_ids[rows]
    items = torch.nn.functional.normalize(hstu.items.embedding(tokens[rows]), dim=-1, eps=CONFIG.eps)
    strength = hstu.log_strength.weight[feature_ids].sum(2).exp()  # [users, length, 1]
    x = hstu.rotation(items) * strength + hstu.feature_embedding.weight[feature_ids].sum(2)
    for layer in hstu.layers:
        assert isinstance(layer, HstuLayer)
        x = reference_layer(layer, x, seconds[rows].long(), lengths)
    return torch.nn.functional.normalize(x[valid], dim=-1, eps=CONFIG.eps)


@settings(max_examples=15)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=12), st.integers(0, 1000))
def test_packed_model_equals_the_padded_specification(lengths: list[int], seed: int) -> None:
    hstu = make_model(seed)
    inputs = make_inputs(lengths, seed)
    with torch.no_grad():
        packed = model_states(hstu, inputs)
        packed_last = model_states(hstu, inputs, last=True)
        expected = reference_states(hstu, inputs)
    torch.testing.assert_close(packed, expected, rtol=1e-4, atol=1e-5)
    last = torch.from_numpy(inputs.offsets[1:] - 1).to(DEVICE)
    torch.testing.assert_close(packed_last, expected[last], rtol=1e-4, atol=1e-5)


@settings(max_examples=10)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=12), st.integers(0, 1000))
def test_block_policy_changes_no_state(lengths: list[int], seed: int) -> None:
    hstu = make_model(seed)
    inputs = make_inputs(lengths, seed)
    one_block_per_user = BlockPolicy(1, 1, 1.0)
    with torch.no_grad():
        rows = event_rows(hstu, inputs)
        for last in (False, True):
            fine, coarse = (
                hstu(rows, PaddedBlocks.from_inputs(inputs, DEVICE, policy), last)
                for policy in (one_block_per_user, GPU_POLICY)
            )
            torch.testing.assert_close(fine, coarse, rtol=1e-4, atol=1e-5)


def test_packed_gradients_equal_those_of_the_specification() -> None:
    inputs = make_inputs([1, 7, 7, 7, 23, 40], seed=3)
    hstu = make_model(3)
    direction = torch.randn(int(inputs.offsets[-1]), CONFIG.width, device=DEVICE)
    gradients = []
    for forward in (model_states, reference_states):
        hstu.zero_grad()
        (forward(hstu, inputs) * direction).sum().backward()
        gradients.append({name: parameter.grad.clone() for name, parameter in hstu.named_parameters()})
    for name, expected in gradients[1].items():
        torch.testing.assert_close(gradients[0][name], expected, rtol=1e-3, atol=1e-4, msg=name)


@settings(max_examples=15)
@given(st.integers(2, 40), st.data())
def test_later_event_never_changes_an_earlier_state(length: int, data: st.DataObject) -> None:
    hstu = make_model(5)
    inputs = make_inputs([length], seed=length)
    with torch.no_grad():
        before = model_states(hstu, inputs)
        position = data.draw(st.integers(1, length - 1))
        inputs.item_rows[position:] = (inputs.item_rows[position:] + 7) % CONFIG.items
        inputs.feature_ids[position:] = (inputs.feature_ids[position:] + 11) % N_FEATURE_IDS
        inputs.seconds[position:] += 77
        after = model_states(hstu, inputs)
    torch.testing.assert_close(after[:position], before[:position], rtol=0, atol=0)
    assert not torch.allclose(after[position], before[position])


@settings(max_examples=15)
@given(st.lists(st.integers(1, 40), min_size=2, max_size=20), st.data())
def test_state_does_not_depend_on_the_rest_of_the_batch(lengths: list[int], data: st.DataObject) -> None:
    hstu = make_model(9)
    inputs = make_inputs(lengths, seed=len(lengths))
    user = data.draw(st.integers(0, len(lengths) - 1))
    part = slice(int(inputs.offsets[user]), int(inputs.offsets[user + 1]))
    alone = EncoderInputs(
        inputs.item_rows[part], inputs.feature_ids[part], inputs.seconds[part], np.array([0, lengths[user]])
    )
    with torch.no_grad():
        together = model_states(hstu, inputs, last=True)[user]
        expected = model_states(hstu, alone, last=True)[0]
    torch.testing.assert_close(expected, together, rtol=1e-4, atol=1e-5)
