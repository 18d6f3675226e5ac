"""A batch of the `hstu` strategy: what was prepared on the host, and the same on the device after one copy."""

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from pipeline.backends.encoder import EncoderBatch
from pipeline.backends.head_scorer import HeadBatch
from pipeline.backends.staging import Staging
from pipeline.features.event_features import EncoderInputs
from pipeline.features.inputs import Inputs
from pipeline.strategies.retrieval import ExcludedItems
from pipeline.strategies.strategy import Request


@dataclass(slots=True)
class PreparedBatch:
    """A batch of n users on the host.

    inputs: of the full histories; read: of the newest events that the encoder reads
    excluded: bool [total], the events whose items are excluded
    popular: int64 [candidates], rows for users without events, 0 = none left; empty where every user has some
    """

    request: Request
    inputs: Inputs
    read: EncoderInputs
    excluded: np.ndarray
    popular: np.ndarray
    features_ms: float

    @property
    def is_empty(self) -> np.ndarray:  # bool [n], users without events
        return self.read.lengths == 0


@dataclass(slots=True)
class DeviceBatch:
    """A batch of n users on the device. users: int64 [present], those who have events; popular: see PreparedBatch"""

    n: int
    events: EncoderBatch
    heads: HeadBatch
    excluded: ExcludedItems
    users: Tensor
    is_empty: Tensor
    popular: Tensor

    @classmethod
    def from_prepared(cls, prepared: PreparedBatch, stage: Staging) -> "DeviceBatch":
        """Copy everything that the batch needs to the device at once."""
        events, users = prepared.read.present()
        longest, head_columns = HeadBatch.columns(prepared.inputs, prepared.read)
        excluded_users = prepared.request.histories.users[prepared.excluded]
        excluded_rows = prepared.inputs.events.item_rows[prepared.excluded].astype(np.int64)
        n = len(prepared.read)
        on_device = stage.groups(
            EncoderBatch.columns(events),
            head_columns,
            (excluded_users, excluded_rows),
            (users, prepared.is_empty, prepared.popular),
        )
        return cls(
            n,
            EncoderBatch(events, *on_device[0]),
            HeadBatch.from_columns(longest, on_device[1]),
            ExcludedItems(np.searchsorted(excluded_users, np.arange(n + 1)), *on_device[2]),
            *on_device[3],
        )
