"""Training batches: random crops of the users' sequences, each event asked for its successor.

Most users that a model meets in service were not there in training. So an epoch cuts every sequence into crops at a new
random offset: each event is seen with long and with short contexts, and the model leans on items, not on who it is.
"""

from dataclasses import dataclass, replace

import numpy as np

from pipeline.data.sequences import UserSequences
from pipeline.features.affinity import AffinityIndex
from pipeline.features.event_features import N_FEATURES, EncoderInputs, encoder_inputs
from pipeline.features.labels import compute_labels, engaged
from pipeline.features.visit_frequency import N_VISIT_FEATURES, visit_frequency
from pipeline.items.catalogue import EMPTY_CATALOGUE, Catalogue, ItemFacts
from pipeline.items.vocabulary import UNKNOWN
from pipeline.jagged import find_rows, ranges
from pipeline.records import EventSchema


@dataclass(slots=True)
class TrainingColumns:
    """What the corpus shows and asks: columns [total] over its events, 123 bytes an event beside the corpus' own.

    They are made once, users by users: a crop's features need all that came before it, so making them with each batch
    would walk through the same histories in every epoch.

    inputs:     of the whole sequences, of which crops are taken; its codes are int16
    successors: int32, the token of the user's next event; 0 where there is none
    asked:      bool, the retrieval is trained here: the successor is known and (unless repeats count) new to the user,
                for what the user has touched before is excluded in service
    labels:     float32 [total, 3], see labels.compute_labels
    rhythm:     float32 [total, RHYTHMS], see rhythm.rhythm
    affinities, facts: of the histories and of the events' items, see affinity.py
    older_events: the model is shown so many of a user's events before a crop, too, in sessions
    """

    inputs: EncoderInputs
    successors: np.ndarray
    target_mask: np.ndarray
    labels: np.ndarray
    visit_frequency: np.ndarray
    affinities: AffinityIndex
    facts: ItemFacts
    older_events: int = 0

    @classmethod
    def from_sequences(
        cls, corpus: UserSequences, schema: EventSchema, repeats: bool, catalogue: Catalogue = EMPTY_CATALOGUE
    ) -> "TrainingColumns":
        total, histories, facts = len(corpus), corpus.histories, catalogue.facts(corpus.tokens)
        codes, seconds = np.empty((total, N_FEATURES), np.int16), np.empty(total, np.int32)
        examples = cls(
            EncoderInputs(corpus.tokens, codes, seconds, corpus.offsets),
            _successors(corpus),
            np.zeros(total, bool),
            compute_labels(histories, schema, int(histories.ts_ms.max(initial=0))),
            np.empty((total, N_VISIT_FEATURES), np.float32),
            AffinityIndex.from_histories(histories, corpus.tokens, facts, engaged(histories, schema)),
            facts,
        )
        for place, part in corpus.chunks():
            examples._fill(place, part)
            examples.target_mask[place][:-1] = True if repeats else part.is_first_touch[1:]
        examples.target_mask &= examples.successors != UNKNOWN
        return examples

    def _fill(self, place: slice, part: UserSequences) -> None:
        inputs = encoder_inputs(part.histories, part.tokens, np.iinfo(np.int32).max, self.facts.select(place))
        self.inputs.feature_ids[place], self.inputs.seconds[place] = inputs.feature_ids, inputs.seconds
        self.visit_frequency[place] = visit_frequency(part.histories, np.arange(len(part)))

    def with_context(self, starts: np.ndarray, lengths: np.ndarray) -> EncoderInputs:
        """Of these crops, each behind the older events of its user."""
        begins = self.inputs.offsets[find_rows(self.inputs.offsets, starts)]
        older = np.minimum(starts - begins, self.older_events)
        inputs = self.inputs.gather_runs(starts - older, older + lengths)
        return replace(inputs, feature_ids=inputs.feature_ids.astype(np.int32))

    def target_frequency(self, items: int) -> np.ndarray:
        """float64 [items]: each token's share of the targets."""
        counts = np.bincount(self.successors[self.target_mask], minlength=items)
        return counts / max(1, counts.sum())


def _successors(corpus: UserSequences) -> np.ndarray:
    successors = np.append(corpus.tokens[1:], UNKNOWN).astype(np.int32)
    successors[corpus.offsets[1:] - 1] = UNKNOWN
    return successors


@dataclass(slots=True)
class TrainingBatch:
    """Some crops, packed: columns [total] over their events.

    inputs:  of `Examples.shown`: a crop's events are its user's last ones there
    offsets: int64 [crops + 1], of the crops' own events
    successors: int32 [total]; labels: float32 [total, 3]; affinity: float32 [total, AFFINITIES], of the successors
    asked: int64 [m], the rows that train the retrieval
    seen:  pairs (number of the asked row, token), int64 [pairs] each: what the crop's own events show up to that row
    whole: the batch that this is one process' part of; None: it is the whole one
    """

    inputs: EncoderInputs
    offsets: np.ndarray
    successors: np.ndarray
    labels: np.ndarray
    visit_frequency: np.ndarray
    affinity: np.ndarray
    target_rows: np.ndarray
    seen: tuple[np.ndarray, np.ndarray]
    full_batch: "TrainingBatch | None" = None

    @property
    def targets(self) -> np.ndarray:
        """int32 [m]: the successors of the asked rows."""
        return self.successors[self.target_rows]

    @property
    def loss_fractions(self) -> np.ndarray:
        """float32 [1 + 3]: of the whole batch's rows that each loss is a mean of, the retrieval's and the tasks'."""
        return (self._rows / np.maximum((self.full_batch or self)._rows, 1)).astype(np.float32)

    @property
    def _rows(self) -> np.ndarray:
        return np.array([len(self.target_rows), *np.isfinite(self.labels).sum(axis=0)])

    def shard(self, rank: int, count: int) -> "TrainingBatch":
        """Each count-th crop, from number `rank` on. Where there is none: the first crop, asked nothing."""
        crops, whole = len(self.inputs), self.inputs
        if rank >= crops:
            idle, nothing = self.shard(0, crops), np.empty(0, np.int64)
            return replace(idle, labels=np.full_like(idle.labels, np.nan), target_mask=nothing, seen=(nothing, nothing))
        rows, offsets = ranges(self.offsets[:-1][rank::count], np.diff(self.offsets)[rank::count])
        places = np.full(len(self.successors), -1)
        places[rows] = np.arange(len(rows))
        asked = places[self.target_rows]
        own = asked >= 0
        numbers, shown = (column[own[self.seen[0]]] for column in self.seen)
        return TrainingBatch(
            whole.gather_runs(whole.offsets[:-1][rank::count], np.diff(whole.offsets)[rank::count]),
            offsets,
            self.successors[rows],
            self.labels[rows],
            self.visit_frequency[rows],
            self.affinity[rows],
            asked[own],
            ((np.cumsum(own) - 1)[numbers], shown),
            self,
        )


def random_crops(offsets: np.ndarray, length: int, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Every user's run cut into crops of `length` at a random offset: starts int64 [n], lengths int64 [n]."""
    lengths = np.diff(offsets)
    shifts = np.where(lengths > length, random.integers(0, length, len(lengths)), 0)
    counts = -(-(lengths + shifts) // length)
    number, _ = ranges(np.zeros_like(counts), counts)  # of the crop within its user
    begins = number * length - np.repeat(shifts, counts)
    ends = np.minimum(begins + length, np.repeat(lengths, counts))
    begins = np.maximum(begins, 0)
    return np.repeat(offsets[:-1], counts) + begins, ends - begins


def batch_crops(starts: np.ndarray, lengths: np.ndarray, events_per_batch: int,
            random: np.random.Generator) -> list[tuple[np.ndarray, np.ndarray]]:  # fmt: skip
    """Crops of like lengths together, about `batch_events` events a batch, in random order."""
    order = np.lexsort((random.random(len(starts)), lengths // 8))
    starts, lengths = starts[order], lengths[order]
    number = (np.cumsum(lengths) - 1) // events_per_batch
    cuts = np.flatnonzero(np.diff(number)) + 1
    parts = list(zip(np.split(starts, cuts), np.split(lengths, cuts), strict=True))
    random.shuffle(parts)
    return parts


def make_batch(examples: TrainingColumns, starts: np.ndarray, lengths: np.ndarray, unknown_item_rate: float,
             random: np.random.Generator) -> TrainingBatch:  # fmt: skip
    """The crops as model inputs; a share of the input items is made unknown, as new items will be in service."""
    order = np.argsort(lengths, kind="stable")
    index, offsets = ranges(starts[order], lengths[order])
    asked = np.flatnonzero(examples.target_mask[index])
    seen = _seen(examples.inputs.item_rows[index], offsets, asked)
    inputs = examples.with_context(starts[order], lengths[order])
    inputs.item_rows[random.random(len(inputs.item_rows)) < unknown_item_rate] = UNKNOWN
    successors, labels, rhythms = examples.successors[index], examples.labels[index], examples.visit_frequency[index]
    following = np.minimum(index + 1, len(examples.successors) - 1)
    affinity = examples.affinities.at(index, successors, examples.facts.select(following))
    return TrainingBatch(inputs, offsets, successors, labels, rhythms, affinity, asked, seen)


def _seen(item_rows: np.ndarray, offsets: np.ndarray, asked: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    begins = np.repeat(offsets[:-1], np.diff(offsets))[asked]
    counts = asked - begins + 1
    index, _ = ranges(begins, counts)
    return np.repeat(np.arange(len(asked)), counts), item_rows[index]
