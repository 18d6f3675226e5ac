"""Long histories in short sequences: a user's newest events as they are, one vector a session of those before them.

A session's vector is the mean of its events weighted by their strengths; its time is its last event's. The
specification, and the fused operator, are kernels.hierarchical_sequence_fusion.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pipeline.features.event_features import SESSION_GAP_MS, EncoderInputs
from pipeline.jagged import ranges


@dataclass(slots=True)
class SessionPooling:
    """Which events make each row of the short sequences. total events, n users, m rows.

    rows:    int64 [total], the row that each event is part of; m: of none, its session was too old
    whole:   bool [total], the event is a row of its own, one of its user's newest
    seconds: int32 [m]
    offsets: int64 [n + 1], of the rows
    """

    rows: np.ndarray
    is_recent: np.ndarray
    seconds: np.ndarray
    offsets: np.ndarray

    @classmethod
    def from_inputs(cls, inputs: EncoderInputs, recent: int | np.ndarray, sessions: int) -> "SessionPooling":
        """Each user's newest `recent` events, or int64 [n], and the newest `sessions` of the sessions before them."""
        lengths, places = np.diff(inputs.offsets), np.arange(len(inputs.seconds))
        whole = places >= np.repeat(inputs.offsets[1:] - recent, lengths)
        first = places == np.repeat(inputs.offsets[:-1], lengths)
        pause = np.diff(inputs.seconds, prepend=np.int32(0)) >= SESSION_GAP_MS // 1000
        begins = first | whole | pause
        numbers = np.cumsum(begins) - 1  # of the row each event is part of, before the oldest sessions are left out
        counts = np.add.reduceat(begins, inputs.offsets[:-1][lengths > 0]) if len(places) else np.zeros(0, np.int64)
        made = np.zeros(len(lengths), np.int64)
        made[lengths > 0] = counts
        kept = np.minimum(made, np.minimum(lengths, recent) + sessions)
        starts = np.concatenate([[0], np.cumsum(made)])[:-1] + made - kept
        rows, offsets = np.full(int(made.sum()), kept.sum(), np.int64), np.concatenate([[0], np.cumsum(kept)])
        index, _ = ranges(starts, kept)
        rows[index] = np.arange(len(index))
        ends = np.append(begins[1:], True)[: len(begins)]
        return cls(rows[numbers], whole, inputs.seconds[ends][index], offsets)

    def pool(self, events: Tensor, weights: Tensor) -> Tensor:
        """events: [total, width], weights: [total, 1], above 0 -> [m, width]: of each row the weighted mean."""
        rows = torch.from_numpy(self.rows).to(events.device)
        sums = events.new_zeros(len(self.seconds) + 1, events.shape[1]).index_add(0, rows, events * weights)
        return (sums / weights.new_zeros(len(sums), 1).index_add(0, rows, weights).clamp(min=1e-30))[:-1]

    def inputs(self) -> EncoderInputs:
        """Offsets and seconds of the rows, as a Layout wants them; they have no tokens or codes of their own."""
        return EncoderInputs(np.empty(0, np.int32), np.empty((0, 0), np.int32), self.seconds, self.offsets)
