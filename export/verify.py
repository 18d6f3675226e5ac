"""Does an encoder answer as the one it came from? Only tests ask yet: torch's encoder is the only one that serves."""

from collections.abc import Iterable

import msgspec
import numpy as np

from pipeline.backends import Encoder
from pipeline.features.event_features import N_FEATURE_IDS, N_FEATURES, EncoderInputs
from pipeline.serving.retrieval import Retrieval

NOTHING = np.empty(0, np.int64)
STEPS_S = (0, 0, 1, 20, 400, 90_000)  # between events: within a second, a session, days


class Agreement(msgspec.Struct, frozen=True):
    """users: compared; state_error: the largest difference of a state's component, states being unit vectors;
    top_overlap: mean share of the reference's k best items that the candidate has among its own."""

    users: int
    state_error: float
    top_overlap: float


def compare(candidate: Encoder, reference: Encoder, batches: Iterable[EncoderInputs], k: int = 10) -> Agreement:
    """Encode the same batches by both and compare the states and what they retrieve, each from its own table."""
    users, error, overlap = 0, 0.0, 0.0
    tables = Retrieval(candidate.table), Retrieval(reference.table)
    for inputs in batches:
        states = candidate.encode(inputs), reference.encode(inputs)
        difference = (states[0].cpu() - states[1].cpu()).abs().amax().item()
        error = max(error, difference) if np.isfinite(difference) else float("inf")
        tops = [table.top_k(state, NOTHING, NOTHING, k)[0] for table, state in zip(tables, states, strict=True)]
        overlap += (tops[0][:, :, None] == tops[1][:, None, :]).any(1).mean(1).sum()
        users += len(inputs)
    return Agreement(users, error, float(overlap / max(1, users)))


def random_inputs(items: int, lengths: Iterable[int], random: np.random.Generator) -> EncoderInputs:
    """Users of these lengths with any items, features and times: harder than any log, and always at hand."""
    offsets = np.concatenate([[0], np.cumsum(np.fromiter(lengths, np.int64))])
    total = int(offsets[-1])
    clock = np.concatenate([[0], np.cumsum(random.choice(STEPS_S, total))])
    seconds = clock[:-1] - np.repeat(clock[offsets[:-1]], np.diff(offsets))
    tokens, codes = random.integers(0, items, total), random.integers(0, N_FEATURE_IDS, (total, N_FEATURES))
    return EncoderInputs(tokens.astype(np.int32), codes.astype(np.int32), seconds.astype(np.int32), offsets)
