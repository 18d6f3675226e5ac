"""The encoder on the kernels against the model in torch; on a CPU its kernels run in Triton's interpreter."""

import gc
import weakref
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from msgspec.structs import replace
from torch import Tensor, nn

from kernels import graphs
from kernels.graphs import possible_buckets
from pipeline.backends.encoder import GraphOptions
from pipeline.backends.fused import FusedEncoder
from pipeline.backends.staging import Staging
from pipeline.backends.torch import TorchEncoder
from pipeline.features.event_features import FEATURE_COLUMNS
from pipeline.model.config import HstuConfig
from pipeline.model.hstu import Hstu, attention_plan, supports_kernels
from pipeline.model.padding import PaddedBlocks
from tests.pipeline.backends.batches import DEVICE, Items, encode, make_inputs

CONFIG = HstuConfig(
    items=40,
    layers=2,
    width=16,
    heads=2,
    d_qk=16,
    d_v=16,
    max_events=20,
    content_rows=0,
    dropout=0.3,
    attention_dropout=0.3,
)
GRAPHS = GraphOptions(max_users=8, max_events=256)
LENGTHS = [7, 20, 1]


def make_model(config: HstuConfig) -> Hstu:
    torch.manual_seed(3)
    hstu = Hstu(config)
    for parameter in hstu.parameters():  # biases start at zero, which would hide errors
        nn.init.normal_(parameter, std=0.2)
    return hstu.eval().requires_grad_(False).to(DEVICE)


def make_encoder(hstu: Hstu, graphs: GraphOptions = GRAPHS, dtype: torch.dtype = torch.float32) -> FusedEncoder:
    return FusedEncoder(hstu, Items(hstu.items()), dtype, graphs)


@pytest.fixture
def small_buckets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Round a graph's rows up to 16 instead of 256: the interpreter runs padding, too."""
    monkeypatch.setattr(graphs, "MIN_ROWS", 16)


@pytest.mark.usefixtures("small_buckets")
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"strength": False},
        {"time_bias": False},
        {"position_bias": False},
        {"excluded_features": FEATURE_COLUMNS[3:9]},
        {"recent_events": 6, "max_events": 10, "history_events": 20},
        {"d_qk": 32, "heads": 1, "layers": 1},
    ],
    ids=lambda options: ", ".join(options) or "default",
)
def test_states_equal_torch_with_and_without_graphs(options: dict[str, Any]) -> None:
    hstu = make_model(replace(CONFIG, **options))
    encoder = make_encoder(hstu)
    inputs = make_inputs(LENGTHS, CONFIG.items)
    expected = encode(TorchEncoder(hstu, Items(hstu.items())), inputs)
    torch.testing.assert_close(encode(encoder, inputs), expected, rtol=1e-3, atol=1e-4)
    assert encoder.warm() > 0
    torch.testing.assert_close(encode(encoder, inputs), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE.type != "cuda", reason="no GPU")
def test_gpu_serves_one_model_while_another_captures_its_graphs() -> None:
    hstu = make_model(CONFIG)
    options = GraphOptions(max_users=64, max_events=1024)
    serving = make_encoder(hstu, options, torch.bfloat16)
    coming = make_encoder(hstu, options, torch.bfloat16)
    serving.warm()
    batches = [
        make_inputs([1 + (5 * n + seed) % 20 for n in range(1 + 7 * seed)], CONFIG.items, seed) for seed in range(9)
    ]
    expected = [encode(TorchEncoder(hstu, Items(hstu.items())), inputs) for inputs in batches]
    with ThreadPoolExecutor(1) as executor:
        warming = executor.submit(coming.warm)
        rounds = 0
        while not warming.done() or rounds < 20:
            rounds += 1
            for inputs, states in zip(batches, expected, strict=True):
                torch.testing.assert_close(encode(serving, inputs), states, rtol=5e-2, atol=5e-2)
    assert warming.result() == len(set(possible_buckets(64, 1024, [CONFIG.max_events])))
    for inputs, states in zip(batches, expected, strict=True):
        torch.testing.assert_close(encode(coming, inputs), states, rtol=5e-2, atol=5e-2)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE.type != "cuda", reason="no GPU")
def test_gpu_copies_of_any_number_of_models_avoid_the_stream_of_captures() -> None:
    captures = torch.cuda.Stream(DEVICE)
    stagings = [Staging(DEVICE) for _ in range(100)]
    assert {staging._stream for staging in stagings} & {captures} == set()


@pytest.mark.parametrize(
    "options",
    [{}, {"time_bias": False, "layers": 1, "heads": 1}, {"position_bias": False, "layers": 1, "heads": 1}],
    ids=lambda options: ", ".join(options) or "default",
)
def test_training_on_kernels_equals_torch_in_states_and_gradients(options: dict[str, Any]) -> None:
    hstu = make_model(replace(CONFIG, dropout=0.0, attention_dropout=0.0, **options))
    hstu.train().requires_grad_(True)
    lengths = [7, 20, 1, 13]
    inputs = make_inputs(lengths, CONFIG.items)
    rows = torch.randn(sum(lengths), CONFIG.width, device=DEVICE)
    weights = torch.randn(CONFIG.width, device=DEVICE)
    layouts = {
        "torch": PaddedBlocks.from_inputs(inputs, DEVICE),
        "kernels": attention_plan(inputs, CONFIG.max_events, torch.float32, DEVICE, kernels=True),
    }
    states: dict[str, Tensor] = {}
    gradients: dict[str, dict[str, Tensor]] = {}
    for name, layout in layouts.items():
        hstu.zero_grad()
        states[name] = hstu(rows, layout)
        (states[name] @ weights).square().sum().backward()
        gradients[name] = {key: each.grad for key, each in hstu.layers.named_parameters() if each.grad is not None}
    torch.testing.assert_close(states["kernels"], states["torch"], rtol=1e-3, atol=1e-4)
    assert gradients["torch"].keys() <= gradients["kernels"].keys()
    for name, expected in gradients["torch"].items():
        torch.testing.assert_close(gradients["kernels"][name], expected, rtol=1e-2, atol=1e-3, msg=name)


def test_attention_dropout_is_drawn_per_layer_and_step_and_off_in_serving() -> None:
    hstu = make_model(replace(CONFIG, dropout=0.0))
    inputs = make_inputs([20], CONFIG.items)
    rows = torch.randn(20, CONFIG.width, device=DEVICE)
    plan = attention_plan(inputs, CONFIG.max_events, torch.float32, DEVICE, kernels=True)
    without = hstu(rows, plan)
    assert torch.equal(without, hstu(rows, plan))
    hstu.train()
    torch.manual_seed(1)
    first = hstu(rows, plan)
    second = hstu(rows, plan)
    torch.manual_seed(1)
    assert torch.equal(first, hstu(rows, plan))
    assert not torch.equal(first, second)
    assert not torch.equal(first, without)


@pytest.mark.parametrize(
    "options",
    [{"norm_in": "rms"}, {"norm_out": "none"}, {"attention_scale": "length"}, {"d_v": 24}, {"width": 20}],
    ids=str,
)
def test_options_that_the_kernels_lack_are_not_supported(options: dict[str, Any]) -> None:
    assert supports_kernels(CONFIG)
    assert not supports_kernels(replace(CONFIG, **options))


def test_replaced_model_is_freed_without_the_garbage_collector() -> None:
    hstu = make_model(CONFIG)
    gc.collect()
    gc.disable()
    try:
        encoder = make_encoder(hstu)
        encoder.warm()
        table = weakref.ref(encoder._forward.rotated)
        del encoder
        assert table() is None
    finally:
        gc.enable()
