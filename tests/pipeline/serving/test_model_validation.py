"""Validation of a model before it serves: full slates, and no implausible difference from the serving model."""

from collections.abc import Sequence

import msgspec
import numpy as np
import pytest

from pipeline.errors import ArtifactError
from pipeline.features.labels import LabelOptions
from pipeline.manifest import Manifest
from pipeline.model.config import HstuConfig
from pipeline.records import EventSchema
from pipeline.serving.model_validation import (
    HIT_RATE,
    RING_EVENTS,
    Thresholds,
    check_hit_rate,
    check_output,
    check_overlap,
    slate_overlap,
)
from pipeline.slates import SlateItem
from pipeline.strategies.strategy import RankedItems, Request, rank
from pipeline.strategies.warm_up import synthetic_histories

ITEM_IDS = [f"i{number}" for number in range(5)]


class FixedStrategy:
    """Answers every user with the same tokens."""

    name = "hstu"
    backend = "torch"

    def __init__(self, tokens: Sequence[int], score: float = 1.0, probability: float = 0.5) -> None:
        self._tokens = tokens
        self._score = score
        self._probability = probability

    def prepare(self, request: Request) -> Request:
        return request

    def launch(self, prepared: Request) -> Request:
        return prepared

    def finish(self, pending: Request) -> RankedItems:
        tokens = np.tile(np.array(self._tokens, np.int32), (len(pending.histories), 1))
        scores = np.where(tokens > 0, np.float32(self._score), -np.inf)
        return RankedItems(tokens, scores, np.full((*tokens.shape, 3), self._probability, np.float32), "hstu")

    def close(self) -> None: ...


def ranked(tokens: Sequence[int], users: int) -> RankedItems:
    return rank(FixedStrategy(tokens), synthetic_histories(ITEM_IDS, [1] * users), len(tokens))


def served(*slates: str) -> list[list[SlateItem]]:
    """Return slates whose items are the letters of each text."""
    return [[SlateItem(item_id, 1.0, None, None, None, "hstu") for item_id in slate] for slate in slates]


def make_manifest(**metrics: float) -> Manifest:
    return Manifest(1, "m", "v", "", HstuConfig(), EventSchema(), LabelOptions(), metrics, {}, {}, "")


def test_slate_may_be_short_only_where_the_catalogue_is_exhausted():
    strategy = FixedStrategy([4, 5, 0])
    check_output(strategy, synthetic_histories(ITEM_IDS, [3, 9]), 3, len(ITEM_IDS))
    with pytest.raises(ArtifactError, match="1 of 2 slates shorter than 3 items"):
        check_output(strategy, synthetic_histories(ITEM_IDS, [2, 9]), 3, len(ITEM_IDS))


@pytest.mark.parametrize("output", [{"score": np.inf}, {"score": np.nan}, {"probability": np.nan}])
def test_output_that_is_not_finite_is_rejected(output: dict[str, float]):
    strategy = FixedStrategy([1, 2, 3], **output)
    with pytest.raises(ArtifactError, match="not finite"):
        check_output(strategy, synthetic_histories(ITEM_IDS, [1]), 3, len(ITEM_IDS))


def test_overlap_is_the_mean_fraction_of_served_slates_of_any_length():
    slates = ranked([1, 2, 3], users=3)
    by_token = ["", *"abcde"]
    assert slate_overlap(slates, served("abc", "cde", "ax"), by_token) == pytest.approx((1 + 1 / 3 + 1 / 2) / 3)
    only_first = slate_overlap(slates, served("c", "", ""), by_token)
    assert only_first == 0, "with a served slate of one item, the first item alone is compared"


def test_overlap_below_the_threshold_is_rejected_and_none_passes():
    check_overlap(0.1, Thresholds(min_overlap=0.1))
    check_overlap(None, Thresholds(min_overlap=0.1))
    assert slate_overlap(ranked([1], users=1), served(""), ITEM_IDS) is None
    with pytest.raises(ArtifactError, match=r"share 9\.9% .*pipeline\.min_overlap is 10\.0%"):
        check_overlap(0.099, Thresholds(min_overlap=0.1))


def test_hit_rate_that_dropped_too_far_is_rejected_and_one_that_cannot_be_compared_passes():
    thresholds = Thresholds(max_hit_rate_drop=0.2)
    serving = make_manifest(**{HIT_RATE: 0.25})
    for metrics in ({HIT_RATE: 0.2}, {HIT_RATE: 0.9}, {}):
        check_hit_rate(make_manifest(**metrics), serving, thresholds)
    for unknown in (None, make_manifest()):
        check_hit_rate(make_manifest(**{HIT_RATE: 0.01}), unknown, thresholds)
    check_hit_rate(make_manifest(**{HIT_RATE: 0.01, RING_EVENTS: 20.0}), serving, thresholds)
    with pytest.raises(ArtifactError, match=r"0\.1900, the serving model's 0\.2500"):
        check_hit_rate(make_manifest(**{HIT_RATE: 0.19}), serving, thresholds)


def test_compared_metric_is_written_by_training(shop):
    manifest = msgspec.json.decode((shop.artifact / "manifest.json").read_bytes(), type=Manifest)
    assert {HIT_RATE, RING_EVENTS} <= manifest.metrics.keys()
