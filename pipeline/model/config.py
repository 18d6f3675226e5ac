"""Hyperparameters of HSTU, and named presets."""

from typing import Literal

import msgspec

from pipeline.features.event_features import COUNT_CAP, FEATURE_COLUMNS
from pipeline.types import NonNegativeInt, PositiveFloat, PositiveInt, Rate

Norm = Literal["layer", "rms", "none"]


class HstuConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The model's hyperparameters.

    Attention reads `max_events` rows, one per event. With `recent_events` only that many of the newest events have a
    row each; the rows before them are sessions, one row each, of the newest `history_events` events in total: see
    session_pooling.py.
    """

    items: PositiveInt = 1  # rows of the item table, including row 0, the unknown item
    layers: PositiveInt = 2
    width: PositiveInt = 64
    heads: PositiveInt = 2
    d_qk: PositiveInt = 32
    d_v: PositiveInt = 32
    max_events: PositiveInt = 200  # rows that attention reads, and its N
    dropout: Rate = 0.2
    attention_dropout: Rate = 0.5  # of single (row, earlier row) weights
    temperature: PositiveFloat = 0.1
    content_rows: NonNegativeInt = 16_384  # rows of the table of hashed content; 0: items by their ids alone
    strength: bool = True  # an event's item is weighted by the learned strength of the action
    feature_dropout: Rate = 0.0  # of single features of single events
    time_bias: bool = True
    position_bias: bool = True
    excluded_features: tuple[str, ...] = ()  # names of FEATURE_COLUMNS that the model does not read
    eps: float = 1e-6
    norm_in: Norm = "layer"  # of a layer's rows, before the projection
    norm_out: Norm = "layer"  # of attention's output, before the gate
    attention_scale: Literal["max_events", "length"] = "max_events"  # divisor of attention's sums
    recent_events: NonNegativeInt = 0  # newest events with a row each; 0: all
    history_events: PositiveInt = 1000  # events read when recent_events > 0; an older one costs its features and a sum

    def __post_init__(self) -> None:
        if unknown := set(self.excluded_features) - set(FEATURE_COLUMNS):
            raise ValueError(
                f"excluded_features: no column {', '.join(sorted(unknown))}; want some of {', '.join(FEATURE_COLUMNS)}"
            )
        if self.recent_events and not self.recent_events < self.max_events <= self.history_events:
            raise ValueError(
                f"recent_events = {self.recent_events}, max_events = {self.max_events}, history_events ="
                f" {self.history_events}: want them in ascending order, for sessions need rows; or recent_events = 0:"
                " no sessions"
            )

    @property
    def history_length(self) -> int:
        """Number of newest events that a state reads, each as a row of its own or in its session."""
        return self.history_events if self.recent_events else self.max_events

    @property
    def recent_length(self) -> int:
        """Number of newest events that have a row of their own."""
        return self.recent_events or self.max_events

    @property
    def receptive_field(self) -> int:
        """Number of newest events that a state depends on: `history_length`, and the events that the oldest one's
        features count.

        NOTE: visit_frequency.py, which the retention head reads, goes back 90 days, or to the beginning of the ring.
        """
        return self.history_length + COUNT_CAP


# Named by the approximate number of parameters in the layers; tables, which depend on the log, are not counted. `tiny`
# has 43 thousand.
PRESETS = {
    "tiny": HstuConfig(),
    "1m": HstuConfig(layers=3, width=256, heads=4, d_qk=64, d_v=64),
    "10m": HstuConfig(layers=8, width=512, heads=4, d_qk=128, d_v=128),
    "100m": HstuConfig(layers=19, width=1024, heads=8, d_qk=128, d_v=128),
}
