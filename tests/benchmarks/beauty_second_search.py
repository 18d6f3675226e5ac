"""The benchmark `beauty` with other search spaces: how much its result depends on the tuning.

These spaces have fewer values for most options, longer trainings, and two options more (items that training treats as
unknown, features that HSTU does not read), for as many trials. The stages are those of `beauty`, in a folder --out of
their own; the result is beauty_second_search.json.
"""

from dataclasses import replace

from tests.benchmarks import beauty
from tests.benchmarks.accuracy_models import Space
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
HSTU: Space = beauty.HSTU | {"model.attention_dropout": (0.0, 0.2)}
CONTENTS: Space = {
    "trainer.item_dropout": (0.0, 0.1),
    # Hours and weekdays are made up in this log; or none of the features, as with ids alone.
    "model.excluded_features": (("hour", "weekday"), IDS_ONLY["model.excluded_features"]),
}
BENCHMARK = replace(
    beauty.BENCHMARK,
    name="beauty_second_search",
    contenders=beauty.BENCHMARK.contenders | beauty.sequence_models(TRAINING, HSTU, CONTENTS),
)
QUICK = beauty.quick(BENCHMARK)

if __name__ == "__main__":
    main(BENCHMARK, QUICK, __doc__)
