"""The hstu strategy: the kernels give the slates of torch, and warm-up covers all shapes of batches."""

import numpy as np
import pytest
import torch

from kernels import graphs
from pipeline.artifact import draft
from pipeline.backends.encoder import GraphOptions
from pipeline.backends.fused import FusedEncoder
from pipeline.errors import DeviceError
from pipeline.items.catalogue import Catalogue
from pipeline.items.vocabulary import Vocabulary
from pipeline.model.config import HstuConfig
from pipeline.records import EventSchema
from pipeline.serving import retrieval
from pipeline.serving.exclusion import Exclusion
from pipeline.serving.hstu_strategy import HstuStrategy
from pipeline.serving.retrieval import FusedRetrieval
from pipeline.serving.warm_up import synthetic_histories
from pipeline.training.multi_task_model import MultiTaskModel

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CONFIG = HstuConfig(items=40, layers=2, width=16, heads=2, d_qk=16, d_v=16, max_events=20, content_rows=0)
GRAPHS = GraphOptions(max_users=8, max_events=256)
ITEM_IDS = [f"i{number}" for number in range(1, CONFIG.items)]


def make_strategy(device: str) -> HstuStrategy:
    """Return the strategy of an untrained model, the same in each call."""
    counters = {"items": np.zeros(0, np.uint64), "popularity": np.zeros(0), "values": np.zeros(0, np.float32)}
    torch.manual_seed(3)
    artifact = draft(CONFIG, EventSchema(), MultiTaskModel(CONFIG).state_dict(), ITEM_IDS, counters)
    return HstuStrategy(artifact, Catalogue(Vocabulary(ITEM_IDS)), Exclusion(), device, graphs=GRAPHS)


def test_strategy_on_kernels_gives_the_slates_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retrieval, "FUSED_MIN_SCORES", 0)
    monkeypatch.setattr(graphs, "MIN_ROWS", 16)
    on_kernels = make_strategy(DEVICE)
    in_torch = make_strategy("cpu")
    encoder = on_kernels._encoder
    with torch.inference_mode():
        encoder._fused = FusedEncoder(encoder._hstu, encoder._vectors, torch.float32, GRAPHS)
    on_kernels._retrieval = FusedRetrieval(encoder.table)
    histories = synthetic_histories(ITEM_IDS[:19], [1, 0, 17, 7])
    found = on_kernels.rank(histories, 10)
    expected = in_torch.rank(histories, 10)
    assert found.tokens.tolist() == expected.tokens.tolist()
    np.testing.assert_allclose(found.scores, expected.scores, rtol=1e-4, atol=1e-4)


def test_warm_up_on_a_card_that_cannot_run_the_kernels_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    class BrokenEncoder:
        device = torch.device("cuda")

        def warm(self) -> int:
            raise RuntimeError("out of resource: shared memory\nRequired: 278568")

    strategy = make_strategy("cpu")
    assert strategy.warm(["i1"]) == 0, "on a CPU there is nothing to warm up"
    monkeypatch.setattr(strategy, "_encoder", BrokenEncoder())
    with pytest.raises(
        DeviceError, match=r"on this card: out of resource: shared memory; set pipeline\.custom_kernels"
    ):
        strategy.warm(["i1"])
