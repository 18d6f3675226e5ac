"""The encoder that serves on a GPU against the model in torch; on a CPU its kernels run in Triton's interpreter."""

import gc
import weakref
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.graphs import buckets
from pipeline.artifact import draft
from pipeline.backends import GraphOptions
from pipeline.backends.fused import FusedEncoder
from pipeline.errors import DeviceError
from pipeline.features.event_features import FEATURE_COLUMNS, N_FEATURE_IDS, N_FEATURES, EncoderInputs
from pipeline.items.catalogue import Catalogue
from pipeline.items.vocabulary import Vocabulary
from pipeline.model.config import HstuConfig
from pipeline.model.hstu import Hstu, attention_plan, supports_kernels
from pipeline.model.padding import PaddedBlocks
from pipeline.records import EventSchema
from pipeline.serving import retrieval
from pipeline.serving.exclusion import Exclusion
from pipeline.serving.hstu_strategy import HstuStrategy, warm_up_lengths
from pipeline.serving.model_validation import synthetic_histories
from pipeline.serving.retrieval import FusedRetrieval
from pipeline.training.trainer import MultiTaskModel

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CONFIG = HstuConfig(
    items=40, layers=2, width=16, heads=2, d_qk=16, d_v=16, max_events=20, content_rows=0, dropout=0.3,
    attention_dropout=0.3,
)  # fmt: skip
GRAPHS = GraphOptions(max_users=8, max_events=256)
LENGTHS = [7, 0, 20, 1, 13]


def model(config: HstuConfig) -> Hstu:
    torch.manual_seed(3)
    hstu = Hstu(config)
    for parameter in hstu.parameters():  # biases begin at zero and would hide their errors
        nn.init.normal_(parameter, std=0.2)
    return hstu.eval().requires_grad_(False).to(DEVICE)


def inputs_of(lengths: list[int], seed: int = 0) -> EncoderInputs:
    random, total = np.random.default_rng(seed), sum(lengths)
    seconds = [np.cumsum(random.choice([0, 7, 1799, 1800, 90_000], length)) for length in lengths]
    return EncoderInputs(
        random.integers(0, CONFIG.items, total).astype(np.int32),
        random.integers(0, N_FEATURE_IDS, (total, N_FEATURES)).astype(np.int32),
        np.concatenate(seconds).astype(np.int32),
        np.concatenate([[0], np.cumsum(lengths)]),
    )


def states_in_torch(hstu: Hstu, vectors: Tensor, inputs: EncoderInputs) -> Tensor:
    states = torch.zeros(len(inputs), CONFIG.width, device=DEVICE)
    ordered, users = inputs.by_length()
    tokens, codes = (torch.from_numpy(column).to(DEVICE) for column in (ordered.item_rows, ordered.feature_ids))
    rows, sequences = hstu.sequences(F.embedding(tokens, vectors), codes, ordered)
    states[torch.from_numpy(users).to(DEVICE)] = hstu(rows, PaddedBlocks.from_inputs(sequences, DEVICE), last=True)
    return states


@pytest.mark.parametrize(
    "options",
    [
        {}, {"strength": False}, {"time_bias": False}, {"position_bias": False},
        {"excluded_features": FEATURE_COLUMNS[3:9]},
        {"recent_events": 6, "max_events": 10, "history_events": 20}, {"d_qk": 32, "heads": 1, "layers": 1},
    ],
    ids=lambda options: ", ".join(options) or "as it is",
)  # fmt: skip
def test_states_are_those_of_the_model_in_torch(options: dict[str, Any]) -> None:
    hstu = model(msgspec.structs.replace(CONFIG, **options))
    vectors = hstu.items()
    encoder = FusedEncoder(hstu, vectors, torch.float32, GRAPHS)
    inputs = inputs_of(LENGTHS)
    wanted = states_in_torch(hstu, vectors, inputs)
    torch.testing.assert_close(encoder.encode(inputs), wanted, rtol=1e-3, atol=1e-4)
    assert encoder.warm() > 0
    torch.testing.assert_close(encoder.encode(inputs), wanted, rtol=1e-3, atol=1e-4)


def test_batches_of_any_size_are_encoded_one_after_another() -> None:
    hstu = model(CONFIG)
    encoder = FusedEncoder(hstu, hstu.items(), torch.float32, GRAPHS)
    encoder.warm()
    for seed, lengths in enumerate(([3], [], [0, 0], [20] * 7, [1] * 9, [20] * 14)):  # the last two have no graph
        inputs = inputs_of(lengths, seed) if lengths else inputs_of([4]).gather_runs(np.empty(0, int), np.empty(0, int))
        found = encoder.encode(inputs)
        if sum(lengths):
            wanted = states_in_torch(hstu, hstu.items(), inputs)
            torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4)
        else:
            assert found.tolist() == [[0.0] * CONFIG.width] * len(lengths)


@pytest.mark.parametrize("further", [0, 30])
def test_items_that_come_later_are_read_from_then_on(further: int) -> None:
    hstu, inputs = model(CONFIG), inputs_of(LENGTHS)
    encoder = FusedEncoder(hstu, hstu.items(), torch.float32, GRAPHS)
    encoder.warm()
    before = encoder.encode(inputs)
    vectors = torch.cat([hstu.items(), torch.randn(further, CONFIG.width, device=DEVICE)])
    rows = np.array([5, len(vectors) - 1])
    vectors[torch.from_numpy(rows).to(DEVICE)] = F.normalize(torch.randn(2, CONFIG.width, device=DEVICE))
    inputs.item_rows[::3] = rows[1]
    encoder.set_item_vectors(rows, vectors)
    after = encoder.encode(inputs)
    torch.testing.assert_close(after, states_in_torch(hstu, vectors, inputs), rtol=1e-3, atol=1e-4)
    assert not torch.allclose(before, after, atol=1e-2)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE.type != "cuda", reason="no GPU")
def test_on_a_gpu_one_model_serves_while_another_makes_its_graphs() -> None:
    hstu, graphs = model(CONFIG), GraphOptions(max_users=64, max_events=1024)
    serving, coming = (FusedEncoder(hstu, hstu.items(), torch.bfloat16, graphs) for _ in range(2))
    serving.warm()
    batches = [inputs_of([1 + (5 * n + seed) % 20 for n in range(1 + 7 * seed)], seed) for seed in range(9)]
    wanted = [states_in_torch(hstu, hstu.items(), inputs) for inputs in batches]
    with ThreadPoolExecutor(1) as aside:
        warming, rounds = aside.submit(coming.warm), 0
        while not warming.done() or rounds < 20:
            rounds += 1
            for inputs, states in zip(batches, wanted, strict=True):
                torch.testing.assert_close(serving.encode(inputs), states, rtol=5e-2, atol=5e-2)
    assert warming.result() == len(set(buckets(64, 1024, [CONFIG.max_events])))
    for inputs, states in zip(batches, wanted, strict=True):
        torch.testing.assert_close(coming.encode(inputs), states, rtol=5e-2, atol=5e-2)


@pytest.mark.parametrize("options", [{}, {"time_bias": False}, {"position_bias": False}], ids=str)
def test_training_by_the_kernels_gives_the_states_and_gradients_of_torch(options: dict[str, Any]) -> None:
    hstu = model(msgspec.structs.replace(CONFIG, dropout=0.0, attention_dropout=0.0, **options))
    hstu.train().requires_grad_(True)
    lengths = [7, 20, 1, 13]
    inputs = inputs_of(lengths)
    rows, weights = torch.randn(sum(lengths), CONFIG.width, device=DEVICE), torch.randn(CONFIG.width, device=DEVICE)
    found: list[tuple[Tensor, dict[str, Tensor]]] = []
    for layout in (
        PaddedBlocks.from_inputs(inputs, DEVICE),
        attention_plan(inputs, CONFIG.max_events, torch.float32, DEVICE, kernels=True),
    ):
        hstu.zero_grad()
        states = hstu(rows, layout)
        (states @ weights).square().sum().backward()
        gradients = {name: each.grad for name, each in hstu.layers.named_parameters() if each.grad is not None}
        found.append((states.detach(), gradients))
    (wanted, of_torch), (states, of_kernels) = found
    torch.testing.assert_close(states, wanted, rtol=1e-3, atol=1e-4)
    assert of_torch.keys() <= of_kernels.keys()
    for name, gradient in of_torch.items():
        torch.testing.assert_close(of_kernels[name], gradient, rtol=1e-2, atol=1e-3, msg=name)


def test_attention_dropout_is_drawn_anew_for_each_layer_and_step_and_off_in_service() -> None:
    hstu, inputs = model(msgspec.structs.replace(CONFIG, dropout=0.0)), inputs_of([20])
    rows, plan = (
        torch.randn(20, CONFIG.width, device=DEVICE),
        attention_plan(inputs, CONFIG.max_events, torch.float32, DEVICE, kernels=True),
    )
    still = hstu(rows, plan)
    assert torch.equal(still, hstu(rows, plan))
    hstu.train()
    torch.manual_seed(1)
    first, second = hstu(rows, plan), hstu(rows, plan)
    torch.manual_seed(1)
    assert torch.equal(first, hstu(rows, plan))
    assert not torch.equal(first, second)
    assert not torch.equal(first, still)


def test_what_the_kernels_do_not_know_is_left_to_torch() -> None:
    assert supports_kernels(CONFIG)
    changes: list[dict[str, Any]] = [
        {"norm_in": "rms"}, {"norm_out": "none"}, {"attention_scale": "length"}, {"d_v": 24}, {"width": 20},
    ]  # fmt: skip
    for change in changes:
        assert not supports_kernels(msgspec.structs.replace(CONFIG, **change)), change


def rung(device: torch.device) -> HstuStrategy:
    """Of an untrained model."""
    ids = [f"i{number}" for number in range(1, CONFIG.items)]
    nothing = {"items": np.zeros(0, np.uint64), "popularity": np.zeros(0), "values": np.zeros(0, np.float32)}
    torch.manual_seed(3)
    artifact = draft(CONFIG, EventSchema(), MultiTaskModel(CONFIG).state_dict(), ids, nothing)
    return HstuStrategy(artifact, Catalogue(Vocabulary(ids)), Exclusion(), str(device), graphs=GRAPHS)


def test_a_rung_by_the_kernels_gives_the_slates_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retrieval, "FUSED_MIN_SCORES", 0)
    ours, of_torch = rung(DEVICE), rung(torch.device("cpu"))
    encoder = ours._encoder
    with torch.inference_mode():
        encoder._fused = FusedEncoder(encoder._hstu, encoder._vectors, torch.float32, GRAPHS)
    ours._retrieval = FusedRetrieval(encoder.table)
    histories = synthetic_histories([f"i{number}" for number in range(1, 20)], [1, 0, 17, 7])
    found, wanted = (each.rank(histories, 10) for each in (ours, of_torch))
    assert found.tokens.tolist() == wanted.tokens.tolist()
    np.testing.assert_allclose(found.scores, wanted.scores, rtol=1e-4, atol=1e-4)


def test_a_model_that_is_replaced_leaves_no_memory_to_the_garbage_collector() -> None:
    hstu = model(CONFIG)
    gc.collect()
    gc.disable()
    try:
        encoder = FusedEncoder(hstu, hstu.items(), torch.float32, GRAPHS)
        encoder.warm()
        table = weakref.ref(encoder._forward.rotated)
        del encoder
        assert table() is None
    finally:
        gc.enable()


def test_shapes_that_warm_a_model_are_of_all_sizes() -> None:
    shapes = list(warm_up_lengths(6, 9))
    assert {len(lengths) for lengths in shapes} == {1, 2, 4}
    assert {max(lengths) for lengths in shapes} == {1, 2, 9}
    assert len({tuple(lengths) for lengths in shapes}) == len(shapes)


@pytest.mark.parametrize("users", [1, 2, 16, 256])
def test_kernels_are_warmed_for_multiples_of_16_rows_and_for_others(users: int) -> None:
    long = [sum(lengths) for lengths in warm_up_lengths(256, 200) if len(lengths) == users and max(lengths) > 100]
    assert {rows % 16 == 0 for rows in long} == {True, False}


def test_a_card_that_cannot_run_the_kernels_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        device = torch.device("cuda")

        def warm(self) -> int:
            raise RuntimeError("out of resource: shared memory\nRequired: 278568")

    broken = rung(torch.device("cpu"))
    assert broken.warm(["i1"]) == 0  # on a CPU there is nothing to wait for
    monkeypatch.setattr(broken, "_encoder", Broken())
    with pytest.raises(
        DeviceError, match=r"on this card: out of resource: shared memory; set pipeline\.custom_kernels"
    ):
        broken.warm(["i1"])
