"""Compare an exported encoder with its reference. Used by tests only: torch's encoder is the only one that serves."""

from collections.abc import Iterable

import msgspec
import numpy as np
import torch
from torch import Tensor

from pipeline.backends.encoder import Encoder, EncoderBatch
from pipeline.backends.staging import Staging
from pipeline.features.event_features import N_FEATURE_IDS, N_FEATURES, EncoderInputs
from pipeline.strategies.retrieval import ExcludedItems, Retrieval

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

    vectors: float32 [items, width], of the table that both share; every user of the batches has events
    """
    users = 0
    error = 0.0
    overlap = 0.0
    retrieval = Retrieval(vectors)
    stage = Staging(vectors.device)
    for inputs in batches:
        batch = EncoderBatch.from_inputs(inputs, stage)
        states = candidate.encode(batch), reference.encode(batch)
        difference = (states[0] - states[1]).abs().amax().item()
        error = max(error, difference) if np.isfinite(difference) else float("inf")
        nothing = _nothing_excluded(len(inputs), vectors.device)
        found, expected = (retrieval.top_k(state, nothing, k)[0] for state in states)  # int64 [users, k] each
        overlap += (found[:, :, None] == expected[:, None, :]).any(1).float().mean(1).sum().item()
        users += len(inputs)
    return Agreement(users, error, float(overlap / max(1, users)))


def _nothing_excluded(users: int, device: torch.device) -> ExcludedItems:
    none = torch.empty(0, dtype=torch.int64, device=device)
    return ExcludedItems(np.zeros(users + 1, np.int64), none, none)


def random_inputs(items: int, lengths: Iterable[int], rng: np.random.Generator) -> EncoderInputs:
    """Return random item rows, features and times, more varied than any log's.

    items: number of rows of the item table; lengths: events per user
    """
    offsets = np.concatenate([[0], np.cumsum(np.fromiter(lengths, np.int64))])
    total = int(offsets[-1])
    clock = np.concatenate([[0], np.cumsum(rng.choice(STEPS_S, total))])
    seconds = clock[:-1] - np.repeat(clock[offsets[:-1]], np.diff(offsets))
    item_rows = rng.integers(0, items, total)
    feature_ids = rng.integers(0, N_FEATURE_IDS, (total, N_FEATURES))
    return EncoderInputs(item_rows.astype(np.int32), feature_ids.astype(np.int32), seconds.astype(np.int32), offsets)
