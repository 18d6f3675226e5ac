"""Baselines for a log of repeat purchases: what the user buys most, and counters that go on counting after training."""

from collections.abc import Iterator
from dataclasses import dataclass

import msgspec
import numpy as np

from pipeline.data.event_log import EventLog
from pipeline.data.sequences import UserSequences
from pipeline.evaluation.full_ranking import column_top_k
from pipeline.evaluation.popularity import Popularity
from pipeline.evaluation.ranking import BATCH_USERS, HeldOutEvents
from pipeline.items.vocabulary import UNKNOWN, Vocabulary
from pipeline.jagged import find_rows, ranges
from pipeline.records import DAY_MS, Histories
from pipeline.strategies.exclusion import Exclusion
from pipeline.strategies.options import PipelineOptions, new_counters
from pipeline.strategies.simple_strategy import SimpleStrategy
from pipeline.strategies.strategy import rank
from pipeline.training.preparation import TrainingSetup
from tests.benchmarks.accuracy_models import CountingRanker, Fits, at_once, fit_sequences
from tests.benchmarks.accuracy_setting import Options, Setting


class PersonalFrequency:
    """Implements CatalogueScorer: an item's events in the user's history, decayed by age, then popularity.

    Age counts from the user's latest event; a long half-life counts all events equally.
    """

    name = "personal_frequency"

    def __init__(self, train: UserSequences, items: int, half_life_days: float) -> None:
        self._popularity = Popularity(train, items)
        self._items = items
        self._half_life_ms = half_life_days * DAY_MS

    def score(self, histories: Histories, tokens: np.ndarray) -> np.ndarray:
        """See CatalogueScorer."""
        latest = np.repeat(np.append(histories.ts_ms, 0)[histories.offsets[1:] - 1], histories.lengths)
        weights = np.exp2((histories.ts_ms - latest) / self._half_life_ms)
        cells = histories.users * self._items + tokens
        counts = np.bincount(cells, weights, len(histories) * self._items).reshape(len(histories), self._items)
        return np.where(counts > 0, counts, self._popularity.score(histories, tokens)).astype(np.float32)


@dataclass(slots=True)
class _LogInTime:
    """All events of user sequences in order of time.

    positions: int64 [total], in the sequences; index_of: int64 [total], the inverse
    ts_ms:     int64 [total]; tokens: int32 [total]
    """

    positions: np.ndarray
    index_of: np.ndarray
    ts_ms: np.ndarray
    tokens: np.ndarray

    @classmethod
    def from_sequences(cls, sequences: UserSequences) -> "_LogInTime":
        ts_ms = sequences.histories.ts_ms
        positions = np.argsort(ts_ms, kind="stable")
        index_of = np.empty_like(positions)
        index_of[positions] = np.arange(len(positions))
        return cls(positions, index_of, ts_ms[positions], sequences.tokens[positions])


class CountingOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Events of the last `window_days` count, and halve with every half-life; None: no limit."""

    half_life_days: float | None = None
    window_days: float | None = None


class CountingPopularity(CountingRanker):
    """Ranks items by all events before the scored event's time."""

    def __init__(self, items: int, options: CountingOptions) -> None:
        self._items = items
        self._options = options

    def slates(self, test: HeldOutEvents, k: int) -> np.ndarray:
        """See CountingRanker."""
        log = _LogInTime.from_sequences(test.sequences)
        request_ms = log.ts_ms[log.index_of[test.positions]]
        order = np.argsort(request_ms, kind="stable")
        slates = np.empty((len(test), k), np.int32)
        counts = self._counts(log, request_ms[order])
        for start in range(0, len(order), BATCH_USERS):
            rows = order[start : start + BATCH_USERS]
            weights = np.stack([next(counts) for _ in rows])
            slates[rows] = column_top_k(np.where(weights > 0, weights, -np.inf), k)[0]
        return slates

    def _counts(self, log: _LogInTime, request_ms: np.ndarray) -> Iterator[np.ndarray]:
        """Yield the items' weights at each of these times, float64 [items]. request_ms: int64 [n], ascending."""
        units = self._units(log.ts_ms)
        window_days = self._options.window_days
        oldest_ms = request_ms - int(window_days * DAY_MS) if window_days else np.zeros_like(request_ms)
        counted = np.zeros(self._items)
        begin = end = 0
        for next_begin, next_end in np.searchsorted(log.ts_ms, np.stack([oldest_ms, request_ms], 1), "left").tolist():
            for sign, part in ((1, slice(end, next_end)), (-1, slice(begin, next_begin))):
                np.add.at(counted, log.tokens[part], sign * units[part])
            begin = next_begin
            end = next_end
            counted[UNKNOWN] = 0
            yield counted.copy()

    def _units(self, ts_ms: np.ndarray) -> np.ndarray:
        """Return each event's weight as of the end of the log, float64 [total]: only their ratios matter."""
        half_life_days = self._options.half_life_days
        return np.exp2((ts_ms - ts_ms[-1:]) / (half_life_days * DAY_MS)) if half_life_days else np.ones(len(ts_ms))


class CountingCooccurrence(CountingRanker):
    """The `simple` strategy, whose counters see all events before each batch of scored events, in order of time."""

    def __init__(self, vocabulary: Vocabulary, exclusion: Exclusion, options: PipelineOptions) -> None:
        self._vocabulary = vocabulary
        self._exclusion = exclusion
        self._options = options

    def slates(self, test: HeldOutEvents, k: int) -> np.ndarray:
        """See CountingRanker. While a batch of BATCH_USERS scored events is ranked nothing is counted."""
        counters = new_counters(self._options, self._vocabulary)
        strategy = SimpleStrategy(counters, self._exclusion)
        log = _LogInTime.from_sequences(test.sequences)
        request_ms = log.ts_ms[log.index_of[test.positions]]
        order = np.argsort(request_ms, kind="stable")
        slates = np.empty((len(test), k), np.int32)
        begin = 0
        for start in range(0, len(order), BATCH_USERS):
            rows = order[start : start + BATCH_USERS]
            end = int(np.searchsorted(log.ts_ms, request_ms[rows[0]], "left"))
            counters.observe(*_with_context(test.sequences, log.positions[begin:end], self._options.window_events))
            slates[rows] = rank(
                strategy, test.sequences.histories_before(test.positions[rows], test.max_events), k
            ).tokens
            begin = end
        return slates


def _with_context(sequences: UserSequences, positions: np.ndarray, context: int) -> tuple[Histories, np.ndarray]:
    """Return histories that end with these events, `context` older ones before, and which are new, bool [total].

    positions: int64 [n]; those of one user follow each other in the sequences
    """
    users, fresh = np.unique(find_rows(sequences.offsets, positions), return_counts=True)
    ends = np.sort(positions)[np.cumsum(fresh) - 1] + 1
    starts = np.maximum(sequences.offsets[users], ends - fresh - context)
    index, offsets = ranges(starts, ends - starts)
    return Histories(sequences.events[index], offsets), np.isin(index, positions)


def personal_frequency(
    setting: Setting, log: EventLog, full: bool, options: Options, seed: int
) -> tuple[TrainingSetup, Fits]:
    setup = setting.prepare(log)
    half_life_days = msgspec.convert(options["half_life_days"], float)
    return at_once(setup, PersonalFrequency(fit_sequences(setup, full), len(setup.vocabulary), half_life_days))


def counting_popularity(
    setting: Setting, log: EventLog, full: bool, options: Options, seed: int
) -> tuple[TrainingSetup, Fits]:
    setup = setting.prepare(log)
    ranker = CountingPopularity(len(setup.vocabulary), msgspec.convert(options, CountingOptions))
    return setup, iter([(0, lambda: ranker)])


def counting_cooccurrence(
    setting: Setting, log: EventLog, full: bool, options: Options, seed: int
) -> tuple[TrainingSetup, Fits]:
    setup = setting.prepare(log)
    counter_options = msgspec.convert(options, PipelineOptions)
    ranker = CountingCooccurrence(setup.vocabulary, setup.pipeline.exclusion, counter_options)
    return setup, iter([(0, lambda: ranker)])
