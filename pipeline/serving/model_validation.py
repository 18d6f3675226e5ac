"""What is asked of a model before it takes over from one that is serving.

It must answer: whole slates with finite scores. And it must not be strangely different: share items with the slates
that were just served, and have been judged about as well in its training. Neither says that a model is better, which
only its users can; a mix-up of item ids, a training that diverged or an empty log is caught.
"""

from collections.abc import Sequence

import msgspec
import numpy as np

from pipeline.artifact import Manifest
from pipeline.errors import ArtifactError
from pipeline.records import ACTION_SHIFT, EVENT_DTYPE, Histories, SlateItem, item_hash
from pipeline.serving.strategy import RankedItems, Strategy

HIT_RATE = "validation_hit_rate"  # of a manifest's metrics
_MINUTE_MS = 60_000
_FIRST_ACTION = 1 << ACTION_SHIFT  # see EVENT_DTYPE


class Thresholds(msgspec.Struct, frozen=True):
    """`min_overlap`: mean share of a served slate's items; `max_hit_rate_drop`: of the serving model's hit rate."""

    min_overlap: float = 0.0
    max_hit_rate_drop: float = 1.0


def check_output(strategy: Strategy, histories: Histories, k: int, items: int) -> RankedItems:
    """The model's slates; ArtifactError unless they are whole. items: the size of its catalogue."""
    ranked = strategy.rank(histories, k)
    given = ranked.tokens > 0  # bool [n, k]
    numbers = [ranked.scores[given]] if ranked.heads is None else [ranked.scores[given], ranked.heads[given]]
    if not all(np.isfinite(column).all() for column in numbers):
        raise ArtifactError("its model scores items by numbers that are not finite; train again")
    left = np.clip(items - histories.lengths, 0, k)  # all that a user may not have touched
    if short := int((given.sum(axis=1) < left).sum()):
        raise ArtifactError(f"its model leaves {short} of {len(histories)} slates shorter than {k} items; train again")
    return ranked


def synthetic_histories(item_ids: Sequence[str], lengths: Sequence[int]) -> Histories:
    """Users of these lengths who went through the items in their order, one a minute: all shapes, no traffic needed."""
    places = np.concatenate([np.arange(length) for length in lengths])
    hashes = np.array([item_hash(item_id) for item_id in item_ids[: max(lengths)]], np.uint64)
    events = np.zeros(len(places), EVENT_DTYPE)
    events["item"] = hashes[places % len(hashes)]
    events["ts_action_device"] = places * _MINUTE_MS + _FIRST_ACTION
    return Histories(events, np.concatenate([[0], np.cumsum(lengths)]))


def slate_overlap(ranked: RankedItems, slates: Sequence[Sequence[SlateItem]], item_ids: Sequence[str]) -> float | None:
    """The mean share of a served slate's items that the model serves to that user, too; None without slates.

    item_ids: by token.
    """
    shares = [
        len({item.item_id for item in slate} & {item_ids[token] for token in row[: len(slate)]}) / len(slate)
        for row, slate in zip(ranked.tokens.tolist(), slates, strict=True)
        if slate
    ]
    return float(np.mean(shares)) if shares else None


def check_overlap(share: float | None, thresholds: Thresholds) -> None:
    """ArtifactError below the bar; None (nothing was served yet) is not."""
    if share is not None and share < thresholds.min_overlap:
        raise ArtifactError(
            f"its slates share {share:.1%} of their items with those just served, pipeline.min_overlap is"
            f" {thresholds.min_overlap:.1%}; look at its log and its item ids, or restart, which does not compare"
        )


def check_hit_rate(new: Manifest, old: Manifest | None, thresholds: Thresholds) -> None:
    """ArtifactError when training judged the new model so much worse; what a manifest does not have is not compared."""
    before, now = (manifest.metrics.get(HIT_RATE) if manifest else None for manifest in (old, new))
    if before is not None and now is not None and now < before * (1 - thresholds.max_hit_rate_drop):
        raise ArtifactError(
            f"its validation hit rate is {now:.4f}, the serving model's {before:.4f}: more than"
            f" pipeline.max_hit_rate_drop ({thresholds.max_hit_rate_drop:.0%}) below; look at its log, or restart,"
            " which does not compare"
        )
