"""Random batches for encoders, and the states of one, as the tests of every backend need them."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pipeline.backends.encoder import Encoder, EncoderBatch
from pipeline.backends.staging import Staging
from pipeline.features.event_features import N_FEATURE_IDS, N_FEATURES, EncoderInputs

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@dataclass
class Items:
    """Implements ItemVectors."""

    vectors: Tensor


def make_inputs(lengths: list[int], items: int, seed: int = 0) -> EncoderInputs:
    """Draw items, features and times. lengths: events per user; items: rows of the table"""
    rng = np.random.default_rng(seed)
    total = sum(lengths)
    seconds = [np.cumsum(rng.choice([0, 7, 1799, 1800, 90_000], length)) for length in lengths]
    return EncoderInputs(
        item_rows=rng.integers(0, items, total).astype(np.int32),
        feature_ids=rng.integers(0, N_FEATURE_IDS, (total, N_FEATURES)).astype(np.int32),
        seconds=np.concatenate([np.empty(0), *seconds]).astype(np.int32),
        offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
    )


def encode(encoder: Encoder, inputs: EncoderInputs) -> Tensor:
    """Return a copy of the states of users who all have events: float32 [users, width]."""
    return encoder.encode(EncoderBatch.from_inputs(inputs, Staging(DEVICE))).clone()
