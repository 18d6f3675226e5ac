"""The shape of an HSTU: what it may be told, and a few shapes by name."""

from typing import Literal

import msgspec

from pipeline.features.event_features import COUNT_CAP, FEATURE_COLUMNS
from pipeline.types import NonNegativeInt, PositiveFloat, PositiveInt, Rate

Norm = Literal["layer", "rms", "none"]


class HstuConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The model's shape. `max_events`: the rows that attention reads, and N of the attention.

    A row is an event. With `recent_events` only so many of the newest are; the rows before them are sessions, one each,
    of the newest `history_events` in all: see session_pooling.py.
    """

    items: PositiveInt = 1  # rows of the item table, the unknown one included
    layers: PositiveInt = 2
    width: PositiveInt = 64
    heads: PositiveInt = 2
    d_qk: PositiveInt = 32
    d_v: PositiveInt = 32
    max_events: PositiveInt = 200
    dropout: Rate = 0.2
    attention_dropout: Rate = 0.5  # of single (event, earlier event) weights
    temperature: PositiveFloat = 0.1
    content_rows: NonNegativeInt = 16_384  # hashed pieces of items' texts; 0: items by their ids alone
    strength: bool = True  # an event's item counts by the learned strength of what was done with it
    feature_dropout: Rate = 0.0  # of single features of an event
    time_bias: bool = True
    position_bias: bool = True
    excluded_features: tuple[str, ...] = ()  # columns of features.COLUMNS that are not read
    eps: float = 1e-6
    norm_in: Norm = "layer"  # of a layer's rows before they are projected
    norm_out: Norm = "layer"  # of what attention has gathered, before the gate
    attention_scale: Literal["max_events", "length"] = "max_events"  # what attention's sums are divided by
    recent_events: NonNegativeInt = 0  # 0: all that are read
    history_events: PositiveInt = 1000  # read with recent_events; an older event costs its features and a sum

    def __post_init__(self) -> None:
        if unknown := set(self.excluded_features) - set(FEATURE_COLUMNS):
            raise ValueError(
                f"without {', '.join(sorted(unknown))}: no such column; want of {', '.join(FEATURE_COLUMNS)}"
            )
        if self.recent_events and not self.recent_events < self.max_events <= self.history_events:
            raise ValueError(
                f"recent_events = {self.recent_events}, max_events = {self.max_events}, history_events ="
                f" {self.history_events}: want them in ascending order, for some rows must be left to sessions; or"
                " recent_events = 0, no sessions"
            )

    @property
    def history_length(self) -> int:
        """A state reads so many of the newest events, each as it is or in its session."""
        return self.history_events if self.recent_events else self.max_events

    @property
    def recent_length(self) -> int:
        """The newest events that are a row of their own."""
        return self.recent_events or self.max_events

    @property
    def receptive_field(self) -> int:
        """A state depends on so many: those it reads, and those before them that the oldest one's features count.

        NOTE: visit_frequency.py, which the retention head reads, goes back 90 days, however many events those are.
        """
        return self.history_length + COUNT_CAP


# By the parameters of the layers, about; the tables' depend on the log and are left out. `tiny` has 43 thousand.
PRESETS = {
    "tiny": HstuConfig(),
    "1m": HstuConfig(layers=3, width=256, heads=4, d_qk=64, d_v=64),
    "10m": HstuConfig(layers=8, width=512, heads=4, d_qk=128, d_v=128),
    "100m": HstuConfig(layers=19, width=1024, heads=8, d_qk=128, d_v=128),
}
