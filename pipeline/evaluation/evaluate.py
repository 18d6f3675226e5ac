"""What a model and the baselines would have been worth on a part of a log that they have not seen.

Every scored event is ranked from its user's preceding events, as a ring of `cap_events` holds them. Models and counters
are frozen, the histories grow. With the online cut, the replay of the same log through the worker, one slate an event,
gives the same numbers.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated

import msgspec
import numpy as np
from msgspec import Meta

from pipeline.artifact import Artifact
from pipeline.counters.counters import without_neighbours
from pipeline.data.event_log import Log
from pipeline.data.sequences import Corpus
from pipeline.data.split import Cut
from pipeline.errors import EvaluationError
from pipeline.evaluation.beyond_accuracy import SlateMeasures, category_vectors, cooccurrence_vectors, slate_measures
from pipeline.evaluation.business_metrics import Weighed
from pipeline.evaluation.comparison import Comparison, Estimates
from pipeline.evaluation.full_ranking import CatalogueRanker
from pipeline.evaluation.head_predictions import odds_of
from pipeline.evaluation.item_knn import ItemKnn, ItemKnnOptions
from pipeline.evaluation.metrics import HeadMeasures, RankingMeasures, head_measures, ranking_measures, ranks_of
from pipeline.evaluation.negatives import Negatives, sample_negatives
from pipeline.evaluation.popularity import RecentPopularity
from pipeline.evaluation.ranking import Ranker, Scored, ranks_among, slates_of
from pipeline.features.labels import TASKS, labels_of
from pipeline.items.catalogue import Catalogue
from pipeline.items.vocabulary import UNKNOWN, Vocabulary
from pipeline.records import EventSchema, Item
from pipeline.serving.hstu_strategy import HstuRung
from pipeline.serving.pipeline import PipelineOptions, frozen_counters
from pipeline.serving.simple_strategy import SimpleRung

SLATE_ITEMS = 10
COLD = 5  # an item with fewer training events, a user with fewer earlier events, is cold
MODEL = "hstu"


class EvaluationOptions(msgspec.Struct, frozen=True):
    """What to score and how. negatives: None ranks all items; resamples, seed: of the intervals."""

    cut: Cut = Cut()
    cutoffs: tuple[Annotated[int, Meta(gt=0)], ...] = (5, SLATE_ITEMS, 20, 50)
    negatives: Negatives | None = None
    resamples: Annotated[int, Meta(gt=0)] = 1000
    seed: int = 0
    cap_events: int = 512

    @property
    def k(self) -> int:
        """What slices and slates are measured at: the cutoff that is nearest to a slate's length from below."""
        return max((cutoff for cutoff in self.cutoffs if cutoff <= SLATE_ITEMS), default=min(self.cutoffs))


class Ranking(msgspec.Struct, frozen=True):
    """How one ranker fared. slates: None among sampled negatives; behind: by how much the model is ahead of it."""

    at: dict[int, Estimates]
    behind: dict[int, Estimates]
    slices: dict[str, RankingMeasures]
    slates: SlateMeasures | None


class Report(msgspec.Struct, frozen=True):
    """`millrace evaluate`'s JSON.

    worth: of the model's slates, see business_metrics.py, empty among negatives; warning: why the numbers may be too
    good, or None
    """

    cut: str
    candidates: str
    version: str
    k: int
    events: int
    users: int
    rankings: dict[str, Ranking]
    heads: dict[str, HeadMeasures]
    worth: dict[str, float]
    warning: str | None


def evaluate(artifact: Artifact, log: Log, options: PipelineOptions, asked: EvaluationOptions | None = None,
             items: Iterable[Item] = ()) -> Report:  # fmt: skip
    """Every measure over the log's events behind the cut. Raises EvaluationError.

    items: what is known of items, also of those that training did not have: the model ranks these by it, and categories
    tell how varied a slate is.
    """
    asked = asked or EvaluationOptions()
    left_out = asked.cut.left_out(log)
    warning = _check(artifact, log, left_out, asked.cut)
    vocabulary = Vocabulary(dict.fromkeys([*artifact.item_ids, *log.item_ids]), options.max_items)
    if vocabulary.refused:
        raise EvaluationError(f"evaluate: {vocabulary.overflow}")
    split = Split.of(log, left_out, vocabulary, asked.cap_events)
    catalogue, items = Catalogue(vocabulary), list(items)
    artifact.inform(catalogue)
    catalogue.put(items)
    hstu = HstuRung(artifact, catalogue, options.exclusion, options.device, options.threads, options.rerank)
    weighed = Weighed(hstu, asked.k)
    rankers = _baselines(artifact, split, options, catalogue if items else None) | {MODEL: weighed}
    ranks, slates = _ranked(rankers, split, asked, items)
    return Report(
        cut=str(asked.cut),
        candidates="all items" if asked.negatives is None else str(asked.negatives),
        version=artifact.version,
        k=asked.k,
        events=len(split.scored),
        users=len(np.unique(split.scored.users)),
        rankings=_rankings(ranks, slates, split, asked),
        heads=measure_heads(hstu, split.scored, options.schema),
        worth=weighed.means(),
        warning=warning,
    )


@dataclass(slots=True)
class Split:
    """A log cut in two. known: what lies before the cut; scored: what lies behind it, in the whole log."""

    vocabulary: Vocabulary
    known: Corpus
    scored: Scored

    @classmethod
    def of(cls, log: Log, left_out: np.ndarray, vocabulary: Vocabulary, cap_events: int) -> "Split":
        """left_out: bool [n], the log's events behind the cut."""
        whole, known = Corpus.of_log(log, vocabulary), Corpus.of_log(log.part(~left_out), vocabulary)
        return cls(vocabulary, known, Scored(whole, np.flatnonzero(left_out[whole.places]), cap_events))

    @property
    def items(self) -> int:
        return len(self.vocabulary)

    @property
    def counts(self) -> np.ndarray:
        """int64 [items]: events before the cut by token, 0 for the unknown item."""
        counts = np.bincount(self.known.tokens, minlength=self.items)
        counts[UNKNOWN] = 0
        return counts


def _check(artifact: Artifact, log: Log, left_out: np.ndarray, cut: Cut) -> str | None:
    """EvaluationError when nothing is left to score or it taught the artifact; a sentence when that cannot be told."""
    if not left_out.any():
        raise EvaluationError(f"evaluate: none of the log's {len(log)} events is left to score ({cut}); score more")
    taught = artifact.manifest.taught
    seen = taught.seen(log, left_out) if taught else None
    if taught and seen:
        raise EvaluationError(
            f"evaluate: {seen} of the {int(left_out.sum())} events to score ({cut}) taught artifact {artifact.version},"
            f" which left out {taught.cut}; score those, or train with the cut that you score"
        )
    if seen is None:
        return f"artifact {artifact.version} may have been taught by events scored here: it is not of this very log"
    return None


def _baselines(
    artifact: Artifact, split: Split, options: PipelineOptions, records: Catalogue | None
) -> dict[str, Ranker]:
    """The counters as the artifact holds them, and rankers fitted to the events before the cut, or to items' records
    where there are any."""

    def counted(state: Mapping[str, np.ndarray]) -> SimpleRung:
        return SimpleRung(frozen_counters(options, split.vocabulary, state), options.exclusion)

    recent = RecentPopularity(split.known, split.items, options.half_life_days)
    scorers = [recent, ItemKnn.of_users(split.known, split.items, ItemKnnOptions())]
    if records is not None:
        scorers.append(ItemKnn.of_contents(records, split.known, ItemKnnOptions(shrinkage=0.0)))
    return {
        "popularity": counted(without_neighbours(artifact.counters)),
        "cooccurrence": counted(artifact.counters),
        **{scorer.name: CatalogueRanker(scorer, split.vocabulary, options.exclusion) for scorer in scorers},
    }


def _ranked(
    rankers: Mapping[str, Ranker], split: Split, asked: EvaluationOptions, items: list[Item]
) -> tuple[dict[str, np.ndarray], dict[str, SlateMeasures]]:
    """Each ranker's ranks, int64 [n], and, among all items, what its slates are like."""
    scored, counts = split.scored, split.counts
    if asked.negatives is not None:
        drawn = sample_negatives(asked.negatives, scored, counts)
        return {name: ranks_among(ranker, scored, drawn) for name, ranker in rankers.items()}, {}
    vectors = category_vectors(items, split.vocabulary) if items else cooccurrence_vectors(split.known, split.items)
    ranks, measures = {}, {}
    for name, ranker in rankers.items():
        slates = slates_of(ranker, scored, max(asked.cutoffs))
        ranks[name] = ranks_of(slates, scored.wanted)
        measures[name] = slate_measures(slates[:, : asked.k], counts, vectors)
    return ranks, measures


def _rankings(
    ranks: dict[str, np.ndarray], slates: dict[str, SlateMeasures], split: Split, asked: EvaluationOptions
) -> dict[str, Ranking]:
    comparison = Comparison.of(ranks, split.scored.users, asked.cutoffs, asked.resamples, asked.seed)
    slices = {
        "cold_items": split.counts[split.scored.wanted] < COLD,
        "cold_users": split.scored.lengths < COLD,
    }
    return {
        name: Ranking(
            comparison.at(name),
            comparison.difference(MODEL, name) if name != MODEL else {},
            {part: ranking_measures(places[inside], asked.k) for part, inside in slices.items()},
            slates.get(name),
        )
        for name, places in ranks.items()
    }


def measure_heads(hstu: HstuRung, scored: Scored, schema: EventSchema) -> dict[str, HeadMeasures]:
    """The heads' odds of each event's item, asked just before the event, against what the event turned out to be."""
    corpus = scored.corpus
    asked = Scored(corpus, scored.positions[scored.lengths > 0], scored.cap_events)
    labels = labels_of(corpus.histories, schema, int(corpus.histories.ts_ms.max(initial=0)))[asked.positions - 1]
    odds = odds_of(hstu, asked)
    return {task: head_measures(odds[:, i], labels[:, i]) for i, task in enumerate(TASKS)}
