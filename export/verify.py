"""Compare an exported encoder with its reference. Used by tests only: torch's encoder is the only one that serves."""

from collections.abc import Iterable

import msgspec
import numpy as np
from torch import Tensor

from pipeline.backends.encoder import Encoder
from pipeline.features.event_features import N_FEATURE_IDS, N_FEATURES, EncoderInputs
from pipeline.serving.retrieval import Retrieval

NO_PAIRS = np.empty(0, np.int64)  # excludes nothing
STEPS_S = (0, 0, 1, 20, 400, 90_000)  # between events: within a second, a session, days


class Agreement(msgspec.Struct, frozen=True):
    """users: number compared; state_error: largest difference between components of states, which are unit vectors;
    top_overlap: mean fraction of the reference's k best items that are among the candidate's."""

    users: int
    state_error: float
    top_overlap: float


def compare(
    candidate: Encoder, reference: Encoder, vectors: Tensor, batches: Iterable[EncoderInputs], k: int = 10
) -> Agreement:
    """Encode the same batches with both; compare the states, and the k items that each retrieves.

    vectors: float32 [items, width], of the table that both share
    """
    users = 0
    error = 0.0
    overlap = 0.0
    retrieval = Retrieval(vectors)
    for inputs in batches:
        states = candidate.encode(inputs), reference.encode(inputs)
        difference = (states[0].cpu() - states[1].cpu()).abs().amax().item()
        error = max(error, difference) if np.isfinite(difference) else float("inf")
        found, expected = (
            retrieval.top_k(state.to(vectors.device), NO_PAIRS, NO_PAIRS, k)[0] for state in states
        )  # int32 [users, k] each
        overlap += (found[:, :, None] == expected[:, None, :]).any(1).mean(1).sum()
        users += len(inputs)
    return Agreement(users, error, float(overlap / max(1, users)))


def random_inputs(items: int, lengths: Iterable[int], rng: np.random.Generator) -> EncoderInputs:
    """Return random item rows, features and times, more varied than any log's.

    items: number of rows of the item table; lengths: events per user, 0 for a user without events
    """
    offsets = np.concatenate([[0], np.cumsum(np.fromiter(lengths, np.int64))])
    total = int(offsets[-1])
    clock = np.concatenate([[0], np.cumsum(rng.choice(STEPS_S, total))])
    seconds = clock[:-1] - np.repeat(clock[offsets[:-1]], np.diff(offsets))
    item_rows = rng.integers(0, items, total)
    feature_ids = rng.integers(0, N_FEATURE_IDS, (total, N_FEATURES))
    return EncoderInputs(item_rows.astype(np.int32), feature_ids.astype(np.int32), seconds.astype(np.int32), offsets)
