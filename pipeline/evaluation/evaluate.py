"""Offline evaluation of a model and baselines on held-out events.

Every scored event is ranked from its user's preceding events, as a ring of `ring_events` holds them. Models and
counters are frozen, the histories grow. With a split by time, the replay of the same log through the worker, one slate
per event, gives the same numbers.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import msgspec
import numpy as np

from pipeline.artifact import Artifact
from pipeline.counters.counters import without_neighbours
from pipeline.data.event_log import EventLog
from pipeline.data.sequences import UserSequences
from pipeline.data.split import Split
from pipeline.errors import EvaluationError
from pipeline.evaluation.beyond_accuracy import (
    BeyondAccuracyMetrics,
    beyond_accuracy,
    category_vectors,
    cooccurrence_vectors,
)
from pipeline.evaluation.business_metrics import BusinessMetricsRecorder
from pipeline.evaluation.comparison import Comparison, Estimates
from pipeline.evaluation.full_ranking import FullRanking
from pipeline.evaluation.head_predictions import predict_heads
from pipeline.evaluation.item_knn import ItemKnn, ItemKnnOptions
from pipeline.evaluation.metrics import HeadMetrics, RankingMetrics, head_metrics, ranking_metrics, target_ranks
from pipeline.evaluation.negatives import NegativeSampling, sample_negatives
from pipeline.evaluation.popularity import RecentPopularity
from pipeline.evaluation.ranking import (
    HeldOutEvents,
    Recommender,
    StrategyRecommender,
    rank_among_negatives,
    recommend_slates,
)
from pipeline.features.labels import TASKS, LabelRules, compute_log_labels
from pipeline.items.catalogue import Catalogue
from pipeline.items.vocabulary import UNKNOWN, Vocabulary
from pipeline.records import Item
from pipeline.strategies.hstu_strategy import HstuStrategy, load_hstu_strategy
from pipeline.strategies.options import PipelineOptions, frozen_counters
from pipeline.strategies.simple_strategy import SimpleStrategy
from pipeline.types import PositiveInt

SLATE_ITEMS = 10
COLD = 5  # an item with fewer training events, a user with fewer earlier events, is cold
MODEL = "hstu"


class EvaluationOptions(msgspec.Struct, frozen=True):
    """Options of `millrace evaluate`. negatives: None ranks all items; resamples, seed: for the intervals."""

    split: Split = Split()
    cutoffs: tuple[PositiveInt, ...] = (5, SLATE_ITEMS, 20, 50)
    negatives: NegativeSampling | None = None
    resamples: PositiveInt = 1000
    seed: int = 0

    @property
    def k(self) -> int:
        """Cutoff of slices and slates: the largest one that a slate is long enough for, else the smallest."""
        return max((cutoff for cutoff in self.cutoffs if cutoff <= SLATE_ITEMS), default=min(self.cutoffs))


class RankerMetrics(msgspec.Struct, frozen=True):
    """Metrics of one ranker.

    at: by cutoff; difference: by cutoff, the model's metrics minus this ranker's
    slices: at cutoff k, of cold items, of cold users, and of untied events, which have a time of their own
    slates: None among sampled negatives
    """

    at: dict[int, Estimates]
    difference: dict[int, Estimates]
    slices: dict[str, RankingMetrics]
    slates: BeyondAccuracyMetrics | None


class EvaluationReport(msgspec.Struct, frozen=True):
    """`millrace evaluate`'s JSON.

    tied_fraction: of the events, those with the time of their user's event before: the log alone orders the two
    excluded: number of the events whose item was kept off its user's slates, so that no slate could hit it; 0 among
    negatives
    business_metrics: means over the model's slates, see business_metrics.py; empty among negatives
    warning: why the numbers may be too good, or None
    """

    split: str
    candidates: str
    version: str
    k: int
    events: int
    users: int
    tied_fraction: float
    excluded: int
    rankings: dict[str, RankerMetrics]
    heads: dict[str, HeadMetrics]
    business_metrics: dict[str, float]
    warning: str | None


@dataclass(slots=True)
class TrainTest:
    """A split log. test: the held-out events, with the full log's sequences as their context."""

    vocabulary: Vocabulary
    train: UserSequences
    test: HeldOutEvents

    @classmethod
    def from_log(cls, log: EventLog, test_mask: np.ndarray, vocabulary: Vocabulary, max_events: int) -> "TrainTest":
        """Split the log. test_mask: bool [n], the held-out events."""
        sequences = UserSequences.from_log(log, vocabulary)
        train = UserSequences.from_log(log.select(~test_mask), vocabulary)
        positions = np.flatnonzero(test_mask[sequences.log_positions])
        return cls(vocabulary, train, HeldOutEvents(sequences, positions, max_events))

    @property
    def items(self) -> int:
        return len(self.vocabulary)

    @property
    def counts(self) -> np.ndarray:
        """Training events by token, int64 [items]; 0 for the unknown item."""
        counts = np.bincount(self.train.tokens, minlength=self.items)
        counts[UNKNOWN] = 0
        return counts


def evaluate(
    artifact: Artifact,
    log: EventLog,
    options: PipelineOptions,
    request: EvaluationOptions | None = None,
    items: Iterable[Item] = (),
) -> EvaluationReport:
    """Compute every metric over the log's held-out events. Raises EvaluationError.

    items: metadata, also of items that training did not have: the model ranks those by it, and categories measure the
    diversity of slates.
    """
    request = request or EvaluationOptions()
    test_mask = request.split.test_mask(log)
    warning = _check_held_out(artifact, log, test_mask, request.split)
    vocabulary = Vocabulary(dict.fromkeys([*artifact.item_ids, *log.item_ids]), options.max_items)
    if vocabulary.rejected_count:
        raise EvaluationError(vocabulary.overflow_message)
    data = TrainTest.from_log(log, test_mask, vocabulary, options.ring_events)
    items = list(items)
    catalogue = Catalogue(vocabulary)
    artifact.load_into(catalogue)
    catalogue.upsert(items)
    hstu = load_hstu_strategy(artifact, catalogue, options.exclusion, options.device, options.threads, options.rerank)
    model = BusinessMetricsRecorder(StrategyRecommender(hstu), request.k)
    rankers = fit_baselines(artifact, data, options, catalogue if items else None) | {MODEL: model}
    ranks, slates = _rank(rankers, data, request, items)
    return EvaluationReport(
        split=str(request.split),
        candidates="all items" if request.negatives is None else str(request.negatives),
        version=artifact.version,
        k=request.k,
        events=len(data.test),
        users=len(np.unique(data.test.users)),
        tied_fraction=float(data.test.is_tied.mean()),
        excluded=0 if request.negatives else data.test.count_excluded(options.exclusion),
        rankings=_measure(ranks, slates, data, request),
        heads=evaluate_heads(hstu, data.test, artifact.label_rules),
        business_metrics=model.means(),
        warning=warning,
    )


def fit_baselines(
    artifact: Artifact, data: TrainTest, options: PipelineOptions, metadata: Catalogue | None
) -> dict[str, Recommender]:
    """Return the artifact's counters as rankers, and baselines fitted to the training events or to item metadata."""

    def simple_strategy(state: Mapping[str, np.ndarray]) -> StrategyRecommender:
        return StrategyRecommender(SimpleStrategy(frozen_counters(options, data.vocabulary, state), options.exclusion))

    recent = RecentPopularity(data.train, data.items, options.half_life_days)
    scorers = [recent, ItemKnn.from_users(data.train, data.items, ItemKnnOptions())]
    if metadata is not None:
        scorers.append(ItemKnn.from_content(metadata, data.train, ItemKnnOptions(shrinkage=0.0)))
    return {
        "popularity": simple_strategy(without_neighbours(artifact.counters)),
        "cooccurrence": simple_strategy(artifact.counters),
        **{scorer.name: FullRanking(scorer, data.vocabulary, options.exclusion) for scorer in scorers},
    }


def evaluate_heads(hstu: HstuStrategy, test: HeldOutEvents, rules: LabelRules) -> dict[str, HeadMetrics]:
    """Compare the heads' probabilities for each event's item, predicted just before the event, with its labels.

    Users' first events are left out.
    """
    sequences = test.sequences
    events = HeldOutEvents(sequences, test.positions[test.lengths > 0], test.max_events)
    labels = compute_log_labels(sequences.histories, rules)
    labels = labels[events.positions - 1]  # an event's labels are stored at its predecessor
    probabilities = predict_heads(hstu, events)
    return {task: head_metrics(probabilities[:, i], labels[:, i]) for i, task in enumerate(TASKS)}


def _check_held_out(artifact: Artifact, log: EventLog, test_mask: np.ndarray, split: Split) -> str | None:
    """Return a warning when it cannot be known whether the artifact was trained on events to score.

    EvaluationError when it was, or when there is nothing to score.
    """
    if not test_mask.any():
        raise EvaluationError(f"none of the log's {len(log)} events is left to score ({split}); score more")
    provenance = artifact.manifest.trained_on
    seen = provenance.count_seen(log, test_mask) if provenance else None
    if provenance and seen:
        raise EvaluationError(
            f"artifact {artifact.version} was trained on {seen} of the {int(test_mask.sum())} events to score"
            f" ({split}); it held out {provenance.split}: score those, or train with the split that you score"
        )
    if seen is None:
        return (
            f"artifact {artifact.version} may have been trained on events scored here: it was trained on a different"
            " log"
        )
    return None


def _rank(
    rankers: Mapping[str, Recommender], data: TrainTest, request: EvaluationOptions, items: list[Item]
) -> tuple[dict[str, np.ndarray], dict[str, BeyondAccuracyMetrics]]:
    """Return each ranker's target ranks, int64 [n], and, unless among negatives, the metrics of its slates."""
    counts = data.counts
    if request.negatives is not None:
        negatives = sample_negatives(request.negatives, data.test, counts)
        return {name: rank_among_negatives(ranker, data.test, negatives) for name, ranker in rankers.items()}, {}
    vectors = category_vectors(items, data.vocabulary) if items else cooccurrence_vectors(data.train, data.items)
    ranks = {}
    slate_metrics = {}
    for name, ranker in rankers.items():
        slates = recommend_slates(ranker, data.test, max(request.cutoffs))
        ranks[name] = target_ranks(slates, data.test.targets)
        slate_metrics[name] = beyond_accuracy(slates[:, : request.k], counts, vectors)
    return ranks, slate_metrics


def _measure(
    ranks: dict[str, np.ndarray],
    slates: dict[str, BeyondAccuracyMetrics],
    data: TrainTest,
    request: EvaluationOptions,
) -> dict[str, RankerMetrics]:
    comparison = Comparison.from_ranks(ranks, data.test.users, request.cutoffs, request.resamples, request.seed)
    slices = {
        "cold_items": data.counts[data.test.targets] < COLD,
        "cold_users": data.test.lengths < COLD,
        "untied": ~data.test.is_tied,
    }
    return {
        name: RankerMetrics(
            at=comparison.at(name),
            difference=comparison.difference(MODEL, name) if name != MODEL else {},
            slices={key: ranking_metrics(own_ranks[mask], request.k) for key, mask in slices.items()},
            slates=slates.get(name),
        )
        for name, own_ranks in ranks.items()
    }
