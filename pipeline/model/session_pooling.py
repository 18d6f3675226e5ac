"""Long histories as short sequences: a user's newest events with a row each, older events with one row per session.

A session's vector is the mean of its events weighted by their strengths; its time is its last event's. The
specification, and the fused operator, are kernels.hierarchical_sequence_fusion.
"""

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from pipeline.features.event_features import SESSION_GAP_S, EncoderInputs
from pipeline.jagged import ranges, row_starts
from pipeline.tensors import to_device


@dataclass(slots=True)
class SessionPooling:
    """Assignment of `total` events of n users to the m rows of the short sequences.

    rows:      int64 [total], each event's row; m where its session was too old to have one
    is_recent: bool [total], the event has a row of its own, as one of its user's newest
    seconds:   int32 [m], each row's time: its last event's
    offsets:   int64 [n + 1] of the rows
    """

    rows: np.ndarray
    is_recent: np.ndarray
    seconds: np.ndarray
    offsets: np.ndarray

    @classmethod
    def from_inputs(cls, inputs: EncoderInputs, recent: int | np.ndarray, sessions: int) -> "SessionPooling":
        """Assign events to rows.

        recent: number of newest events with a row each, also int64 [n]; sessions: number of sessions before them that
        have a row, at most
        """
        lengths = np.diff(inputs.offsets)
        positions = np.arange(len(inputs.seconds))
        is_recent = positions >= np.repeat(inputs.offsets[1:] - recent, lengths)
        is_first = positions == row_starts(inputs.offsets)
        after_gap = np.diff(inputs.seconds, prepend=np.int32(0)) >= SESSION_GAP_S
        begins = is_first | is_recent | after_gap
        spans = np.cumsum(begins) - 1  # each event's row before the oldest sessions are dropped
        n_spans = np.zeros(len(lengths), np.int64)
        if len(positions):
            n_spans[lengths > 0] = np.add.reduceat(begins, inputs.offsets[:-1][lengths > 0])
        n_rows = np.minimum(n_spans, np.minimum(lengths, recent) + sessions)
        first_spans = np.concatenate([[0], np.cumsum(n_spans)])[:-1] + n_spans - n_rows
        kept_spans, offsets = ranges(first_spans, n_rows)
        row_of_span = np.full(int(n_spans.sum()), n_rows.sum(), np.int64)
        row_of_span[kept_spans] = np.arange(len(kept_spans))
        is_last = np.append(begins[1:], True)[: len(begins)]
        return cls(row_of_span[spans], is_recent, inputs.seconds[is_last][kept_spans], offsets)

    def pool(self, events: Tensor, weights: Tensor) -> Tensor:
        """Return the weighted mean of each row's events, [m, width]. events: [total, width]; weights > 0: [total, 1]"""
        rows = to_device(self.rows, events.device)
        sums = events.new_zeros(len(self.seconds) + 1, events.shape[1]).index_add(0, rows, events * weights)
        totals = weights.new_zeros(len(sums), 1).index_add(0, rows, weights)
        return (sums / totals.clamp(min=1e-30))[:-1]

    def inputs(self) -> EncoderInputs:
        """Return offsets and seconds of the rows, for PaddedBlocks; rows have no item and no features of their own."""
        return EncoderInputs(np.empty(0, np.int32), np.empty((0, 0), np.int32), self.seconds, self.offsets)
