"""Graphs by bucket: padding, captures of frequent buckets, and the budget; on a GPU the graphs themselves."""

from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kernels import graphs as graphs_module
from kernels.fused_attention_layernorm.plan import AttentionPlan
from kernels.graphs import MIN_CALLS, BatchGraphs, Bucket, CapturedGraph, bucket_rows, possible_buckets
from pipeline.backends.fused import make_kernel_encoder
from pipeline.features.event_features import TIME_THRESHOLDS
from tests.kernels.fused_attention_layernorm.test_encoder import DEVICE, WIDE
from tests.kernels.fused_attention_layernorm.test_op_reference import make_inputs, make_model

LENGTH_CLASSES = (64, 300)
EXAMPLE = [torch.zeros(1)]


class UserSums:
    """Returns each user's sum of its rows, and records the sizes of its calls."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, int, int]] = []  # rows, users, max_length
        self.offsets: list[list[int]] = []

    def __call__(self, columns: Sequence[Tensor], offsets: Tensor, max_length: int) -> Tensor:
        self.calls.append((len(columns[0]), len(offsets) - 1, max_length))
        self.offsets.append(offsets.tolist())
        sums = torch.cat([columns[0].new_zeros(1), columns[0].cumsum(0)])
        return sums[offsets[1:].long()] - sums[offsets[:-1].long()]


class TenByteGraphs(BatchGraphs):
    """Counts its captures; every graph holds ten bytes."""

    captures = 0

    def _capture_call(self, call: Callable[[], Tensor]) -> CapturedGraph:
        self.captures += 1
        return CapturedGraph(call, 10)


def make_batch(lengths: list[int]) -> tuple[list[Tensor], Tensor]:
    offsets = torch.tensor([0, *lengths]).cumsum(0).int()
    return [torch.arange(float(offsets[-1]))], offsets


@given(st.lists(st.integers(1, 300), min_size=1, max_size=20))
def test_bucket_of_every_batch_is_a_possible_one(lengths: list[int]) -> None:
    max_length = next(bound for bound in LENGTH_CLASSES if max(lengths) <= bound)
    bucket = Bucket.from_sizes(len(lengths), sum(lengths), max_length)
    assert bucket in set(possible_buckets(20, 6000, LENGTH_CLASSES))


def test_every_possible_bucket_fits_some_batch() -> None:
    for bucket in possible_buckets(20, 6000, LENGTH_CLASSES):
        longest = LENGTH_CLASSES[0] + 1 if bucket.max_length == LENGTH_CLASSES[1] else 1
        smallest = [1] * (bucket.users // 2) + [longest]
        assert sum(smallest) <= bucket.rows, bucket
        largest = Bucket.from_sizes(bucket.users, bucket.users * bucket.max_length, 0)
        assert largest.rows >= bucket.rows, bucket


def test_batch_padded_to_its_bucket_gives_the_same_result() -> None:
    run = UserSums()
    graphs = BatchGraphs(run, EXAMPLE, 20, 6000)
    assert graphs.warm(LENGTH_CLASSES) == len(set(possible_buckets(20, 6000, LENGTH_CLASSES)))
    for lengths in ([3], [300, 1, 7], [64] * 5, [1] * 20):
        columns, offsets = make_batch(lengths)
        max_length = LENGTH_CLASSES[max(lengths) > LENGTH_CLASSES[0]]
        result = graphs(columns, offsets, max_length)[: len(lengths)]
        assert result.tolist() == run(columns, offsets, max_length).tolist()
        assert run.calls[-2][:2] == (bucket_rows(sum(lengths)), 1 << (len(lengths) - 1).bit_length())


def test_users_that_pad_a_bucket_have_no_rows_after_any_batch() -> None:
    run = UserSums()
    graphs = BatchGraphs(run, EXAMPLE, 8, 600)
    graphs.warm(LENGTH_CLASSES)
    for lengths in ([60] * 8, [3, 1, 2, 1, 1]):
        graphs(*make_batch(lengths), 64)
    assert run.offsets[-1] == [0, 3, 4, 6, 7, 8, 8, 8, 8]


def test_largest_buckets_are_warmed_until_the_budget_is_full() -> None:
    graphs = TenByteGraphs(UserSums(), EXAMPLE, 16, 2000, budget_bytes=35)
    assert graphs.warm([256]) == 3
    assert graphs.captures == 4  # the last one did not fit
    run = UserSums()
    graphs._run = run
    for lengths in ([125] * 16, [100]):
        graphs(*make_batch(lengths), 256)
    assert [rows for rows, *_ in run.calls] == [100]  # the large batch has a graph, the small one does not


def test_full_budget_captures_only_buckets_called_twice_as_often() -> None:
    graphs = TenByteGraphs(UserSums(), EXAMPLE, 16, 2000, budget_bytes=35)
    for _ in range(100):
        for rows in (300, 600, 900, 1200, 1500, 1900):
            graphs(*make_batch([rows // 16] * 16), 256)
    assert graphs.captures == 4  # in 600 batches; the last one did not fit
    for _ in range(200 + MIN_CALLS):
        graphs(*make_batch([16] * 16), 256)
        assert graphs.captures == 4
    graphs(*make_batch([16] * 16), 256)  # now twice as often as those that have graphs
    assert graphs.captures == 5
    assert Bucket.from_sizes(16, 256, 256) in graphs._graphs


def test_bucket_called_long_ago_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs_module, "HALF_LIFE_CALLS", 50)
    graphs = TenByteGraphs(UserSums(), EXAMPLE, 16, 2000, budget_bytes=15)
    for rows in (300, 600):
        for _ in range(200):
            graphs(*make_batch([rows // 16] * 16), 256)
    assert set(graphs._graphs) == {Bucket.from_sizes(16, 600, 256)}


def test_batch_runs_without_a_graph_if_the_device_is_out_of_memory() -> None:
    class FullDevice(BatchGraphs):
        def _capture_call(self, call: Callable[[], Tensor]) -> CapturedGraph:
            raise torch.OutOfMemoryError("none left")

    graphs = FullDevice(UserSums(), EXAMPLE, 4, 600)
    for _ in range(2 * MIN_CALLS):
        assert graphs(*make_batch([5, 6]), 64).tolist() == [10.0, 45.0]
    assert len(graphs) == graphs.warm([64]) == 0


def test_too_large_batch_runs_without_a_graph() -> None:
    run = UserSums()
    graphs = BatchGraphs(run, EXAMPLE, 4, 256)
    for lengths in ([257], [1] * 5):
        for _ in range(MIN_CALLS + 2):
            graphs(*make_batch(lengths), 300)
        assert set(run.calls) == {(sum(lengths), len(lengths), 300)}
        run.calls.clear()
    assert len(graphs) == 0


def test_frequent_bucket_gets_a_graph_and_clear_drops_it() -> None:
    graphs = BatchGraphs(UserSums(), EXAMPLE, 4, 256)
    for calls in range(1, MIN_CALLS + 2):
        graphs(*make_batch([5, 6]), 64)
        assert len(graphs) == (calls > MIN_CALLS)
    graphs.clear()
    assert len(graphs) == 0


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE.type != "cuda", reason="no GPU")
def test_on_gpu_graphs_give_the_encoders_states_within_their_budget() -> None:
    encoder = make_kernel_encoder(make_model(1, WIDE).to(DEVICE), torch.float16)
    thresholds = torch.tensor(TIME_THRESHOLDS, dtype=torch.int32, device=DEVICE)

    def run(columns: Sequence[Tensor], offsets: Tensor, max_length: int) -> Tensor:
        x, seconds = columns
        plan = AttentionPlan.from_batch(seconds, offsets, thresholds, max_length, torch.float16, trusted=True)
        return encoder(x, plan)

    example = [torch.zeros(1, WIDE.width, device=DEVICE).half(), torch.zeros(1, device=DEVICE).int()]
    graphs = BatchGraphs(run, example, 16, 600)
    without_budget = BatchGraphs(run, example, 16, 600, budget_bytes=1)
    assert graphs.warm([40]) == len(set(possible_buckets(16, 600, [40])))
    assert without_budget.warm([40]) == 0
    assert 0 < graphs.nbytes < 1 << 30
    for lengths in ([1, 7, 39, 23], [40, 40, 3], [40] * 9, [1, 7, 39, 23]):
        inputs = make_inputs(lengths, seed=len(lengths))
        x = torch.randn(sum(lengths), WIDE.width, device=DEVICE).half()
        seconds, offsets = (torch.as_tensor(column).int().to(DEVICE) for column in (inputs.seconds, inputs.offsets))
        expected = run([x, seconds], offsets, 40)
        for each in (graphs, without_budget):
            torch.testing.assert_close(each([x, seconds], offsets, 40)[: len(x)], expected, rtol=2e-3, atol=2e-3)
