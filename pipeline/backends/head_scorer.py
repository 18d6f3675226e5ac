"""The task heads on a batch: from states and candidates to calibrated probabilities, all on the device."""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.backends.encoder import EncoderBatch, ItemVectors
from pipeline.features.event_features import COUNT_CAP, EncoderInputs
from pipeline.features.inputs import Inputs
from pipeline.jagged import last_runs, ranges
from pipeline.model.affinity import AffinityColumns, ItemColumns, LatestEvents
from pipeline.model.heads import N_RECENT, HeadContext, RecentEvents, TaskHeads
from pipeline.model.hstu import Hstu


@dataclass(slots=True)
class HeadBatch:
    """The heads' inputs for n users besides their states, on the device.

    longest:          length of the longest history that affinity is counted over
    visits:           float32 [n, N_VISIT_FEATURES]
    recent:           int64 [r], each user's N_RECENT newest events as rows of the encoder's batch
    recent_offsets:   int64 [n + 1]
    affinity_offsets: int64 [n + 1], of `affinity`
    """

    longest: int
    visits: Tensor
    recent: Tensor
    recent_offsets: Tensor
    affinity_offsets: Tensor
    affinity: AffinityColumns

    @classmethod
    def from_columns(cls, longest: int, columns: list[Tensor]) -> "HeadBatch":
        """Return the batch from what `columns` returned, on the device."""
        visits, recent, recent_offsets, affinity_offsets, *affinity = columns
        return cls(longest, visits, recent, recent_offsets, affinity_offsets, AffinityColumns(*affinity))

    @staticmethod
    def columns(inputs: Inputs, read: EncoderInputs) -> tuple[int, tuple[np.ndarray, ...]]:
        """Return `longest` and the other columns, to be copied to the device.

        read: the events of all n users that the encoder reads
        """
        affinity = inputs.affinity.tail(COUNT_CAP)
        recent, recent_offsets = ranges(*last_runs(read.offsets, N_RECENT))
        return affinity.longest, (inputs.visits, recent, recent_offsets, affinity.offsets, *affinity.columns)


class HeadScorer:
    """The heads in torch, on the table's device. They embed the newest events by the encoder's weights."""

    def __init__(self, hstu: Hstu, heads: TaskHeads, table: ItemVectors) -> None:
        self._hstu = hstu
        self._heads = heads
        self._table = table

    @torch.inference_mode()
    def probabilities(self, states: Tensor, events: EncoderBatch, users: HeadBatch, items: ItemColumns) -> Tensor:
        """Return calibrated probabilities by labels.TASKS, float32 [n, k, 3], if each item is the user's next.

        states: [n, width], zeros for a user without events. It never waits for the device.
        """
        item_vectors = F.embedding(items.rows, self._table.vectors)
        logits = self._heads(states, items.rows, item_vectors, self._context(events, users, items))
        return self._heads.probabilities(logits)

    def _context(self, events: EncoderBatch, users: HeadBatch, items: ItemColumns) -> HeadContext:
        recent_items = F.embedding(events.item_rows[users.recent], self._table.vectors)
        recent_events = self._hstu.event_rows(recent_items, events.feature_ids[users.recent])
        latest = LatestEvents.of_users(users.affinity, users.affinity_offsets, users.longest)
        return HeadContext(
            events=_with_spare_row(recent_events),
            items=_with_spare_row(recent_items),
            recent=RecentEvents.from_offsets(users.recent_offsets),
            visit_frequency=users.visits,
            affinity=latest.affinity(items),
        )


def _with_spare_row(rows: Tensor) -> Tensor:
    """Return the rows [m, width] and one of zeros, so that an index finds a row where a batch has no events."""
    return F.pad(rows, (0, 0, 0, 1))
