"""The task heads on a batch: from states and candidates to calibrated probabilities."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.backends.encoder import ItemVectors
from pipeline.features.event_features import N_FEATURES, EncoderInputs
from pipeline.items.vocabulary import UNKNOWN
from pipeline.model.heads import N_RECENT, HeadContext, RecentEvents, TaskHeads
from pipeline.model.hstu import Hstu


class HeadScorer:
    """The heads in torch, on the table's device. They embed the newest events by the encoder's weights."""

    def __init__(self, hstu: Hstu, heads: TaskHeads, table: ItemVectors) -> None:
        self._hstu = hstu
        self._heads = heads
        self._table = table

    @torch.inference_mode()
    def probabilities(
        self,
        states: Tensor,
        inputs: EncoderInputs,
        visit_frequency: np.ndarray,
        affinity: np.ndarray,
        item_rows: np.ndarray,
    ) -> np.ndarray:
        """Return calibrated probabilities by labels.TASKS, float32 [n, k, 3], if each item is the user's next.

        states: of `Encoder.encode(inputs)`; item_rows: int32 [n, k]
        visit_frequency: float32 [n, N_VISIT_FEATURES], affinity: float32 [n, k, N_AFFINITY_FEATURES], both as of each
        user's newest event
        """
        vectors = self._table.vectors
        rows = torch.from_numpy(item_rows).to(vectors.device)
        context = self._context(inputs.tail(N_RECENT), visit_frequency, affinity)
        logits = self._heads(states, rows, F.embedding(rows, vectors), context)
        return self._heads.probabilities(logits).cpu().numpy()

    def _context(self, inputs: EncoderInputs, visit_frequency: np.ndarray, affinity: np.ndarray) -> HeadContext:
        vectors = self._table.vectors
        device = vectors.device
        # One extra row, so that `recent` has a row to point to where a batch has no events.
        no_features = np.zeros_like(inputs.feature_ids, shape=(1, N_FEATURES))
        item_rows = torch.from_numpy(np.append(inputs.item_rows, UNKNOWN)).to(device)
        feature_ids = torch.from_numpy(np.concatenate([inputs.feature_ids, no_features])).to(device)
        items = F.embedding(item_rows, vectors)
        return HeadContext(
            events=self._hstu.event_rows(items, feature_ids),
            items=items,
            recent=RecentEvents.from_offsets(inputs.offsets, device),
            visit_frequency=torch.from_numpy(visit_frequency).to(device),
            affinity=torch.from_numpy(affinity).to(device),
        )
