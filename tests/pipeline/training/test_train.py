from pathlib import Path

import numpy as np
import pytest
import torch
from msgspec.structs import replace

from pipeline import artifact as artifacts
from pipeline.data.event_log import EventLog, event_log_from_blocks
from pipeline.data.sequences import UserSequences, split_index
from pipeline.data.split import Split
from pipeline.errors import EvaluationError, TrainingError
from pipeline.evaluation.evaluate import EvaluationOptions, evaluate
from pipeline.model.config import HstuConfig
from pipeline.records import Event, EventSchema
from pipeline.serving.pipeline import PipelineOptions
from pipeline.training.batches import TrainingBatch
from pipeline.training.loss_weighting import WeightingName
from pipeline.training.multi_task_model import MultiTaskModel
from pipeline.training.preparation import TrainingOptions, prepare
from pipeline.training.train import EpochReport, train
from pipeline.training.trainer import TrainerOptions

CREATED = "2026-01-01T00:00:00+00:00"
ITEMS = 120
OPTIONS = TrainingOptions(
    TrainerOptions(epochs=4, seed=1, crop_length=16, events_per_batch=256),
    HstuConfig(width=16, heads=2, d_qk=8, d_v=8, max_events=32),
)
SERVING = PipelineOptions(device="cpu", threads=1)


class Silent:
    """An observer; `until` (stage from 1, epoch) ends training by force after that epoch, as a kill would."""

    def __init__(self, until: tuple[int, int] | None = None) -> None:
        self.reports: list[EpochReport] = []
        self.epochs: list[tuple[int, int]] = []  # (stage, epoch) of every epoch that ended
        self._stage, self._until = 0, until

    def phase(self, name: str, epochs: int) -> None:
        self._stage += 1

    def batch(self, epoch: int, loss: float, done: int, total: int) -> None:
        if self._until is not None and (self._stage, epoch) > self._until and done > 1:
            raise KeyboardInterrupt
        if done == total:
            self.epochs.append((self._stage, epoch))

    def epoch(self, report: EpochReport, best: EpochReport) -> None:
        self.reports.append(report)


def log_of(users: int = 80, length: int = 25, lawful: bool = True) -> EventLog:
    """Users walk through the catalogue: a view leads 7 items on, a click 13. Or (not lawful) anywhere."""
    random = np.random.default_rng(0)
    events = []
    for user in range(users):
        current = int(random.integers(ITEMS))
        for step in range(length):
            action = ("view", "click")[int(random.integers(2))]
            ts_ms = 86_400_000 * step + 1000 * user  # users side by side: every time slice has all of them
            events.append(Event(f"u{user}", f"i{current}", action, ts_ms))
            current = (current + (7 if action == "view" else 13)) % ITEMS if lawful else int(random.integers(ITEMS))
    return event_log_from_blocks([events], EventSchema())


def trained(folder: Path, options: TrainingOptions = OPTIONS, log: EventLog | None = None, **more: bool) -> str:
    return train(log_of() if log is None else log, folder, options, SERVING, Silent(), CREATED, **more).version


def test_the_same_seed_gives_the_same_artifact_and_another_seed_another(tmp_path: Path) -> None:
    first, again = trained(tmp_path / "a"), trained(tmp_path / "b")
    other = trained(tmp_path / "c", replace(OPTIONS, trainer=replace(OPTIONS.trainer, seed=2)))
    assert first == again != other


def test_training_neither_reads_nor_moves_torchs_own_randomness(tmp_path: Path) -> None:
    torch.manual_seed(5)
    first = trained(tmp_path / "a")
    after = torch.rand(3)
    torch.manual_seed(5)
    assert torch.equal(after, torch.rand(3))
    torch.manual_seed(6)
    assert trained(tmp_path / "b") == first


@pytest.mark.parametrize("after", [(1, 1), (1, 3), (2, 1)], ids=["early", "late", "trained anew"])
def test_an_interrupted_and_resumed_training_equals_an_uninterrupted_one_bit_for_bit(
    tmp_path: Path, after: tuple[int, int]
) -> None:
    uninterrupted = Silent()
    whole = train(log_of(), tmp_path / "whole", OPTIONS, SERVING, uninterrupted, CREATED)
    broken_off = Silent(until=after)
    with pytest.raises(KeyboardInterrupt):
        train(log_of(), tmp_path / "parts", OPTIONS, SERVING, broken_off, CREATED)
    assert not (tmp_path / "parts").exists(), "an unfinished training leaves no artifact"
    watching = Silent()
    resumed = train(log_of(), tmp_path / "parts", OPTIONS, SERVING, watching, CREATED, resume=True)
    epochs = [epoch for _, epoch in uninterrupted.epochs]
    assert [epoch for _, epoch in broken_off.epochs + watching.epochs] == epochs, "no epoch is trained twice"
    assert watching.reports == uninterrupted.reports, "what was judged before the break is told again"
    assert (resumed.version, resumed.metrics) == (whole.version, whole.metrics)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["parts", "whole"], "no checkpoint is left"


@pytest.mark.parametrize("name", ["uncertainty", "dwa"])
@pytest.mark.parametrize("after", [(1, 3), (2, 2)], ids=["judged", "trained anew"])
def test_a_learnt_weighting_of_the_losses_resumes_bit_for_bit_too(
    tmp_path: Path, name: WeightingName, after: tuple[int, int]
) -> None:
    options = replace(OPTIONS, trainer=replace(OPTIONS.trainer, weighting=name))
    whole = train(log_of(), tmp_path / "whole", options, SERVING, Silent(), CREATED)
    assert whole.version != trained(tmp_path / "fixed")
    with pytest.raises(KeyboardInterrupt):
        train(log_of(), tmp_path / "parts", options, SERVING, Silent(until=after), CREATED)
    assert trained(tmp_path / "parts", options, resume=True) == whole.version


def test_the_artifacts_heads_are_calibrated_on_what_the_judged_model_has_not_learnt_from(tmp_path: Path) -> None:
    log, codes = log_of(), EventSchema().action_codes()
    liked = np.random.default_rng(1).random(len(log)) < 0.2
    actions = np.where(liked, codes["like"], codes["view"]).astype(np.uint64)
    log.events["ts_action_device"] = log.ts_ms.astype(np.uint64) | actions << np.uint64(48)
    train(log, tmp_path / "model", OPTIONS, SERVING, Silent(), CREATED)
    engagement, retention, monetization = artifacts.load(tmp_path / "model").weights["heads.calibration"].tolist()
    assert engagement != [1, 0]
    assert retention == [1, 0], "everyone returns every day: there is nothing to fit"
    assert monetization == [1, 0], "nobody pays"


def test_the_model_is_trained_anew_on_all_events_before_the_cut_for_the_best_number_of_epochs(tmp_path: Path) -> None:
    watching = Silent()
    anew = train(log_of(), tmp_path / "anew", OPTIONS, SERVING, watching, CREATED)
    assert [epoch for stage, epoch in watching.epochs if stage == 2] == list(range(1, int(anew.metrics["epoch"]) + 1))
    judged = train(log_of(), tmp_path / "judged", replace(OPTIONS, refit=False), SERVING, Silent(), CREATED)
    assert judged.metrics == anew.metrics
    assert judged.version != anew.version


def test_resuming_without_a_checkpoint_or_with_other_options_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="nothing to resume from"):
        trained(tmp_path / "model", resume=True)
    with pytest.raises(KeyboardInterrupt):
        train(log_of(), tmp_path / "model", OPTIONS, SERVING, Silent(until=(1, 1)), CREATED)
    with pytest.raises(TrainingError, match="a different log or different options"):
        trained(tmp_path / "model", replace(OPTIONS, trainer=replace(OPTIONS.trainer, seed=9)), resume=True)
    with pytest.raises(TrainingError, match="a different log or different options"):
        trained(tmp_path / "model", log=log_of(length=24), resume=True)
    (tmp_path / "model.checkpoint.safetensors").write_bytes(b"torn")
    with pytest.raises(TrainingError, match="cannot be read"):
        trained(tmp_path / "model", resume=True)


def test_what_comes_after_the_cut_changes_nothing(tmp_path: Path) -> None:
    log, changed = log_of(), log_of()
    late = changed.ts_ms >= np.sort(changed.ts_ms)[int(0.8 * len(changed))]
    changed.events = changed.events.copy()
    changed.events["item"][late] = changed.events["item"][late][::-1]
    changed.items = changed.items.copy()
    changed.items[late] = changed.items[late][::-1]
    assert trained(tmp_path / "a", log=log) == trained(tmp_path / "b", log=changed)


def test_what_is_left_out_of_each_user_changes_nothing(tmp_path: Path) -> None:
    options = replace(OPTIONS, leave_last_out=4, validation_last_out=3)
    log, changed = log_of(), log_of()
    late = Split(leave_last_out=4).test_mask(changed)
    changed.items, changed.events = changed.items.copy(), changed.events.copy()
    changed.items[late] = changed.items[late][::-1]
    changed.events["item"][late] = changed.events["item"][late][::-1]
    assert trained(tmp_path / "a", options, log) == trained(tmp_path / "b", options, changed)
    assert trained(tmp_path / "c", replace(options, leave_last_out=3), log) != trained(tmp_path / "a", options, log)
    task = prepare(log, options, SERVING)
    assert np.diff(task.train.offsets).tolist() == [21] * 80
    assert np.diff(task.fit.offsets).tolist() == [18] * 80
    assert (task.validation_events.lengths.reshape(80, 3) == [18, 19, 20]).all(), (
        "each user's three newest before the cut"
    )


def test_the_manifest_remembers_the_cut_and_evaluation_keeps_to_it(tmp_path: Path) -> None:
    log = log_of()
    trained(tmp_path / "last", replace(OPTIONS, leave_last_out=4), log)
    model = artifacts.load(tmp_path / "last")
    assert model.manifest.trained_on is not None
    assert model.manifest.trained_on.split.leave_last_out == 4
    assert evaluate(model, log, SERVING, EvaluationOptions(Split(leave_last_out=4))).warning is None
    with pytest.raises(EvaluationError, match=r"was trained on \d+ of the \d+ events to score"):
        evaluate(model, log, SERVING, EvaluationOptions(Split(leave_last_out=5)))
    trained(tmp_path / "share", log=log)
    with pytest.raises(EvaluationError, match=r"was trained on \d+ of the \d+ events to score"):
        evaluate(artifacts.load(tmp_path / "share"), log, SERVING, EvaluationOptions(Split(0.5)))


def test_a_log_of_more_items_than_have_room_is_neither_trained_on_nor_evaluated(tmp_path: Path) -> None:
    log, narrow = log_of(), replace(SERVING, max_items=5)
    refused = f"{len(log.item_ids) - 5} items have no token: all 5 are taken; counters.max_items is 5: set it higher"
    with pytest.raises(TrainingError, match=refused):
        train(log, tmp_path / "model", OPTIONS, narrow, Silent(), CREATED)
    trained(tmp_path / "model", log=log)
    with pytest.raises(EvaluationError, match=refused):
        evaluate(artifacts.load(tmp_path / "model"), log, narrow, EvaluationOptions())


def test_pieces_are_no_longer_than_what_the_model_reads(tmp_path: Path) -> None:
    def version(crop_events: int) -> str:
        trainer = replace(OPTIONS.trainer, crop_length=crop_events, epochs=1)
        return trained(tmp_path / str(crop_events), replace(OPTIONS, trainer=trainer))

    reads = OPTIONS.model.max_events
    assert version(2 * reads) == version(reads) != version(reads // 2)


def test_an_epoch_may_be_a_part_of_the_log_another_one_each_time() -> None:
    task = prepare(log_of(), replace(OPTIONS, trainer=replace(OPTIONS.trainer, events_per_epoch=300)), SERVING)
    trainer = task.trainer(task.fit, 2)
    batches: list[TrainingBatch] = []

    class Watched(MultiTaskModel):
        def losses(self, batch: TrainingBatch, shares: np.ndarray, random: np.random.Generator) -> tuple:
            batches.append(batch)
            return super().losses(batch, shares, random)

    trainer.model.__class__ = Watched
    for _ in range(2):
        trainer.train_epoch()
    assert len(batches) == 4, "300 events are two batches of 256"
    first, second = (np.concatenate([batch.successors for batch in batches[part : part + 2]]) for part in (0, 2))
    assert sorted(first) != sorted(second)


def test_half_precision_trains_as_well_and_keeps_its_weights_whole() -> None:
    losses = {}
    for name in ("fp32", "bf16"):
        task = prepare(log_of(), replace(OPTIONS, trainer=replace(OPTIONS.trainer, precision=name)), SERVING)
        trainer = task.trainer(task.fit, 6)
        losses[name] = [trainer.train_epoch() for _ in range(6)]
        assert {weight.dtype for weight in trainer.weights().values()} == {torch.float32}
    assert losses["bf16"] != losses["fp32"]
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=0.02)
    assert losses["bf16"][-1] < 0.9 * losses["bf16"][0]


def test_a_rule_of_succession_is_learnt_and_beats_both_baselines(tmp_path: Path) -> None:
    options = TrainingOptions(
        replace(OPTIONS.trainer, epochs=40, learning_rate=1e-2), replace(OPTIONS.model, dropout=0.1), patience=20
    )
    log = log_of(users=200)
    train(log, tmp_path / "model", options, SERVING, Silent(), CREATED)
    report = evaluate(artifacts.load(tmp_path / "model"), log, SERVING, EvaluationOptions(cutoffs=(1,)))
    hit_rates = {name: row.at[1].hit_rate.value for name, row in report.rankings.items()}
    corpus = UserSequences.from_columns(log.events, np.ones(len(log), np.int32), log.users)
    possible = corpus.is_first_touch[corpus.log_positions >= split_index(log.ts_ms, 0.8)].mean()  # repeats are excluded
    assert 0.9 * possible < hit_rates["hstu"] <= possible
    assert hit_rates["hstu"] > 3 * hit_rates["cooccurrence"] > 3 * hit_rates["popularity"]


def test_training_stops_when_the_hit_rate_no_longer_rises(tmp_path: Path) -> None:
    watching = Silent()
    log = log_of(lawful=False)
    options = replace(OPTIONS, trainer=replace(OPTIONS.trainer, epochs=60, learning_rate=1e-2), patience=3)
    manifest = train(log, tmp_path / "model", options, SERVING, watching, CREATED)
    best = max(watching.reports, key=lambda report: (report.validation.ndcg, report.epoch))
    assert len(watching.reports) == best.epoch + 3 < 60
    assert manifest.metrics["epoch"] == best.epoch
    assert manifest.metrics["validation_hit_rate"] == best.validation.hit_rate


def test_a_log_that_cannot_train_is_one_sentence(tmp_path: Path) -> None:
    lonely = event_log_from_blocks([[Event(f"u{n}", f"i{n}", "view", n) for n in range(50)]], EventSchema())
    with pytest.raises(TrainingError, match="no user goes from one item to another"):
        trained(tmp_path / "model", log=lonely)
    same = event_log_from_blocks([[Event("u", "i", "view", n) for n in range(50)]], EventSchema())
    with pytest.raises(TrainingError, match="no user goes from one item to another"):
        trained(tmp_path / "model", log=same)
    at_once = event_log_from_blocks([[Event(f"u{n % 5}", f"i{n % 7}", "view", 9) for n in range(50)]], EventSchema())
    with pytest.raises(
        TrainingError, match=r"none of the 50 events .* events of one millisecond together; .* by user \(--leave-last-out\)"
    ):
        trained(tmp_path / "model", log=at_once)
    with pytest.raises(TrainingError, match="none of the 0 events is left to train on"):
        trained(tmp_path / "model", log=event_log_from_blocks([], EventSchema()))


@pytest.mark.parametrize(
    ("epochs", "sentence"), [(1, "holds infinity or NaN|loss is"), (9, "loss is (nan|inf)")]
)
def test_a_training_that_leaves_the_numbers_writes_nothing(tmp_path: Path, epochs: int, sentence: str) -> None:
    trained(tmp_path / "model")
    before = (tmp_path / "model" / "manifest.json").read_bytes()
    wild = replace(OPTIONS, trainer=replace(OPTIONS.trainer, learning_rate=1e30, epochs=epochs))
    with pytest.raises(TrainingError, match=sentence):
        train(log_of(), tmp_path / "model", wild, SERVING, Silent(), CREATED)
    assert (tmp_path / "model" / "manifest.json").read_bytes() == before


def test_a_checkpoint_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / ".model.checkpoint.safetensors.draft").mkdir()
    with pytest.raises(TrainingError, match=r"model.checkpoint.safetensors: cannot be written .* with --resume"):
        trained(tmp_path / "model")


def test_one_user_is_enough_to_train_on(tmp_path: Path) -> None:
    alone = log_of(users=1, length=100)
    trained(tmp_path / "model", log=alone)
    model = artifacts.load(tmp_path / "model")
    assert model.manifest.metrics["training_events"] == 80
    report = evaluate(model, alone, SERVING, EvaluationOptions())
    assert (report.events, report.users, report.warning) == (20, 1, None)


def test_times_that_are_all_equal_can_be_cut_by_user(tmp_path: Path) -> None:
    at_once = event_log_from_blocks([[Event(f"u{n % 5}", f"i{n % 7}", "view", 9) for n in range(100)]], EventSchema())
    trained(tmp_path / "model", replace(OPTIONS, leave_last_out=2), at_once)
    assert artifacts.load(tmp_path / "model").manifest.metrics["training_events"] == 90
