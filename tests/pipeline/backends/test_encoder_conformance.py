"""What every encoder must do, whatever its runtime: a new backend adds its maker to BACKENDS and passes as it is.

The reference is torch in float32 on the same device. On a CPU the kernels run in Triton's interpreter.
"""

import gc
import weakref
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from kernels import graphs
from pipeline.backends.encoder import Encoder, GraphOptions, ItemVectors
from pipeline.backends.fused import FusedEncoder
from pipeline.backends.torch import TorchEncoder
from pipeline.features.event_features import EncoderInputs
from pipeline.model.config import HstuConfig
from pipeline.model.hstu import Hstu
from tests.pipeline.backends.batches import DEVICE, Items, encode, make_inputs

CONFIG = HstuConfig(items=40, layers=2, width=16, heads=2, d_qk=16, d_v=16, max_events=20, content_rows=0)
GRAPHS = GraphOptions(max_users=8, max_events=128)
# Users and rows within the graphs' limits and beyond them, one row and the most, one length and many.
GRID = ([1], [20], [7, 20, 1], [3] * 8, [1] * 9, [20] * 7, [5, 20, 13, 1, 1, 18])
assert_close = partial(torch.testing.assert_close, rtol=1e-3, atol=1e-4)

BACKENDS: dict[str, Callable[[Hstu, ItemVectors], Encoder]] = {
    "torch": TorchEncoder,
    "kernels": lambda hstu, table: FusedEncoder(hstu, table, torch.float32, GRAPHS),
}


def make_model(seed: int = 3) -> Hstu:
    torch.manual_seed(seed)
    hstu = Hstu(CONFIG)
    for parameter in hstu.parameters():  # biases start at zero, which would hide errors
        nn.init.normal_(parameter, std=0.2)
    return hstu.eval().requires_grad_(False).to(DEVICE)


@pytest.fixture(autouse=True)
def _small_buckets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Round a graph's rows up to 16 instead of 256: the interpreter runs padding, too."""
    monkeypatch.setattr(graphs, "MIN_ROWS", 16)


@pytest.fixture
def hstu() -> Hstu:
    return make_model()


@pytest.fixture
def table(hstu: Hstu) -> Items:
    return Items(hstu.items())


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def encoder(backend: str, hstu: Hstu, table: Items) -> Encoder:
    return BACKENDS[backend](hstu, table)


def batches() -> list[EncoderInputs]:
    return [make_inputs(lengths, CONFIG.items, seed) for seed, lengths in enumerate(GRID)]


def expect_parity(encoder: Encoder, hstu: Hstu, table: Items) -> None:
    reference = TorchEncoder(hstu, table)
    for inputs in batches():
        assert_close(encode(encoder, inputs), encode(reference, inputs))


def test_it_names_its_backend_and_reads_the_models_history(encoder: Encoder, backend: str) -> None:
    assert encoder.backend == backend
    assert encoder.max_events == CONFIG.history_length


def test_states_equal_the_reference_over_sizes_before_and_after_warm_up(
    encoder: Encoder, hstu: Hstu, table: Items
) -> None:
    expect_parity(encoder, hstu, table)
    assert encoder.warm() >= 0
    expect_parity(encoder, hstu, table)


def test_states_are_unit_vectors_of_float32_on_the_tables_device(encoder: Encoder, table: Items) -> None:
    states = encode(encoder, make_inputs([4, 20], CONFIG.items))
    assert states.dtype == torch.float32
    assert states.device == table.vectors.device
    assert_close(states.norm(dim=1), torch.ones(2, device=DEVICE))


def test_state_does_not_depend_on_the_rest_of_the_batch(encoder: Encoder) -> None:
    encoder.warm()
    together = make_inputs([5, 20, 2], CONFIG.items)
    states = encode(encoder, together)
    for user in range(3):
        alone = together.gather_runs(together.offsets[user : user + 1], together.lengths[user : user + 1])
        assert_close(encode(encoder, alone)[0], states[user])


def test_state_depends_on_the_order_and_the_times_of_events(encoder: Encoder) -> None:
    inputs = make_inputs([12], CONFIG.items)
    before = encode(encoder, inputs)
    inputs.item_rows[:] = inputs.item_rows[::-1].copy()
    reversed_items = encode(encoder, inputs)
    assert not torch.allclose(before, reversed_items, atol=1e-2)
    inputs.seconds[6:] += 3600 * 24 * 30
    assert not torch.allclose(reversed_items, encode(encoder, inputs), atol=1e-4)


@pytest.mark.parametrize("added", [0, 1, 30], ids=["rewritten", "one more", "beyond the spare room"])
def test_new_vectors_are_read_once_they_are_announced(encoder: Encoder, hstu: Hstu, table: Items, added: int) -> None:
    encoder.warm()
    inputs = make_inputs([7, 20, 1], CONFIG.items)
    vectors = torch.cat([table.vectors, torch.zeros(added, CONFIG.width, device=DEVICE)])
    rows = np.array([5, *range(CONFIG.items, CONFIG.items + added)])
    vectors[torch.from_numpy(rows).to(DEVICE)] = F.normalize(torch.randn(len(rows), CONFIG.width, device=DEVICE))
    inputs.item_rows[::3] = rows[-1]
    table.vectors = vectors
    encoder.update_items(rows)
    vectors[7] = F.normalize(torch.randn(CONFIG.width, device=DEVICE), dim=0)  # later: the first ones must stay
    inputs.item_rows[1::3] = 7
    encoder.update_items(np.array([7]))
    expected = encode(TorchEncoder(hstu, table), inputs)
    assert_close(encode(encoder, inputs), expected)


def test_two_models_in_turn_do_not_disturb_each_other(backend: str, hstu: Hstu, table: Items) -> None:
    coming = make_model(seed=8)
    coming_table = Items(coming.items())
    encoders = [(BACKENDS[backend](each, its), each, its) for each, its in ((hstu, table), (coming, coming_table))]
    for encoder, _, _ in encoders:
        encoder.warm()
    for inputs in batches():
        for encoder, model, its in encoders:
            expected = encode(TorchEncoder(model, its), inputs)
            assert_close(encode(encoder, inputs), expected)
    encoders[0][0].close()
    expect_parity(*encoders[1])


def test_closing_twice_is_harmless_and_a_closed_one_is_freed_without_the_collector(
    backend: str, hstu: Hstu, table: Items
) -> None:
    encoder = BACKENDS[backend](hstu, table)
    encoder.warm()
    encode(encoder, make_inputs([3, 4], CONFIG.items))
    encoder.close()
    encoder.close()
    gc.collect()
    gc.disable()
    try:
        reference = weakref.ref(encoder)
        del encoder
        assert reference() is None
    finally:
        gc.enable()


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE.type != "cuda", reason="no GPU")
def test_gpu_memory_returns_when_an_encoder_is_closed(backend: str) -> None:
    hstu = make_model()
    table = Items(hstu.items())

    def bytes_open_and_closed() -> tuple[int, int]:
        encoder = BACKENDS[backend](hstu, table)
        encoder.warm()
        encode(encoder, make_inputs([20] * 7, CONFIG.items))
        while_open = torch.cuda.memory_allocated()
        encoder.close()
        return while_open, torch.cuda.memory_allocated()

    bytes_open_and_closed()  # compiles, and fills the libraries' workspaces
    before = torch.cuda.memory_allocated()
    while_open, closed = bytes_open_and_closed()
    assert before <= closed <= while_open
    assert closed < while_open or backend == "torch", "graphs and tables are freed, weights are not"
    assert torch.cuda.memory_allocated() == before


def test_reference_differs_from_a_model_with_other_weights(hstu: Hstu, table: Items) -> None:
    inputs = make_inputs([7, 20, 1], CONFIG.items)
    states = encode(TorchEncoder(hstu, table), inputs)
    other = encode(TorchEncoder(make_model(seed=4), table), inputs)
    assert not torch.allclose(states, other, atol=1e-2), "else parity would say nothing"
