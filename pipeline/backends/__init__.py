"""What turns packed histories into user states: one Protocol, a module each for torch, ONNX Runtime, TensorRT."""

from typing import Protocol

from torch import Tensor

from pipeline.features import Inputs


class Encoder(Protocol):
    """A trained model on one device. Not thread-safe."""

    max_events: int  # the newest events it reads: histories must be cut by `tail(max_events)`
    table: Tensor  # float32 [items, width] on the device: a state's dot products with its rows score the items

    def encode(self, inputs: Inputs) -> Tensor:
        """States float32 [n, width] after each user's newest event; zeros for a user without events."""
        ...
