"""The model reads equal columns in training and in serving, and none of them leaks the target."""

import numpy as np
import pytest
import torch
from torch import Tensor

from pipeline.backends.head_scorer import HeadScorer
from pipeline.backends.torch import TorchEncoder
from pipeline.features.event_features import FEATURE_COLUMNS, EncoderInputs, encoder_inputs
from pipeline.features.visit_frequency import visit_frequency
from pipeline.model.config import HstuConfig
from pipeline.records import DAY_MS, Histories
from pipeline.serving.pipeline import PipelineOptions
from pipeline.simulation.closed_loop import warm_up
from pipeline.simulation.simulator import Simulator
from pipeline.simulation.world import SimulatorConfig
from pipeline.training.preparation import TrainingOptions, TrainingSetup, prepare

SHOP = SimulatorConfig(events=1500, users=30, items=60, days=20)
MODEL = HstuConfig(width=16, heads=2, d_qk=8, d_v=8, max_events=20)
FROM_RECORDS = ("item_age", "price_delta", "affinity")


@pytest.fixture(scope="module")
def setup() -> TrainingSetup:
    simulator = Simulator(SHOP)
    log, _ = warm_up(simulator, SHOP.days)
    options = TrainingOptions(model=MODEL, train_fraction=1.0)
    return prepare(log, options, PipelineOptions(device="cpu", threads=1), simulator.items())


@pytest.fixture
def served(setup: TrainingSetup, monkeypatch: pytest.MonkeyPatch) -> tuple[EncoderInputs, np.ndarray]:
    """Return the inputs that serving gives the encoder, and the visit frequencies it gives the heads."""
    encoder_calls: list[EncoderInputs] = []
    heads_calls: list[np.ndarray] = []
    encode = TorchEncoder.encode
    heads = HeadScorer.probabilities

    def spy_encode(encoder: TorchEncoder, inputs: EncoderInputs) -> Tensor:
        encoder_calls.append(inputs)
        return encode(encoder, inputs)

    def spy_heads(
        scorer: HeadScorer, states: Tensor, inputs: EncoderInputs, visit_frequency: np.ndarray, *rest
    ) -> np.ndarray:
        heads_calls.append(visit_frequency)
        return heads(scorer, states, inputs, visit_frequency, *rest)

    monkeypatch.setattr(TorchEncoder, "encode", spy_encode)
    monkeypatch.setattr(HeadScorer, "probabilities", spy_heads)
    torch.manual_seed(0)
    strategy = setup.ranker(setup.trainer(setup.fit, 1).weights())
    strategy.rank(setup.train.histories, 5)
    return encoder_calls[0], heads_calls[0]


def test_training_and_serving_read_equal_columns_of_a_history(
    setup: TrainingSetup, served: tuple[EncoderInputs, np.ndarray]
) -> None:
    columns = setup.columns(setup.train)
    served_inputs, served_visit_frequency = served
    trained_inputs = columns.inputs.tail(MODEL.history_length)
    assert len(trained_inputs.item_rows) < len(setup.train), "some histories are longer than the model reads"
    for name in ("item_rows", "feature_ids", "seconds", "offsets"):
        assert np.array_equal(getattr(trained_inputs, name), getattr(served_inputs, name)), name
    latest = setup.train.offsets[1:] - 1
    assert np.array_equal(columns.visit_frequency[latest], served_visit_frequency)


def test_parity_log_fills_every_column(setup: TrainingSetup) -> None:
    feature_ids = setup.columns(setup.train).inputs.feature_ids
    constant = {name for index, name in enumerate(FEATURE_COLUMNS) if len(np.unique(feature_ids[:, index])) == 1}
    assert not constant & {*FROM_RECORDS, "gap", "hour", "weekday"}, constant
    assert len(constant) <= 1, constant


def test_time_of_the_target_event_does_not_leak_into_its_features(setup: TrainingSetup) -> None:
    tokens = setup.train.tokens
    latest = setup.train.offsets[1:] - 1
    earlier = np.setdiff1d(np.arange(len(tokens)), latest)

    def features(histories: Histories) -> tuple[np.ndarray, np.ndarray]:
        inputs = encoder_inputs(histories, tokens, len(setup.vocabulary), setup.catalogue.facts(tokens))
        return inputs.feature_ids[earlier], visit_frequency(histories, earlier)

    events = setup.train.events.copy()
    events["ts_action_device"][latest] += np.uint64(5 * DAY_MS + 3 * 3_600_000)  # the time is in the low bits
    feature_ids, frequency = features(setup.train.histories)
    moved_feature_ids, moved_frequency = features(Histories(events, setup.train.offsets))
    assert np.array_equal(feature_ids, moved_feature_ids)
    assert np.array_equal(frequency, moved_frequency)
