"""Fusion against the specification: the kernels on a GPU if there is one, else in Triton's interpreter."""

from typing import Any

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
from pipeline.features.event_features import N_FEATURE_IDS, N_FEATURES

Fused = tuple[Tensor, Tensor, Tensor]  # rows, seconds, offsets

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ITEMS = 40
GAP_S = 1800
ON_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
# A unit in the last place of the output (the interpreter truncates bfloat16), and of float32: of the sums of 60 events,
# and of strengths up to e^20, whose exponential is off by 20 such units if a sum's last bit differs.
FLOAT32 = 2e-5
TOLERANCES = {torch.float32: FLOAT32, torch.float16: 2.0**-10 + FLOAT32, torch.bfloat16: 2.0**-7 + FLOAT32}


def make_embeddings(width: int, dtype: torch.dtype = torch.float32) -> Embeddings:
    rng = torch.Generator().manual_seed(width)
    table, features = (torch.randn(rows, width, generator=rng).to(dtype) for rows in (ITEMS, N_FEATURE_IDS))
    log_strength = torch.randn(N_FEATURE_IDS, generator=rng)
    return Embeddings(table.to(DEVICE), features.to(DEVICE), log_strength.to(DEVICE))


def make_events(lengths: list[int], seed: int) -> EventColumns:
    """Random events of users with these lengths, with pauses around GAP_S."""
    rng = np.random.default_rng(seed)
    total = sum(lengths)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    steps = np.split(rng.choice([0, 5, GAP_S - 1, GAP_S, 90_000], total), offsets[1:-1])
    seconds = np.concatenate([np.cumsum(part) for part in steps]) if lengths else np.zeros(0)
    feature_ids = rng.integers(0, N_FEATURE_IDS, (total, N_FEATURES)).astype(np.int32)
    tokens = rng.integers(0, ITEMS, total).astype(np.int32)
    columns = (tokens, feature_ids, seconds.astype(np.int32), offsets)
    return EventColumns(*(torch.from_numpy(column).to(DEVICE) for column in columns))


def specified(embeddings: Embeddings, events: EventColumns, recent: int, sessions: int) -> Fused:
    """The result of the specification."""
    return reference(
        embeddings.table,
        embeddings.features,
        embeddings.log_strength,
        events.tokens,
        events.feature_ids,
        events.seconds,
        events.offsets,
        recent,
        sessions,
        GAP_S,
    )


def fuse(embeddings: Embeddings, events: EventColumns, recent: int, sessions: int) -> Fused:
    """The result of the kernels."""
    return launch.fuse(embeddings, events, recent, sessions, GAP_S)


def call(embeddings: Embeddings, events: EventColumns, **changes: Any) -> Fused:
    """The result of the public call, with some arguments changed."""
    arguments = {
        "table": embeddings.table,
        "features": embeddings.features,
        "log_strength": embeddings.log_strength,
        "tokens": events.tokens,
        "feature_ids": events.feature_ids,
        "seconds": events.seconds,
        "offsets": events.offsets,
        "recent": 4,
        "sessions": 3,
        "gap_s": GAP_S,
    } | changes
    return hierarchical_sequence_fusion(
        **{name: value.to(DEVICE) if isinstance(value, Tensor) else value for name, value in arguments.items()}
    )


def assert_near(result: Fused, expected: Fused) -> None:
    """Assert equal offsets and seconds, and rows within the tolerance of their dtype."""
    assert torch.equal(result[2], expected[2])
    assert torch.equal(result[1], expected[1])
    bound = TOLERANCES[expected[0].dtype]
    torch.testing.assert_close(result[0], expected[0], rtol=bound, atol=bound)


@pytest.mark.parametrize(
    ("lengths", "width", "recent", "sessions"),
    [
        ([1], 1, 1, 1),
        ([0, 5, 0], 24, 2, 2),
        ([60, 1, 3, 0, 1], 16, 4, 3),
        ([9, 9], 33, 0, 4),
        ([9, 9], 16, 5, 0),
        ([3, 4], 16, 7, 2),
    ],
)
@pytest.mark.parametrize("dtype", TOLERANCES)
def test_kernels_equal_the_specification(
    lengths: list[int], width: int, recent: int, sessions: int, dtype: torch.dtype
) -> None:
    embeddings = make_embeddings(width, dtype)
    events = make_events(lengths, seed=len(lengths))
    result = fuse(embeddings, events, recent, sessions)
    assert_near(result, specified(embeddings, events, recent, sessions))


@settings(max_examples=5)
@given(
    st.lists(st.integers(0, 12), min_size=1, max_size=5).filter(any),
    st.integers(0, 3),
    st.integers(1, 3),
    st.integers(0, 99),
)
def test_kernels_equal_the_specification_for_any_offsets(
    lengths: list[int], recent: int, sessions: int, seed: int
) -> None:
    embeddings = make_embeddings(8)
    events = make_events(lengths, seed)
    result = fuse(embeddings, events, recent, sessions)
    assert_near(result, specified(embeddings, events, recent, sessions))


def test_equal_inputs_give_equal_bits() -> None:
    embeddings = make_embeddings(8)
    events = make_events([30, 2], seed=1)
    first, second = (fuse(embeddings, events, 2, 3) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_session_of_equal_weights_is_the_mean_of_its_events() -> None:
    embeddings = make_embeddings(8)
    packed = make_events([6], seed=2)
    embeddings.log_strength.zero_()
    packed.seconds.copy_(torch.arange(6))
    fused, seconds, offsets = call(embeddings, packed, recent=2, sessions=1)
    events = call(embeddings, packed, recent=6, sessions=1)[0]
    torch.testing.assert_close(fused[0], events[:4].mean(0))
    assert seconds[:3].tolist() == [3, 4, 5]
    assert offsets.tolist() == [0, 3]


@pytest.mark.parametrize("sign", [1, -1])
def test_strengths_beyond_the_cap_are_equal(sign: int) -> None:
    """72 and 30 count as 20, -72 and -30 as -20: the session is its events' mean, and no weight is lost."""
    embeddings = make_embeddings(8)
    events = make_events([6], seed=2)
    embeddings.log_strength[:3] = torch.tensor([0.0, 72.0, 30.0]) * sign
    events.feature_ids.zero_()
    events.feature_ids[:, 0] = torch.tensor([1, 2, 2, 1, 1, 2])
    events.seconds.copy_(torch.arange(6))
    fused = fuse(embeddings, events, 2, 1)
    assert_near(fused, specified(embeddings, events, 2, 1))
    items = embeddings.table[events.tokens.long()]
    feature_sums = embeddings.features[events.feature_ids.long()].sum(1)
    torch.testing.assert_close(fused[0][0], (items + feature_sums)[:4].mean(0))
    strength = torch.tensor(20.0 * sign).exp()
    torch.testing.assert_close(fused[0][1:3], items[4:] * strength + feature_sums[4:])


@pytest.mark.parametrize("sessions", [3, 40])
def test_user_of_several_chunks_keeps_its_last_sessions(sessions: int) -> None:
    recent = 4
    events = make_events([2600, 1, 0, 2, 1], seed=10)
    events.seconds[:2600] = torch.arange(2600) // 100 * GAP_S
    starts = torch.zeros(5, sessions + 1, dtype=torch.int32, device=DEVICE)
    counts = torch.zeros(5, dtype=torch.int32, device=DEVICE)
    launch.launch(
        launch.kernel.session_kernel, (5,), events.seconds, events.offsets, starts, counts, GAP_S,
        RECENT=recent, SESSIONS=sessions, BLOCK=1024,
    )  # fmt: skip
    expected = [*range(0, 2600, 100)][-sessions:]
    assert counts.tolist() == [len(expected) + recent, 1, 0, 2, 1]
    assert starts[0, : len(expected) + 1].tolist() == [*expected, 2600 - recent]


def test_later_session_changes_no_earlier_vector() -> None:
    embeddings = make_embeddings(8)
    events = make_events([30], seed=3)
    events.seconds[20:] += GAP_S
    fused = call(embeddings, events, recent=1, sessions=30)[0]
    earlier = EventColumns(
        events.tokens[:21], events.feature_ids[:21], events.seconds[:21], torch.tensor([0, 21], device=DEVICE)
    )
    expected, _, offsets = call(embeddings, earlier, recent=1, sessions=30)
    pooled = int(offsets[1]) - 1
    torch.testing.assert_close(fused[:pooled], expected[:pooled], rtol=0, atol=0)


def test_empty_batch_gives_no_rows() -> None:
    fused, seconds, offsets = call(make_embeddings(8), make_events([0, 0], seed=4))
    assert fused.shape == (0, 8)
    assert seconds.shape == (0,)
    assert offsets.tolist() == [0, 0, 0]


def test_compile_and_export_keep_the_operator_intact() -> None:
    embeddings = make_embeddings(8)
    events = make_events([9, 4], seed=5)

    class Fusion(torch.nn.Module):
        def forward(self, *columns: Tensor) -> Fused:
            return call(embeddings, EventColumns(*columns))

    columns = (events.tokens, events.feature_ids, events.seconds, events.offsets)
    exported = torch.export.export(Fusion(), columns).module()
    compiled = torch.compile(Fusion(), backend="aot_eager", fullgraph=True)
    for module in (exported, compiled):
        assert_near(module(*columns), call(embeddings, events))
    arguments = (embeddings.table, embeddings.features, embeddings.log_strength, *columns, 4, 3, GAP_S)
    torch.library.opcheck(torch.ops.millrace.hierarchical_sequence_fusion.default, arguments)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"table": torch.zeros(40, 8).int()}, r"table is torch.int32 \[40, 8\]"),
        ({"table": torch.zeros(40, 16, device=DEVICE)[:, ::2]}, "rows of adjacent elements"),
        ({"features": torch.zeros(9, 7)}, r"features is torch.float32 \[9, 7\] .* expected .* \[feature rows, 8\]"),
        ({"log_strength": torch.zeros(3)}, r"log_strength is torch.float32 \[3\]"),
        ({"log_strength": torch.full((N_FEATURE_IDS,), torch.nan)}, r"log_strength \[\d+\] must be finite"),
        ({"features": torch.full((N_FEATURE_IDS, 8), torch.inf)}, r"features \[\d+, 8\] must be finite"),
        ({"table": torch.zeros(0, 8)}, r"table is torch.float32 \[0, 8\] .* expected at least one item"),
        ({"tokens": torch.zeros(13)}, r"tokens is torch.float32 \[13\]"),
        ({"tokens": torch.tensor(3)}, r"tokens is torch.int64 \[\] .* expected int32 or int64 \[events\]"),
        ({"tokens": torch.full((13,), ITEMS)}, r"tokens \[13\] must be from 0 to 39"),
        ({"feature_ids": torch.full((13, 2), -1)}, r"feature_ids \[13, 2\] must be from 0"),
        (
            {"feature_ids": torch.zeros(12, 2).int()},
            r"feature_ids is torch.int32 \[12, 2\] .* expected .* \[13, up to 32\]",
        ),
        ({"seconds": torch.zeros(13).long()}, r"seconds is torch.int64 \[13\]"),
        ({"offsets": torch.tensor([0, 14, 13])}, r"offsets \[3\] must not decrease"),
        ({"offsets": torch.tensor([1, 13])}, r"offsets \[2\] must begin with 0 and end with 13"),
        ({"recent": -1}, "recent = -1"),
        ({"gap_s": 0}, "gap_s = 0"),
        ({"offsets": torch.zeros(40_000).long(), "recent": 60_000}, "39999 users of up to 60003 rows each"),
    ],
)
def test_invalid_argument_is_named_with_its_shape(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(make_embeddings(8), make_events([9, 4], seed=6), **changes)


@ON_GPU
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize(("lengths", "width"), [([0, 5, 1, 900, 3, 0], 256), ([40] * 70, 24), ([7], 520)])
def test_on_gpu_the_call_equals_the_specification(lengths: list[int], width: int, dtype: torch.dtype) -> None:
    embeddings = make_embeddings(width, dtype)
    events = make_events(lengths, seed=7)
    assert_near(call(embeddings, events, recent=11), specified(embeddings, events, 11, 3))


@ON_GPU
@pytest.mark.gpu
def test_on_gpu_captured_graph_fuses_new_events() -> None:
    embeddings = make_embeddings(64)
    events = make_events([20, 3, 50], seed=8)
    call(embeddings, events, check_values=False)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call(embeddings, events, check_values=False)
    new = make_events([1, 70, 2], seed=9)
    for column, values in (
        (events.tokens, new.tokens),
        (events.feature_ids, new.feature_ids),
        (events.seconds, new.seconds),
        (events.offsets, new.offsets),
    ):
        column.copy_(values)
    graph.replay()
    assert_near(captured, call(embeddings, new))
