"""What a model and the baselines would have been worth on a part of a log that they have not seen.

Every scored event is ranked from its user's preceding events, as a ring of `cap_events` holds them. Models and counters
are frozen, the histories grow. With the online cut, the replay of the same log through the worker, one slate an event,
gives the same numbers.
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
from pipeline.evaluation.ranking import HeldOutEvents, Recommender, ranks_among, slates_of
from pipeline.features.labels import TASKS, compute_labels
from pipeline.items.catalogue import Catalogue
from pipeline.items.vocabulary import UNKNOWN, Vocabulary
from pipeline.records import EventSchema, Item
from pipeline.serving.hstu_strategy import HstuStrategy
from pipeline.serving.pipeline import PipelineOptions, frozen_counters
from pipeline.serving.simple_strategy import SimpleStrategy
from pipeline.types import PositiveInt

SLATE_ITEMS = 10
COLD = 5  # an item with fewer training events, a user with fewer earlier events, is cold
MODEL = "hstu"


class EvaluationOptions(msgspec.Struct, frozen=True):
    """What to score and how. negatives: None ranks all items; resamples, seed: of the intervals."""

    split: Split = Split()
    cutoffs: tuple[PositiveInt, ...] = (5, SLATE_ITEMS, 20, 50)
    negatives: NegativeSampling | None = None
    resamples: PositiveInt = 1000
    seed: int = 0
    max_events: int = 512

    @property
    def k(self) -> int:
        """What slices and slates are measured at: the cutoff that is nearest to a slate's length from below."""
        return max((cutoff for cutoff in self.cutoffs if cutoff <= SLATE_ITEMS), default=min(self.cutoffs))


class RankerMetrics(msgspec.Struct, frozen=True):
    """How one ranker fared. slates: None among sampled negatives; behind: by how much the model is ahead of it."""

    at: dict[int, Estimates]
    lift: dict[int, Estimates]
    slices: dict[str, RankingMetrics]
    slates: BeyondAccuracyMetrics | None


class EvaluationReport(msgspec.Struct, frozen=True):
    """`millrace evaluate`'s JSON.

    worth: of the model's slates, see business_metrics.py, empty among negatives; warning: why the numbers may be too
    good, or None
    """

    split: str
    candidates: str
    version: str
    k: int
    events: int
    users: int
    rankings: dict[str, RankerMetrics]
    heads: dict[str, HeadMetrics]
    business_metrics: dict[str, float]
    warning: str | None


def evaluate(artifact: Artifact, log: EventLog, options: PipelineOptions, request: EvaluationOptions | None = None,
             items: Iterable[Item] = ()) -> EvaluationReport:  # fmt: skip
    """Every measure over the log's events behind the cut. Raises EvaluationError.

    items: what is known of items, also of those that training did not have: the model ranks these by it, and categories
    tell how varied a slate is.
    """
    request = request or EvaluationOptions()
    left_out = request.split.test_mask(log)
    warning = _check(artifact, log, left_out, request.split)
    vocabulary = Vocabulary(dict.fromkeys([*artifact.item_ids, *log.item_ids]), options.max_items)
    if vocabulary.rejected_count:
        raise EvaluationError(f"evaluate: {vocabulary.overflow_message}")
    split = TrainTest.from_log(log, left_out, vocabulary, request.max_events)
    catalogue, items = Catalogue(vocabulary), list(items)
    artifact.load_into(catalogue)
    catalogue.upsert(items)
    hstu = HstuStrategy(artifact, catalogue, options.exclusion, options.device, options.threads, options.rerank)
    weighed = BusinessMetricsRecorder(hstu, request.k)
    rankers = _baselines(artifact, split, options, catalogue if items else None) | {MODEL: weighed}
    ranks, slates = _ranked(rankers, split, request, items)
    return EvaluationReport(
        split=str(request.split),
        candidates="all items" if request.negatives is None else str(request.negatives),
        version=artifact.version,
        k=request.k,
        events=len(split.test),
        users=len(np.unique(split.test.users)),
        rankings=_rankings(ranks, slates, split, request),
        heads=evaluate_heads(hstu, split.test, options.schema),
        business_metrics=weighed.means(),
        warning=warning,
    )


@dataclass(slots=True)
class TrainTest:
    """A log cut in two. known: what lies before the cut; scored: what lies behind it, in the whole log."""

    vocabulary: Vocabulary
    train: UserSequences
    test: HeldOutEvents

    @classmethod
    def from_log(cls, log: EventLog, left_out: np.ndarray, vocabulary: Vocabulary, cap_events: int) -> "TrainTest":
        """left_out: bool [n], the log's events behind the cut."""
        whole, known = (
            UserSequences.from_log(log, vocabulary),
            UserSequences.from_log(log.select(~left_out), vocabulary),
        )
        return cls(vocabulary, known, HeldOutEvents(whole, np.flatnonzero(left_out[whole.log_positions]), cap_events))

    @property
    def items(self) -> int:
        return len(self.vocabulary)

    @property
    def counts(self) -> np.ndarray:
        """int64 [items]: events before the cut by token, 0 for the unknown item."""
        counts = np.bincount(self.train.tokens, minlength=self.items)
        counts[UNKNOWN] = 0
        return counts


def _check(artifact: Artifact, log: EventLog, left_out: np.ndarray, cut: Split) -> str | None:
    """EvaluationError when nothing is left to score or it taught the artifact; a sentence when that cannot be told."""
    if not left_out.any():
        raise EvaluationError(f"evaluate: none of the log's {len(log)} events is left to score ({cut}); score more")
    taught = artifact.manifest.trained_on
    seen = taught.count_seen(log, left_out) if taught else None
    if taught and seen:
        raise EvaluationError(
            f"evaluate: {seen} of the {int(left_out.sum())} events to score ({cut}) taught artifact {artifact.version},"
            f" which left out {taught.split}; score those, or train with the cut that you score"
        )
    if seen is None:
        return f"artifact {artifact.version} may have been taught by events scored here: it is not of this very log"
    return None


def _baselines(
    artifact: Artifact, split: TrainTest, options: PipelineOptions, records: Catalogue | None
) -> dict[str, Recommender]:
    """The counters as the artifact holds them, and rankers fitted to the events before the cut, or to items' records
    where there are any."""

    def counted(state: Mapping[str, np.ndarray]) -> SimpleStrategy:
        return SimpleStrategy(frozen_counters(options, split.vocabulary, state), options.exclusion)

    recent = RecentPopularity(split.train, split.items, options.half_life_days)
    scorers = [recent, ItemKnn.from_users(split.train, split.items, ItemKnnOptions())]
    if records is not None:
        scorers.append(ItemKnn.from_content(records, split.train, ItemKnnOptions(shrinkage=0.0)))
    return {
        "popularity": counted(without_neighbours(artifact.counters)),
        "cooccurrence": counted(artifact.counters),
        **{scorer.name: FullRanking(scorer, split.vocabulary, options.exclusion) for scorer in scorers},
    }


def _ranked(
    rankers: Mapping[str, Recommender], split: TrainTest, asked: EvaluationOptions, items: list[Item]
) -> tuple[dict[str, np.ndarray], dict[str, BeyondAccuracyMetrics]]:
    """Each ranker's ranks, int64 [n], and, among all items, what its slates are like."""
    scored, counts = split.test, split.counts
    if asked.negatives is not None:
        drawn = sample_negatives(asked.negatives, scored, counts)
        return {name: ranks_among(ranker, scored, drawn) for name, ranker in rankers.items()}, {}
    vectors = category_vectors(items, split.vocabulary) if items else cooccurrence_vectors(split.train, split.items)
    ranks, measures = {}, {}
    for name, ranker in rankers.items():
        slates = slates_of(ranker, scored, max(asked.cutoffs))
        ranks[name] = target_ranks(slates, scored.targets)
        measures[name] = beyond_accuracy(slates[:, : asked.k], counts, vectors)
    return ranks, measures


def _rankings(
    ranks: dict[str, np.ndarray], slates: dict[str, BeyondAccuracyMetrics], split: TrainTest, asked: EvaluationOptions
) -> dict[str, RankerMetrics]:
    comparison = Comparison.from_ranks(ranks, split.test.users, asked.cutoffs, asked.resamples, asked.seed)
    slices = {
        "cold_items": split.counts[split.test.targets] < COLD,
        "cold_users": split.test.lengths < COLD,
    }
    return {
        name: RankerMetrics(
            comparison.at(name),
            comparison.difference(MODEL, name) if name != MODEL else {},
            {part: ranking_metrics(places[inside], asked.k) for part, inside in slices.items()},
            slates.get(name),
        )
        for name, places in ranks.items()
    }


def evaluate_heads(hstu: HstuStrategy, scored: HeldOutEvents, schema: EventSchema) -> dict[str, HeadMetrics]:
    """The heads' odds of each event's item, asked just before the event, against what the event turned out to be."""
    corpus = scored.sequences
    asked = HeldOutEvents(corpus, scored.positions[scored.lengths > 0], scored.max_events)
    labels = compute_labels(corpus.histories, schema, int(corpus.histories.ts_ms.max(initial=0)))[asked.positions - 1]
    odds = predict_heads(hstu, asked)
    return {task: head_metrics(odds[:, i], labels[:, i]) for i, task in enumerate(TASKS)}
