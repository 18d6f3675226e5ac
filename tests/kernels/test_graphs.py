"""Graphs by bucket: padding, captures, and the budget; on a GPU the graphs themselves."""

from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kernels.fused_attention_layernorm.plan import AttentionPlan
from kernels.graphs import BatchGraphs, Bucket, CapturedGraph, bucket_rows, possible_buckets
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


def test_full_budget_keeps_the_graphs_that_were_captured_first() -> None:
    graphs = TenByteGraphs(UserSums(), EXAMPLE, 16, 2000, budget_bytes=35)
    for _ in range(3):
        for rows in (300, 600, 900, 1200, 1500):
            graphs(*make_batch([rows // 16] * 16), 256)
    assert set(graphs._graphs) == {Bucket.from_sizes(16, rows, 256) for rows in (300, 600, 900)}
    assert graphs.captures == 4  # the last one did not fit


def test_bucket_is_captured_by_its_first_call_and_again_after_clear() -> None:
    graphs = TenByteGraphs(UserSums(), EXAMPLE, 4, 256, budget_bytes=15)
    for _ in range(2):
        for lengths in ([5, 6], [7]):  # there is no room for the second one
            assert graphs(*make_batch(lengths), 64)[0] == sum(range(lengths[0]))
        assert set(graphs._graphs) == {Bucket.from_sizes(2, 11, 64)}
        graphs.clear()
        assert len(graphs) == graphs.nbytes == 0
    assert graphs.captures == 4


def test_bucket_too_large_for_the_budget_is_captured_once() -> None:
    graphs = TenByteGraphs(UserSums(), EXAMPLE, 4, 600, budget_bytes=5)
    for _ in range(3):
        for lengths in ([300], [200], [250, 250]):
            assert len(graphs(*make_batch(lengths), 300)) == len(lengths)
    assert len(graphs) == 0
    assert graphs.captures == 2  # 300 rows and, being smaller, 200


@pytest.mark.parametrize(("sizes", "captures"), [((1500, 300), 2), ((300, 1500), 3)])
def test_graph_whose_pool_exceeds_the_budget_leaves_room_for_the_first_one(
    sizes: tuple[int, int], captures: int
) -> None:
    class GrowingPool(TenByteGraphs):
        def _capture_call(self, call: Callable[[], Tensor]) -> CapturedGraph:
            self._pool_bytes += 60
            return super()._capture_call(call)

    graphs = GrowingPool(UserSums(), EXAMPLE, 1, 2000, budget_bytes=100)
    for _ in range(3):
        for size in sizes:
            graphs(*make_batch([size]), 2000)
    assert set(graphs._graphs) == {Bucket.from_sizes(1, sizes[0], 2000)}
    assert graphs.captures == captures  # a small one again, after a large one emptied the pool


def test_full_device_bars_batches_as_large_until_clear() -> None:
    class FullDevice(TenByteGraphs):
        free_rows = 1000

        def capture(self, bucket: Bucket) -> CapturedGraph:
            if bucket.rows > self.free_rows:
                raise torch.OutOfMemoryError("none left")
            return super().capture(bucket)

    graphs = FullDevice(UserSums(), EXAMPLE, 1, 3000)
    sizes = {size: Bucket.from_sizes(1, size, 3000) for size in (500, 2000, 3000)}

    def captured_sizes() -> list[int]:
        for size in sizes:
            assert graphs(*make_batch([size]), 3000).tolist() == [sum(range(size))]
        return [size for size, bucket in sizes.items() if bucket in graphs._graphs]

    assert captured_sizes() == [500]
    graphs.free_rows = 4000
    assert captured_sizes() == [500]
    graphs.clear()
    assert captured_sizes() == [500, 2000, 3000]


def test_batch_runs_without_a_graph_if_the_device_is_out_of_memory() -> None:
    class FullDevice(BatchGraphs):
        def _capture_call(self, call: Callable[[], Tensor]) -> CapturedGraph:
            raise torch.OutOfMemoryError("none left")

    graphs = FullDevice(UserSums(), EXAMPLE, 4, 600)
    assert graphs(*make_batch([5, 6]), 64).tolist() == [10.0, 45.0]
    assert len(graphs) == graphs.warm([64]) == 0


def test_too_large_batch_runs_without_a_graph() -> None:
    run = UserSums()
    graphs = BatchGraphs(run, EXAMPLE, 4, 256)
    for lengths in ([257], [1] * 5):
        graphs(*make_batch(lengths), 300)
        assert run.calls.pop() == (sum(lengths), len(lengths), 300)
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
