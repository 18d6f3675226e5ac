"""The hstu strategy: the kernels give the slates of torch, and warm-up covers all shapes of batches."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch

from kernels import graphs
from pipeline.artifact import Artifact, draft
from pipeline.backends.encoder import GraphOptions
from pipeline.backends.fused import FusedEncoder
from pipeline.backends.torch import TorchModel
from pipeline.errors import DeviceError
from pipeline.items.catalogue import Catalogue
from pipeline.items.vocabulary import Vocabulary
from pipeline.model.config import HstuConfig
from pipeline.records import EventSchema
from pipeline.serving import retrieval
from pipeline.serving.exclusion import Exclusion
from pipeline.serving.hstu_strategy import HstuStrategy, load_hstu_strategy
from pipeline.serving.pipeline import PipelineOptions, load_strategy
from pipeline.serving.retrieval import FusedRetrieval
from pipeline.serving.warm_up import synthetic_histories
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


def test_strategy_on_kernels_gives_the_slates_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retrieval, "FUSED_MIN_SCORES", 0)
    monkeypatch.setattr(graphs, "MIN_ROWS", 16)
    on_kernels = make_strategy(DEVICE)
    in_torch = make_strategy("cpu")
    assert in_torch.backend == "torch"
    assert on_kernels.backend == {"cpu": "torch", "cuda": "kernels"}[DEVICE]
    table = on_kernels._table
    on_kernels._encoder = FusedEncoder(make_model(DEVICE).hstu, table, torch.float32, GRAPHS)
    on_kernels._retrieval = FusedRetrieval(table.vectors, CONFIG.temperature)
    on_kernels._retrieval.block(table.blocked_rows)
    histories = synthetic_histories(ITEM_IDS[:19], [1, 0, 17, 7])
    found = on_kernels.rank(histories, 10)
    expected = in_torch.rank(histories, 10)
    assert found.tokens.tolist() == expected.tokens.tolist()
    np.testing.assert_allclose(found.scores, expected.scores, rtol=1e-4, atol=1e-4)


def test_warm_up_on_a_card_that_cannot_run_the_kernels_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: HstuStrategy, item_ids: Sequence[str], graphs: GraphOptions) -> None:
        raise RuntimeError("out of resource: shared memory\nRequired: 278568")

    options = PipelineOptions(device="cpu", graphs=GRAPHS)
    catalogue = Catalogue(Vocabulary(ITEM_IDS))
    monkeypatch.setattr(HstuStrategy, "warm", fail)
    assert load_strategy(make_artifact(), catalogue, options).name == "hstu", "on a CPU there is nothing to warm up"
    monkeypatch.setattr(HstuStrategy, "on_gpu", True)
    with pytest.raises(
        DeviceError, match=r"on this card: out of resource: shared memory; set pipeline\.custom_kernels"
    ):
        load_strategy(make_artifact(), catalogue, options)
