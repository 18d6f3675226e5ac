"""The interface of encoders, which every runtime implements, and the limits of their CUDA graphs."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import msgspec
import numpy as np

from pipeline.features.event_features import EncoderInputs

if TYPE_CHECKING:
    from torch import Tensor

    from pipeline.backends.staging import Staging


class GraphOptions(msgspec.Struct, frozen=True):
    """Limits of the batches that run as CUDA graphs on a GPU.

    max_users, max_events: a larger batch runs without; budget_mib: memory of all graphs, 0 disables them
    slate_size: the slate length of most requests
    """

    max_users: int = 256
    max_events: int = 32768
    budget_mib: int = 4096
    slate_size: int = 10


class ItemVectors(Protocol):
    """The part of an ItemTable that encoders read."""

    @property
    def vectors(self) -> "Tensor":
        """The items' unit vectors on the model's device, row 0 of the unknown item: float32 [rows, width]."""
        ...


@dataclass(slots=True)
class EncoderBatch:
    """The events of users who all have some, at most `Encoder.max_events` each.

    inputs: on the host; item_rows, feature_ids, seconds: its columns on the device; offsets: int32 [users + 1], there
    """

    inputs: EncoderInputs
    item_rows: "Tensor"
    feature_ids: "Tensor"
    seconds: "Tensor"
    offsets: "Tensor"

    @classmethod
    def from_inputs(cls, inputs: EncoderInputs, stage: "Staging") -> "EncoderBatch":
        """Copy the columns to the device."""
        return cls(inputs, *stage(*cls.columns(inputs)))

    @staticmethod
    def columns(inputs: EncoderInputs) -> tuple[np.ndarray, ...]:
        """Return the columns to copy to the device, in the order of the fields."""
        return inputs.item_rows, inputs.feature_ids, inputs.seconds, inputs.offsets.astype(np.int32)


class Encoder(Protocol):
    """A trained model on one device, on an ItemTable that it shares with others. Not thread-safe."""

    backend: str  # the runtime's name on slates and in metrics
    max_events: int  # newest events that it reads

    def encode(self, batch: EncoderBatch) -> "Tensor":
        """Return unit states float32 [users, width] after each user's newest event, valid until the next call.

        A state's dot products with the table's vectors order the items. It never waits for the device.
        """
        ...

    def update_items(self, rows: np.ndarray) -> None:
        """Take over the new vectors of these rows of the table, int64 [n]."""
        ...

    def warm(self) -> int:
        """Compile and capture everything ahead of time, so that no batch waits; return the number of graphs."""
        ...

    def close(self) -> None:
        """Free what was captured and copied on the device; weights go with the last reference to the encoder.

        No other call may follow, but `close` again.
        """
        ...
