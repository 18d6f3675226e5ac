import numpy as np
import torch

from export.verify import compare, random_inputs
from pipeline import artifact as artifacts
from pipeline.artifact import Artifact
from pipeline.backends.torch import TorchEncoder
from pipeline.model.config import HstuConfig
from pipeline.records import EventSchema
from pipeline.training.trainer import MultiTaskModel

CONFIG = HstuConfig(items=300, width=16, heads=2, d_qk=8, d_v=8, max_events=64)


def draft(noise: float = 0.0) -> Artifact:
    torch.manual_seed(2)
    weights = MultiTaskModel(CONFIG).state_dict()
    weights = {name: weight + noise * torch.randn_like(weight) for name, weight in weights.items()}
    return artifacts.draft(CONFIG, EventSchema(), weights, [f"i{n}" for n in range(299)], {})


def test_the_same_model_agrees_with_itself_whatever_the_batches() -> None:
    random = np.random.default_rng(1)
    batches = [random_inputs(CONFIG.items, random.integers(0, 65, 40), random) for _ in range(3)]
    agreement = compare(TorchEncoder(draft(), "cpu"), TorchEncoder(draft(), "cpu"), batches)
    assert agreement.users == 120
    assert agreement.state_error < 1e-5
    assert agreement.top_overlap == 1.0


def test_another_model_is_found_out() -> None:
    random = np.random.default_rng(1)
    batches = [random_inputs(CONFIG.items, random.integers(1, 65, 40), random)]
    agreement = compare(TorchEncoder(draft(noise=0.05), "cpu"), TorchEncoder(draft(), "cpu"), batches)
    assert agreement.state_error > 1e-2
    assert agreement.top_overlap < 0.9


def test_random_inputs_keep_each_users_times_in_order_from_zero() -> None:
    inputs = random_inputs(10, [3, 0, 5, 1], np.random.default_rng(0))
    assert np.diff(inputs.offsets).tolist() == [3, 0, 5, 1]
    for start, stop in zip(inputs.offsets[:-1], inputs.offsets[1:], strict=True):
        seconds = inputs.seconds[start:stop]
        assert (np.diff(seconds) >= 0).all()
        assert (seconds[:1] == 0).all()
