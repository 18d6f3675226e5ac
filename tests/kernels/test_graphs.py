"""Buckets, padding, patience and the budget; on a GPU the graphs themselves."""

from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kernels import graphs as graphs_module
from kernels.fused_attention_layernorm.plan import AttentionPlan
from kernels.graphs import MIN_CALLS, BatchGraphs, Bucket, CapturedGraph, bucket_rows, possible_buckets
from pipeline.backends.fused import encoder_of
from pipeline.features.event_features import TIME_THRESHOLDS
from tests.kernels.fused_attention_layernorm.test_encoder import DEVICE, WIDE
from tests.kernels.fused_attention_layernorm.test_op_reference import inputs_of_lengths, model

CLASSES = (64, 300)


class Summed:
    """Each user's sum of its rows; the sizes that it was called with."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, int, int]] = []
        self.offsets: list[list[int]] = []

    def __call__(self, columns: Sequence[Tensor], offsets: Tensor, longest: int) -> Tensor:
        self.calls.append((len(columns[0]), len(offsets) - 1, longest))
        self.offsets.append(offsets.tolist())
        sums = torch.cat([columns[0].new_zeros(1), columns[0].cumsum(0)])
        return sums[offsets[1:].long()] - sums[offsets[:-1].long()]


def batch_of(lengths: list[int]) -> tuple[list[Tensor], Tensor]:
    offsets = torch.tensor([0, *lengths]).cumsum(0).int()
    return [torch.arange(float(offsets[-1]))], offsets


@given(st.lists(st.integers(1, 300), min_size=1, max_size=20))
def test_every_batch_finds_its_bucket_among_those_that_are_warmed(lengths: list[int]) -> None:
    longest = next(most for most in CLASSES if max(lengths) <= most)
    assert Bucket.from_sizes(len(lengths), sum(lengths), longest) in set(possible_buckets(20, 6000, CLASSES))


def test_no_bucket_is_warmed_that_no_batch_can_have() -> None:
    for bucket in possible_buckets(20, 6000, CLASSES):
        lengths = [1] * (bucket.users // 2) + [CLASSES[0] + 1 if bucket.max_length == CLASSES[1] else 1]
        assert sum(lengths) <= bucket.rows, bucket  # the smallest such batch is within it
        assert Bucket.from_sizes(bucket.users, bucket.users * bucket.max_length, 0).rows >= bucket.rows, (
            bucket
        )  # the largest not


def test_a_batch_is_padded_to_its_bucket_and_gives_the_same() -> None:
    run = Summed()
    graphs = BatchGraphs(run, [torch.zeros(1)], 20, 6000)
    assert graphs.warm(CLASSES) == len(set(possible_buckets(20, 6000, CLASSES)))
    for lengths in ([3], [300, 1, 7], [64] * 5, [1] * 20):
        columns, offsets = batch_of(lengths)
        longest = CLASSES[max(lengths) > CLASSES[0]]
        assert graphs(columns, offsets, longest)[: len(lengths)].tolist() == run(columns, offsets, longest).tolist()
        assert run.calls[-2][:2] == (bucket_rows(sum(lengths)), 1 << (len(lengths) - 1).bit_length())


def test_users_that_fill_up_a_bucket_have_no_rows_whatever_batch_came_before() -> None:
    run = Summed()
    graphs = BatchGraphs(run, [torch.zeros(1)], 8, 600)
    graphs.warm(CLASSES)
    for lengths in ([60] * 8, [3, 1, 2, 1, 1]):
        graphs(*batch_of(lengths), 64)
    assert run.offsets[-1] == [0, 3, 4, 6, 7, 8, 8, 8, 8]


class Counted(BatchGraphs):
    """Every graph holds ten bytes."""

    made = 0

    def _captured(self, call: Callable[[], Tensor]) -> CapturedGraph:
        self.made += 1
        return CapturedGraph(call, 10)


def test_the_largest_buckets_are_warmed_until_the_budget_is_full() -> None:
    graphs = Counted(Summed(), [torch.zeros(1)], 16, 2000, budget_bytes=35)
    assert graphs.warm([256]) == 3
    assert graphs.made == 4  # the last one had no room
    run = Summed()
    graphs._run = run
    for lengths in ([125] * 16, [100]):
        graphs(*batch_of(lengths), 256)
    assert [rows for rows, *_ in run.calls] == [100]  # the large batch's graph was made; the small one has none


def test_more_buckets_than_room_do_not_make_graphs_over_and_over_but_the_often_called_have_them() -> None:
    graphs = Counted(Summed(), [torch.zeros(1)], 16, 2000, budget_bytes=35)
    for _ in range(100):
        for rows in (300, 600, 900, 1200, 1500, 1900):
            graphs(*batch_of([rows // 16] * 16), 256)
    assert graphs.made == 4  # of 600 batches; the last one had no room
    for _ in range(200 + MIN_CALLS):
        graphs(*batch_of([16] * 16), 256)
        assert graphs.made == 4
    graphs(*batch_of([16] * 16), 256)  # twice as often as those that have graphs
    assert graphs.made == 5
    assert Bucket.from_sizes(16, 256, 256) in graphs._graphs


def test_what_was_asked_for_long_ago_gives_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs_module, "HALF_LIFE_CALLS", 50)
    graphs = Counted(Summed(), [torch.zeros(1)], 16, 2000, budget_bytes=15)
    for rows in (300, 600):
        for _ in range(200):
            graphs(*batch_of([rows // 16] * 16), 256)
    assert set(graphs._graphs) == {Bucket.from_sizes(16, 600, 256)}


def test_where_the_device_has_no_room_the_batch_is_called_as_it_is() -> None:
    class Full(BatchGraphs):
        def _captured(self, call: Callable[[], Tensor]) -> CapturedGraph:
            raise torch.OutOfMemoryError("none left")

    run = Summed()
    graphs = Full(run, [torch.zeros(1)], 4, 600)
    for _ in range(2 * MIN_CALLS):
        assert graphs(*batch_of([5, 6]), 64).tolist() == [10.0, 45.0]
    assert len(graphs) == graphs.warm([64]) == 0


def test_a_batch_that_is_too_large_is_called_as_it_is() -> None:
    run = Summed()
    graphs = BatchGraphs(run, [torch.zeros(1)], 4, 256)
    for lengths in ([257], [1] * 5):
        for _ in range(MIN_CALLS + 2):
            graphs(*batch_of(lengths), 300)
        assert set(run.calls) == {(sum(lengths), len(lengths), 300)}
        run.calls.clear()
    assert len(graphs) == 0


def test_a_bucket_that_comes_again_and_again_gets_a_graph() -> None:
    graphs = BatchGraphs(Summed(), [torch.zeros(1)], 4, 256)
    for calls in range(1, MIN_CALLS + 2):
        graphs(*batch_of([5, 6]), 64)
        assert len(graphs) == (calls > MIN_CALLS)
    graphs.clear()
    assert len(graphs) == 0


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE.type != "cuda", reason="no GPU")
def test_on_a_gpu_graphs_give_the_encoders_states_and_keep_to_their_budget() -> None:
    encode = make_kernel_encoder(model(1, WIDE).to(DEVICE), torch.float16)
    thresholds = torch.tensor(TIME_THRESHOLDS, dtype=torch.int32, device=DEVICE)

    def run(columns: Sequence[Tensor], offsets: Tensor, longest: int) -> Tensor:
        x, seconds = columns
        return encode(x, AttentionPlan.from_batch(seconds, offsets, thresholds, longest, torch.float16, trusted=True))

    like = [torch.zeros(1, WIDE.width, device=DEVICE).half(), torch.zeros(1, device=DEVICE).int()]
    graphs, none = BatchGraphs(run, like, 16, 600), BatchGraphs(run, like, 16, 600, budget_bytes=1)
    assert graphs.warm([40]) == len(set(possible_buckets(16, 600, [40])))
    assert none.warm([40]) == 0
    assert 0 < graphs.nbytes < 1 << 30
    for lengths in ([1, 7, 39, 23], [40, 40, 3], [40] * 9, [1, 7, 39, 23]):
        inputs = inputs_of_lengths(lengths, seed=len(lengths))
        x = torch.randn(sum(lengths), WIDE.width, device=DEVICE).half()
        seconds, offsets = (torch.as_tensor(column).int().to(DEVICE) for column in (inputs.seconds, inputs.offsets))
        wanted = run([x, seconds], offsets, 40)
        for each in (graphs, none):
            torch.testing.assert_close(each([x, seconds], offsets, 40)[: len(x)], wanted, rtol=2e-3, atol=2e-3)
