"""Top-k against the specification: the kernels on a GPU if there is one, else in Triton's interpreter, in float32 and
float16; its bfloat16 products are wrong."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels.sequence_recommendation_interaction import launch
from kernels.sequence_recommendation_interaction.launch import ExcludedRows, ItemRows, TopKPlan
from kernels.sequence_recommendation_interaction.op import candidate_interaction, sequence_recommendation_interaction
from kernels.sequence_recommendation_interaction.reference import candidate_interaction as reference_candidates
from kernels.sequence_recommendation_interaction.reference import sequence_recommendation_interaction as reference
from kernels.sequence_recommendation_interaction.tiles import TopKTiles

TopK = tuple[Tensor, Tensor]  # scores, rows

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TILES = TopKTiles(block_items=16, block_users=16, warps=4, stages=1)
UNSAMPLED = TopKPlan(0, 0, TILES, capacity=512)
SAMPLED = TopKPlan(2, 4, TILES, capacity=512)
OVERFLOWING = TopKPlan(2, 4, TILES, capacity=16)
SCARCE = TopKPlan(2, 1, TILES, capacity=64)  # a tight bound: few candidates reach it
ON_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


def random_integers(seed: int, *shape: int) -> Tensor:
    """Small integers as float32: every sum is exact in any order, and many scores are equal."""
    return torch.randint(-3, 4, shape, generator=torch.Generator().manual_seed(seed)).float().to(DEVICE)


def random_seen(seed: int, users: int, items: int, max_seen: int) -> ExcludedRows:
    rng = torch.Generator().manual_seed(seed)
    counts = torch.randint(0, max_seen + 1, (users,), generator=rng)
    rows = [torch.randperm(items, generator=rng)[:count].sort().values for count in counts.tolist()]
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
    return ExcludedRows(torch.cat(rows).int().to(DEVICE), offsets.to(DEVICE))


def on_device(*numbers: int) -> Tensor:
    return torch.tensor(numbers, device=DEVICE)


def run(states: Tensor, catalogue: ItemRows, k: int, seen: ExcludedRows | None, plan: TopKPlan) -> TopK:
    """The result of the kernels."""
    return launch.top_k(states, catalogue, k, seen, plan, num_sms=1)


def specified(states: Tensor, catalogue: ItemRows, k: int, seen: ExcludedRows | None) -> TopK:
    """The result of the specification."""
    rows, offsets = (None, None) if seen is None else (seen.rows, seen.offsets)
    return reference(states, catalogue.table, k, rows, offsets, catalogue.eligible, catalogue.scales)


def assert_equal(result: TopK, expected: TopK) -> None:
    torch.testing.assert_close(result[0], expected[0], rtol=0, atol=0)
    assert torch.equal(result[1], expected[1])


def assert_run_equals_specification(
    states: Tensor, catalogue: ItemRows, k: int, seen: ExcludedRows | None, plan: TopKPlan
) -> TopK:
    result = run(states, catalogue, k, seen, plan)
    assert_equal(result, specified(states, catalogue, k, seen))
    return result


@pytest.mark.parametrize(
    ("users", "items", "width", "k", "plan"),
    [
        (1, 1, 1, 1, UNSAMPLED),
        (3, 5, 7, 8, UNSAMPLED),
        (17, 130, 24, 16, UNSAMPLED),
        (3, 300, 16, 5, SAMPLED),
        (2, 257, 33, 1, SAMPLED),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_kernels_equal_the_specification_including_ties(
    users: int, items: int, width: int, k: int, plan: TopKPlan, dtype: torch.dtype
) -> None:
    states = random_integers(1, users, width).to(dtype)
    table = random_integers(2, items, width).to(dtype)
    assert_run_equals_specification(states, ItemRows(table, None, None), k, None, plan)


@settings(max_examples=5)
@given(st.integers(0, 1000), st.integers(1, 4), st.integers(1, 60), st.integers(1, 12), st.booleans())
def test_seen_and_ineligible_rows_are_excluded(seed: int, users: int, items: int, k: int, quantised: bool) -> None:
    states = random_integers(seed, users, 8)
    table = random_integers(seed + 1, items, 8)
    scales = 2.0 ** random_integers(seed + 2, items) if quantised else None
    eligible = random_integers(seed + 3, items) > -2
    catalogue = ItemRows(table.to(torch.int8) if quantised else table, scales, eligible)
    seen = random_seen(seed, users, items, items)
    assert_run_equals_specification(states, catalogue, k, seen, UNSAMPLED)


def test_bound_of_a_long_seen_list_does_not_count_seen_items() -> None:
    states = random_integers(4, 3, 8)
    table = random_integers(5, 300, 8)
    best = (states[1] @ table.T).argsort(descending=True)[:60].sort().values
    seen = ExcludedRows(torch.cat([on_device(7), best]).int(), on_device(0, 1, 61, 61))
    assert_run_equals_specification(states, ItemRows(table, None, None), 5, seen, SAMPLED)


def test_more_candidates_than_capacity_take_the_overflow_pass() -> None:
    states = random_integers(6, 2, 8)
    table = random_integers(7, 90, 8)
    states[0] = 0  # all scores are equal: the first rows are the best
    catalogue = ItemRows(table, None, random_integers(8, 90) > -3)
    seen = ExcludedRows(on_device(0, 2, 3), on_device(0, 2, 3))
    assert_run_equals_specification(states, catalogue, 6, seen, OVERFLOWING)


def test_best_rows_appended_after_the_capacity_are_found() -> None:
    table = torch.arange(90.0, device=DEVICE)[:, None]  # the interpreter appends in the order of rows
    states = torch.ones(2, 1, device=DEVICE)
    states[1] = -1  # the first rows are the best
    assert_run_equals_specification(states, ItemRows(table, None, None), 6, None, OVERFLOWING)


def test_bound_that_leaves_too_few_candidates_takes_the_overflow_pass() -> None:
    """All rows above the bound have been seen: the best of the others are below it."""
    table = torch.arange(300.0, device=DEVICE)[:, None]
    seen = ExcludedRows(torch.arange(100, 300, device=DEVICE), on_device(0, 200))
    states = torch.ones(1, 1, device=DEVICE)
    assert_run_equals_specification(states, ItemRows(table, None, None), 5, seen, SCARCE)


def test_user_who_has_seen_everything_gets_no_rows() -> None:
    states = random_integers(9, 2, 8)
    table = random_integers(10, 20, 8)
    seen = ExcludedRows(torch.arange(20, device=DEVICE), on_device(0, 20, 20))
    scores, rows = run(states, ItemRows(table, None, None), 4, seen, UNSAMPLED)
    assert (scores[0] == -torch.inf).all()
    assert (rows[0] == -1).all()
    assert (rows[1] >= 0).all()


def test_float16_scores_are_within_the_rounding_of_their_sum() -> None:
    rng = torch.Generator().manual_seed(11)
    states, table = (torch.randn(n, 64, generator=rng).half().to(DEVICE) for n in (5, 100))
    scores, rows = run(states, ItemRows(table, None, None), 10, None, UNSAMPLED)
    # Products of float16 are exact in float32; a sum of 64 loses at most 64 half units of 2^-24 of its terms' sizes.
    sizes = states.float().abs() @ table.float().abs().T  # [users, items]
    exact = (states.double() @ table.double().T).gather(1, rows)
    assert ((scores - exact).abs() <= sizes.gather(1, rows) * 64 * 2.0**-24).all()
    assert (scores.diff(dim=1) <= 0).all()


@pytest.mark.parametrize("users", [1, 3, 4])
def test_addresses_need_one_compiled_variant(users: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton compiles another variant of a kernel for an address that is not a multiple of 16."""
    misaligned: list[Tensor] = []
    original = launch.launch

    def recording_launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
        misaligned.extend(part for part in arguments if isinstance(part, Tensor) and part.data_ptr() % 16)
        original(kernel, grid, *arguments, **options)

    monkeypatch.setattr(launch, "launch", recording_launch)
    run(random_integers(23, users, 8), ItemRows(random_integers(24, 20, 8), None, None), 2, None, UNSAMPLED)
    assert not misaligned


def test_equal_inputs_give_equal_bits() -> None:
    rng = torch.Generator().manual_seed(12)
    states, table = (torch.randn(n, 16, generator=rng).to(DEVICE) for n in (3, 260))
    first, second = (run(states, ItemRows(table, None, None), 7, None, SAMPLED) for _ in range(2))
    assert_equal(first, second)


def test_candidate_scores_equal_the_specification() -> None:
    states = random_integers(13, 3, 70)
    table = random_integers(14, 40, 70)
    rows = torch.randint(-1, 40, (3, 19), generator=torch.Generator().manual_seed(15)).to(DEVICE)
    scales = 2.0 ** random_integers(16, 40)
    scores = launch.candidate_scores(states, ItemRows(table.to(torch.int8), scales, None), rows)
    torch.testing.assert_close(scores, reference_candidates(states, table, rows, scales), rtol=0, atol=0)


def test_call_accepts_an_empty_batch_an_empty_catalogue_and_strided_rows() -> None:
    table = random_integers(17, 12, 8)
    assert sequence_recommendation_interaction(table[:0], table, 3)[0].shape == (0, 3)
    assert (sequence_recommendation_interaction(table[:2], table[:0], 3)[1] == -1).all()
    strided = table[::2]
    assert_equal(
        sequence_recommendation_interaction(table, strided, 3),
        sequence_recommendation_interaction(table, strided.clone(), 3),
    )


def test_compile_and_export_keep_the_operators_intact() -> None:
    table = random_integers(18, 12, 8)

    class Retrieval(torch.nn.Module):
        def forward(self, states: Tensor) -> TopK:
            return sequence_recommendation_interaction(states, table, 3)

    states = random_integers(19, 4, 8)
    exported = torch.export.export(Retrieval(), (states,), dynamic_shapes={"states": {0: torch.export.Dim("users")}})
    compiled = torch.compile(Retrieval(), backend="aot_eager", fullgraph=True)
    for module in (exported.module(), compiled):
        assert_equal(module(states), Retrieval()(states))
    scores = torch.compile(candidate_interaction, backend="aot_eager", fullgraph=True)
    rows = on_device(0, -1, 3, 11).view(4, 1)
    assert torch.equal(scores(states, table, rows), candidate_interaction(states, table, rows))
    arguments = (states, table, 3, None, None, None, None)
    torch.library.opcheck(torch.ops.millrace.sequence_recommendation_interaction.default, arguments)
    for scales in (None, torch.ones(12, device=DEVICE)):
        arguments = (states, table if scales is None else table.to(torch.int8), rows, scales)
        torch.library.opcheck(torch.ops.millrace.candidate_interaction.default, arguments)


SEEN_OFFSETS = torch.tensor([0, 1, 3])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"states": torch.zeros(2, 7)}, r"table is torch.float32 \[12, 8\] .* expected torch.float32 \[items, 7\]"),
        ({"states": torch.zeros(2, 8).int()}, r"states is torch.int32 \[2, 8\]"),
        ({"states": torch.full((2, 8), torch.nan)}, r"states \[2, 8\] must be finite"),
        ({"k": 513}, "k = 513"),
        ({"table": torch.zeros(12, 16, device=DEVICE)[:, ::2]}, "contiguous elements within a row"),
        ({"table": torch.zeros(1, 16, device=DEVICE)[:, ::2]}, r"table is .* \[1, 8\] .* contiguous elements"),
        ({"scales": torch.zeros(12)}, r"table is torch.float32 .* expected torch.int8"),
        ({"eligible": torch.ones(11, dtype=torch.bool)}, r"eligible is torch.bool \[11\] .* expected bool \[12\]"),
        ({"seen": torch.tensor([1])}, "seen and seen_offsets must both be given"),
        ({"seen": torch.tensor([1, 5, 12]), "seen_offsets": SEEN_OFFSETS}, r"seen \[3\] must be from 0 to 11"),
        ({"seen": torch.tensor([1, 5, 4]), "seen_offsets": SEEN_OFFSETS}, r"seen \[3\] must ascend within a user"),
        ({"seen": torch.tensor([1]), "seen_offsets": torch.tensor([0, 2, 1])}, r"seen_offsets \[3\] must not decrease"),
        ({"seen": torch.tensor([1]), "seen_offsets": torch.tensor([0, 0, 2])}, "must begin with 0 and end with 1"),
        ({"seen": torch.tensor([1]), "seen_offsets": torch.tensor([0, 1])}, r"seen_offsets .* expected .* \[3\]"),
    ],
)
def test_invalid_argument_is_named_with_its_shape(changes: dict[str, Any], message: str) -> None:
    arguments = {"states": torch.zeros(2, 8), "table": torch.zeros(12, 8), "k": 3} | changes
    arguments = {name: value.to(DEVICE) if isinstance(value, Tensor) else value for name, value in arguments.items()}
    with pytest.raises(ValueError, match=message):
        sequence_recommendation_interaction(**arguments)


def test_candidates_outside_the_table_and_nan_states_are_rejected() -> None:
    with pytest.raises(ValueError, match=r"rows \[1, 2\] must be from -1 to 11"):
        candidate_interaction(torch.zeros(1, 8), torch.zeros(12, 8), torch.tensor([[0, 12]]))
    with pytest.raises(ValueError, match=r"states \[1, 8\] must be finite"):
        candidate_interaction(torch.full((1, 8), torch.nan), torch.zeros(12, 8), torch.tensor([[0]]))


def test_candidates_of_an_empty_table_score_minus_infinity() -> None:
    table = torch.zeros(0, 8, device=DEVICE)
    rows = torch.full((2, 3), -1, device=DEVICE)
    assert (candidate_interaction(torch.zeros(2, 8, device=DEVICE), table, rows) == -torch.inf).all()


@ON_GPU
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("users", "items", "width", "k"),
    [(1, 100_000, 64, 10), (70, 50_001, 200, 512), (300, 9000, 24, 100), (256, 30_000, 256, 128)],
)
def test_on_gpu_the_call_equals_the_specification(
    users: int, items: int, width: int, k: int, dtype: torch.dtype
) -> None:
    states, table = (random_integers(20, n, width).to(dtype) for n in (users, items))
    seen = random_seen(21, users, items, 300)
    masks = {"seen": seen.rows, "seen_offsets": seen.offsets, "eligible": random_integers(22, items) > -3}
    result = sequence_recommendation_interaction(states, table, k, **masks)
    assert_equal(result, reference(states, table, k, **masks))


@ON_GPU
@pytest.mark.gpu
def test_on_gpu_captured_graph_answers_for_new_states() -> None:
    states = torch.randn(32, 64, device="cuda")
    table = torch.randn(50_000, 64, device="cuda")

    def best() -> TopK:
        return sequence_recommendation_interaction(states, table, 10, check_values=False)

    best()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = best()
    states.copy_(torch.randn(32, 64))
    states[3] = 0  # all its scores are equal: the overflow pass runs in the graph
    graph.replay()
    assert_equal(captured, best())


@ON_GPU
@pytest.mark.gpu
def test_on_gpu_captured_graph_scores_new_candidates_with_equal_bits() -> None:
    states = torch.randn(32, 64, device="cuda")
    table = torch.randn(5000, 64, device="cuda")
    rows = torch.randint(-1, 5000, (32, 50), device="cuda")
    candidate_interaction(states, table, rows, check_values=False)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = candidate_interaction(states, table, rows, check_values=False)
    rows.copy_(torch.randint(-1, 5000, (32, 50)))
    graph.replay()
    for _ in range(2):
        assert torch.equal(captured, candidate_interaction(states, table, rows))
