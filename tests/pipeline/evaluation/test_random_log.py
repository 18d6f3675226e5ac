"""On a log of events drawn at random no ranking beats chance: nothing that training or evaluation reads tells more."""

from math import sqrt
from pathlib import Path

import numpy as np
import pytest
from msgspec.structs import replace

from pipeline import artifact as artifacts
from pipeline.data.log_io import read_event_log
from pipeline.evaluation.evaluate import EvaluationOptions, evaluate
from pipeline.model.config import HstuConfig
from pipeline.strategies.options import PipelineOptions
from pipeline.training.preparation import TrainingOptions
from pipeline.training.train import train
from pipeline.training.trainer import TrainerOptions
from tests.pipeline.training.callbacks import SilentCallback

ITEMS = 200
USERS = 150
PAGE = 8  # events of one time
CHANCE = 10 / ITEMS  # also where touched items are excluded: fewer can be hit, of which ten are shown
DEVIATIONS_99_9 = 3.29
SERVING = PipelineOptions(device="cpu", threads=1)
OPTIONS = TrainingOptions(
    TrainerOptions(epochs=8, crop_length=64, events_per_batch=512, learning_rate=5e-3),
    HstuConfig(width=32, layers=1, heads=2, d_qk=16, d_v=16, max_events=64, dropout=0.1, attention_dropout=0.0),
    refit=False,
)


def write_log(path: Path, seed: int, user_pages: bool, sort_pages: bool = False) -> Path:
    """Write random events: all events of one time of one user, or (user_pages off) of as many users."""
    rng = np.random.default_rng(seed)
    lines = ["user,item,ts"]
    for page in range(1600):
        items = rng.integers(0, ITEMS, PAGE)
        users = np.full(PAGE, page % USERS) if user_pages else rng.permutation(USERS)[:PAGE]
        items = np.sort(items) if sort_pages else items
        lines += [f"u{user},i{item:03},{1_700_000_000 + page}" for user, item in zip(users, items, strict=True)]
    path.write_text("\n".join(lines))
    return path


def hit_rates(log_file: Path, folder: Path, seed: int) -> tuple[dict[str, float], int]:
    """Return each ranking's hit rate@10 after training, and the number of scored events."""
    log = read_event_log(log_file)
    options = replace(OPTIONS, trainer=replace(OPTIONS.trainer, seed=seed))
    train(log, folder, options, SERVING, SilentCallback(), "")
    report = evaluate(artifacts.load(folder), log, SERVING, EvaluationOptions(cutoffs=(10,)))
    return {name: ranking.at[10].hit_rate.value for name, ranking in report.rankings.items()}, report.events


def largest_deviation(events: int) -> float:
    return DEVIATIONS_99_9 * sqrt(CHANCE * (1 - CHANCE) / events)


@pytest.mark.parametrize("seed", [11, 12, 13])
@pytest.mark.parametrize("user_pages", [True, False], ids=["ties of one user", "ties across users"])
def test_no_ranking_beats_chance_on_random_events(tmp_path: Path, seed: int, user_pages: bool) -> None:
    log = write_log(tmp_path / "log.csv", seed, user_pages)
    rates, events = hit_rates(log, tmp_path / "artifact", seed)
    for name, rate in rates.items():
        assert abs(rate - CHANCE) < largest_deviation(events), name


def test_sorted_ties_would_tell_the_model_the_next_item(tmp_path: Path) -> None:
    log = write_log(tmp_path / "log.csv", seed=0, user_pages=True, sort_pages=True)
    rates, events = hit_rates(log, tmp_path / "artifact", seed=0)
    assert rates["hstu"] > CHANCE + 3 * largest_deviation(events)
    assert abs(rates["itemknn"] - CHANCE) < largest_deviation(events), "it ignores order"
