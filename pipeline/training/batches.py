"""Training batches: random crops of the users' sequences, each event asked for its successor.

Most users that a model meets in service were not there in training. So an epoch cuts every sequence into crops at a new
random offset: each event is seen with long and with short contexts, and the model leans on items, not on who it is.
"""

from dataclasses import dataclass, replace

import numpy as np

from pipeline.data.sequences import Corpus
from pipeline.features.affinity import Affinities
from pipeline.features.event_features import FEATURES, Inputs, inputs_of, ranges, runs_of
from pipeline.features.labels import engaged, labels_of
from pipeline.features.visit_frequency import RHYTHMS, rhythm
from pipeline.items.catalogue import EMPTY, Catalogue, Facts
from pipeline.items.vocabulary import UNKNOWN
from pipeline.records import EventSchema


@dataclass(slots=True)
class Examples:
    """What the corpus shows and asks: columns [total] over its events, 123 bytes an event beside the corpus' own.

    They are made once, users by users: a crop's features need all that came before it, so making them with each batch
    would walk through the same histories in every epoch.

    inputs:     of the whole sequences, of which crops are taken; its codes are int16
    successors: int32, the token of the user's next event; 0 where there is none
    asked:      bool, the retrieval is trained here: the successor is known and (unless repeats count) new to the user,
                for what the user has touched before is excluded in service
    labels:     float32 [total, 3], see labels.labels_of
    rhythm:     float32 [total, RHYTHMS], see rhythm.rhythm
    affinities, facts: of the histories and of the events' items, see affinity.py
    older_events: the model is shown so many of a user's events before a crop, too, in sessions
    """

    inputs: Inputs
    successors: np.ndarray
    asked: np.ndarray
    labels: np.ndarray
    rhythm: np.ndarray
    affinities: Affinities
    facts: Facts
    older_events: int = 0

    @classmethod
    def of(cls, corpus: Corpus, schema: EventSchema, repeats: bool, catalogue: Catalogue = EMPTY) -> "Examples":
        total, histories, facts = len(corpus), corpus.histories, catalogue.facts(corpus.tokens)
        codes, seconds = np.empty((total, FEATURES), np.int16), np.empty(total, np.int32)
        examples = cls(
            Inputs(corpus.tokens, codes, seconds, corpus.offsets),
            _successors(corpus),
            np.zeros(total, bool),
            labels_of(histories, schema, int(histories.ts_ms.max(initial=0))),
            np.empty((total, RHYTHMS), np.float32),
            Affinities.of(histories, corpus.tokens, facts, engaged(histories, schema)),
            facts,
        )
        for place, part in corpus.parts():
            examples._fill(place, part)
            examples.asked[place][:-1] = True if repeats else part.is_new[1:]
        examples.asked &= examples.successors != UNKNOWN
        return examples

    def _fill(self, place: slice, part: Corpus) -> None:
        inputs = inputs_of(part.histories, part.tokens, np.iinfo(np.int32).max, self.facts.of(place))
        self.inputs.codes[place], self.inputs.seconds[place] = inputs.codes, inputs.seconds
        self.rhythm[place] = rhythm(part.histories, np.arange(len(part)))

    def shown(self, starts: np.ndarray, lengths: np.ndarray) -> Inputs:
        """Of these crops, each behind the older events of its user."""
        begins = self.inputs.offsets[runs_of(self.inputs.offsets, starts)]
        older = np.minimum(starts - begins, self.older_events)
        inputs = self.inputs.taken(starts - older, older + lengths)
        return replace(inputs, codes=inputs.codes.astype(np.int32))

    def shares(self, items: int) -> np.ndarray:
        """float64 [items]: each token's share of the targets."""
        counts = np.bincount(self.successors[self.asked], minlength=items)
        return counts / max(1, counts.sum())


def _successors(corpus: Corpus) -> np.ndarray:
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

    inputs: Inputs
    offsets: np.ndarray
    successors: np.ndarray
    labels: np.ndarray
    rhythm: np.ndarray
    affinity: np.ndarray
    asked: np.ndarray
    seen: tuple[np.ndarray, np.ndarray]
    whole: "TrainingBatch | None" = None

    @property
    def targets(self) -> np.ndarray:
        """int32 [m]: the successors of the asked rows."""
        return self.successors[self.asked]

    @property
    def share(self) -> np.ndarray:
        """float32 [1 + 3]: of the whole batch's rows that each loss is a mean of, the retrieval's and the tasks'."""
        return (self._rows / np.maximum((self.whole or self)._rows, 1)).astype(np.float32)

    @property
    def _rows(self) -> np.ndarray:
        return np.array([len(self.asked), *np.isfinite(self.labels).sum(axis=0)])

    def part(self, rank: int, count: int) -> "TrainingBatch":
        """Each count-th crop, from number `rank` on. Where there is none: the first crop, asked nothing."""
        crops, whole = len(self.inputs), self.inputs
        if rank >= crops:
            idle, nothing = self.part(0, crops), np.empty(0, np.int64)
            return replace(idle, labels=np.full_like(idle.labels, np.nan), asked=nothing, seen=(nothing, nothing))
        rows, offsets = ranges(self.offsets[:-1][rank::count], np.diff(self.offsets)[rank::count])
        places = np.full(len(self.successors), -1)
        places[rows] = np.arange(len(rows))
        asked = places[self.asked]
        own = asked >= 0
        numbers, shown = (column[own[self.seen[0]]] for column in self.seen)
        return TrainingBatch(
            whole.taken(whole.offsets[:-1][rank::count], np.diff(whole.offsets)[rank::count]),
            offsets,
            self.successors[rows],
            self.labels[rows],
            self.rhythm[rows],
            self.affinity[rows],
            asked[own],
            ((np.cumsum(own) - 1)[numbers], shown),
            self,
        )


def crops(offsets: np.ndarray, length: int, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Every user's run cut into crops of `length` at a random offset: starts int64 [n], lengths int64 [n]."""
    lengths = np.diff(offsets)
    shifts = np.where(lengths > length, random.integers(0, length, len(lengths)), 0)
    counts = -(-(lengths + shifts) // length)
    number, _ = ranges(np.zeros_like(counts), counts)  # of the crop within its user
    begins = number * length - np.repeat(shifts, counts)
    ends = np.minimum(begins + length, np.repeat(lengths, counts))
    begins = np.maximum(begins, 0)
    return np.repeat(offsets[:-1], counts) + begins, ends - begins


def batches(starts: np.ndarray, lengths: np.ndarray, batch_events: int,
            random: np.random.Generator) -> list[tuple[np.ndarray, np.ndarray]]:  # fmt: skip
    """Crops of like lengths together, about `batch_events` events a batch, in random order."""
    order = np.lexsort((random.random(len(starts)), lengths // 8))
    starts, lengths = starts[order], lengths[order]
    number = (np.cumsum(lengths) - 1) // batch_events
    cuts = np.flatnonzero(np.diff(number)) + 1
    parts = list(zip(np.split(starts, cuts), np.split(lengths, cuts), strict=True))
    random.shuffle(parts)
    return parts


def batch_of(examples: Examples, starts: np.ndarray, lengths: np.ndarray, unknown_share: float,
             random: np.random.Generator) -> TrainingBatch:  # fmt: skip
    """The crops as model inputs; a share of the input items is made unknown, as new items will be in service."""
    order = np.argsort(lengths, kind="stable")
    index, offsets = ranges(starts[order], lengths[order])
    asked = np.flatnonzero(examples.asked[index])
    seen = _seen(examples.inputs.tokens[index], offsets, asked)
    inputs = examples.shown(starts[order], lengths[order])
    inputs.tokens[random.random(len(inputs.tokens)) < unknown_share] = UNKNOWN
    successors, labels, rhythms = examples.successors[index], examples.labels[index], examples.rhythm[index]
    following = np.minimum(index + 1, len(examples.successors) - 1)
    affinity = examples.affinities.at(index, successors, examples.facts.of(following))
    return TrainingBatch(inputs, offsets, successors, labels, rhythms, affinity, asked, seen)


def _seen(tokens: np.ndarray, offsets: np.ndarray, asked: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    begins = np.repeat(offsets[:-1], np.diff(offsets))[asked]
    counts = asked - begins + 1
    index, _ = ranges(begins, counts)
    return np.repeat(np.arange(len(asked)), counts), tokens[index]
