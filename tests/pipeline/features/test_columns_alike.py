"""What the model is shown while training is what it is shown in service."""

import numpy as np
import pytest
import torch
from torch import Tensor

from pipeline.backends.torch import TorchEncoder
from pipeline.features.event_features import FEATURE_COLUMNS, EncoderInputs, encoder_inputs
from pipeline.features.visit_frequency import visit_frequency
from pipeline.model.config import HstuConfig
from pipeline.records import Histories
from pipeline.serving.pipeline import PipelineOptions
from pipeline.simulation.closed_loop import warm_up
from pipeline.simulation.simulator import Simulator
from pipeline.simulation.world import SimulatorConfig
from pipeline.training.preparation import TrainingOptions, TrainingSetup, prepare

SHOP = SimulatorConfig(events=1500, users=30, items=60, days=20)
MODEL = HstuConfig(width=16, heads=2, d_qk=8, d_v=8, max_events=20)
FROM_RECORDS = ("item_age", "price_delta", "affinity")


@pytest.fixture(scope="module")
def task() -> TrainingSetup:
    simulator = Simulator(SHOP)
    log, _ = warm_up(simulator, SHOP.days)
    options = TrainingOptions(model=MODEL, train_fraction=1.0)
    return prepare(log, options, PipelineOptions(device="cpu", threads=1), simulator.items())


@pytest.fixture
def served(task: TrainingSetup, monkeypatch: pytest.MonkeyPatch) -> tuple[EncoderInputs, np.ndarray]:
    """What the rung gives its encoder and its heads of every user's whole history."""
    seen: list[EncoderInputs] = []
    rhythms: list[np.ndarray] = []
    encode, heads = TorchEncoder.encode, TorchEncoder.heads

    def encoding(encoder: TorchEncoder, inputs: EncoderInputs) -> Tensor:
        seen.append(inputs)
        return encode(encoder, inputs)

    def answering(
        encoder: TorchEncoder, states: Tensor, inputs: EncoderInputs, rhythm: np.ndarray, *rest
    ) -> np.ndarray:
        rhythms.append(rhythm)
        return heads(encoder, states, inputs, rhythm, *rest)

    monkeypatch.setattr(TorchEncoder, "encode", encoding)
    monkeypatch.setattr(TorchEncoder, "heads", answering)
    torch.manual_seed(0)
    rung = task.ranker(task.trainer(task.fit, 1).weights())
    rung.rank(task.train.histories, 5)
    return seen[0], rhythms[0]


def test_training_and_service_read_equal_columns_of_the_same_history(
    task: TrainingSetup, served: tuple[EncoderInputs, np.ndarray]
) -> None:
    examples, (inputs, rhythms) = task.columns(task.train), served
    trained = examples.inputs.tail(MODEL.history_length)
    assert len(trained.tokens) < len(task.train), "some histories are longer than the model reads"
    for name in ("tokens", "feature_ids", "seconds", "offsets"):
        assert np.array_equal(getattr(trained, name), getattr(inputs, name)), name
    newest = task.train.offsets[1:] - 1
    assert np.array_equal(examples.visit_frequency[newest], rhythms)


def test_the_log_that_shows_it_fills_every_column(task: TrainingSetup) -> None:
    codes = task.columns(task.train).inputs.feature_ids
    alike = {name for number, name in enumerate(FEATURE_COLUMNS) if len(np.unique(codes[:, number])) == 1}
    assert not alike & {*FROM_RECORDS, "gap", "hour", "weekday"}, alike
    assert len(alike) <= 1, alike


def test_when_the_wanted_event_comes_says_nothing_to_the_row_that_asks_for_it(task: TrainingSetup) -> None:
    histories, tokens = task.train.histories, task.train.tokens
    facts = task.catalogue.facts(tokens)
    newest = task.train.offsets[1:] - 1
    asking = np.setdiff1d(np.arange(len(tokens)), newest)
    before = encoder_inputs(histories, tokens, len(task.vocabulary), facts).feature_ids[asking]
    rhythm_before = visit_frequency(histories, asking)
    moved = histories.events.copy()
    moved["ts_action_device"][newest] += np.uint64(5 * 86_400_000 + 3 * 3_600_000)  # the time is in the low bits
    later = Histories(moved, histories.offsets)
    assert np.array_equal(before, encoder_inputs(later, tokens, len(task.vocabulary), facts).feature_ids[asking])
    assert np.array_equal(rhythm_before, visit_frequency(later, asking))
