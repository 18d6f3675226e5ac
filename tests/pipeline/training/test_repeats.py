"""What training keeps out of the softmax is what serving keeps off slates, and no more."""

import numpy as np
import pytest
from msgspec.structs import replace

from pipeline import artifact as artifacts
from pipeline.data.event_log import EventLog, event_log_from_blocks
from pipeline.data.sequences import UserSequences
from pipeline.evaluation.evaluate import EvaluationOptions, TrainTest
from pipeline.evaluation.ranking import StrategyRecommender, recommend_slates
from pipeline.items.catalogue import Catalogue
from pipeline.items.vocabulary import Vocabulary
from pipeline.model.config import HstuConfig
from pipeline.records import Event, EventSchema
from pipeline.strategies.exclusion import Exclusion
from pipeline.strategies.hstu_strategy import load_hstu_strategy
from pipeline.strategies.options import PipelineOptions
from pipeline.training.preparation import TrainingOptions
from pipeline.training.train import train
from pipeline.training.trainer import TrainerOptions
from tests.pipeline.training.callbacks import SilentCallback

ITEMS = 40
SCHEMA = EventSchema()
PURCHASES = Exclusion.from_names(("purchase",), 0, SCHEMA)
OPTIONS = TrainingOptions(
    TrainerOptions(epochs=12, seed=1, crop_length=24, events_per_batch=256, learning_rate=2e-2),
    HstuConfig(width=16, layers=1, heads=2, d_qk=8, d_v=8, max_events=32, dropout=0.0, attention_dropout=0.0),
    max_validation_events=100,
    patience=12,
    refit=False,
)


def habitual_log(seed: int) -> EventLog:
    """Return a log in which an event is 7 items after a view; after a click the user goes back to the item before."""
    rng = np.random.default_rng(seed)
    events = []
    for user in range(150):
        previous = item = int(rng.integers(ITEMS))
        for step in range(24):
            action = "click" if step and rng.random() < 0.2 else "view"
            events.append(Event(f"u{user}", f"i{item}", action, 1_000_000 * step + user))
            previous, item = item, (previous if action == "click" else (item + 7) % ITEMS)
    return event_log_from_blocks([events], SCHEMA)


@pytest.mark.parametrize("exclusion", [Exclusion(action_codes=()), PURCHASES], ids=["nothing", "purchases alone"])
def test_model_repeats_items_as_often_as_users_do_where_serving_may_show_them(tmp_path, exclusion: Exclusion) -> None:
    pipeline = PipelineOptions(exclusion=exclusion, device="cpu", threads=1)
    log = habitual_log(0)
    train(log, tmp_path / "model", OPTIONS, pipeline, SilentCallback(), "")
    artifact = artifacts.load(tmp_path / "model")
    vocabulary = Vocabulary(artifact.item_ids)
    hstu = load_hstu_strategy(artifact, Catalogue(vocabulary), exclusion, "cpu", 1)
    data = TrainTest.from_log(log, EvaluationOptions().split.test_mask(log), vocabulary, pipeline.ring_events)
    first = recommend_slates(StrategyRecommender(hstu), data.test, 1)[:, 0]
    touched = np.array([token in history for token, history in zip(first, tokens_before(data), strict=True)])
    repeats = np.array(
        [token in history for token, history in zip(data.test.targets, tokens_before(data), strict=True)]
    )
    assert (first == data.test.targets).mean() > 0.9, "the rule is learned, repeats included"
    assert abs(touched.mean() - repeats.mean()) < 0.05


def tokens_before(data: TrainTest) -> list[set[int]]:
    sequences: UserSequences = data.test.sequences
    starts = sequences.user_starts(data.test.positions)
    return [set(sequences.tokens[a:b].tolist()) for a, b in zip(starts, data.test.positions, strict=True)]


def test_validation_and_calibration_read_rings_as_long_as_serving_keeps_them(tmp_path) -> None:
    """The model reads 4 events; users come back to an item after 8, which only the longer ring still excludes."""
    model = replace(OPTIONS.model, max_events=4)
    options = replace(OPTIONS, model=model, trainer=replace(OPTIONS.trainer, epochs=1))
    events = [
        Event(f"u{user}", f"i{(5 * user + step % 8) % ITEMS}", "view", 1_000_000 * step + user)
        for user in range(60)
        for step in range(24)
    ]
    log = event_log_from_blocks([events], SCHEMA)
    rates = []
    for ring_events in (4, 512):
        pipeline = PipelineOptions(ring_events=ring_events, device="cpu", threads=1)
        manifest = train(log, tmp_path / str(ring_events), options, pipeline, SilentCallback(), "")
        rates.append(manifest.metrics["validation_hit_rate"])
        assert manifest.metrics["validation_ring_events"] == ring_events
    assert rates[0] > 0.5
    assert rates[1] == 0
