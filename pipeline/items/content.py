"""Items' contents as tensors: what the content encoder reads."""

from collections.abc import Mapping
from dataclasses import dataclass, fields

import msgspec
import numpy as np
import torch
from torch import Tensor

from pipeline.items.catalogue import FIELDS
from pipeline.jagged import ranges
from pipeline.records import VALUE_STEPS

COUNT_BUCKETS = 20  # of log2(1 + training events)


class PriceScale(msgspec.Struct, frozen=True):
    """Mean and standard deviation of log(1 + price) over the training items: what makes prices comparable."""

    mean: float = 0.0
    deviation: float = 1.0

    @classmethod
    def fit(cls, price_codes: np.ndarray) -> "PriceScale":
        """price_codes: records.encode_value's, int [n], 0 = no price."""
        logs = price_codes[price_codes > 0] / VALUE_STEPS
        return cls(float(logs.mean()), max(float(logs.std()), 1e-3)) if len(logs) else cls()


@dataclass(slots=True)
class ItemContent:
    """Of n items.

    ids:     int64 [m], hashes of all their fields' pieces; lengths: int64 [n, FIELDS], how many of each field
    numbers: float32 [n, 2], the scaled log price, and 1 where there is a price
    counts:  int64 [n], the bucket of the number of training events, 0 = none
    """

    ids: Tensor
    lengths: Tensor
    numbers: Tensor
    counts: Tensor

    @classmethod
    def from_state(cls, state: Mapping[str, np.ndarray], events: np.ndarray, scale: PriceScale) -> "ItemContent":
        """state: Catalogue.state's; events: int [n], of each item in training."""
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
        """bool [n, FIELDS + 1]: the fields, and at the end the price, that nothing is known of."""
        return torch.cat([self.lengths == 0, self.numbers[:, 1:] == 0], dim=1)

    @property
    def offsets(self) -> Tensor:
        """int64 [n * FIELDS]: where each item's each field begins in `ids`."""
        lengths = self.lengths.flatten()
        return lengths.cumsum(0) - lengths

    def select(self, rows: np.ndarray) -> "ItemContent":
        """Of these items, int64 [k]."""
        device, totals = self.ids.device, self.lengths.sum(1).cpu().numpy()
        starts = np.cumsum(totals) - totals
        places, _ = ranges(starts[rows], totals[rows])
        index = torch.from_numpy(rows).to(device)
        ids = self.ids[torch.from_numpy(places).to(device)]
        return ItemContent(ids, self.lengths[index], self.numbers[index], self.counts[index])

    def to(self, device: torch.device) -> "ItemContent":
        return ItemContent(*(getattr(self, field.name).to(device) for field in fields(self)))
