"""The benchmark `beauty` with other search spaces: how much its result depends on the tuning.

These spaces have fewer values for most options, longer trainings, and two options more (items that training treats as
unknown, features that HSTU does not read), for as many trials. The stages are those of `beauty`, in a folder --out of
their own; the result is beauty_second_search.json.
"""

from dataclasses import replace

from msgspec.structs import replace as replaced

from tests.benchmarks import beauty
from tests.benchmarks.accuracy_models import Contender, Space, hstu, sasrec
from tests.benchmarks.accuracy_setting import IDS_ONLY
from tests.benchmarks.accuracy_stages import main

TRAINING: Space = {  # the draws depend on the order of the options
    "trainer.learning_rate": (2e-3, 4e-3),
    "trainer.weight_decay": (0.01,),
    "trainer.epochs": (40, 60),
    "trainer.unknown_item_rate": (0.0, 0.05),
    "model.width": (128, 256),
    "model.layers": (1, 2),
    "model.heads": (2, 4),
    "model.dropout": (0.3, 0.5),
    "trainer.crop_length": (50,),
    "trainer.events_per_batch": (4096,),
    "model.max_events": (50,),
}
HSTU_SHAPE: Space = TRAINING | {
    "model.attention_dropout": (0.0, 0.2),
    "model.temperature": (0.05, 0.07, 0.1),
    "model.time_bias": (False, True),
}
HSTU_IDS: Space = HSTU_SHAPE | {name: (value,) for name, value in IDS_ONLY.items()}
HSTU_CONTENTS: Space = HSTU_SHAPE | {
    "contents": (True,),
    "trainer.head_weights": ((0.0, 0.0, 0.0),),
    "trainer.item_dropout": (0.0, 0.1),
    # Hours and weekdays are made up in this log; or none of the features, as with ids alone.
    "model.excluded_features": (("hour", "weekday"), IDS_ONLY["model.excluded_features"]),
}
SASREC: Space = TRAINING | {"model.loss": ("softmax",)}
BENCHMARK = replace(
    beauty.BENCHMARK,
    name="beauty_second_search",
    contenders=beauty.BENCHMARK.contenders
    | {
        "hstu": Contender(HSTU_IDS, hstu),
        "hstu_contents": Contender(HSTU_CONTENTS, hstu),
        "sasrec": Contender(SASREC, sasrec),
    },
)
QUICK = replace(BENCHMARK, setting=replaced(beauty.SETTING, users=60, max_epochs=1), trials=2, seeds=1)

if __name__ == "__main__":
    main(BENCHMARK, QUICK, __doc__)
