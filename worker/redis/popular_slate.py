"""The slate of users without one of their own, made of the counters' most popular items."""

from collections.abc import Sequence

from pipeline.slates import Covers, Latency, Slate, SlateItem
from pipeline.strategies.simple_strategy import SimpleStrategy


def popular_slate(
    ids: Sequence[str], scores: Sequence[float], topic: str, as_of_ms: int, version: str, created_ms: int
) -> Slate:
    """Return the slate of users without one: these items, best first. topic: the events'; as_of_ms: of the counts"""
    items = [
        SlateItem(item_id, round(score, 5), None, None, None, "popular")
        for item_id, score in zip(ids, scores, strict=True)
    ]
    return Slate(
        user_id="",
        items=items,
        strategy="popular",
        backend=SimpleStrategy.backend,
        why="default",
        model_version=version,
        covers=Covers(topic, -1, -1, -1, 0, as_of_ms),
        created_ms=created_ms,
        latency_ms=Latency(),
    )
