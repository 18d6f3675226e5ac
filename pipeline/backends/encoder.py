"""The interface of encoders, which every runtime implements, and the limits of their CUDA graphs."""

from typing import TYPE_CHECKING, Protocol

import msgspec
import numpy as np

from pipeline.features.event_features import EncoderInputs

if TYPE_CHECKING:
    from torch import Tensor


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
    """The part of an ItemTable that encoders and heads read."""

    @property
    def vectors(self) -> "Tensor":
        """The items' unit vectors on the model's device, row 0 of the unknown item: float32 [rows, width]."""
        ...


class Encoder(Protocol):
    """A trained model on one device, on an ItemTable that it shares with others. Not thread-safe."""

    backend: str  # the runtime's name on slates and in metrics
    max_events: int  # newest events that it reads: histories must be cut by `tail(max_events)`

    def encode(self, inputs: EncoderInputs) -> "Tensor":
        """Return unit states float32 [n, width] after each user's newest event; zeros for a user without events.

        A state's dot products with the table's vectors order the items.
        """
        ...

    def update_items(self, rows: np.ndarray) -> None:
        """Take over the new vectors of these rows of the table, int64 [n]."""
        ...

    def warm(self) -> int:
        """Compile and capture everything ahead of time, so that no batch waits; return the number of graphs."""
        ...
