"""Checks of what a strategy promises, on small batches: one of one's own must pass before it ranks.

    for sentence in violations(strategy, vocabulary, exclusion):
        print(sentence)

They find mistakes, not malice: what a strategy does with larger batches or other items is checked when it answers
(`check_answer`), and whether it ranks well is for `millrace replay` to show.
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
# Events per user of each batch; 0: a user without events.
LENGTHS = ([1], [0], [0, 40, 1, 3, 0], [user % 9 for user in range(64)])
ITEMS_APART = 11  # items between the beginnings of two users' histories
SLATE_SIZES = (10, 1, 60)
MADE_UP_ITEMS = ("an-item", "another-item")  # where a process has none yet
RELATIVE_ERROR = 1e-4  # between two runs of one batch
COLUMNS = {"tokens": np.int32, "scores": np.float32, "heads": np.float32, "values": np.float32}
OPTIONAL = ("heads", "values")


def check_strategy(strategy: Strategy, vocabulary: Vocabulary, exclusion: Exclusion) -> None:
    """Raise StrategyError unless the strategy keeps its promises. For the thread that ranks."""
    for sentence in violations(strategy, vocabulary, exclusion):
        raise StrategyError(f"pipeline.strategies: {type(strategy).__qualname__}: {sentence}; mend it")


def check_answer(ranked: RankedItems, request: Request, vocabulary: Vocabulary) -> None:
    """Raise StrategyError unless this can be an answer to the request: types, shapes, tokens, order, probabilities."""
    for sentence in answer_violations(ranked, len(request.histories), request.k, vocabulary):
        raise StrategyError(sentence)


def violations(strategy: Strategy, vocabulary: Vocabulary, exclusion: Exclusion) -> Iterator[str]:
    """Yield a sentence for each promise of Strategy that this one breaks."""
    missing = [name for name in METHODS if not callable(getattr(strategy, name, None))]
    if missing:
        yield f"it has no method {', '.join(missing)}"
        return
    for attribute, example in (("name", "trending-now"), ("backend", "numpy")):
        found = getattr(strategy, attribute, None)
        if not isinstance(found, str) or not NAME.fullmatch(found):
            yield f"its {attribute} is {found!r}, want one such as '{example}'"
    known = [item_id for item_id in vocabulary.item_ids[:200] if item_id]
    batches = [synthetic_histories(known or MADE_UP_ITEMS, lengths, ITEMS_APART) for lengths in LENGTHS]
    for histories in batches:
        for k in SLATE_SIZES:
            try:
                ranked = rank(strategy, histories, k)
            except Exception as error:  # whatever it raises
                yield f"it raised {error!r} for {len(histories)} users of {histories.lengths.tolist()} events, k = {k}"
                return
            if sentences := list(answer_violations(ranked, len(histories), k, vocabulary)):
                yield from sentences
                return
            yield from _slate_violations(ranked.tokens, histories, vocabulary, exclusion)
    yield from _order_violations(strategy, batches[0], batches[2])


def answer_violations(ranked: RankedItems, n: int, k: int, vocabulary: Vocabulary) -> Iterator[str]:
    """Yield a sentence for each reason why this is no answer for n users and k items each."""
    if sentences := list(_type_violations(ranked, n, k)):
        yield from sentences
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
    if ranked.values is not None and not (ranked.values[is_item] >= 0).all():
        yield "it gives an item a value that is below 0 or no number"


def _type_violations(ranked: RankedItems, n: int, k: int) -> Iterator[str]:
    if not isinstance(ranked, RankedItems):
        yield f"it answers with {type(ranked).__name__}, want RankedItems"
        return
    for name, dtype in COLUMNS.items():
        column = getattr(ranked, name)
        shape = (n, k, 3) if name == "heads" else (n, k)
        if column is None and name in OPTIONAL:
            continue
        if not isinstance(column, np.ndarray) or column.dtype != dtype:
            found = getattr(column, "dtype", type(column).__name__)
            yield f"its {name} are {found}, want an array of {np.dtype(dtype)}"
        elif column.shape != shape:
            yield f"its {name} have the shape {column.shape}, want {shape}: as many as users and slate items"
    if not isinstance(ranked.source, str) and getattr(ranked.source, "shape", None) != (n, k):
        yield f"its source is neither a name nor an array of names of the shape {(n, k)}"
    if not all(isinstance(ms, float | int) for ms in (ranked.features_ms, ranked.encode_ms, ranked.rank_ms)):
        yield "its times are not all numbers"


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


def _order_violations(strategy: Strategy, first: Histories, second: Histories) -> Iterator[str]:
    """Rank two batches at once, as when their steps overlap, and compare with one after the other."""
    requests = [Request(histories, 10) for histories in (first, second)]
    try:
        alone = [rank(strategy, histories, 10) for histories in (first, second)]
        launched = [strategy.launch(strategy.prepare(request)) for request in requests]
        overlapping = [strategy.finish(each) for each in launched]
        prepared = [strategy.prepare(request) for request in requests]
        launched = [strategy.launch(each) for each in prepared]
        in_step = [strategy.finish(each) for each in launched]
    except Exception as error:  # whatever it raises
        yield f"it raised {error!r} when the next batch was prepared or launched before the last one was finished"
        return
    found = [*overlapping, *in_step]
    if not all(_is_equal(one, other) for one, other in zip([*alone, *alone], found, strict=True)):
        yield "a batch has another answer when the next one is launched before it is finished, or when ranked again"


def _is_equal(one: RankedItems, other: RankedItems) -> bool:
    for name in COLUMNS:
        columns = getattr(one, name), getattr(other, name)
        if columns[0] is None or columns[1] is None:
            if columns[0] is not columns[1]:
                return False
        elif not np.allclose(*columns, RELATIVE_ERROR):
            return False
    return True
