"""A model that takes over answers whole slates, and is not strangely different from the one before it."""

import msgspec
import numpy as np
import pytest

from pipeline.artifact import Manifest
from pipeline.errors import ArtifactError
from pipeline.model.config import HstuConfig
from pipeline.records import EventSchema, Histories, SlateItem, item_hash
from pipeline.serving.model_validation import (
    HIT_RATE,
    Thresholds,
    check_hit_rate,
    check_output,
    check_overlap,
    slate_overlap,
    synthetic_histories,
)
from pipeline.serving.strategy import RankedItems

ITEMS = [f"i{number}" for number in range(5)]


class Fixed:
    """A rung that answers every user with this row."""

    name = "hstu"

    def __init__(self, tokens: list[int], score: float = 1.0, odds: float = 0.5) -> None:
        self._tokens, self._score, self._odds = tokens, score, odds

    def rank(self, histories: Histories, k: int) -> RankedItems:
        tokens = np.tile(np.array(self._tokens, np.int32), (len(histories), 1))
        scores = np.where(tokens > 0, np.float32(self._score), -np.inf)
        return RankedItems(tokens, scores, np.full((*tokens.shape, 3), self._odds, np.float32), "hstu")


def served(*slates: str) -> list[list[SlateItem]]:
    return [[SlateItem(item_id, 1.0, None, None, None, "hstu") for item_id in slate] for slate in slates]


def manifest(**metrics: float) -> Manifest:
    return Manifest(1, "m", "v", "", HstuConfig(), EventSchema(), metrics, {}, {}, "")


def test_walks_have_the_lengths_asked_for_and_go_through_the_models_items():
    histories = synthetic_histories(ITEMS, [1, 3, 12])
    assert histories.lengths.tolist() == [1, 3, 12]
    assert histories.items[1:4].tolist() == [item_hash(item_id) for item_id in ITEMS[:3]]
    assert set(histories.items.tolist()) == {item_hash(item_id) for item_id in ITEMS}
    assert (np.diff(histories.ts_ms[4:]) > 0).all()
    assert set(histories.actions.tolist()) == {1}


def test_a_slate_may_be_short_only_where_the_catalogue_is_exhausted():
    check_output(Fixed([4, 5, 0]), synthetic_histories(ITEMS, [3, 9]), 3, len(ITEMS))
    with pytest.raises(ArtifactError, match="1 of 2 slates shorter than 3 items"):
        check_output(Fixed([4, 5, 0]), synthetic_histories(ITEMS, [2, 9]), 3, len(ITEMS))


@pytest.mark.parametrize("broken", [{"score": np.inf}, {"score": np.nan}, {"odds": np.nan}])
def test_numbers_that_are_none_are_refused(broken: dict[str, float]):
    with pytest.raises(ArtifactError, match="not finite"):
        check_output(Fixed([1, 2, 3], **broken), synthetic_histories(ITEMS, [1]), 3, len(ITEMS))


def test_overlap_is_the_mean_share_of_what_was_served_whatever_its_length():
    ranked = Fixed([1, 2, 3]).rank(synthetic_histories(ITEMS, [1, 1, 1]), 3)
    by_token = ["", *"abcde"]
    assert slate_overlap(ranked, served("abc", "cde", "ax"), by_token) == pytest.approx((1 + 1 / 3 + 1 / 2) / 3)
    assert slate_overlap(ranked, served("c", "", ""), by_token) == 0, (
        "only the first item of a slate of one is compared"
    )


def test_an_overlap_below_the_bar_is_refused_and_none_at_all_is_not():
    check_overlap(0.1, Thresholds(min_overlap=0.1))
    check_overlap(None, Thresholds(min_overlap=0.1))
    assert slate_overlap(Fixed([1]).rank(synthetic_histories(ITEMS, [1]), 1), served(""), ITEMS) is None
    with pytest.raises(ArtifactError, match=r"share 9\.9% .*pipeline\.min_overlap is 10\.0%"):
        check_overlap(0.099, Thresholds(min_overlap=0.1))


def test_a_hit_rate_that_fell_too_far_is_refused_and_one_that_is_not_known_is_not():
    bar, old = Thresholds(max_hit_rate_drop=0.2), manifest(**{HIT_RATE: 0.25})
    for metrics in ({HIT_RATE: 0.2}, {HIT_RATE: 0.9}, {}):
        check_hit_rate(manifest(**metrics), old, bar)
    for before in (None, manifest()):
        check_hit_rate(manifest(**{HIT_RATE: 0.01}), before, bar)
    with pytest.raises(ArtifactError, match=r"0\.1900, the serving model's 0\.2500"):
        check_hit_rate(manifest(**{HIT_RATE: 0.19}), old, bar)


def test_the_metric_that_is_compared_is_one_that_training_writes(shop):
    written = msgspec.json.decode((shop.artifact / "manifest.json").read_bytes(), type=Manifest)
    assert HIT_RATE in written.metrics
