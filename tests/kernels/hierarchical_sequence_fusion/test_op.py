"""The kernels on a GPU where there is one, else in Triton's interpreter; the marked tests need a GPU."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels.hierarchical_sequence_fusion import launch
from kernels.hierarchical_sequence_fusion.launch import Embeddings, EventColumns
from kernels.hierarchical_sequence_fusion.op import hierarchical_sequence_fusion
from kernels.hierarchical_sequence_fusion.reference import hierarchical_sequence_fusion as reference
from pipeline.features.event_features import N_FEATURE_IDS, N_FEATURES, EncoderInputs

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ITEMS, GAP_S = 40, 1800
ON_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
# A unit in the last place of the output (the interpreter cuts bfloat16 off), and of float32: of the sums of 60 events,
# and of strengths up to e^20, whose exponential is off by 20 such units where a sum's last bit differs.
FLOAT32 = 2e-5
TOLERANCES = {torch.float32: FLOAT32, torch.float16: 2.0**-10 + FLOAT32, torch.bfloat16: 2.0**-7 + FLOAT32}


def embeddings_of(width: int, dtype: torch.dtype) -> Embeddings:
    generator = torch.Generator().manual_seed(width)
    table, features = (torch.randn(rows, width, generator=generator).to(dtype) for rows in (ITEMS, N_FEATURE_IDS))
    strength = torch.randn(N_FEATURE_IDS, generator=generator)
    return Embeddings(table.to(DEVICE), features.to(DEVICE), strength.to(DEVICE))


def events_of(lengths: list[int], seed: int) -> EventColumns:
    random = np.random.default_rng(seed)
    total, offsets = sum(lengths), np.concatenate([[0], np.cumsum(lengths)])
    steps = np.split(random.choice([0, 5, GAP_S - 1, GAP_S, 90_000], total), offsets[1:-1])
    seconds = np.concatenate([np.cumsum(part) for part in steps]) if lengths else np.zeros(0)
    codes = random.integers(0, N_FEATURE_IDS, (total, N_FEATURES))
    inputs = EncoderInputs(
        random.integers(0, ITEMS, total).astype(np.int32), codes.astype(np.int32), seconds.astype(np.int32), offsets
    )
    columns = (inputs.item_rows, inputs.feature_ids, inputs.seconds, inputs.offsets)
    return EventColumns(*(torch.from_numpy(column).to(DEVICE) for column in columns))


def specified(
    embeddings: Embeddings, events: EventColumns, recent: int, sessions: int
) -> tuple[Tensor, Tensor, Tensor]:
    return reference(
        embeddings.table, embeddings.features, embeddings.log_strength, events.tokens, events.feature_ids, events.seconds,
        events.offsets, recent, sessions, GAP_S,
    )  # fmt: skip


def called(embeddings: Embeddings, events: EventColumns, **changes: object) -> tuple[Tensor, Tensor, Tensor]:
    arguments: dict = {
        "table": embeddings.table, "features": embeddings.features, "strength": embeddings.log_strength,
        "tokens": events.tokens, "codes": events.feature_ids, "seconds": events.seconds, "offsets": events.offsets,
        "recent": 4, "sessions": 3, "gap_s": GAP_S,
    } | changes  # fmt: skip
    return hierarchical_sequence_fusion(
        **{name: value.to(DEVICE) if isinstance(value, Tensor) else value for name, value in arguments.items()}
    )


def assert_close(found: tuple[Tensor, Tensor, Tensor], wanted: tuple[Tensor, Tensor, Tensor]) -> None:
    assert torch.equal(found[2], wanted[2])
    assert torch.equal(found[1], wanted[1])
    bound = TOLERANCES[wanted[0].dtype]
    torch.testing.assert_close(found[0], wanted[0], rtol=bound, atol=bound)


@pytest.mark.parametrize(
    ("lengths", "width", "recent", "sessions"),
    [
        ([1], 1, 1, 1), ([0, 5, 0], 24, 2, 2), ([60, 1, 3, 0, 1], 16, 4, 3), ([9, 9], 33, 0, 4),
        ([9, 9], 16, 5, 0), ([3, 4], 16, 7, 2),
    ],
)  # fmt: skip
@pytest.mark.parametrize("dtype", TOLERANCES)
def test_the_kernels_equal_the_specification(lengths, width, recent, sessions, dtype):
    embeddings, packed = embeddings_of(width, dtype), events_of(lengths, seed=len(lengths))
    found = launch.fuse(embeddings, packed, recent, sessions, GAP_S)
    assert_close(found, specified(embeddings, packed, recent, sessions))


@settings(max_examples=5, deadline=None)
@given(
    st.lists(st.integers(0, 12), min_size=1, max_size=5).filter(any),
    st.integers(0, 3),
    st.integers(1, 3),
    st.integers(0, 99),
)
def test_any_offsets_pack_alike(lengths, recent, sessions, seed):
    embeddings, packed = embeddings_of(8, torch.float32), events_of(lengths, seed)
    found = launch.fuse(embeddings, packed, recent, sessions, GAP_S)
    assert_close(found, specified(embeddings, packed, recent, sessions))


def test_the_result_has_the_same_bits_every_time():
    embeddings, packed = embeddings_of(8, torch.float32), events_of([30, 2], seed=1)
    first, second = (launch.fuse(embeddings, packed, 2, 3, GAP_S) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_session_of_equal_weights_is_its_events_mean():
    embeddings, packed = embeddings_of(8, torch.float32), events_of([6], seed=2)
    embeddings.log_strength.zero_()
    packed.seconds.copy_(torch.arange(6))
    fused, seconds, offsets = called(embeddings, packed, recent=2, sessions=1)
    events = called(embeddings, packed, recent=6, sessions=1)[0]
    torch.testing.assert_close(fused[0], events[:4].mean(0))
    assert seconds[:3].tolist() == [3, 4, 5]
    assert offsets.tolist() == [0, 3]


@pytest.mark.parametrize("sign", [1, -1])
def test_strengths_beyond_the_cap_are_equal(sign):
    """72 and 30 count as 20, -72 and -30 as -20: such a session is its events' mean, and no weight is lost."""
    embeddings, packed = embeddings_of(8, torch.float32), events_of([6], seed=2)
    embeddings.log_strength[:3] = torch.tensor([0.0, 72.0, 30.0]) * sign
    packed.feature_ids.zero_()
    packed.feature_ids[:, 0] = torch.tensor([1, 2, 2, 1, 1, 2])
    packed.seconds.copy_(torch.arange(6))
    fused = launch.fuse(embeddings, packed, 2, 1, GAP_S)
    assert_close(fused, specified(embeddings, packed, 2, 1))
    items, beside = embeddings.table[packed.tokens.long()], embeddings.features[packed.feature_ids.long()].sum(1)
    torch.testing.assert_close(fused[0][0], (items + beside)[:4].mean(0))
    torch.testing.assert_close(fused[0][1:3], items[4:] * torch.tensor(20.0 * sign).exp() + beside[4:])


@pytest.mark.parametrize("sessions", [3, 40])
def test_a_user_of_several_looks_keeps_the_newest_of_all_its_sessions(sessions):
    packed, recent = events_of([2600, 1, 0, 2, 1], seed=10), 4
    packed.seconds[:2600] = torch.arange(2600) // 100 * GAP_S
    starts = torch.zeros(5, sessions + 1, dtype=torch.int32, device=DEVICE)
    counts = torch.zeros(5, dtype=torch.int32, device=DEVICE)
    launch.launch(
        launch.kernel.session_kernel, (5,), packed.seconds, packed.offsets, starts, counts, GAP_S,
        RECENT=recent, SESSIONS=sessions, BLOCK=1024,
    )  # fmt: skip
    begins = [*range(0, 2600, 100)][-sessions:]
    assert counts.tolist() == [len(begins) + recent, 1, 0, 2, 1]
    assert starts[0, : len(begins) + 1].tolist() == [*begins, 2600 - recent]


def test_a_later_session_changes_no_vector_before_it():
    embeddings, packed = embeddings_of(8, torch.float32), events_of([30], seed=3)
    packed.seconds[20:] += GAP_S
    whole = called(embeddings, packed, recent=1, sessions=30)[0]
    part = EventColumns(
        packed.tokens[:21], packed.feature_ids[:21], packed.seconds[:21], torch.tensor([0, 21], device=DEVICE)
    )
    before, _, offsets = called(embeddings, part, recent=1, sessions=30)
    pooled = int(offsets[1]) - 1
    torch.testing.assert_close(whole[:pooled], before[:pooled], rtol=0, atol=0)


def test_the_call_takes_an_empty_batch():
    embeddings = embeddings_of(8, torch.float32)
    fused, seconds, offsets = called(embeddings, events_of([0, 0], seed=4))
    assert fused.shape == (0, 8)
    assert seconds.shape == (0,)
    assert offsets.tolist() == [0, 0, 0]


def test_compile_and_export_pass_the_call_through():
    embeddings, packed = embeddings_of(8, torch.float32), events_of([9, 4], seed=5)

    class Fused(torch.nn.Module):
        def forward(self, *columns: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            return called(embeddings, EventColumns(*columns))

    columns = (packed.tokens, packed.feature_ids, packed.seconds, packed.offsets)
    exported = torch.export.export(Fused(), columns).module()
    compiled = torch.compile(Fused(), backend="aot_eager", fullgraph=True)
    for run in (exported, compiled):
        assert_close(run(*columns), called(embeddings, packed))
    arguments = (embeddings.table, embeddings.features, embeddings.log_strength, *columns, 4, 3, GAP_S)
    torch.library.opcheck(torch.ops.millrace.hierarchical_sequence_fusion.default, arguments)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"table": torch.zeros(40, 8).int()}, r"table is torch.int32 \[40, 8\]"),
        ({"table": torch.zeros(40, 16, device=DEVICE)[:, ::2]}, "rows of adjacent elements"),
        ({"features": torch.zeros(9, 7)}, r"features is torch.float32 \[9, 7\] .* wanted .* \[feature rows, 8\]"),
        ({"strength": torch.zeros(3)}, r"strength is torch.float32 \[3\]"),
        ({"strength": torch.full((N_FEATURE_IDS,), torch.nan)}, r"strength \[\d+\] must be finite"),
        ({"features": torch.full((N_FEATURE_IDS, 8), torch.inf)}, r"features \[\d+, 8\] must be finite"),
        ({"table": torch.zeros(0, 8)}, r"table is torch.float32 \[0, 8\] .* wanted an item at least"),
        ({"tokens": torch.zeros(13)}, r"tokens is torch.float32 \[13\]"),
        ({"tokens": torch.tensor(3)}, r"tokens is torch.int64 \[\] .* wanted int32 or int64 \[events\]"),
        ({"tokens": torch.full((13,), ITEMS)}, r"tokens \[13\] must be from 0 to 39"),
        ({"codes": torch.full((13, 2), -1)}, r"codes \[13, 2\] must be from 0"),
        ({"codes": torch.zeros(12, 2).int()}, r"codes is torch.int32 \[12, 2\] .* wanted .* \[13, up to 32\]"),
        ({"seconds": torch.zeros(13).long()}, r"seconds is torch.int64 \[13\]"),
        ({"offsets": torch.tensor([0, 14, 13])}, r"offsets \[3\] must not decrease"),
        ({"offsets": torch.tensor([1, 13])}, r"offsets \[2\] must begin with 0 and end with 13"),
        ({"recent": -1}, "recent = -1"),
        ({"gap_s": 0}, "gap_s = 0"),
        ({"offsets": torch.zeros(40_000).long(), "recent": 60_000}, "39999 users of up to 60003 tokens each"),
    ],
)
def test_bad_input_is_named_with_its_shape_and_what_was_wanted(changes, message):
    with pytest.raises(ValueError, match=message):
        called(embeddings_of(8, torch.float32), events_of([9, 4], seed=6), **changes)


@ON_GPU
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize(("lengths", "width"), [([0, 5, 1, 900, 3, 0], 256), ([40] * 70, 24), ([7], 520)])
def test_on_a_gpu_the_call_equals_the_specification(lengths, width, dtype):
    embeddings, packed = embeddings_of(width, dtype), events_of(lengths, seed=7)
    assert_close(called(embeddings, packed, recent=11), specified(embeddings, packed, 11, 3))


@ON_GPU
@pytest.mark.gpu
def test_on_a_gpu_a_captured_graph_fuses_new_events():
    embeddings, packed = embeddings_of(64, torch.float32), events_of([20, 3, 50], seed=8)
    called(embeddings, packed, check_values=False)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = called(embeddings, packed, check_values=False)
    new = events_of([1, 70, 2], seed=9)
    for column, values in (
        (packed.tokens, new.tokens),
        (packed.feature_ids, new.feature_ids),
        (packed.seconds, new.seconds),
        (packed.offsets, new.offsets),
    ):
        column.copy_(values)
    graph.replay()
    assert_close(captured, called(embeddings, new))
