"""Training batches: random crops of the users' sequences, each event predicting its successor.

Most users that a model serves were not in its training log. So each epoch cuts every sequence into crops at a
new random offset: an event is seen with long and with short contexts, and the model relies on items, not on the user.
"""

from dataclasses import dataclass, replace

import numpy as np

from pipeline.data.sequences import UserSequences
from pipeline.features.affinity import AffinityEvents
from pipeline.features.event_features import COUNT_CAP, N_FEATURES, EncoderInputs
from pipeline.features.inputs import Inputs, encode
from pipeline.features.labels import LabelRules, compute_log_labels
from pipeline.features.visit_frequency import N_VISIT_FEATURES
from pipeline.items.catalogue import EMPTY_CATALOGUE, Catalogue
from pipeline.items.vocabulary import UNKNOWN
from pipeline.jagged import find_rows, ranges, row_starts
from pipeline.records import Histories
from pipeline.strategies.exclusion import Exclusion

LENGTH_BUCKET = 8  # events: crops whose lengths fall into one bucket may share a batch


@dataclass(slots=True)
class TrainingColumns:
    """Inputs and targets as columns [total] over the sequences' events, 88 bytes per event besides the sequences.

    They are computed once, some users at a time: a crop's features need all events before it, so computing them per
    batch would walk through the same histories in every epoch.

    inputs:             of every event of the full sequences, from which crops are cut; feature_ids is int16
    successors:         int32, the token of the user's next event; 0 where there is none
    events:             EVENT_DTYPE, the sequences' own
    exclusion:          what serving keeps off a user's slates, neither a target nor a negative there
    ring_events:        a user's newest events, as many as serving knows of
    target_mask:        bool, retrieval is trained here: the successor is in the vocabulary and not excluded
    labels:             float32 [total, 3], see labels.compute_labels
    older_events:       at most this many of a user's events before a crop are input, too, pooled into sessions
    """

    events: np.ndarray
    exclusion: Exclusion
    ring_events: int
    inputs: Inputs
    successors: np.ndarray
    target_mask: np.ndarray
    labels: np.ndarray
    older_events: int = 0

    @classmethod
    def from_sequences(
        cls,
        sequences: UserSequences,
        rules: LabelRules,
        exclusion: Exclusion,
        ring_events: int,
        catalogue: Catalogue = EMPTY_CATALOGUE,
    ) -> "TrainingColumns":
        """Compute the columns. exclusion, ring_events: as in serving, see PipelineOptions"""
        successors = _successors(sequences)
        excluded = exclusion.excluded_targets(sequences.histories, ring_events)
        columns = cls(
            events=sequences.events,
            exclusion=exclusion,
            ring_events=ring_events,
            inputs=_empty_inputs(sequences),
            successors=successors,
            target_mask=(successors != UNKNOWN) & ~np.append(excluded[1:], False),  # at the event before
            labels=compute_log_labels(sequences.histories, rules),
        )
        for rows, chunk in sequences.chunks():
            facts = catalogue.facts(chunk.tokens)
            columns._write(rows, encode(chunk.histories, chunk.tokens, facts, rules, ring_events))
        return columns

    def _write(self, rows: slice, inputs: Inputs) -> None:
        self.inputs.visits[rows] = inputs.visits
        self.inputs.events.feature_ids[rows] = inputs.events.feature_ids
        self.inputs.events.seconds[rows] = inputs.events.seconds
        affinity = self.inputs.affinity
        affinity.categories[rows] = inputs.affinity.categories
        affinity.price_codes[rows] = inputs.affinity.price_codes
        affinity.engaged[rows] = inputs.affinity.engaged

    def with_context(self, starts: np.ndarray, lengths: np.ndarray) -> tuple[EncoderInputs, AffinityEvents]:
        """Return what the encoder and the affinity of these crops read: each with older events of its user before."""
        offsets = self.inputs.events.offsets
        before = starts - offsets[find_rows(offsets, starts)]
        older = np.minimum(before, self.older_events)
        events = self.inputs.events.gather_runs(starts - older, older + lengths)
        counted = np.minimum(before, COUNT_CAP - 1)
        affinity = self.inputs.affinity.gather_runs(starts - counted, counted + lengths)
        return replace(events, feature_ids=events.feature_ids.astype(np.int32)), affinity

    def target_frequency(self, items: int) -> np.ndarray:
        """Return float64 [items]: each token's fraction of the targets."""
        counts = np.bincount(self.successors[self.target_mask], minlength=items)
        return counts / max(1, counts.sum())


def _empty_inputs(sequences: UserSequences) -> Inputs:
    """Return columns to fill."""
    total = len(sequences)
    tokens = sequences.tokens
    offsets = sequences.offsets
    feature_ids = np.empty((total, N_FEATURES), np.int16)
    facts = np.empty(total, np.int32), np.empty(total, np.uint16)
    return Inputs(
        events=EncoderInputs(tokens, feature_ids, np.empty(total, np.int32), offsets),
        visits=np.empty((total, N_VISIT_FEATURES), np.float32),
        affinity=AffinityEvents(tokens, *facts, np.empty(total, bool), offsets),
    )


def _successors(sequences: UserSequences) -> np.ndarray:
    successors = np.append(sequences.tokens[1:], UNKNOWN).astype(np.int32)
    successors[sequences.offsets[1:] - 1] = UNKNOWN
    return successors


@dataclass(slots=True)
class TrainingBatch:
    """Packed crops: columns [total] over their events.

    inputs, affinity: from TrainingColumns.with_context: a crop's own events are the last of its run there
    offsets:     int64 [crops + 1], of the crops' own events
    successors, categories, price_codes: int32 [total], of the successors' items
    labels:      float32 [total, 3]; visits: float32 [total, N_VISIT_FEATURES]
    target_rows: int64 [m], the rows that train retrieval
    excluded:    pairs (index of the target row, token), int64 [pairs] each: what the crop's own events up to that row
                 exclude
    full_batch:  the batch that this is one process's shard of; None: this is the full batch
    """

    inputs: EncoderInputs
    affinity: AffinityEvents
    offsets: np.ndarray
    successors: np.ndarray
    categories: np.ndarray
    price_codes: np.ndarray
    labels: np.ndarray
    visits: np.ndarray
    target_rows: np.ndarray
    excluded: tuple[np.ndarray, np.ndarray]
    full_batch: "TrainingBatch | None" = None

    @property
    def targets(self) -> np.ndarray:
        """Successors of the target rows, int32 [m]."""
        return self.successors[self.target_rows]

    @property
    def loss_fractions(self) -> np.ndarray:
        """Fraction of each loss's rows that are in this shard, float32 [1 + 3]: retrieval, then the tasks."""
        return (self._loss_rows / np.maximum((self.full_batch or self)._loss_rows, 1)).astype(np.float32)

    @property
    def _loss_rows(self) -> np.ndarray:
        return np.array([len(self.target_rows), *np.isfinite(self.labels).sum(axis=0)])

    def shard(self, rank: int, count: int) -> "TrainingBatch":
        """Return every count-th crop from index `rank` on. Without one: the first crop, with nothing to train on."""
        crops = len(self.inputs)
        if rank >= crops:
            nothing = np.empty(0, np.int64)
            idle = self.shard(0, crops)
            return replace(
                idle, labels=np.full_like(idle.labels, np.nan), target_rows=nothing, excluded=(nothing, nothing)
            )
        rows, offsets = ranges(*_every(self.offsets, rank, count))
        shard_rows = np.full(len(self.successors), -1)  # by row of this batch, -1 = in another shard
        shard_rows[rows] = np.arange(len(rows))
        target_rows = shard_rows[self.target_rows]
        is_own = target_rows >= 0
        own_index = np.cumsum(is_own) - 1  # of the own targets, by target of this batch
        pair_targets, pair_tokens = self.excluded
        is_own_pair = is_own[pair_targets]
        return TrainingBatch(
            inputs=self.inputs.gather_runs(*_every(self.inputs.offsets, rank, count)),
            affinity=self.affinity.gather_runs(*_every(self.affinity.offsets, rank, count)),
            offsets=offsets,
            successors=self.successors[rows],
            categories=self.categories[rows],
            price_codes=self.price_codes[rows],
            labels=self.labels[rows],
            visits=self.visits[rows],
            target_rows=target_rows[is_own],
            excluded=(own_index[pair_targets[is_own_pair]], pair_tokens[is_own_pair]),
            full_batch=self,
        )


def _every(offsets: np.ndarray, rank: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the starts and lengths of every count-th run from index `rank` on."""
    return offsets[:-1][rank::count], np.diff(offsets)[rank::count]


def random_crops(offsets: np.ndarray, length: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Cut every user's run into crops of at most `length` at a random offset: starts int64 [n], lengths int64 [n]."""
    lengths = np.diff(offsets)
    shifts = np.where(lengths > length, rng.integers(0, length, len(lengths)), 0)
    counts = -(-(lengths + shifts) // length)
    index, _ = ranges(np.zeros_like(counts), counts)  # of the crop within its user
    begins = index * length - np.repeat(shifts, counts)
    ends = np.minimum(begins + length, np.repeat(lengths, counts))
    begins = np.maximum(begins, 0)
    return np.repeat(offsets[:-1], counts) + begins, ends - begins


def batch_crops(
    starts: np.ndarray, lengths: np.ndarray, events_per_batch: int, rng: np.random.Generator
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Group crops of similar length into batches of about `events_per_batch` events, in random order.

    Returns (starts, lengths) of each batch's crops.
    """
    order = np.lexsort((rng.random(len(starts)), lengths // LENGTH_BUCKET))
    starts = starts[order]
    lengths = lengths[order]
    batch_of_crop = (np.cumsum(lengths) - 1) // events_per_batch
    boundaries = np.flatnonzero(np.diff(batch_of_crop)) + 1
    batches = list(zip(np.split(starts, boundaries), np.split(lengths, boundaries), strict=True))
    rng.shuffle(batches)
    return batches


def make_batch(
    columns: TrainingColumns,
    starts: np.ndarray,
    lengths: np.ndarray,
    unknown_item_rate: float,
    rng: np.random.Generator,
) -> TrainingBatch:
    """Pack crops as model inputs, shortest first.

    A fraction `unknown_item_rate` of the input items is made unknown, as new items will be when serving.
    """
    order = np.argsort(lengths, kind="stable")
    index, offsets = ranges(starts[order], lengths[order])
    target_rows = np.flatnonzero(columns.target_mask[index])
    inputs, affinity = columns.with_context(starts[order], lengths[order])
    inputs.item_rows[rng.random(len(inputs.item_rows)) < unknown_item_rate] = UNKNOWN
    successors = columns.successors[index]
    following = np.minimum(index + 1, len(columns.successors) - 1)
    crops = Histories(columns.events[index], offsets)
    pair_targets, pair_rows = _excluded(columns.exclusion, columns.ring_events, crops, target_rows)
    return TrainingBatch(
        inputs=inputs,
        affinity=affinity,
        offsets=offsets,
        successors=successors,
        categories=columns.inputs.affinity.categories[following],
        price_codes=columns.inputs.affinity.price_codes[following].astype(np.int32),
        labels=columns.labels[index],
        visits=columns.inputs.visits[index],
        target_rows=target_rows,
        excluded=(pair_targets, columns.inputs.events.item_rows[index][pair_rows]),
    )


def _excluded(
    exclusion: Exclusion, ring_events: int, crops: Histories, target_rows: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return pairs (index of the target row, row of an event up to it that excludes its item), int64 [pairs] each."""
    counts = np.minimum(target_rows - row_starts(crops.offsets)[target_rows] + 1, ring_events)
    rows, _ = ranges(target_rows - counts + 1, counts)
    targets = np.repeat(np.arange(len(target_rows)), counts)
    excludes = exclusion.excludes(crops, rows, target_rows[targets])
    return targets[excludes], rows[excludes]
