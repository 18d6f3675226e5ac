"""The interface of encoders, which every runtime implements, and the limits of their CUDA graphs."""

from typing import TYPE_CHECKING, Protocol

import msgspec

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


class Encoder(Protocol):
    """A trained model on one device. Not thread-safe."""

    max_events: int  # newest events that it reads: histories must be cut by `tail(max_events)`
    table: "Tensor"  # float32 [items, width] on the device: a state's dot products with its rows score the items

    def encode(self, inputs: EncoderInputs) -> "Tensor":
        """Return states float32 [n, width] after each user's newest event; zeros for a user without events."""
        ...
