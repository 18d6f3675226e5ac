from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from export.verify import compare, random_inputs
from pipeline import artifact as artifacts
from pipeline.backends.torch import TorchEncoder, TorchModel
from pipeline.model.config import HstuConfig
from pipeline.records import EventSchema
from pipeline.training.multi_task_model import MultiTaskModel

CONFIG = HstuConfig(items=300, width=16, heads=2, d_qk=8, d_v=8, max_events=64)


@dataclass
class Items:
    """Implements ItemVectors."""

    vectors: Tensor


VECTORS = F.normalize(torch.randn(CONFIG.items, CONFIG.width, generator=torch.Generator().manual_seed(3)))


def make_encoder(noise: float = 0.0) -> TorchEncoder:
    """Return the encoder of an untrained model, with noise on its weights."""
    torch.manual_seed(2)
    weights = MultiTaskModel(CONFIG).state_dict()
    weights = {name: weight + noise * torch.randn_like(weight) for name, weight in weights.items()}
    item_ids = [f"i{number}" for number in range(299)]
    artifact = artifacts.draft(CONFIG, EventSchema(), weights, item_ids, {})
    return TorchEncoder(TorchModel.from_artifact(artifact, "cpu").hstu, Items(VECTORS))


def test_model_agrees_with_itself_on_several_batches() -> None:
    rng = np.random.default_rng(1)
    batches = [random_inputs(CONFIG.items, rng.integers(1, 65, 40), rng) for _ in range(3)]
    agreement = compare(make_encoder(), make_encoder(), VECTORS, batches)
    assert agreement.users == 120
    assert agreement.state_error < 1e-5
    assert agreement.top_overlap == 1.0


def test_different_model_is_detected() -> None:
    rng = np.random.default_rng(1)
    batches = [random_inputs(CONFIG.items, rng.integers(1, 65, 40), rng)]
    agreement = compare(make_encoder(noise=0.05), make_encoder(), VECTORS, batches)
    assert agreement.state_error > 1e-2
    assert agreement.top_overlap < 0.9


def test_random_inputs_have_ascending_times_from_zero_per_user() -> None:
    inputs = random_inputs(10, [3, 0, 5, 1], np.random.default_rng(0))
    assert np.diff(inputs.offsets).tolist() == [3, 0, 5, 1]
    for start, stop in zip(inputs.offsets[:-1], inputs.offsets[1:], strict=True):
        seconds = inputs.seconds[start:stop]
        assert (np.diff(seconds) >= 0).all()
        assert (seconds[:1] == 0).all()
