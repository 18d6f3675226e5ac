"""The model that is trained: encoder, item vectors and task heads, with their losses."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.features.labels import TASKS
from pipeline.items.content import ItemContent
from pipeline.items.vocabulary import UNKNOWN
from pipeline.jagged import find_rows, ranges
from pipeline.model.affinity import AffinityColumns, ItemColumns, LatestEvents
from pipeline.model.config import HstuConfig
from pipeline.model.heads import HeadContext, RecentEvents, TaskHeads, head_losses
from pipeline.model.hstu import Hstu
from pipeline.tensors import to_device
from pipeline.training.batches import TrainingBatch
from pipeline.training.losses import Candidates, next_item_loss, sample_candidates

INTERACTION_LR_SCALE = 4.0  # relative to the encoder's learning rate: the head has only a few hundred steps


class Trainable(nn.Module, ABC):
    """A model that a Trainer can train. tasks: number of losses besides the retrieval loss."""

    tasks = 0

    @abstractmethod
    def losses(self, batch: TrainingBatch, frequency: np.ndarray, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        """Return the retrieval loss, a scalar in nats per row, and the task losses, [tasks].

        frequency: float64 [items], see TrainingColumns.target_frequency; rng: draws the candidates.
        """

    def lr_scales(self) -> list[tuple[nn.Module, float]]:
        """Return the model's parts, each with its learning rate as a multiple of the options'."""
        return [(self, 1.0)]


class MultiTaskModel(Trainable):
    """The encoder and the task heads, trained and saved together."""

    tasks = len(TASKS)

    def __init__(self, config: HstuConfig, content: ItemContent | None = None, item_dropout: float = 0.0) -> None:
        """content: of the item table's rows; item_dropout: see TrainerOptions, without content it has no effect."""
        super().__init__()
        self.hstu = Hstu(config)
        self.heads = TaskHeads(config.items, config.width)
        self.hstu.items.item_content = content
        self._item_dropout = item_dropout if content is not None else 0.0

    def losses(self, batch: TrainingBatch, frequency: np.ndarray, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        """See Trainable."""
        device = self.hstu.rotation.weight.device
        candidates = sample_candidates((batch.full_batch or batch).targets, frequency, rng)
        cold = rng.random(len(frequency)) < self._item_dropout
        vectors = _ItemVectors.from_batch(self.hstu, batch, candidates, cold)
        states, context = self._encode(batch, vectors.events)
        target_states = states[to_device(batch.target_rows, device)]
        table = self.hstu.scoring_table(vectors.candidates)
        loss = next_item_loss(target_states, table, batch.targets, batch.excluded, candidates)
        # The heads, too, see cold items as new.
        successors = np.where(cold[batch.successors], UNKNOWN, batch.successors)
        successor_tokens = to_device(successors, device)
        logits = self.heads(states, successor_tokens[:, None], vectors.successors[:, None], context)
        return loss, head_losses(logits[:, 0], to_device(batch.labels, device))

    def _encode(self, batch: TrainingBatch, event_vectors: Tensor) -> tuple[Tensor, HeadContext]:
        """Return states [total, width] after the crops' own events, and the heads' context.

        event_vectors: [inputs, width], of the batch's inputs, which may begin with older events
        """
        inputs = batch.inputs
        device = event_vectors.device
        feature_ids = to_device(inputs.feature_ids, device)
        rows, sequences = self.hstu.sequences(event_vectors, feature_ids, inputs, np.diff(batch.offsets))
        states = self.hstu(rows, self.hstu.attention_layout(sequences))
        context = HeadContext(
            events=_last_rows(rows, sequences.offsets, batch.offsets),
            items=_last_rows(event_vectors, inputs.offsets, batch.offsets),
            recent=RecentEvents.from_each_event(batch.offsets, device),
            visit_frequency=to_device(batch.visits, device),
            affinity=successor_affinity(batch, device),
        )
        return _last_rows(states, sequences.offsets, batch.offsets), context

    def lr_scales(self) -> list[tuple[nn.Module, float]]:
        return [(self.hstu, 1.0), (self.heads.interaction, INTERACTION_LR_SCALE), (self.heads.retention, 1.0)]


@dataclass(slots=True)
class _ItemVectors:
    """Vectors of a batch's input events [inputs, width], successors [total, width] and candidates [c, width]."""

    events: Tensor
    successors: Tensor
    candidates: Tensor

    @classmethod
    def from_batch(cls, hstu: Hstu, batch: TrainingBatch, candidates: Candidates, cold: np.ndarray) -> "_ItemVectors":
        """Compute each item's vector once. cold: bool [items], items to represent by their content alone."""
        device = hstu.rotation.weight.device
        item_rows = batch.inputs.item_rows
        if candidates.tokens is None:
            vectors = hstu.items(cold=cold)
            candidate_vectors = vectors
            event_rows = item_rows
            successor_rows = batch.successors
        else:
            sampled = candidates.tokens.numpy()
            unique, rows = np.unique(np.concatenate([sampled, item_rows, batch.successors]), return_inverse=True)
            vectors = hstu.items(unique.astype(np.int64), cold[unique])
            bounds = np.cumsum([len(sampled), len(item_rows)])
            candidate_rows, event_rows, successor_rows = np.split(rows, bounds)
            candidate_vectors = F.embedding(to_device(candidate_rows, device), vectors)
        event_vectors = F.embedding(to_device(event_rows, device), vectors)
        successor_vectors = F.embedding(to_device(successor_rows, device), vectors)
        return cls(event_vectors, successor_vectors, candidate_vectors)


def successor_affinity(batch: TrainingBatch, device: torch.device) -> Tensor:
    """Return the affinity of each own event's successor, as of the event: [total, 1, N_AFFINITY_FEATURES]."""
    events = batch.affinity
    ends = _last_positions(events.offsets, batch.offsets)
    starts = events.offsets[find_rows(events.offsets, ends)]
    columns = AffinityColumns(*(to_device(column, device) for column in events.columns))
    latest = LatestEvents.gather(columns, to_device(starts, device), to_device(ends, device), events.longest)
    successors = batch.successors, batch.categories, batch.price_codes
    return latest.affinity(ItemColumns(*(to_device(column, device)[:, None] for column in successors)))


def _last_rows(packed: Tensor, offsets: np.ndarray, own_offsets: np.ndarray) -> Tensor:
    """Return the last rows of each packed run, as many as the run has in `own_offsets`. Both: int64 [n + 1]"""
    if offsets[-1] == own_offsets[-1]:
        return packed
    return packed[to_device(_last_positions(offsets, own_offsets), packed.device)]


def _last_positions(offsets: np.ndarray, own_offsets: np.ndarray) -> np.ndarray:
    """Return the positions of each run's last rows, as many as the run has in `own_offsets`: int64 [own rows]."""
    counts = np.diff(own_offsets)
    positions, _ = ranges(offsets[1:] - counts, counts)
    return positions
