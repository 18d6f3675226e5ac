"""Checks, on small batches, of all that a strategy promises: one of one's own must pass before it ranks.

for sentence in violations(strategy, vocabulary, exclusion):
    print(sentence)
"""

import re
from collections.abc import Iterator

import numpy as np

from pipeline.errors import StrategyError
from pipeline.items.vocabulary import UNKNOWN, Vocabulary
from pipeline.records import Histories
from pipeline.strategies.exclusion import Exclusion
from pipeline.strategies.strategy import RankedItems, Request, Strategy, rank
from pipeline.strategies.warm_up import synthetic_histories

NAME = re.compile(r"[a-z][a-z0-9_-]{0,31}")
METHODS = ("prepare", "launch", "finish", "close")
LENGTHS = ([1], [0], [0, 40, 1, 3, 0])  # events per user of each batch; 0: a user without events
SLATE_SIZES = (10, 1, 60)
MADE_UP_ITEMS = ("an-item", "another-item")  # where a process has none yet
RELATIVE_ERROR = 1e-4  # of scores, between two runs of one batch


def check_strategy(strategy: Strategy, vocabulary: Vocabulary, exclusion: Exclusion) -> None:
    """Raise StrategyError unless the strategy keeps its promises. For the thread that ranks."""
    for sentence in violations(strategy, vocabulary, exclusion):
        raise StrategyError(f"pipeline.strategies: {type(strategy).__qualname__}: {sentence}")


def violations(strategy: Strategy, vocabulary: Vocabulary, exclusion: Exclusion) -> Iterator[str]:
    """Yield a sentence for each promise of Strategy that this one breaks."""
    missing = [name for name in METHODS if not callable(getattr(strategy, name, None))]
    if missing:
        yield f"it has no method {', '.join(missing)}"
        return
    if not NAME.fullmatch(str(getattr(strategy, "name", ""))):
        yield f"its name is {getattr(strategy, 'name', None)!r}, want one such as 'trending-now'"
    if not NAME.fullmatch(str(getattr(strategy, "backend", ""))):
        yield f"its backend is {getattr(strategy, 'backend', None)!r}, want one such as 'numpy'"
    known = [item_id for item_id in vocabulary.item_ids[:200] if item_id]
    batches = [synthetic_histories(known or MADE_UP_ITEMS, lengths) for lengths in LENGTHS]
    for k in SLATE_SIZES:
        for histories in batches:
            try:
                ranked = rank(strategy, histories, k)
            except Exception as error:  # whatever it raises
                yield f"it raised {error!r} for {len(histories)} users of {histories.lengths.tolist()} events, k = {k}"
                return
            yield from _answer_violations(ranked, histories, k, vocabulary, exclusion)
    yield from _order_violations(strategy, batches)


def _answer_violations(
    ranked: RankedItems, histories: Histories, k: int, vocabulary: Vocabulary, exclusion: Exclusion
) -> Iterator[str]:
    shape = (len(histories), k)
    columns = {"tokens": ranked.tokens, "scores": ranked.scores, "values": ranked.values}
    for name, column in columns.items():
        if column is not None and column.shape != shape:
            yield f"its {name} have the shape {column.shape}, want {shape}: as many as users and slate items"
            return
    if ranked.heads is not None and ranked.heads.shape != (*shape, 3):
        yield f"its heads have the shape {ranked.heads.shape}, want {(*shape, 3)}"
        return
    is_item = ranked.tokens != UNKNOWN
    if (ranked.tokens < 0).any() or (ranked.tokens >= len(vocabulary)).any():
        yield f"its tokens are not all from 0 to {len(vocabulary) - 1}, the vocabulary's last"
        return
    if (is_item[:, 1:] & ~is_item[:, :-1]).any():
        yield "a slate of it has a gap: token 0 stands before an item"
    if vocabulary.blocked[ranked.tokens[is_item]].any():
        yield "it recommends a delisted item"
    if not np.isfinite(ranked.scores[is_item]).all():
        yield "it gives an item a score that is not finite"
    elif ((ranked.scores[:, 1:] > ranked.scores[:, :-1]) & is_item[:, 1:]).any():
        yield "a slate of it is not in the order of its scores"
    if ranked.heads is not None and not ((ranked.heads[is_item] >= 0) & (ranked.heads[is_item] <= 1)).all():
        yield "it gives an item a probability that is not from 0 to 1"
    yield from _slate_violations(ranked.tokens, histories, vocabulary, exclusion)


def _slate_violations(
    tokens: np.ndarray, histories: Histories, vocabulary: Vocabulary, exclusion: Exclusion
) -> Iterator[str]:
    mask = exclusion.mask(histories)
    excluded_tokens = vocabulary.tokens(histories.items[mask])
    excluded_users = histories.users[mask]
    for user, slate in enumerate(tokens.tolist()):
        items = [token for token in slate if token]
        if len(set(items)) < len(items):
            yield "it recommends an item twice in one slate"
        if set(items) & set(excluded_tokens[excluded_users == user].tolist()):
            yield "it recommends an item that pipeline.exclude_actions and exclude_window_days keep off the slate"


def _order_violations(strategy: Strategy, batches: list[Histories]) -> Iterator[str]:
    """Rank two batches at once, as when their stages overlap, and compare with one after the other."""
    first, second = batches[0], batches[-1]
    alone = [rank(strategy, first, 10), rank(strategy, second, 10)]
    pending = [strategy.launch(strategy.prepare(Request(histories, 10))) for histories in (first, second)]
    together = [strategy.finish(each) for each in pending]
    for one, other in zip(alone, together, strict=True):
        is_equal = (one.tokens == other.tokens).all()
        if not is_equal or not np.allclose(one.scores, other.scores, RELATIVE_ERROR):
            yield "a batch has another answer when the next one is launched before it is finished, or when ranked again"
            return
