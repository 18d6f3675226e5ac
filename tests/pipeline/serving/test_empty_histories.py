"""Users without events, alone or among others, get slates from every strategy under every exclusion rule."""

from functools import cache
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.records import DAY_MS, Event, EventSchema
from pipeline.serving.pipeline import Pipeline
from pipeline.strategies.exclusion import Exclusion
from pipeline.strategies.options import PipelineOptions

OWN = ("tests.pipeline.strategies.test_own_strategies:Alphabetical",)
EXCLUSIONS = [
    Exclusion.from_names(actions, days, EventSchema())
    for actions in (None, (), ("purchase",))
    for days in (0.0, 1e-9, 3.0)
]
event = st.builds(
    Event,
    st.just("u"),
    st.sampled_from(["item-1", "item-2", "never seen"]),
    st.sampled_from(EventSchema().actions),
    st.integers(0, 9 * DAY_MS),
)


@cache
def load(artifact: Path, exclusion: Exclusion) -> Pipeline:
    return Pipeline.load(artifact, PipelineOptions(device="cpu", threads=1, exclusion=exclusion, strategies=OWN))


@pytest.mark.parametrize("strategy", ["alphabetical", "hstu", "simple"])
@pytest.mark.parametrize("exclusion", EXCLUSIONS, ids=repr)
@given(histories=st.lists(st.lists(event, max_size=3), max_size=4))
def test_every_history_gets_a_full_slate_from_the_requested_strategy(
    shop, exclusion: Exclusion, strategy: str, histories: list[list[Event]]
) -> None:
    slates = load(shop.artifact, exclusion).recommend(histories, 5, strategy)
    assert [(slate.strategy, slate.why, len(slate.items)) for slate in slates] == [(strategy, "requested", 5)] * len(
        histories
    )
