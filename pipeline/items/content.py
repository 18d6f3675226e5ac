"""Item content as tensors, the input of the content encoder."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import msgspec
import numpy as np
import torch
from torch import Tensor

from pipeline.items.catalogue import FIELDS
from pipeline.jagged import ranges
from pipeline.records import VALUE_STEPS

COUNT_BUCKETS = 20  # by log2(1 + training events)


class PriceScale(msgspec.Struct, frozen=True):
    """Mean and standard deviation of log(1 + price) over the training items, to standardise prices."""

    mean: float = 0.0
    deviation: float = 1.0

    @classmethod
    def fit(cls, price_codes: np.ndarray) -> "PriceScale":
        """Fit on price codes of records.encode_value, int [n], 0 = no price."""
        logs = price_codes[price_codes > 0] / VALUE_STEPS
        return cls(float(logs.mean()), max(float(logs.std()), 1e-3)) if len(logs) else cls()


@dataclass(slots=True)
class ItemContent:
    """Content of n items.

    ids:     int64 [m], the content hashes of all items and fields
    lengths: int64 [n, FIELDS], the number of hashes per item and field
    numbers: float32 [n, 2], the standardised log price, and 1 when there is a price
    counts:  int64 [n], the bucket of the number of training events, 0 = none
    """

    ids: Tensor
    lengths: Tensor
    numbers: Tensor
    counts: Tensor
    _spans: tuple[np.ndarray, np.ndarray] | None = field(default=None, init=False)  # of `_item_spans`

    @classmethod
    def from_state(cls, state: Mapping[str, np.ndarray], events: np.ndarray, scale: PriceScale) -> "ItemContent":
        """Read Catalogue.state's arrays. events: int [n], each item's number of training events."""
        codes = state["price_codes"].astype(np.float32)
        priced = codes > 0
        numbers = np.stack([(codes / VALUE_STEPS - scale.mean) / scale.deviation * priced, priced], 1)
        counts = np.ceil(np.log2(1 + events)).clip(0, COUNT_BUCKETS - 1)
        return cls(
            torch.from_numpy(state["hashes"].astype(np.int64)),
            torch.from_numpy(np.diff(state["offsets"]).reshape(-1, len(FIELDS))),
            torch.from_numpy(numbers.astype(np.float32)),
            torch.from_numpy(counts.astype(np.int64)),
        )

    def __len__(self) -> int:
        return len(self.counts)

    @property
    def missing(self) -> Tensor:
        """Which fields, and in the last column whether the price, are unknown: bool [n, FIELDS + 1]."""
        return torch.cat([self.lengths == 0, self.numbers[:, 1:] == 0], dim=1)

    @property
    def offsets(self) -> Tensor:
        """Start of each item's fields in `ids`: int64 [n * FIELDS]."""
        lengths = self.lengths.flatten()
        return lengths.cumsum(0) - lengths

    def select(self, rows: np.ndarray) -> "ItemContent":
        """Return the content of these items, int64 [k]."""
        device = self.ids.device
        starts, totals = self._item_spans()
        positions, _ = ranges(starts[rows], totals[rows])
        index = torch.from_numpy(rows).to(device)
        ids = self.ids[torch.from_numpy(positions).to(device)]
        return ItemContent(ids, self.lengths[index], self.numbers[index], self.counts[index])

    def to(self, device: torch.device) -> "ItemContent":
        """Return the content on a device: itself where it is there already."""
        if self.ids.device == device:
            return self
        columns = self.ids, self.lengths, self.numbers, self.counts
        return ItemContent(*(column.to(device) for column in columns))

    def _item_spans(self) -> tuple[np.ndarray, np.ndarray]:
        """Return each item's start in `ids` and its number of hashes: int64 [n] each."""
        if self._spans is None:
            totals = self.lengths.sum(1).cpu().numpy()
            self._spans = np.cumsum(totals) - totals, totals
        return self._spans
