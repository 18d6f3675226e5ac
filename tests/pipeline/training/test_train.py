import dataclasses
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from msgspec.structs import replace

from pipeline import artifact as artifacts
from pipeline.data.event_log import EventLog, event_log_from_blocks
from pipeline.data.sequences import UserSequences
from pipeline.data.split import Split, split_index
from pipeline.errors import EvaluationError, TrainingError
from pipeline.evaluation.evaluate import EvaluationOptions, evaluate
from pipeline.manifest import Manifest
from pipeline.model.config import HstuConfig
from pipeline.records import DAY_MS, Event, EventSchema
from pipeline.strategies.options import PipelineOptions
from pipeline.training.batches import TrainingBatch
from pipeline.training.loss_weighting import WeightingName
from pipeline.training.multi_task_model import MultiTaskModel
from pipeline.training.preparation import TrainingOptions, prepare
from pipeline.training.train import EpochReport, train
from pipeline.training.trainer import TrainerOptions
from tests.pipeline.training.callbacks import SilentCallback

CREATED = "2026-01-01T00:00:00+00:00"
ITEMS = 60
USERS = 40
LENGTH = 16  # events per user
OPTIONS = TrainingOptions(
    TrainerOptions(epochs=3, seed=1, crop_length=16, events_per_batch=128, learning_rate=1e-2),
    HstuConfig(width=16, layers=1, heads=2, d_qk=8, d_v=8, max_events=32),
)
LEAVE_LAST_OUT = replace(OPTIONS, leave_last_out=4, validation_last_out=3)
SERVING = PipelineOptions(device="cpu", threads=1)
Position = tuple[int, int]  # (phase from 1, epoch)


class RecordingCallback(SilentCallback):
    """Records reports and epochs. Raises KeyboardInterrupt in the epoch after `interrupt_after`, as a kill would."""

    def __init__(self, interrupt_after: Position | None = None) -> None:
        self.reports: list[EpochReport] = []
        self.epochs: list[Position] = []  # every epoch that ended
        self._phase = 0
        self._interrupt_after = interrupt_after

    def phase(self, name: str, epochs: int) -> None:
        self._phase += 1

    def batch(self, epoch: int, loss: float, done: int, total: int) -> None:
        position = (self._phase, epoch)
        if self._interrupt_after is not None and position > self._interrupt_after and done > 1:
            raise KeyboardInterrupt
        if done == total:
            self.epochs.append(position)

    def epoch(self, report: EpochReport, best: EpochReport) -> None:
        self.reports.append(report)


def rule_log(users: int = USERS, length: int = LENGTH, random: bool = False) -> EventLog:
    """Return a log in which an event is 7 items after a view, 13 after a click; or (random) anywhere."""
    rng = np.random.default_rng(0)
    events = []
    for user in range(users):
        item = int(rng.integers(ITEMS))
        for step in range(length):
            action = ("view", "click")[int(rng.integers(2))]
            ts_ms = DAY_MS * step + 1000 * user  # every time slice has all users
            events.append(Event(f"u{user}", f"i{item}", action, ts_ms))
            item = int(rng.integers(ITEMS)) if random else (item + (7 if action == "view" else 13)) % ITEMS
    return as_log(events)


def as_log(events: list[Event]) -> EventLog:
    return event_log_from_blocks([events] if events else [], EventSchema())


def trainer_options(options: TrainingOptions = OPTIONS, **changes: object) -> TrainingOptions:
    return replace(options, trainer=replace(options.trainer, **changes))


def run(
    folder: Path,
    options: TrainingOptions = OPTIONS,
    log: EventLog | None = None,
    callback: SilentCallback | None = None,
    resume: bool = False,
) -> Manifest:
    log = rule_log() if log is None else log
    return train(log, folder, options, SERVING, callback or SilentCallback(), CREATED, resume)


@dataclass
class Run:
    folder: Path
    manifest: Manifest
    callback: RecordingCallback


@pytest.fixture(scope="module")
def default_run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Train the rule log with OPTIONS, uninterrupted."""
    folder = tmp_path_factory.mktemp("default") / "model"
    callback = RecordingCallback()
    with torch.random.fork_rng():
        torch.manual_seed(5)
        return Run(folder, run(folder, callback=callback), callback)


@pytest.fixture(scope="module")
def leave_last_out_run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("leave-last-out") / "model"
    callback = RecordingCallback()
    return Run(folder, run(folder, LEAVE_LAST_OUT, callback=callback), callback)


@pytest.fixture(scope="module")
def weighted_versions(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Version of an uninterrupted training by weighting."""
    folder = tmp_path_factory.mktemp("weightings")
    return {name: run(folder / name, trainer_options(weighting=name)).version for name in ("uncertainty", "dwa")}


def test_same_seed_gives_the_same_artifact_whatever_torchs_random_state(default_run: Run, tmp_path: Path) -> None:
    """Training neither reads nor changes torch's global random state."""
    torch.manual_seed(6)
    again = run(tmp_path / "model")
    after = torch.rand(3)
    torch.manual_seed(6)
    assert torch.equal(after, torch.rand(3))
    assert again.version == default_run.manifest.version


def test_another_seed_gives_another_artifact(default_run: Run, tmp_path: Path) -> None:
    assert run(tmp_path / "model", trainer_options(seed=2)).version != default_run.manifest.version


@pytest.mark.parametrize("after", [(1, 1), (1, 2), (2, 1)], ids=["early", "late", "refit"])
def test_resumed_training_equals_an_uninterrupted_one_bit_for_bit(
    default_run: Run, tmp_path: Path, after: Position
) -> None:
    interrupted = RecordingCallback(interrupt_after=after)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "parts", callback=interrupted)
    assert not (tmp_path / "parts").exists(), "an unfinished training leaves no artifact"
    resumed = RecordingCallback()
    manifest = run(tmp_path / "parts", callback=resumed, resume=True)
    epochs = [epoch for _, epoch in default_run.callback.epochs]
    assert [epoch for _, epoch in interrupted.epochs + resumed.epochs] == epochs, "no epoch is trained twice"
    assert resumed.reports == default_run.callback.reports, "reports of the checkpoint are repeated"
    assert (manifest.version, manifest.metrics) == (default_run.manifest.version, default_run.manifest.metrics)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["parts"], "no checkpoint is left"


@pytest.mark.parametrize("name", ["uncertainty", "dwa"])
@pytest.mark.parametrize("after", [(1, 2), (2, 2)], ids=["validated", "refit"])
def test_learned_loss_weighting_resumes_bit_for_bit(
    default_run: Run, weighted_versions: dict[str, str], tmp_path: Path, name: WeightingName, after: Position
) -> None:
    options = trainer_options(weighting=name)
    assert weighted_versions[name] != default_run.manifest.version, "fixed weights"
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "parts", options, callback=RecordingCallback(interrupt_after=after))
    assert run(tmp_path / "parts", options, resume=True).version == weighted_versions[name]


def test_heads_are_calibrated_on_labels_that_the_validated_model_was_not_trained_on(tmp_path: Path) -> None:
    log = rule_log()
    codes = EventSchema().action_codes()
    is_validated = np.arange(len(log)) >= int(0.76 * len(log))  # the last 5 % of the first 80 %
    is_like = np.random.default_rng(1).random(len(log)) < np.where(is_validated, 0.5, 0.1)
    actions = np.where(is_like, codes["like"], codes["view"]).astype(np.uint64)
    log.events["ts_action_device"] = log.ts_ms.astype(np.uint64) | actions << np.uint64(48)
    run(tmp_path / "model", log=log)
    engagement, retention, monetization = artifacts.load(tmp_path / "model").weights["heads.calibration"].tolist()
    assert engagement != [1, 0], "likes are far more frequent there"
    assert retention == [1, 0], "everyone returns every day: there is nothing to fit"
    assert monetization == [1, 0], "nobody pays"


def test_refit_trains_on_all_training_events_for_the_best_number_of_epochs(default_run: Run, tmp_path: Path) -> None:
    best = int(default_run.manifest.metrics["epoch"])
    assert [epoch for phase, epoch in default_run.callback.epochs if phase == 2] == list(range(1, best + 1))
    without = run(tmp_path / "model", replace(OPTIONS, refit=False))
    assert without.metrics == default_run.manifest.metrics
    assert without.version != default_run.manifest.version


def test_resume_without_a_checkpoint_or_with_other_options_is_rejected(tmp_path: Path) -> None:
    path = tmp_path / "model"
    with pytest.raises(TrainingError, match="nothing to resume from"):
        run(path, resume=True)
    with pytest.raises(KeyboardInterrupt):
        run(path, callback=RecordingCallback(interrupt_after=(1, 1)))
    with pytest.raises(TrainingError, match="a different log or different options"):
        run(path, trainer_options(seed=9), resume=True)
    with pytest.raises(TrainingError, match="a different log or different options"):
        run(path, log=rule_log(length=LENGTH - 1), resume=True)
    (tmp_path / "model.checkpoint.safetensors").write_bytes(b"torn")
    with pytest.raises(TrainingError, match="cannot be read"):
        run(path, resume=True)


def with_items_reversed(log: EventLog, mask: np.ndarray) -> EventLog:
    """Return a copy in which the masked events' items are in reverse order."""
    items = log.items.copy()
    events = log.events.copy()
    items[mask] = items[mask][::-1]
    events["item"][mask] = events["item"][mask][::-1]
    return dataclasses.replace(log, items=items, events=events)


def test_events_after_the_split_change_nothing(default_run: Run, tmp_path: Path) -> None:
    log = rule_log()
    is_late = log.ts_ms >= np.sort(log.ts_ms)[int(0.8 * len(log))]
    changed = with_items_reversed(log, is_late)
    assert (changed.items != log.items).any()
    assert run(tmp_path / "model", log=changed).version == default_run.manifest.version


def test_each_users_held_out_events_change_nothing(leave_last_out_run: Run, tmp_path: Path) -> None:
    log = rule_log()
    changed = with_items_reversed(log, Split(leave_last_out=4).test_mask(log))
    assert (changed.items != log.items).any()
    version = leave_last_out_run.manifest.version
    assert run(tmp_path / "changed", LEAVE_LAST_OUT, changed).version == version
    assert run(tmp_path / "other", replace(LEAVE_LAST_OUT, leave_last_out=3), log).version != version
    setup = prepare(log, LEAVE_LAST_OUT, SERVING)
    assert np.diff(setup.train.offsets).tolist() == [LENGTH - 4] * USERS
    assert np.diff(setup.fit.offsets).tolist() == [LENGTH - 7] * USERS
    lengths = setup.validation_events.lengths.reshape(USERS, 3)
    assert (lengths == [LENGTH - 7, LENGTH - 6, LENGTH - 5]).all(), "each user's three latest before the split"


def test_manifest_records_the_split_and_evaluation_respects_it(default_run: Run, leave_last_out_run: Run) -> None:
    log = rule_log()
    model = artifacts.load(leave_last_out_run.folder)
    assert model.manifest.trained_on is not None
    assert model.manifest.trained_on.split.leave_last_out == 4
    assert evaluate(model, log, SERVING, EvaluationOptions(Split(leave_last_out=4))).warning is None
    with pytest.raises(EvaluationError, match=r"was trained on \d+ of the \d+ events to score"):
        evaluate(model, log, SERVING, EvaluationOptions(Split(leave_last_out=5)))
    with pytest.raises(EvaluationError, match=r"was trained on \d+ of the \d+ events to score"):
        evaluate(artifacts.load(default_run.folder), log, SERVING, EvaluationOptions(Split(0.5)))


def test_log_with_more_items_than_max_items_is_rejected(default_run: Run, tmp_path: Path) -> None:
    log = rule_log()
    narrow = replace(SERVING, max_items=5)
    message = f"{len(log.item_ids) - 5} items have no token: all 5 are taken; counters.max_items is 5: set it higher"
    with pytest.raises(TrainingError, match=message):
        train(log, tmp_path / "model", OPTIONS, narrow, SilentCallback(), CREATED)
    with pytest.raises(EvaluationError, match=message):
        evaluate(artifacts.load(default_run.folder), log, narrow, EvaluationOptions())


def test_crops_are_no_longer_than_what_the_model_reads(tmp_path: Path) -> None:
    model = replace(OPTIONS.model, max_events=8)

    def version(crop_length: int) -> str:
        options = replace(trainer_options(crop_length=crop_length, epochs=1), model=model, refit=False)
        return run(tmp_path / str(crop_length), options).version

    assert version(16) == version(8) != version(4)


def test_events_per_epoch_trains_on_a_different_part_in_each_epoch() -> None:
    setup = prepare(rule_log(), trainer_options(events_per_epoch=150), SERVING)
    trainer = setup.trainer(setup.fit, 2)
    batches: list[TrainingBatch] = []

    class WatchedModel(MultiTaskModel):
        def losses(self, batch: TrainingBatch, frequency: np.ndarray, rng: np.random.Generator) -> tuple:
            batches.append(batch)
            return super().losses(batch, frequency, rng)

    trainer.model.__class__ = WatchedModel
    for _ in range(2):
        trainer.train_epoch()
    assert len(batches) == 4, "150 events are two batches of 128"
    first, second = (np.concatenate([batch.successors for batch in batches[part : part + 2]]) for part in (0, 2))
    assert sorted(first) != sorted(second)


def test_bf16_trains_as_well_as_fp32_and_keeps_fp32_weights() -> None:
    losses = {}
    for precision in ("fp32", "bf16"):
        setup = prepare(rule_log(), trainer_options(precision=precision), SERVING)
        trainer = setup.trainer(setup.fit, 6)
        losses[precision] = [trainer.train_epoch() for _ in range(6)]
        assert {weight.dtype for weight in trainer.weights().values()} == {torch.float32}
    assert losses["bf16"] != losses["fp32"]
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=0.02)
    assert losses["bf16"][-1] < 0.9 * losses["bf16"][0]


def test_model_learns_a_succession_rule_and_beats_both_baselines(tmp_path: Path) -> None:
    options = replace(
        trainer_options(epochs=18, learning_rate=2e-2, events_per_batch=256),
        model=replace(OPTIONS.model, layers=2, dropout=0.0, attention_dropout=0.0),
        max_validation_events=100,
        patience=18,
        refit=False,
    )
    log = rule_log(users=200)
    run(tmp_path / "model", options, log)
    report = evaluate(artifacts.load(tmp_path / "model"), log, SERVING, EvaluationOptions(cutoffs=(1,)))
    hit_rates = {name: metrics.at[1].hit_rate.value for name, metrics in report.rankings.items()}
    sequences = UserSequences.from_columns(log.events, np.ones(len(log), np.int32), log.users)
    is_scored = sequences.log_positions >= split_index(log.ts_ms, 0.8)
    possible = sequences.is_first_touch[is_scored].mean()  # repeats are excluded
    assert 0.9 * possible < hit_rates["hstu"] <= possible
    assert hit_rates["hstu"] > 3 * hit_rates["cooccurrence"] > 3 * hit_rates["popularity"]


def test_training_stops_when_ndcg_no_longer_rises(tmp_path: Path) -> None:
    callback = RecordingCallback()
    options = replace(trainer_options(epochs=60), patience=3)
    manifest = run(tmp_path / "model", options, rule_log(random=True), callback)
    best = max(callback.reports, key=lambda report: (report.validation.ndcg, report.epoch))
    assert len(callback.reports) == best.epoch + 3 < 60
    assert manifest.metrics["epoch"] == best.epoch
    assert manifest.metrics["validation_hit_rate"] == best.validation.hit_rate


@pytest.mark.parametrize(
    ("events", "message"),
    [
        ([Event(f"u{n}", f"i{n}", "view", n) for n in range(50)], "no user goes from one item to another"),
        ([Event("u", "i", "view", n) for n in range(50)], "no user goes from one item to another"),
        (
            [Event(f"u{n % 5}", f"i{n % 7}", "view", 9) for n in range(50)],
            r"none of the 50 events .* events of one millisecond together; .* by user \(--leave-last-out\)",
        ),
        ([], "none of the 0 events is left to train on"),
    ],
    ids=["users with one event", "one item", "all at one time", "empty"],
)
def test_log_that_cannot_train_a_model_is_rejected(tmp_path: Path, events: list[Event], message: str) -> None:
    with pytest.raises(TrainingError, match=message):
        run(tmp_path / "model", log=as_log(events))


@pytest.mark.parametrize(("epochs", "message"), [(1, "holds infinity or NaN|loss is"), (9, "loss is (nan|inf)")])
def test_diverging_training_writes_nothing(default_run: Run, tmp_path: Path, epochs: int, message: str) -> None:
    shutil.copytree(default_run.folder, tmp_path / "model")
    before = (tmp_path / "model" / "manifest.json").read_bytes()
    with pytest.raises(TrainingError, match=message):
        run(tmp_path / "model", trainer_options(learning_rate=1e30, epochs=epochs))
    assert (tmp_path / "model" / "manifest.json").read_bytes() == before


def test_unwritable_checkpoint_is_reported_with_the_next_step(tmp_path: Path) -> None:
    (tmp_path / ".model.checkpoint.safetensors.draft").mkdir()
    with pytest.raises(TrainingError, match=r"model.checkpoint.safetensors: cannot be written .* with --resume"):
        run(tmp_path / "model")


def test_one_user_is_enough_to_train_on(tmp_path: Path) -> None:
    log = rule_log(users=1, length=100)
    run(tmp_path / "model", log=log)
    model = artifacts.load(tmp_path / "model")
    assert model.manifest.metrics["training_events"] == 80
    report = evaluate(model, log, SERVING, EvaluationOptions())
    assert (report.events, report.users, report.warning) == (20, 1, None)


def test_events_of_one_time_can_be_split_by_user(tmp_path: Path) -> None:
    log = as_log([Event(f"u{n % 5}", f"i{n % 7}", "view", 9) for n in range(100)])
    run(tmp_path / "model", replace(OPTIONS, leave_last_out=2), log)
    assert artifacts.load(tmp_path / "model").manifest.metrics["training_events"] == 90
