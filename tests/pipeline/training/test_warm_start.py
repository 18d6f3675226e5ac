from functools import cache
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
from pipeline.model.config import HstuConfig
from pipeline.records import Event, EventSchema, Item
from pipeline.serving.pipeline import Pipeline, PipelineOptions
from pipeline.training.multi_task_model import MultiTaskModel
from pipeline.training.preparation import TrainingOptions, prepare
from pipeline.training.train import EpochReport, train
from pipeline.training.trainer import TrainerOptions
from pipeline.training.warm_start import WarmStart

SERVING = PipelineOptions(device="cpu", threads=1)
ITEMS, NEW = 40, 4
DAY_MS = 86_400_000
OPTIONS = TrainingOptions(
    TrainerOptions(epochs=8, seed=1, crop_length=16, events_per_batch=256, learning_rate=1e-2, item_dropout=0.0),
    HstuConfig(width=16, heads=2, d_qk=8, d_v=8, max_events=32, dropout=0.0, content_rows=64),
    train_fraction=1.0,
    validation_fraction=0.2,
)
FEW = replace(OPTIONS, trainer=replace(OPTIONS.trainer, epochs=2, learning_rate=2e-3))
RECORDS = [Item(f"i{number}", title=f"word{number % 7}") for number in range(ITEMS + NEW)]


class Silent:
    """An observer."""

    def phase(self, name: str, epochs: int) -> None: ...

    def batch(self, epoch: int, loss: float, done: int, total: int) -> None: ...

    def epoch(self, report: EpochReport, best: EpochReport) -> None: ...


def log_of(days: int) -> EventLog:
    """Every user goes 3 items on, or 7 after a click; from day 20 on the catalogue has NEW items more."""
    random, events = np.random.default_rng(0), []
    for user in range(120):
        current = int(random.integers(ITEMS))
        for day in range(24):
            action = ("view", "click")[int(random.integers(2))]
            events.append(Event(f"u{user}", f"i{current}", action, DAY_MS * (day + 1) + user))
            current = (current + (3 if action == "view" else 7)) % (ITEMS + (NEW if day >= 19 else 0))
    return event_log_from_blocks([[event for event in events if event.ts_ms < DAY_MS * (days + 1)]], EventSchema())


@cache
def old_artifact(folder: Path, items: bool = False) -> Artifact:
    train(log_of(20), folder / f"old{items}", OPTIONS, SERVING, Silent(), "", items=RECORDS if items else ())
    return artifacts.load(folder / f"old{items}")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("refresh")


def options_for(base: Artifact, options: TrainingOptions = FEW) -> TrainingOptions:
    return replace(options, model=base.config)


def refreshed(folder: Path, base: Artifact, log: EventLog | None = None, options: TrainingOptions = FEW) -> Artifact:
    train(
        log or log_of(24), folder / "new", options_for(base, options), SERVING, Silent(), "", warm_start=WarmStart(base)
    )
    return artifacts.load(folder / "new")


def hit_rate(artifact: Artifact, log: EventLog, cut: Split) -> float:
    return evaluate(artifact, log, SERVING, EvaluationOptions(cut, (1,))).rankings["hstu"].at[1].hit_rate.value


def test_a_few_epochs_from_an_artifact_beat_as_many_from_nothing(folder: Path) -> None:
    log, options = log_of(24), replace(FEW, train_fraction=22 / 24)
    refresh = refreshed(folder, old_artifact(folder), log, options)
    train(log, folder / "anew", options, SERVING, Silent(), "")
    anew = artifacts.load(folder / "anew")
    assert hit_rate(refresh, log, options.split) > 1.5 * hit_rate(anew, log, options.split)


def test_what_was_refreshed_is_served_new_items_too(folder: Path) -> None:
    refreshed(folder, old_artifact(folder), options=replace(FEW, trainer=replace(FEW.trainer, epochs=6)))
    history = [Event("u", f"i{number}", "view", DAY_MS * 25 + number) for number in (32, 35, 38)]
    [answer] = Pipeline.load(folder / "new", SERVING).recommend([history], k=5)
    assert "i41" in [item.item_id for item in answer.items], "three on from 38 is a new item"
    assert answer.strategy == "hstu"


def test_old_items_keep_their_tokens_also_those_that_the_log_has_not_and_new_ones_come_after(folder: Path) -> None:
    old = old_artifact(folder)
    late = log_of(24)
    late = late.select(late.ts_ms > DAY_MS * 12)
    late = late.select(late.items != late.item_ids.index("i5"))
    new = refreshed(folder, old, late)
    assert new.item_ids[: len(old.item_ids)] == old.item_ids
    assert "i5" in old.item_ids
    assert set(new.item_ids[len(old.item_ids) :]) == {f"i{number}" for number in range(ITEMS, ITEMS + NEW)}


def test_a_new_items_row_begins_as_its_contents_vector_and_all_else_as_it_was(folder: Path) -> None:
    base = WarmStart(old_artifact(folder, items=True))
    task = prepare(log_of(24), options_for(base.artifact), SERVING, RECORDS, base)
    contents = task.metadata(task.train).content()
    model = MultiTaskModel(task.config, contents)
    base.init_model(model)
    old, items, rows = base.artifact.module_weights("hstu"), model.hstu.items, ITEMS + 1
    assert torch.equal(items.embedding.weight[:rows], old["items.embedding.weight"])
    new = np.arange(rows, rows + NEW)
    assert torch.allclose(items(new), items.from_content(contents.select(new)), atol=1e-5)
    assert torch.equal(model.hstu.rotation.weight, old["rotation.weight"])


def test_records_that_the_artifact_knew_are_still_known_when_none_are_given(folder: Path) -> None:
    old = old_artifact(folder, items=True)
    task = prepare(log_of(24), options_for(old), SERVING, (), WarmStart(old))
    state = task.metadata(task.train).state
    size = len(old.metadata.state["hashes"])
    assert size > 0
    assert np.array_equal(state["hashes"][:size], old.metadata.state["hashes"])


def test_only_new_events_are_counted_and_only_they_judge(folder: Path) -> None:
    old = old_artifact(folder)
    whole = prepare(log_of(24), FEW, SERVING)
    task = prepare(log_of(24), options_for(old), SERVING, (), WarmStart(old))
    popularity = {
        name: dict(zip(counted["items"].tolist(), counted["popularity"].tolist(), strict=True))
        for name, counted in (("whole", whole.counters), ("task", task.counters))
    }
    assert popularity["task"] == pytest.approx(popularity["whole"]), "as if all had been counted at once"
    assert task.metadata(task.train).events.sum() == len(log_of(24))
    times = task.validation_events.sequences.histories.ts_ms[task.validation_events.positions]
    assert (times > WarmStart(old).latest_ms).all()
    assert len(times) == 96, "a fifth of the new events"


def test_what_does_not_fit_the_artifact_is_one_sentence(folder: Path) -> None:
    old = old_artifact(folder)
    wider = replace(FEW, model=replace(old.config, width=32, layers=3))
    with pytest.raises(TrainingError, match=r"has layers 2, width 16, requested: layers 3, width 32; .* leave these"):
        prepare(log_of(24), wider, SERVING, (), WarmStart(old))
    with pytest.raises(TrainingError, match=r"none of the 2400 training events .* continues after it"):
        refreshed(folder, old, log_of(20))
    with pytest.raises(TrainingError, match="trained without item metadata"):
        prepare(log_of(24), options_for(old), SERVING, RECORDS, WarmStart(old))
    schema = EventSchema(actions=("click", "view"))
    with pytest.raises(ArtifactError, match=r"events.actions is \['click', 'view'\]"):
        prepare(log_of(24), options_for(old), replace(SERVING, schema=schema), (), WarmStart(old))
