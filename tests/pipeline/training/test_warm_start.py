from pathlib import Path

import numpy as np
import pytest
import torch
from msgspec.structs import replace

from pipeline import artifact as artifacts
from pipeline.artifact import Artifact
from pipeline.data.event_log import EventLog, event_log_from_blocks
from pipeline.data.split import Split
from pipeline.errors import ArtifactError, TrainingError
from pipeline.evaluation.evaluate import EvaluationOptions, evaluate
from pipeline.features.labels import LabelOptions
from pipeline.model.config import HstuConfig
from pipeline.records import DAY_MS, EVENT_DTYPE, Event, EventPacker, EventSchema, Item
from pipeline.serving.pipeline import Pipeline
from pipeline.strategies.options import PipelineOptions
from pipeline.training.multi_task_model import MultiTaskModel
from pipeline.training.preparation import TrainingOptions, TrainingSetup, prepare
from pipeline.training.train import train
from pipeline.training.trainer import TrainerOptions
from pipeline.training.warm_start import WarmStart
from pipeline.weights import ITEM_TABLE
from tests.pipeline.training.callbacks import SilentCallback

SERVING = PipelineOptions(device="cpu", threads=1)
USERS = 60
ITEMS = 40
NEW_ITEMS = 4
OPTIONS = TrainingOptions(
    TrainerOptions(epochs=8, seed=1, crop_length=16, events_per_batch=256, learning_rate=1e-2, item_dropout=0.0),
    HstuConfig(width=16, layers=1, heads=2, d_qk=8, d_v=8, max_events=32, dropout=0.0, content_rows=64),
    train_fraction=1.0,
    validation_fraction=0.2,
)
FEW_EPOCHS = replace(OPTIONS, trainer=replace(OPTIONS.trainer, epochs=2, learning_rate=2e-3))
RECORDS = [Item(f"i{number}", title=f"word{number % 7}") for number in range(ITEMS + NEW_ITEMS)]


def rule_log(days: int) -> EventLog:
    """Return a log in which an event is 3 items after a view, 7 after a click; NEW_ITEMS are added on day 20."""
    rng = np.random.default_rng(0)
    events = []
    for user in range(USERS):
        item = int(rng.integers(ITEMS))
        for day in range(24):
            action = ("view", "click")[int(rng.integers(2))]
            events.append(Event(f"u{user}", f"i{item}", action, DAY_MS * (day + 1) + user))
            item = (item + (3 if action == "view" else 7)) % (ITEMS + (NEW_ITEMS if day >= 19 else 0))
    return event_log_from_blocks([[event for event in events if event.ts_ms < DAY_MS * (days + 1)]], EventSchema())


LOG = rule_log(days=24)
OLD_LOG = rule_log(days=20)


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """An artifact of the first 20 days, without item records."""
    folder = tmp_path_factory.mktemp("old") / "model"
    train(OLD_LOG, folder, OPTIONS, SERVING, SilentCallback(), "")
    return artifacts.load(folder)


@pytest.fixture(scope="module")
def old_with_records(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """The same with item records, after one epoch."""
    folder = tmp_path_factory.mktemp("old-with-records") / "model"
    options = replace(OPTIONS, trainer=replace(OPTIONS.trainer, epochs=1), refit=False)
    train(OLD_LOG, folder, options, SERVING, SilentCallback(), "", items=RECORDS)
    return artifacts.load(folder)


def prepare_warm_start(old: Artifact, **arguments) -> TrainingSetup:
    return prepare(LOG, replace(FEW_EPOCHS, model=old.config), SERVING, warm_start=WarmStart(old), **arguments)


def continue_training(
    old: Artifact, folder: Path, log: EventLog = LOG, options: TrainingOptions = FEW_EPOCHS
) -> Artifact:
    options = replace(options, model=old.config)
    train(log, folder, options, SERVING, SilentCallback(), "", warm_start=WarmStart(old))
    return artifacts.load(folder)


def hit_rate(artifact: Artifact, split: Split) -> float:
    return evaluate(artifact, LOG, SERVING, EvaluationOptions(split, (1,))).rankings["hstu"].at[1].hit_rate.value


def test_few_epochs_from_an_artifact_beat_as_many_from_scratch(old: Artifact, tmp_path: Path) -> None:
    options = replace(FEW_EPOCHS, train_fraction=22 / 24)
    warm = continue_training(old, tmp_path / "warm", options=options)
    train(LOG, tmp_path / "scratch", options, SERVING, SilentCallback(), "")
    scratch = artifacts.load(tmp_path / "scratch")
    assert hit_rate(warm, options.split) > 1.5 * hit_rate(scratch, options.split)


def test_warm_started_model_serves_new_items(old: Artifact, tmp_path: Path) -> None:
    options = replace(FEW_EPOCHS, trainer=replace(FEW_EPOCHS.trainer, epochs=6))
    continue_training(old, tmp_path / "model", options=options)
    history = [Event("u", f"i{number}", "view", DAY_MS * 25 + number) for number in (32, 35, 38)]
    [slate] = Pipeline.load(tmp_path / "model", SERVING).recommend([history], k=5)
    assert "i41" in [item.item_id for item in slate.items], "three on from 38 is a new item"
    assert slate.strategy == "hstu"


def test_old_items_keep_their_tokens_and_new_items_follow(old: Artifact, tmp_path: Path) -> None:
    """Include old items that the log does not have."""
    late = LOG.select(LOG.ts_ms > DAY_MS * 12)
    late = late.select(late.items != late.item_ids.index("i5"))
    new = continue_training(old, tmp_path / "model", late)
    assert new.item_ids[: len(old.item_ids)] == old.item_ids
    assert "i5" in old.item_ids
    assert set(new.item_ids[len(old.item_ids) :]) == {f"i{number}" for number in range(ITEMS, ITEMS + NEW_ITEMS)}


def test_new_rows_start_from_content_and_all_other_weights_are_kept(old_with_records: Artifact) -> None:
    setup = prepare_warm_start(old_with_records, items=RECORDS)
    content = setup.metadata(setup.train).content()
    model = WarmStart(old_with_records).init_model(MultiTaskModel(setup.config, content))
    old_weights = old_with_records.weights
    items = model.hstu.items
    rows = ITEMS + 1
    assert torch.equal(items.embedding.weight[:rows], old_weights[ITEM_TABLE])
    new = np.arange(rows, rows + NEW_ITEMS)
    assert torch.allclose(items(new), items.from_content(content.select(new)), atol=1e-5)
    assert torch.equal(model.hstu.rotation.weight, old_weights["hstu.rotation.weight"])


def test_metadata_of_the_artifact_is_kept_without_new_records(old_with_records: Artifact) -> None:
    setup = prepare_warm_start(old_with_records)
    hashes = old_with_records.metadata.state["hashes"]
    assert len(hashes) > 0
    assert np.array_equal(setup.metadata(setup.train).state["hashes"][: len(hashes)], hashes)


def test_only_new_events_are_counted_and_validated_on(old: Artifact) -> None:
    from_scratch = prepare(LOG, FEW_EPOCHS, SERVING)
    warm = prepare_warm_start(old)
    popularity, expected = (
        dict(zip(setup.counters["items"].tolist(), setup.counters["popularity"].tolist(), strict=True))
        for setup in (warm, from_scratch)
    )
    assert popularity == pytest.approx(expected), "as if all events had been counted at once"
    assert warm.metadata(warm.train).events.sum() == len(LOG)
    ts_ms = warm.validation_events.sequences.histories.ts_ms[warm.validation_events.positions]
    assert (ts_ms > WarmStart(old).latest_ms).all()
    assert len(ts_ms) == 4 * USERS // 5, "a fifth of the new events"


def test_event_of_the_far_future_is_not_new_on_every_day(old: Artifact, tmp_path: Path) -> None:
    future = Event("u0", "i0", "view", int(OLD_LOG.ts_ms.max()) + 150 * 365 * DAY_MS)
    log = with_event(LOG, future)
    warm = prepare(log, replace(FEW_EPOCHS, model=old.config), SERVING, warm_start=WarmStart(old))
    assert warm.metadata(warm.train).events.sum() == len(LOG)
    with pytest.raises(TrainingError, match=r"none of the .* continues after it"):
        continue_training(old, tmp_path / "model", with_event(OLD_LOG, future))


def with_event(log: EventLog, event: Event) -> EventLog:
    """Return the log with one more event of a user and an item that it has, at its end."""
    packed = np.frombuffer(EventPacker(EventSchema()).pack(event), EVENT_DTYPE)
    user = log.user_ids.index(event.user_id)
    item = log.item_ids.index(event.item_id)
    return EventLog(
        log.user_ids,
        np.append(log.users, np.int32(user)),
        log.item_ids,
        np.append(log.items, np.int32(item)),
        np.concatenate([log.events, packed]),
    )


def test_mismatch_with_the_artifact_is_rejected(old: Artifact, tmp_path: Path) -> None:
    wider = replace(FEW_EPOCHS, model=replace(old.config, width=32, layers=3))
    with pytest.raises(TrainingError, match=r"has layers 1, width 16, requested: layers 3, width 32; .* leave these"):
        prepare(LOG, wider, SERVING, (), WarmStart(old))
    with pytest.raises(TrainingError, match=rf"none of the {len(OLD_LOG)} training events .* continues after it"):
        continue_training(old, tmp_path / "model", OLD_LOG)
    with pytest.raises(TrainingError, match="trained without item metadata"):
        prepare_warm_start(old, items=RECORDS)
    other_labels = replace(FEW_EPOCHS, model=old.config, labels=LabelOptions(retention_days=1.0))
    with pytest.raises(TrainingError, match=r'other labels, .*"retention_days":7.0.*restore them in .* \[labels\]'):
        prepare(LOG, other_labels, SERVING, (), WarmStart(old))
    schema = EventSchema(actions=("click", "view"))
    with pytest.raises(ArtifactError, match=r"events.actions is \['click', 'view'\]"):
        prepare(LOG, replace(FEW_EPOCHS, model=old.config), replace(SERVING, schema=schema), (), WarmStart(old))


def test_dropout_rates_may_change_from_the_artifacts(old: Artifact) -> None:
    model = replace(old.config, dropout=0.3, attention_dropout=0.3, feature_dropout=0.3)
    setup = prepare(LOG, replace(FEW_EPOCHS, model=model), SERVING, warm_start=WarmStart(old))
    assert setup.config.feature_dropout == 0.3
