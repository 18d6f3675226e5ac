"""What the model is shown while training is what it is shown in service."""

import numpy as np
import pytest
import torch
from torch import Tensor

from pipeline.backends.torch import TorchEncoder
from pipeline.features.event_features import COLUMNS, Inputs, inputs_of
from pipeline.features.visit_frequency import rhythm
from pipeline.model.config import HstuConfig
from pipeline.records import Histories
from pipeline.serving.pipeline import PipelineOptions
from pipeline.simulation.closed_loop import warm_up
from pipeline.simulation.simulator import Simulator
from pipeline.simulation.world import SimulatorConfig
from pipeline.training.preparation import Task, TrainingOptions, prepare

SHOP = SimulatorConfig(events=1500, users=30, items=60, days=20)
MODEL = HstuConfig(width=16, heads=2, d_qk=8, d_v=8, max_events=20)
FROM_RECORDS = ("item_age", "price_fit", "affinity")


@pytest.fixture(scope="module")
def task() -> Task:
    simulator = Simulator(SHOP)
    log, _ = warm_up(simulator, SHOP.days)
    options = TrainingOptions(model=MODEL, until_share=1.0)
    return prepare(log, options, PipelineOptions(device="cpu", threads=1), simulator.items())


@pytest.fixture
def served(task: Task, monkeypatch: pytest.MonkeyPatch) -> tuple[Inputs, np.ndarray]:
    """What the rung gives its encoder and its heads of every user's whole history."""
    seen: list[Inputs] = []
    rhythms: list[np.ndarray] = []
    encode, heads = TorchEncoder.encode, TorchEncoder.heads

    def encoding(encoder: TorchEncoder, inputs: Inputs) -> Tensor:
        seen.append(inputs)
        return encode(encoder, inputs)

    def answering(encoder: TorchEncoder, states: Tensor, inputs: Inputs, rhythm: np.ndarray, *rest) -> np.ndarray:
        rhythms.append(rhythm)
        return heads(encoder, states, inputs, rhythm, *rest)

    monkeypatch.setattr(TorchEncoder, "encode", encoding)
    monkeypatch.setattr(TorchEncoder, "heads", answering)
    torch.manual_seed(0)
    rung = task.ranker(task.trainer(task.fit, 1).weights())
    rung.rank(task.known.histories, 5)
    return seen[0], rhythms[0]


def test_training_and_service_read_equal_columns_of_the_same_history(
    task: Task, served: tuple[Inputs, np.ndarray]
) -> None:
    examples, (inputs, rhythms) = task.examples(task.known), served
    trained = examples.inputs.tail(MODEL.read_events)
    assert len(trained.tokens) < len(task.known), "some histories are longer than the model reads"
    for name in ("tokens", "codes", "seconds", "offsets"):
        assert np.array_equal(getattr(trained, name), getattr(inputs, name)), name
    newest = task.known.offsets[1:] - 1
    assert np.array_equal(examples.rhythm[newest], rhythms)


def test_the_log_that_shows_it_fills_every_column(task: Task) -> None:
    codes = task.examples(task.known).inputs.codes
    alike = {name for number, name in enumerate(COLUMNS) if len(np.unique(codes[:, number])) == 1}
    assert not alike & {*FROM_RECORDS, "gap", "hour", "weekday"}, alike
    assert len(alike) <= 1, alike


def test_when_the_wanted_event_comes_says_nothing_to_the_row_that_asks_for_it(task: Task) -> None:
    histories, tokens = task.known.histories, task.known.tokens
    facts = task.catalogue.facts(tokens)
    newest = task.known.offsets[1:] - 1
    asking = np.setdiff1d(np.arange(len(tokens)), newest)
    before = inputs_of(histories, tokens, len(task.vocabulary), facts).codes[asking]
    rhythm_before = rhythm(histories, asking)
    moved = histories.events.copy()
    moved["ts_action_device"][newest] += np.uint64(5 * 86_400_000 + 3 * 3_600_000)  # the time is in the low bits
    later = Histories(moved, histories.offsets)
    assert np.array_equal(before, inputs_of(later, tokens, len(task.vocabulary), facts).codes[asking])
    assert np.array_equal(rhythm_before, rhythm(later, asking))
