"""HSTU compared with SASRec and four baselines on a real log (MILLRACE_DATA, default ../shared/data: MovieLens 100k).

Protocol: each user's latest ten events are left out of training and scored one after another, each ranked among all
items from all of its user's preceding events (and again among 100 uniform negatives, as older papers do). Every
contender is tuned by a seeded random search with the same number of trials, by NDCG@10 over the five latest events
before the scored ones. Then the trained models are fitted on all events before the split with five seeds. Popularity
counts every training event equally. Half of the events share the second of their user's previous one: they keep the
file's order, as a worker would receive them, and metrics over the others are given next to those over all.

The benchmark runs in stages, so that trials and tests can run on a GPU machine that has only torch, numpy, msgspec and
safetensors:
    python -m tests.benchmarks.accuracy --stage tune --workers 12 --out DIR
    python -m tests.benchmarks.accuracy --stage test --workers 12 --out DIR
    python -m tests.benchmarks.accuracy --stage report --out DIR       writes results/accuracy.json
--trials-of tests/benchmarks/results/accuracy.json --trials-commit COMMIT takes over the trials of an earlier result.
"""

import os
from dataclasses import replace
from pathlib import Path

from msgspec.structs import replace as replaced

from tests.benchmarks.accuracy_models import (
    Benchmark,
    Contender,
    Gain,
    Space,
    cooccurrence,
    hstu,
    itemknn,
    popularity,
    recent_popularity,
    sasrec,
)
from tests.benchmarks.accuracy_setting import IDS_ONLY, Options, Setting
from tests.benchmarks.accuracy_stages import main

FOLDER = Path(os.environ.get("MILLRACE_DATA", "../shared/data")).absolute() / "ml-100k"
SETTING = Setting(FOLDER / "ml-100k.inter", FOLDER / "ml-100k.item", leave_out=10, validation_last=5, negatives=True)

TRAINING: Space = {  # the same for both sequence models
    "trainer.learning_rate": (5e-4, 1e-3, 2e-3, 4e-3),
    "trainer.weight_decay": (0.0, 0.01, 0.1),
    "trainer.epochs": (20, 40, 60),
    "trainer.crop_length": (64, 128, 200),
    "trainer.events_per_batch": (2048, 4096),
    "model.width": (64, 96, 128, 192, 256),
    "model.layers": (1, 2, 3, 4),
    "model.heads": (1, 2, 4, 8),
}
HSTU: Space = TRAINING | {
    "model.dropout": (0.1, 0.2, 0.3, 0.4, 0.5),
    "model.attention_dropout": (0.0, 0.2, 0.5, 0.7),
    "model.temperature": (0.07, 0.1, 0.15, 0.2),
    "contents": (False, True),  # item content: titles, genres, years of the films
}
SASREC: Space = TRAINING | {
    "model.dropout": (0.1, 0.2, 0.3, 0.4, 0.5, 0.6),
    "model.loss": ("bce", "softmax"),
}
RECENT: Space = {"half_life_days": tuple(float(2**power) for power in range(-2, 10))}
COOCCURRENCE: Space = {
    "half_life_days": (7.0, 30.0, 90.0, 10_000.0),
    "neighbours": (32, 64, 128, 256),
    "window_events": (5, 10, 20),
}
ITEMKNN: Space = {
    "neighbours": (50, 100, 200, 400, 800),
    "shrinkage": (0.0, 1.0, 2.0, 5.0, 10.0, 20.0),
    "recency": (0.5, 0.6, 0.7, 0.8, 0.9, 1.0),
}
CONTENDERS = {
    "hstu": Contender(HSTU, hstu),
    "sasrec": Contender(SASREC, sasrec),
    "popularity": Contender({}, popularity),
    "recent_popularity": Contender(RECENT, recent_popularity),
    "cooccurrence": Contender(COOCCURRENCE, cooccurrence),
    "itemknn": Contender(ITEMKNN, itemknn),
}
# Ablations of the tuned HSTU: options that replace its own.
VARIANTS: dict[str, Options] = {
    "hstu, ids only": IDS_ONLY,
    "hstu, whole sequences": {"trainer.crop_length": 200},
    "hstu, no unknown items": {"trainer.unknown_item_rate": 0.0},
    "hstu, no attention dropout": {"model.attention_dropout": 0.0},
    "hstu, one layer": {"model.layers": 1},
    "hstu, no time bias": {"model.time_bias": False},
    "hstu, no contents": {"contents": False},
    "hstu, contents": {"contents": True},
    "hstu, no strength": {"model.strength": False},
    "hstu, sessions": {"model.recent_events": 100, "model.history_events": 400},
}
BENCHMARK = Benchmark(
    name="accuracy",
    protocol="newest events",
    setting=SETTING,
    contenders=CONTENDERS,
    gains=(
        Gain("ndcg10_gain", "ndcg10", "hstu", "sasrec"),
        Gain("hr10_gain", "hr10", "hstu", "sasrec"),
        Gain("ndcg10_gain_over_cooccurrence", "ndcg10", "hstu", "cooccurrence"),
        Gain("hr10_gain_over_cooccurrence", "hr10", "hstu", "cooccurrence"),
        Gain("ndcg10_gain_of_ids", "ndcg10", "hstu, ids only", "sasrec"),
    ),
    variants={name: ("hstu", changes) for name, changes in VARIANTS.items()},
)
QUICK = replace(BENCHMARK, setting=replaced(SETTING, users=40, max_epochs=1), trials=2, seeds=1)

if __name__ == "__main__":
    main(BENCHMARK, QUICK, __doc__)
