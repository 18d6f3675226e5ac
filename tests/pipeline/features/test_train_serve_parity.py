"""The model reads equal columns in training and in serving, and none of them leaks the target."""

from dataclasses import fields

import numpy as np
import pytest
import torch

from pipeline.features.affinity import AffinityEvents
from pipeline.features.event_features import FEATURE_COLUMNS
from pipeline.features.inputs import encode
from pipeline.model.config import HstuConfig
from pipeline.records import DAY_MS, Histories
from pipeline.simulation.closed_loop import warm_up
from pipeline.simulation.simulator import Simulator
from pipeline.simulation.world import SimulatorConfig
from pipeline.strategies.options import PipelineOptions
from pipeline.strategies.strategy import Request
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


def test_training_and_serving_read_equal_columns_of_a_history(setup: TrainingSetup) -> None:
    torch.manual_seed(0)
    strategy = setup.ranker(setup.trainer(setup.fit, 1).weights())
    served = strategy.prepare(Request(setup.train.histories, 5))
    trained = setup.columns(setup.train).inputs
    trained_events = trained.events.tail(MODEL.history_length)
    assert len(trained_events.item_rows) < len(setup.train), "some histories are longer than the model reads"
    for name in ("item_rows", "feature_ids", "seconds", "offsets"):
        assert np.array_equal(getattr(trained_events, name), getattr(served.read, name)), name
    for field in fields(AffinityEvents):
        name = field.name
        assert np.array_equal(getattr(trained.affinity, name), getattr(served.inputs.affinity, name)), name
    assert np.array_equal(trained.visits[setup.train.offsets[1:] - 1], served.inputs.visits)


def test_parity_log_fills_every_column(setup: TrainingSetup) -> None:
    feature_ids = setup.columns(setup.train).inputs.events.feature_ids
    constant = {name for index, name in enumerate(FEATURE_COLUMNS) if len(np.unique(feature_ids[:, index])) == 1}
    assert not constant & {*FROM_RECORDS, "gap", "hour", "weekday"}, constant
    assert len(constant) <= 1, constant


def test_time_of_the_target_event_does_not_leak_into_its_features(setup: TrainingSetup) -> None:
    tokens = setup.train.tokens
    latest = setup.train.offsets[1:] - 1
    earlier = np.setdiff1d(np.arange(len(tokens)), latest)

    def features(histories: Histories) -> tuple[np.ndarray, np.ndarray]:
        inputs = encode(histories, tokens, setup.catalogue.facts(tokens), setup.label_rules, ring_events=512)
        return inputs.events.feature_ids[earlier], inputs.visits[earlier]

    events = setup.train.events.copy()
    events["ts_action_device"][latest] += np.uint64(5 * DAY_MS + 3 * 3_600_000)  # the time is in the low bits
    feature_ids, frequency = features(setup.train.histories)
    moved_feature_ids, moved_frequency = features(Histories(events, setup.train.offsets))
    assert np.array_equal(feature_ids, moved_feature_ids)
    assert np.array_equal(frequency, moved_frequency)
