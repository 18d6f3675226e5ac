"""Affinity features of items on the model's device: the columns that features/affinity.py describes.

One function for training, where the item is the next event's, and for serving, where it was just retrieved.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from pipeline.features.affinity import WINDOWS
from pipeline.features.event_features import COUNT_CAP
from pipeline.records import VALUE_STEPS

CHUNK_PAIRS = 1 << 17  # pairs of an item and an event at a time on a CPU: twice as fast as all at once, in the cache


class AffinityColumns(NamedTuple):
    """The columns of AffinityEvents on the device: [total] each, price codes as int32."""

    item_rows: Tensor
    categories: Tensor
    price_codes: Tensor
    engaged: Tensor


class ItemColumns(NamedTuple):
    """Items of q queries, k for each, on the model's device: int32 [q, k] each. Row, category and price 0: unknown."""

    rows: Tensor
    categories: Tensor
    price_codes: Tensor


@dataclass(slots=True)
class LatestEvents:
    """The latest events of q queries, newest first, at most w = COUNT_CAP of each, on the model's device.

    item_rows: int32 [q], the newest event's; categories, price_codes: int32 [q, w]; engaged: bool [q, w]
    is_event: bool [q, w], false in slots that no event fills, where the other columns are arbitrary
    """

    item_rows: Tensor
    categories: Tensor
    price_codes: Tensor
    engaged: Tensor
    is_event: Tensor

    @classmethod
    def gather(cls, columns: AffinityColumns, starts: Tensor, ends: Tensor, longest: int) -> "LatestEvents":
        """Gather the events from `starts` to `ends`, int64 [q] each, at the latest COUNT_CAP of them.

        a query without events ends before it starts
        longest: the length of the longest run, or more
        """
        slots = torch.arange(max(1, min(longest, COUNT_CAP)), device=ends.device)
        positions = ends[:, None] - slots
        is_event = positions >= starts[:, None]
        item_rows, categories, price_codes, engaged = (_with_spare_row(column) for column in columns)
        positions = positions.clamp(min=0)
        newest = item_rows[positions[:, 0]]
        return cls(newest, categories[positions], price_codes[positions], engaged[positions], is_event)

    @classmethod
    def of_users(cls, columns: AffinityColumns, offsets: Tensor, longest: int) -> "LatestEvents":
        """Gather each user's latest events. offsets: int64 [n + 1]; the others as in `gather`."""
        return cls.gather(columns, offsets[:-1], offsets[1:] - 1, longest)

    def affinity(self, items: ItemColumns) -> Tensor:
        """Return the features of each query's items: float32 [q, k, N_AFFINITY_FEATURES]; zeros without events."""
        n_events = self.is_event.sum(dim=1)[:, None]  # [q, 1]
        n_short, n_long, n_engaged = self._count_by_category(items.categories).unbind(dim=2)  # float32 [q, k] each
        fraction = n_long / (n_events + 1)
        has_category = items.categories > 0
        columns = [
            n_short / (n_events.clamp(max=WINDOWS[0]) + 1),
            fraction,
            fraction.sqrt(),
            (n_engaged + 0.5) / (n_long + 2),
            has_category & self.is_event[:, :1] & (self.categories[:, :1] == items.categories),
            (n_events + 1).rsqrt().expand_as(fraction),
            (items.rows > 0) & (self.item_rows[:, None] == items.rows),
            *self._price_columns(items.price_codes),
        ]
        return torch.stack([column.float() for column in columns], dim=2) * (n_events > 0)[..., None]

    def _count_by_category(self, categories: Tensor) -> Tensor:
        """Return how many events of the shorter window, of the longer one, and engaged ones have an item's category.

        categories: int32 [q, k], 0 = unknown, which no event has. Returns float32 [q, k, 3], exact.
        """
        is_recent = self.is_event.clone()
        is_recent[:, WINDOWS[0] :] = False
        counted = torch.stack([is_recent, self.is_event, self.is_event & self.engaged], dim=2).float()  # [q, w, 3]
        on_cpu = categories.device.type == "cpu"
        step = CHUNK_PAIRS // (categories.shape[1] * self.is_event.shape[1]) if on_cpu else len(categories)
        with torch.autocast(categories.device.type, enabled=False):
            columns = (column.split(max(1, step)) for column in (categories, self.categories, counted))
            counts = [
                (own[..., None] == events[:, None]).float() @ weights
                for own, events, weights in zip(*columns, strict=True)
            ]
        return torch.cat(counts) * (categories > 0)[..., None]

    def _price_columns(self, codes: Tensor) -> list[Tensor]:
        """Return how far log(1 + price) is above and below its mean in the window, and whether that is unknown."""
        is_priced = self.is_event & (self.price_codes > 0)
        n_priced = is_priced.sum(dim=1)[:, None]
        mean = (self.price_codes * is_priced).sum(dim=1)[:, None] / n_priced.clamp(min=1)
        comparable = (n_priced > 0) & (codes > 0)
        difference = (codes - mean).where(comparable, 0) / VALUE_STEPS
        return [difference.clamp(min=0), (-difference).clamp(min=0), ~comparable]


def _with_spare_row(column: Tensor) -> Tensor:
    """Return the column [m] itself, or one zero where it is empty, so that every index finds a row."""
    return column if len(column) else column.new_zeros(1)
