"""HSTU compared with SASRec and six baselines on a year of grocery purchases, where most events repeat an earlier one.

Protocol: the log is split in time. The models are trained on its first 80 %; of the events after it a fixed random
sample of 20,000 is scored, each ranked among all items from all of its user's earlier purchases, of which the latest
1,024 are given. Nothing is excluded from a slate, and repeats are trained on. Models are frozen while histories grow.
The three baselines named `counting_...` keep counting: they see every event before the scored one, also held-out ones.
`personal_frequency` ranks what the user has bought most.

All products of a basket have one time, in random order (journey_prepare). Given the first ones the others are another
task, so the first product of a basket, an untied step, is the honest figure for a shopper who arrives; there small
baskets weigh as much as large ones. More of those steps are scored than are in the sample, and the metrics over all
steps leave the additional ones out.

Every contender with options is tuned by a seeded random search with the same number of trials, by NDCG@10 over a fixed
random part of the last 5 % of the training events. Then the models are trained on all training events with three seeds.

Data: journey/ in MILLRACE_DATA (default ../shared/data), written by tests.benchmarks.journey_prepare. Stages run
separately, so that trials and tests can run on a GPU machine that has only torch, numpy, msgspec and safetensors:
    python -m tests.benchmarks.journey --stage tune --workers 12 --minutes 6 --out DIR
    python -m tests.benchmarks.journey --stage test --workers 12 --minutes 6 --out DIR
    python -m tests.benchmarks.journey --stage report --out DIR        writes results/journey.json
"""

import os
from dataclasses import replace
from pathlib import Path

from msgspec.structs import replace as replaced

from tests.benchmarks import journey_prepare
from tests.benchmarks.accuracy_models import Benchmark, Contender, Gain, Space, cooccurrence, hstu, itemknn, sasrec
from tests.benchmarks.accuracy_setting import IDS_ONLY, Setting
from tests.benchmarks.accuracy_stages import main
from tests.benchmarks.journey_rankers import counting_cooccurrence, counting_popularity, personal_frequency

FOLDER = Path(os.environ.get("MILLRACE_DATA", "../shared/data")).absolute() / "journey"
SETTING = Setting(
    FOLDER / journey_prepare.LOG,
    FOLDER / journey_prepare.ITEMS,
    max_validation_events=4_000,
    evaluations=5,
    max_scored_events=20_000,
    max_events=1_024,
    repeats=True,
)
# Epochs of a fixed length: 20 of them see about five times as many events as the training log has.
TRAINING: Space = {  # the same for both sequence models
    "trainer.learning_rate": (1e-3, 2e-3, 4e-3),
    "trainer.weight_decay": (0.01, 0.1),
    "trainer.epochs": (20,),
    "trainer.events_per_epoch": (262_144,),
    "trainer.events_per_batch": (4_096,),
    "trainer.crop_length": (200,),
    "model.width": (128, 256),
    "model.layers": (2,),
    "model.heads": (2, 4),
    "model.dropout": (0.2, 0.3, 0.5),
}
HSTU: Space = TRAINING | {
    "model.attention_dropout": (0.0, 0.2),
    "model.temperature": (0.05, 0.07, 0.1),
    "contents": (True,),
}
SASREC: Space = TRAINING | {"model.loss": ("softmax",)}
COOCCURRENCE: Space = {
    "half_life_days": (30.0, 90.0, 10_000.0),
    "neighbours": (128, 256),
    "window_events": (10, 20),
}
ITEMKNN: Space = {"neighbours": (100, 200), "shrinkage": (5.0, 20.0, 50.0), "recency": (0.95, 0.99, 1.0)}
BENCHMARK = Benchmark(
    name="journey",
    protocol="events after the split",
    setting=SETTING,
    contenders={
        "hstu": Contender(HSTU, hstu),
        "sasrec": Contender(SASREC, sasrec),
        "personal_frequency": Contender({"half_life_days": (14.0, 30.0, 90.0, 10_000.0)}, personal_frequency),
        "itemknn": Contender(ITEMKNN, itemknn),
        "cooccurrence": Contender(COOCCURRENCE, cooccurrence),
        "counting_cooccurrence": Contender(COOCCURRENCE, counting_cooccurrence),
        "counting_popularity": Contender({"half_life_days": (1.0, 7.0, 30.0, 90.0)}, counting_popularity),
        "counting_popularity_7_days": Contender({"window_days": (7.0,)}, counting_popularity),
    },
    gains=(
        Gain("ndcg10_gain", "ndcg10", "hstu", "sasrec"),
        Gain("ndcg10_gain_over_personal_frequency", "ndcg10", "hstu", "personal_frequency"),
        Gain("ndcg10_gain_over_cooccurrence", "ndcg10", "hstu", "counting_cooccurrence"),
    ),
    variants={"hstu, ids only": ("hstu", IDS_ONLY)},
    trials=4,
    seeds=3,
)
QUICK_SPACE: Space = {"trainer.events_per_epoch": (8_192,), "trainer.events_per_batch": (2_048,), "model.width": (16,)}
QUICK = replace(
    BENCHMARK,
    setting=replaced(SETTING, users=40, max_epochs=1, max_validation_events=200, max_scored_events=200),
    contenders={
        name: Contender({**each.space, **QUICK_SPACE}, each.fit) if each.is_trained else each
        for name, each in BENCHMARK.contenders.items()
    },
    trials=2,
    seeds=1,
)

if __name__ == "__main__":
    main(BENCHMARK, QUICK, __doc__)
