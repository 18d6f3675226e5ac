"""Checks that a model must pass before it replaces the serving one.

Its slates must be full, with finite scores. Its output must not differ implausibly from the serving model's: it must
share items with the slates just served, and its validation hit rate must be similar. Passing does not mean that a model
is better, which only users can show; it catches mixed-up item ids, a training that diverged, or an empty log.
"""

from collections.abc import Sequence

import msgspec
import numpy as np

from pipeline.errors import ArtifactError
from pipeline.manifest import Manifest
from pipeline.records import Histories
from pipeline.slates import SlateItem
from pipeline.strategies.strategy import RankedItems, Strategy, rank

# Of a manifest's metrics. Hit rates from rings of different sizes are those of different tasks: a longer one excludes
# more items.
HIT_RATE = "validation_hit_rate"
RING_EVENTS = "validation_ring_events"


class Thresholds(msgspec.Struct, frozen=True):
    """Limits on how much a new model may differ from the serving one.

    min_overlap: mean fraction of a served slate's items that the model must also serve
    max_hit_rate_drop: fraction of the serving model's validation hit rate that may be lost
    """

    min_overlap: float = 0.0
    max_hit_rate_drop: float = 1.0


def check_output(strategy: Strategy, histories: Histories, k: int, items: int) -> RankedItems:
    """Return the model's slates. ArtifactError unless they are full and finite. items: size of its catalogue"""
    ranked = rank(strategy, histories, k)
    filled = ranked.tokens > 0  # bool [n, k]
    outputs = [ranked.scores] if ranked.heads is None else [ranked.scores, ranked.heads]
    if not all(np.isfinite(output[filled]).all() for output in outputs):
        raise ArtifactError("its model gives items scores that are not finite; train again")
    available = np.clip(items - histories.lengths, 0, k)  # at least this many items are not in the user's history
    if short := int((filled.sum(axis=1) < available).sum()):
        raise ArtifactError(f"its model leaves {short} of {len(histories)} slates shorter than {k} items; train again")
    return ranked


def slate_overlap(ranked: RankedItems, slates: Sequence[Sequence[SlateItem]], item_ids: Sequence[str]) -> float | None:
    """Return the mean fraction of a served slate's items that the model serves to that user, too; None without slates.

    item_ids: by token
    """
    overlaps = [
        len({item.item_id for item in slate} & {item_ids[token] for token in row[: len(slate)]}) / len(slate)
        for row, slate in zip(ranked.tokens.tolist(), slates, strict=True)
        if slate
    ]
    return float(np.mean(overlaps)) if overlaps else None


def check_overlap(overlap: float | None, thresholds: Thresholds) -> None:
    """Raise ArtifactError when the overlap is too small; None (nothing was served yet) passes."""
    if overlap is not None and overlap < thresholds.min_overlap:
        raise ArtifactError(
            f"its slates share {overlap:.1%} of their items with those just served, pipeline.min_overlap is"
            f" {thresholds.min_overlap:.1%}; check its log and its item ids, or restart, which does not compare"
        )


def check_hit_rate(new: Manifest, old: Manifest | None, thresholds: Thresholds) -> None:
    """Raise ArtifactError when the new model's validation hit rate is too low.

    A missing rate, or one from rings of another size, is not compared.
    """
    if old is None or new.metrics.get(RING_EVENTS) != old.metrics.get(RING_EVENTS):
        return
    serving = old.metrics.get(HIT_RATE)
    found = new.metrics.get(HIT_RATE)
    if serving is not None and found is not None and found < serving * (1 - thresholds.max_hit_rate_drop):
        raise ArtifactError(
            f"its validation hit rate is {found:.4f}, the serving model's {serving:.4f}: more than"
            f" pipeline.max_hit_rate_drop ({thresholds.max_hit_rate_drop:.0%}) below; check its log, or restart,"
            " which does not compare"
        )
