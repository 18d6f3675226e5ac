"""A strategy of one's own: what is popular in this process, without what the user has already touched.

usage: PYTHONPATH=docs/examples MILLRACE__PIPELINE__STRATEGIES='["own_strategy:Trending"]' millrace run
"""

import numpy as np

from pipeline.strategies.strategies import StrategyContext
from pipeline.strategies.strategy import RankedItems, Request


class Trending:
    """Each instance serves one version of the model, and all its methods are called by one thread."""

    name = "trending"
    backend = "numpy"

    def __init__(self, context: StrategyContext) -> None:
        self._vocabulary = context.catalogue.vocabulary
        self._counters = context.counters
        self._exclusion = context.options.exclusion

    def prepare(self, request: Request) -> Request:
        """Compute on the host what the batch needs."""
        return request

    def launch(self, prepared: Request) -> Request:
        """Start the work on a device, if there is one, and do not wait for it."""
        return prepared

    def finish(self, pending: Request) -> RankedItems:
        """Return k tokens and scores for each user, best first; token 0 fills a slate that has no more items."""
        histories = pending.histories
        mask = self._exclusion.mask(histories)
        excluded = self._vocabulary.tokens(histories.items[mask])
        users = histories.users[mask]
        tokens = np.zeros((len(histories), pending.k), np.int32)
        scores = np.zeros((len(histories), pending.k), np.float32)
        for user in range(len(histories)):
            own = excluded[users == user]
            popular, popularity = self._counters.popular(pending.k + len(own))
            is_left = ~np.isin(popular, own)
            slate = popular[is_left][: pending.k]
            tokens[user, : len(slate)] = slate
            scores[user, : len(slate)] = popularity[is_left][: pending.k]
        return RankedItems(tokens, scores, heads=None, source="trending")

    def close(self) -> None:
        """Free what the strategy holds: another version of the model serves now."""
