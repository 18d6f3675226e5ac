"""The hstu strategy: the kernels give the slates of torch, and warm-up covers all shapes of batches."""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch.overrides import TorchFunctionMode

from kernels import graphs
from pipeline.artifact import Artifact, draft
from pipeline.backends.encoder import GraphOptions
from pipeline.backends.fused import FusedEncoder
from pipeline.backends.staging import HostCopy
from pipeline.backends.torch import TorchModel
from pipeline.errors import DeviceError
from pipeline.items.catalogue import Catalogue
from pipeline.items.vocabulary import Vocabulary
from pipeline.model.config import HstuConfig
from pipeline.records import EventSchema
from pipeline.strategies import retrieval
from pipeline.strategies.exclusion import Exclusion
from pipeline.strategies.hstu_strategy import HstuStrategy, load_hstu_strategy
from pipeline.strategies.options import PipelineOptions, new_counters
from pipeline.strategies.rerank import RerankWeights
from pipeline.strategies.retrieval import FusedRetrieval
from pipeline.strategies.strategies import StrategyContext, strategies_of
from pipeline.strategies.strategy import Request, rank
from pipeline.strategies.warm_up import synthetic_histories
from pipeline.training.multi_task_model import MultiTaskModel

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CONFIG = HstuConfig(items=40, layers=2, width=16, heads=2, d_qk=16, d_v=16, max_events=20, content_rows=0)
GRAPHS = GraphOptions(max_users=8, max_events=256)
ITEM_IDS = [f"i{number}" for number in range(1, CONFIG.items)]


def make_artifact() -> Artifact:
    """Return the artifact of an untrained model, the same in each call."""
    counters = {"items": np.zeros(0, np.uint64), "popularity": np.zeros(0), "values": np.zeros(0, np.float32)}
    torch.manual_seed(3)
    return draft(CONFIG, EventSchema(), MultiTaskModel(CONFIG).state_dict(), ITEM_IDS, counters)


def make_model(device: str) -> TorchModel:
    return TorchModel.from_artifact(make_artifact(), device)


def make_strategy(device: str) -> HstuStrategy:
    return load_hstu_strategy(make_artifact(), Catalogue(Vocabulary(ITEM_IDS)), Exclusion(), device, graphs=GRAPHS)


def on_kernels() -> HstuStrategy:
    """Return the strategy on the kernels, which on a CPU run in Triton's interpreter."""
    strategy = make_strategy(DEVICE)
    table = strategy._table
    strategy._encoder = FusedEncoder(make_model(DEVICE).hstu, table, torch.float32, GRAPHS)
    strategy._retrieval = FusedRetrieval(table.vectors, CONFIG.temperature)
    strategy._retrieval.block(table.blocked_rows)
    return strategy


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use the kernels for batches of any size."""
    monkeypatch.setattr(retrieval, "FUSED_MIN_SCORES", 0)
    monkeypatch.setattr(graphs, "MIN_ROWS", 16)


@pytest.mark.usefixtures("fused")
def test_strategy_on_kernels_gives_the_slates_of_torch() -> None:
    in_torch = make_strategy("cpu")
    assert in_torch.backend == "torch"
    assert make_strategy(DEVICE).backend == {"cpu": "torch", "cuda": "kernels"}[DEVICE]
    histories = synthetic_histories(ITEM_IDS[:19], [1, 0, 17, 7])
    found = rank(on_kernels(), histories, 10)
    expected = rank(in_torch, histories, 10)
    assert found.tokens.tolist() == expected.tokens.tolist()
    np.testing.assert_allclose(found.scores, expected.scores, rtol=1e-4, atol=1e-4)
    assert found.heads is not None
    assert expected.heads is not None
    np.testing.assert_allclose(found.heads, expected.heads, rtol=1e-4, atol=1e-4)


def test_delisting_is_not_lost_when_following_it_failed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    catalogue = Catalogue(Vocabulary(ITEM_IDS))
    strategy = load_hstu_strategy(make_artifact(), catalogue, Exclusion(), "cpu")
    histories = synthetic_histories(ITEM_IDS, [3])
    best = int(rank(strategy, histories, 5).tokens[0, 0])
    catalogue.delist([catalogue.vocabulary.item_ids[best]])
    with monkeypatch.context() as patch:
        patch.setattr(strategy._retrieval, "block", lambda rows: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            rank(strategy, histories, 5)
    assert best not in rank(strategy, histories, 30).tokens


class WaitCounter(TorchFunctionMode):
    """Counts, by name, the calls that wait for a device and bring its data to the host."""

    WAITING = ("cpu", "numpy", "item", "tolist", "nonzero", "__bool__", "__int__", "__float__", "__index__")

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = getattr(func, "__name__", "")
        if name in self.WAITING:
            self.calls[name] += 1
        if name == "__getitem__" and _has_mask(args[1]):
            self.calls["a mask as index"] += 1
        return func(*args, **(kwargs or {}))


def _has_mask(index: Any) -> bool:
    parts = index if isinstance(index, tuple) else (index,)
    return any(isinstance(part, torch.Tensor) and part.dtype == torch.bool for part in parts)


RERANKS = [RerankWeights(), RerankWeights(engagement=0.5, value=0.2, candidates=20)]


@pytest.mark.parametrize("lengths", [[3, 17, 1], [0, 5, 0], [0]], ids=str)
@pytest.mark.parametrize("rerank", RERANKS, ids=["plain", "reranked"])
def test_only_one_copy_to_the_host_per_batch_at_its_end(
    rerank: RerankWeights, lengths: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU, too, the seam is the only way from tensors to arrays."""
    catalogue = Catalogue(Vocabulary(ITEM_IDS))
    strategy = load_hstu_strategy(make_artifact(), catalogue, Exclusion(), "cpu", rerank=rerank)
    copies: list[HostCopy] = []
    init = HostCopy.__init__

    def count(copy: HostCopy, *tensors: torch.Tensor) -> None:
        copies.append(copy)
        init(copy, *tensors)

    monkeypatch.setattr(HostCopy, "__init__", count)
    prepared = strategy.prepare(Request(synthetic_histories(ITEM_IDS, lengths), 5))
    with WaitCounter() as waits:
        pending = strategy.launch(prepared)
    assert not waits.calls, "launching waits for nothing"
    with WaitCounter() as waits:
        ranked = strategy.finish(pending)
    assert len(copies) == 1
    assert waits.calls == {"numpy": 4}, "tokens, scores, probabilities and values, out of the one copy"
    assert ranked.tokens.shape == (len(lengths), 5)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE != "cuda", reason="no GPU")
@pytest.mark.usefixtures("fused")
@pytest.mark.parametrize("rerank", RERANKS, ids=["plain", "reranked"])
@pytest.mark.parametrize("graphs_of", [None, GRAPHS], ids=["torch", "kernels"])
def test_gpu_is_not_waited_for_from_launch_to_finish(rerank: RerankWeights, graphs_of: GraphOptions | None) -> None:
    catalogue = Catalogue(Vocabulary(ITEM_IDS))
    strategy = load_hstu_strategy(make_artifact(), catalogue, Exclusion(), "cuda", rerank=rerank, graphs=graphs_of)
    if graphs_of is not None:
        strategy.warm(ITEM_IDS, graphs_of)
    requests = [Request(synthetic_histories(ITEM_IDS, lengths), 5) for lengths in ([3, 17, 1], [0, 5, 0], [0], [2])]
    expected = [rank(strategy, request.histories, request.k) for request in requests]  # compiles and allocates
    prepared = [strategy.prepare(request) for request in requests]
    torch.cuda.set_sync_debug_mode("error")
    try:
        pending = [strategy.launch(each) for each in prepared]
        found = [strategy.finish(each) for each in pending]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for one, other in zip(found, expected, strict=True):
        assert one.tokens.tolist() == other.tokens.tolist()
        assert one.encode_ms >= 0
        assert one.rank_ms > 0


def test_warm_up_on_a_card_that_cannot_run_the_kernels_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: HstuStrategy, item_ids: Sequence[str], graphs: GraphOptions) -> None:
        raise RuntimeError("out of resource: shared memory\nRequired: 278568")

    options = PipelineOptions(device="cpu", graphs=GRAPHS)
    catalogue = Catalogue(Vocabulary(ITEM_IDS))
    context = StrategyContext(make_artifact(), catalogue, new_counters(options, catalogue.vocabulary), options)
    monkeypatch.setattr(HstuStrategy, "warm", fail)
    assert [each.name for each in strategies_of(context)] == ["hstu", "simple"], "on a CPU nothing is warmed up"
    monkeypatch.setattr(HstuStrategy, "on_gpu", True)
    with pytest.raises(
        DeviceError, match=r"on this card: out of resource: shared memory; set pipeline\.custom_kernels"
    ):
        strategies_of(context)
