"""The kernels on a GPU where there is one, else in Triton's interpreter, in float32 and float16: its bfloat16 products
are wrong."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels.sequence_recommendation_interaction import launch
from kernels.sequence_recommendation_interaction.launch import ItemRows, Seen, TopKPlan
from kernels.sequence_recommendation_interaction.op import candidate_interaction, sequence_recommendation_interaction
from kernels.sequence_recommendation_interaction.reference import candidate_interaction as reference_candidates
from kernels.sequence_recommendation_interaction.reference import sequence_recommendation_interaction as reference
from kernels.sequence_recommendation_interaction.tiles import TopKTiles

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TILES = TopKTiles(block_items=16, block_users=16, warps=4, stages=1)
WHOLE, SAMPLED = TopKPlan(0, 0, TILES, capacity=512), TopKPlan(2, 4, TILES, capacity=512)
OVERFLOWING = TopKPlan(2, 4, TILES, capacity=16)
SCARCE = TopKPlan(2, 1, TILES, capacity=64)
ON_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


def whole_numbers(seed: int, *shape: int) -> Tensor:
    """Small integers: every sum is exact in any order, and equal scores abound."""
    return torch.randint(-3, 4, shape, generator=torch.Generator().manual_seed(seed)).float().to(DEVICE)


def random_seen(seed: int, users: int, items: int, most: int) -> Seen:
    generator = torch.Generator().manual_seed(seed)
    counts = torch.randint(0, most + 1, (users,), generator=generator)
    rows = [torch.randperm(items, generator=generator)[:count].sort().values for count in counts.tolist()]
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
    return Seen(torch.cat(rows).int().to(DEVICE), offsets.to(DEVICE))


def on_device(*numbers: int) -> Tensor:
    return torch.tensor(numbers, device=DEVICE)


def kernels(states: Tensor, catalogue: ItemRows, k: int, seen: Seen | None, plan: TopKPlan) -> tuple[Tensor, Tensor]:
    return launch.top_k(states, catalogue, k, seen, plan, num_sms=1)


def specified(states: Tensor, catalogue: ItemRows, k: int, seen: Seen | None) -> tuple[Tensor, Tensor]:
    rows, offsets = (None, None) if seen is None else (seen.rows, seen.offsets)
    return reference(states, catalogue.table, k, rows, offsets, catalogue.eligible, catalogue.scales)


def assert_same(found: tuple[Tensor, Tensor], wanted: tuple[Tensor, Tensor]) -> None:
    torch.testing.assert_close(found[0], wanted[0], rtol=0, atol=0)
    assert torch.equal(found[1], wanted[1])


@pytest.mark.parametrize(
    ("users", "items", "width", "k", "plan"),
    [
        (1, 1, 1, 1, WHOLE), (3, 5, 7, 8, WHOLE), (17, 130, 24, 16, WHOLE), (3, 300, 16, 5, SAMPLED),
        (2, 257, 33, 1, SAMPLED),
    ],
)  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_kernels_equal_the_specification_ties_included(users, items, width, k, plan, dtype):
    states, table = whole_numbers(1, users, width).to(dtype), whole_numbers(2, items, width).to(dtype)
    catalogue = ItemRows(table, None, None)
    assert_same(kernels(states, catalogue, k, None, plan), specified(states, catalogue, k, None))


@settings(max_examples=5, deadline=None)
@given(st.integers(0, 1000), st.integers(1, 4), st.integers(1, 60), st.integers(1, 12), st.booleans())
def test_any_seen_and_eligible_rows_are_left_out(seed, users, items, k, quantised):
    states, table = whole_numbers(seed, users, 8), whole_numbers(seed + 1, items, 8)
    scales = 2.0 ** whole_numbers(seed + 2, items) if quantised else None
    eligible = whole_numbers(seed + 3, items) > -2
    catalogue = ItemRows(table.to(torch.int8) if quantised else table, scales, eligible)
    seen = random_seen(seed, users, items, items)
    assert_same(kernels(states, catalogue, k, seen, WHOLE), specified(states, catalogue, k, seen))


def test_one_long_seen_list_among_short_ones_and_a_sample():
    states, table = whole_numbers(4, 3, 8), whole_numbers(5, 300, 8)
    best = (states[1] @ table.T).argsort(descending=True)[:60].sort().values  # the sample's bound must not count these
    seen = Seen(torch.cat([on_device(7), best]).int(), on_device(0, 1, 61, 61))
    catalogue = ItemRows(table, None, None)
    assert_same(kernels(states, catalogue, 5, seen, SAMPLED), specified(states, catalogue, 5, seen))


def test_too_many_candidates_are_rescued_exactly():
    states, table = whole_numbers(6, 2, 8), whole_numbers(7, 90, 8)
    states[0] = 0  # all scores are equal: the answer is the first rows
    catalogue, seen = (
        ItemRows(table, None, whole_numbers(8, 90) > -3),
        Seen(on_device(0, 2, 3), on_device(0, 2, 3)),
    )
    found = kernels(states, catalogue, 6, seen, OVERFLOWING)
    assert_same(found, specified(states, catalogue, 6, seen))


def test_a_user_with_more_candidates_than_places_whose_best_rows_come_last_is_rescued():
    table = torch.arange(90.0, device=DEVICE)[:, None]  # the interpreter appends in the order of rows
    catalogue, states = ItemRows(table, None, None), torch.ones(2, 1, device=DEVICE)
    states[1] = -1  # the first rows are the best
    assert_same(kernels(states, catalogue, 6, None, OVERFLOWING), specified(states, catalogue, 6, None))


def test_a_user_whose_bound_leaves_too_few_candidates_is_rescued():
    """All rows above the bound have been seen: below it lie the best of the others."""
    table = torch.arange(300.0, device=DEVICE)[:, None]
    catalogue, seen = ItemRows(table, None, None), Seen(torch.arange(100, 300, device=DEVICE), on_device(0, 200))
    states = torch.ones(1, 1, device=DEVICE)
    assert_same(kernels(states, catalogue, 5, seen, SCARCE), specified(states, catalogue, 5, seen))


def test_a_user_who_has_seen_everything_gets_nothing():
    states, table = whole_numbers(9, 2, 8), whole_numbers(10, 20, 8)
    seen = Seen(torch.arange(20, device=DEVICE), on_device(0, 20, 20))
    scores, rows = kernels(states, ItemRows(table, None, None), 4, seen, WHOLE)
    assert (scores[0] == -torch.inf).all()
    assert (rows[0] == -1).all()
    assert (rows[1] >= 0).all()


def test_float16_scores_are_within_the_rounding_of_their_sum():
    generator = torch.Generator().manual_seed(11)
    states, table = (torch.randn(n, 64, generator=generator).half().to(DEVICE) for n in (5, 100))
    scores, rows = kernels(states, ItemRows(table, None, None), 10, None, WHOLE)
    # Products of float16 are exact in float32; a sum of 64 loses at most 64 half units of 2^-24 of its terms' sizes.
    sizes = states.float().abs() @ table.float().abs().T  # [users, items]
    exact = (states.double() @ table.double().T).gather(1, rows)
    assert ((scores - exact).abs() <= sizes.gather(1, rows) * 64 * 2.0**-24).all()
    assert (scores.diff(dim=1) <= 0).all()


@pytest.mark.parametrize("users", [1, 3, 4])
def test_the_kernels_read_no_address_that_makes_triton_compile_another_variant(users, monkeypatch):
    apart, run = [], launch.launch

    def watched(kernel, grid, *arguments, **options):
        apart.extend(part for part in arguments if isinstance(part, Tensor) and part.data_ptr() % 16)
        run(kernel, grid, *arguments, **options)

    monkeypatch.setattr(launch, "launch", watched)
    kernels(whole_numbers(23, users, 8), ItemRows(whole_numbers(24, 20, 8), None, None), 2, None, WHOLE)
    assert not apart


def test_the_answer_has_the_same_bits_every_time():
    generator = torch.Generator().manual_seed(12)
    states, table = (torch.randn(n, 16, generator=generator).to(DEVICE) for n in (3, 260))
    found = [kernels(states, ItemRows(table, None, None), 7, None, SAMPLED) for _ in range(2)]
    assert_same(found[0], found[1])


def test_candidates_have_the_scores_of_the_catalogue():
    states, table = whole_numbers(13, 3, 70), whole_numbers(14, 40, 70)
    rows = torch.randint(-1, 40, (3, 19), generator=torch.Generator().manual_seed(15)).to(DEVICE)
    scales = 2.0 ** whole_numbers(16, 40)
    found = launch.candidate_scores(states, ItemRows(table.to(torch.int8), scales, None), rows)
    torch.testing.assert_close(found, reference_candidates(states, table, rows, scales), rtol=0, atol=0)


def test_the_call_takes_an_empty_batch_an_empty_catalogue_and_rows_apart():
    table = whole_numbers(17, 12, 8)
    assert sequence_recommendation_interaction(table[:0], table, 3)[0].shape == (0, 3)
    assert (sequence_recommendation_interaction(table[:2], table[:0], 3)[1] == -1).all()
    apart = table[::2]
    assert_same(
        sequence_recommendation_interaction(table, apart, 3),
        sequence_recommendation_interaction(table, apart.clone(), 3),
    )


def test_compile_and_export_pass_the_call_through():
    table = whole_numbers(18, 12, 8)

    class Best(torch.nn.Module):
        def forward(self, states: Tensor) -> tuple[Tensor, Tensor]:
            return sequence_recommendation_interaction(states, table, 3)

    states = whole_numbers(19, 4, 8)
    exported = torch.export.export(Best(), (states,), dynamic_shapes={"states": {0: torch.export.Dim("users")}})
    compiled = torch.compile(Best(), backend="aot_eager", fullgraph=True)
    for run in (exported.module(), compiled):
        assert_same(run(states), Best()(states))
    scores = torch.compile(candidate_interaction, backend="aot_eager", fullgraph=True)
    rows = on_device(0, -1, 3, 11).view(4, 1)
    assert torch.equal(scores(states, table, rows), candidate_interaction(states, table, rows))
    arguments = (states, table, 3, None, None, None, None)
    torch.library.opcheck(torch.ops.millrace.sequence_recommendation_interaction.default, arguments)
    for scales in (None, torch.ones(12, device=DEVICE)):
        own = (states, table if scales is None else table.to(torch.int8), on_device(0, -1, 3, 11).view(4, 1), scales)
        torch.library.opcheck(torch.ops.millrace.candidate_interaction.default, own)


SEEN_OFFSETS = torch.tensor([0, 1, 3])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"states": torch.zeros(2, 7)}, r"table is torch.float32 \[12, 8\] .* wanted torch.float32 \[items, 7\]"),
        ({"states": torch.zeros(2, 8).int()}, r"states is torch.int32 \[2, 8\]"),
        ({"states": torch.full((2, 8), torch.nan)}, r"states \[2, 8\] must be finite"),
        ({"k": 513}, "k = 513"),
        ({"table": torch.zeros(12, 16, device=DEVICE)[:, ::2]}, "elements of a row next to each other"),
        ({"table": torch.zeros(1, 16, device=DEVICE)[:, ::2]}, r"table is .* \[1, 8\] .* next to each other"),
        ({"scales": torch.zeros(12)}, r"table is torch.float32 .* wanted torch.int8"),
        ({"eligible": torch.ones(11, dtype=torch.bool)}, r"eligible is torch.bool \[11\] .* wanted bool \[12\]"),
        ({"seen": torch.tensor([1])}, "seen and seen_offsets come together"),
        ({"seen": torch.tensor([1, 5, 12]), "seen_offsets": SEEN_OFFSETS}, r"seen \[3\] must be from 0 to 11"),
        ({"seen": torch.tensor([1, 5, 4]), "seen_offsets": SEEN_OFFSETS}, r"seen \[3\] must ascend within a user"),
        ({"seen": torch.tensor([1]), "seen_offsets": torch.tensor([0, 2, 1])}, r"seen_offsets \[3\] must not decrease"),
        ({"seen": torch.tensor([1]), "seen_offsets": torch.tensor([0, 0, 2])}, "must begin with 0 and end with 1"),
        ({"seen": torch.tensor([1]), "seen_offsets": torch.tensor([0, 1])}, r"seen_offsets .* wanted .* \[3\]"),
    ],
)
def test_bad_input_is_named_with_its_shape_and_what_was_wanted(wrong, message):
    arguments = {"states": torch.zeros(2, 8), "table": torch.zeros(12, 8), "k": 3} | wrong
    arguments = {name: value.to(DEVICE) if isinstance(value, Tensor) else value for name, value in arguments.items()}
    with pytest.raises(ValueError, match=message):
        sequence_recommendation_interaction(**arguments)


def test_rows_that_the_table_lacks_and_states_that_are_no_numbers_are_refused():
    with pytest.raises(ValueError, match=r"rows \[1, 2\] must be from -1 to 11"):
        candidate_interaction(torch.zeros(1, 8), torch.zeros(12, 8), torch.tensor([[0, 12]]))
    with pytest.raises(ValueError, match=r"states \[1, 8\] must be finite"):
        candidate_interaction(torch.full((1, 8), torch.nan), torch.zeros(12, 8), torch.tensor([[0]]))


def test_of_an_empty_table_no_candidate_has_a_score():
    table, none = torch.zeros(0, 8, device=DEVICE), torch.full((2, 3), -1, device=DEVICE)
    assert (candidate_interaction(torch.zeros(2, 8, device=DEVICE), table, none) == -torch.inf).all()


@ON_GPU
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("users", "items", "width", "k"),
    [(1, 100_000, 64, 10), (70, 50_001, 200, 512), (300, 9000, 24, 100), (256, 30_000, 256, 128)],
)
def test_on_a_gpu_the_call_equals_the_specification(users, items, width, k, dtype):
    states, table = (whole_numbers(20, n, width).to(dtype) for n in (users, items))
    seen = random_seen(21, users, items, 300)
    listed = {"seen": seen.rows, "seen_offsets": seen.offsets}
    eligible = whole_numbers(22, items) > -3
    found = sequence_recommendation_interaction(states, table, k, eligible=eligible, **listed)
    assert_same(found, reference(states, table, k, eligible=eligible, **listed))


@ON_GPU
@pytest.mark.gpu
def test_on_a_gpu_a_captured_graph_answers_for_new_states():
    states, table = torch.randn(32, 64, device="cuda"), torch.randn(50_000, 64, device="cuda")

    def best() -> tuple[Tensor, Tensor]:
        return sequence_recommendation_interaction(states, table, 10, check_values=False)

    best()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = best()
    states.copy_(torch.randn(32, 64))
    states[3] = 0  # all its scores are equal: the rescue runs in the graph
    graph.replay()
    assert_same(captured, best())


@ON_GPU
@pytest.mark.gpu
def test_on_a_gpu_a_captured_graph_scores_new_candidates_and_twice_the_same():
    states, table = torch.randn(32, 64, device="cuda"), torch.randn(5000, 64, device="cuda")
    rows = torch.randint(-1, 5000, (32, 50), device="cuda")
    candidate_interaction(states, table, rows, check_values=False)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = candidate_interaction(states, table, rows, check_values=False)
    rows.copy_(torch.randint(-1, 5000, (32, 50)))
    graph.replay()
    for _ in range(2):
        assert torch.equal(captured, candidate_interaction(states, table, rows))
