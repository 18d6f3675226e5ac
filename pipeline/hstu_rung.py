"""The `hstu` rung: a trained model's answer."""

import time

import numpy as np

from pipeline.artifact import Artifact
from pipeline.backends.torch import TorchEncoder
from pipeline.exclusion import Exclusion
from pipeline.features import inputs_of
from pipeline.records import Histories
from pipeline.retrieval import Retrieval
from pipeline.strategy import Ranked
from pipeline.vocabulary import UNKNOWN, Vocabulary


class HstuRung:
    """HSTU's state of each user, the nearest items of the whole catalogue, the heads on those.

    A user without events gets what was popular in the training log.
    """

    name = "hstu"

    def __init__(
        self, artifact: Artifact, vocabulary: Vocabulary, exclusion: Exclusion, device: str = "auto", threads: int = 0
    ) -> None:
        """The vocabulary begins with the artifact's items, in their order; later ones are unknown to the model."""
        self._encoder = TorchEncoder(artifact, device, threads)
        self._retrieval = Retrieval(self._encoder.table)
        self._vocabulary, self._exclusion = vocabulary, exclusion
        popular = np.argsort(-artifact.counters["popularity"], kind="stable")
        self._popular = vocabulary.tokens(artifact.counters["items"][popular])

    def rank(self, histories: Histories, k: int) -> Ranked:
        start = time.perf_counter()
        history_tokens, excluded = self._vocabulary.tokens(histories.items), self._exclusion.mask(histories)
        pairs = histories.users[excluded], history_tokens[excluded]
        inputs = inputs_of(histories, history_tokens, len(self._encoder.table)).tail(self._encoder.max_events)
        featured = time.perf_counter()
        states = self._encoder.encode(inputs)
        encoded = time.perf_counter()
        tokens, scores = self._retrieval.top_k(states, *pairs, k)
        source = self._fill_empty(histories, tokens, scores)
        heads = self._encoder.heads(states, tokens)
        ranked = time.perf_counter()
        times_ms = 1e3 * np.diff([start, featured, encoded, ranked])
        return Ranked(tokens, scores, heads, source, *times_ms.tolist())

    def odds(self, histories: Histories, tokens: np.ndarray) -> np.ndarray:
        """What the heads say of these items, int32 [n, k], as each user's next: float32 [n, k, 3]."""
        table_rows = len(self._encoder.table)
        inputs = inputs_of(histories, self._vocabulary.tokens(histories.items), table_rows)
        states = self._encoder.encode(inputs.tail(self._encoder.max_events))
        return self._encoder.heads(states, np.where(tokens < table_rows, tokens, UNKNOWN))

    def _fill_empty(self, histories: Histories, tokens: np.ndarray, scores: np.ndarray) -> np.ndarray | str:
        empty = histories.lengths == 0
        if not empty.any():
            return "hstu"
        popular = self._popular[: tokens.shape[1]]
        tokens[empty], scores[empty] = 0, 0.0
        tokens[empty, : len(popular)] = popular
        return np.where(empty[:, None], "popular", np.full(tokens.shape, "hstu"))
