"""HSTU compared with SASRec and three baselines on Amazon Beauty (5-core), the log that most papers report on.

Protocol: each user's last event is scored among all items, the last but one is for tuning and early stopping. Every
contender is tuned by a seeded random search with the same number of trials, by NDCG@10 over a fixed random part of the
validation events; then the sequence models are trained on all events before the scored ones with three seeds. HSTU is
entered twice and tuned twice: by item ids and times alone, and with the items' attributes. SASRec has the full softmax.

The log's times are real within a user only, in full days, and all users start at the same made-up second: the hours and
weekdays are made up, too. Events of one day keep the source's order, which is by product: published figures share it,
so metrics over untied steps are given next to those over all. The published figures in the result were not measured
here, and their authors' tuning differs.

Data: amazon/beauty.inter.gz and amazon/beauty.item.gz in MILLRACE_DATA (default ../shared/data). Stages run separately,
so that trials and tests can run on a GPU machine that has only torch, numpy, msgspec and safetensors:
    python -m tests.benchmarks.beauty --stage tune --workers 8 --minutes 7 --out DIR
    python -m tests.benchmarks.beauty --stage test --workers 8 --minutes 7 --out DIR
    python -m tests.benchmarks.beauty --stage report --out DIR         writes results/beauty.json
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
    sasrec,
)
from tests.benchmarks.accuracy_setting import IDS_ONLY, Setting
from tests.benchmarks.accuracy_stages import main
from tests.benchmarks.results import Cell

FOLDER = Path(os.environ.get("MILLRACE_DATA", "../shared/data")).absolute() / "amazon"
SETTING = Setting(
    FOLDER / "beauty.inter.gz",
    FOLDER / "beauty.item.gz",
    leave_out=1,
    validation_last=1,
    max_validation_events=10_000,
    evaluations=10,
)
# Users have 8.9 events on average and seldom more than 50: published models read the latest 50, and so do these. Few
# values per option; eight trials are a small sample all the same. `beauty_second_search` has other spaces.
TRAINING: Space = {  # the same for both sequence models
    "trainer.learning_rate": (1e-3, 2e-3, 4e-3),
    "trainer.weight_decay": (0.01, 0.1),
    "trainer.epochs": (20, 40),
    "model.width": (128, 256),
    "model.layers": (1, 2),
    "model.heads": (1, 2, 4),
    "model.dropout": (0.3, 0.5),
    "trainer.crop_length": (50,),
    "trainer.events_per_batch": (4096,),
    "model.max_events": (50,),
}
HSTU: Space = {
    "model.attention_dropout": (0.0, 0.2, 0.5),
    "model.temperature": (0.05, 0.07, 0.1),
    "model.time_bias": (False, True),
}
COOCCURRENCE: Space = {
    "half_life_days": (90.0, 10_000.0),
    "neighbours": (64, 128, 256),
    "window_events": (5, 10, 20),
}
ITEMKNN: Space = {
    "neighbours": (100, 200, 400),
    "shrinkage": (0.0, 5.0, 10.0, 20.0),
    "recency": (0.6, 0.8, 0.9, 1.0),
}
SOURCE = "published: last event, all items"
PUBLISHED: tuple[dict[str, Cell], ...] = tuple(
    {"model": model, "hr10": hr10, "ndcg10": ndcg10, "protocol": SOURCE}
    for model, hr10, ndcg10 in (
        ("SASRec, sampled softmax", 0.0921, 0.0531),
        ("SASRec, full cross-entropy", 0.0974, 0.0588),
        ("eSASRec", 0.0928, 0.0523),
        ("HSTU", 0.0788, 0.0439),
        ("TIGER", 0.0648, 0.0384),
    )
)


def sequence_models(training: Space, of_hstu: Space, of_contents: Space | None = None) -> dict[str, Contender]:
    """Return the trained contenders. of_hstu, of_contents: HSTU's options besides, and those with the attributes"""
    ids: Space = {name: (value,) for name, value in IDS_ONLY.items()}
    contents: Space = {"contents": (True,), "trainer.head_weights": ((0.0, 0.0, 0.0),)} | (of_contents or {})
    return {
        "hstu": Contender(training | of_hstu | ids, hstu),
        "hstu_contents": Contender(training | of_hstu | contents, hstu),
        "sasrec": Contender(training | {"model.loss": ("softmax",)}, sasrec),
    }


def quick(benchmark: Benchmark) -> Benchmark:
    """Return the benchmark with few users, trials and epochs."""
    return replace(benchmark, setting=replaced(SETTING, users=60, max_epochs=1), trials=2, seeds=1)


BENCHMARK = Benchmark(
    name="beauty",
    protocol="last event",
    setting=SETTING,
    contenders={
        **sequence_models(TRAINING, HSTU),
        "itemknn": Contender(ITEMKNN, itemknn),
        "cooccurrence": Contender(COOCCURRENCE, cooccurrence),
        "popularity": Contender({}, popularity),
    },
    gains=(
        Gain("gain", "ndcg10", "hstu_contents", "sasrec"),
        Gain("hr10_gain", "hr10", "hstu_contents", "sasrec"),
        Gain("gain_of_ids", "ndcg10", "hstu", "sasrec"),
        Gain("gain_over_cooccurrence", "ndcg10", "hstu_contents", "cooccurrence"),
    ),
    variants={"hstu_contents, no time bias": ("hstu_contents", {"model.time_bias": False})},
    published=PUBLISHED,
    trials=8,
    seeds=3,
)
QUICK = quick(BENCHMARK)

if __name__ == "__main__":
    main(BENCHMARK, QUICK, __doc__)
