"""The online protocol: what a slate before each event would have been worth.

Over the last part of a log by time, every event is scored by the ranking made from its user's preceding events, as a
ring of `cap_events` holds them. The model and the counters are frozen, the histories grow. All events count in the
denominator; a user's first event is scored by what was popular in the training log; excluded items are those that
serving would exclude. The replay of the same log through the worker, one slate an event, gives the same numbers.
"""

from collections.abc import Callable, Mapping
from typing import Protocol

import msgspec
import numpy as np

from pipeline.artifact import Artifact
from pipeline.corpus import Corpus, place_of_share
from pipeline.counters import without_neighbours
from pipeline.heads import TASKS, labels_of
from pipeline.hstu_rung import HstuRung
from pipeline.logcolumns import Log
from pipeline.measures import HeadMeasures, RankingMeasures, head_measures, ranking_measures, ranks_of
from pipeline.records import EventSchema, Histories
from pipeline.simple_rung import SimpleRung
from pipeline.strategy import Ranked
from pipeline.unified import PipelineOptions, frozen_counters
from pipeline.vocabulary import Vocabulary

BATCH_USERS = 256


class Ranker(Protocol):
    """A rung of the ladder is one."""

    def rank(self, histories: Histories, k: int) -> Ranked: ...


class Report(msgspec.Struct, frozen=True):
    """`millrace evaluate`'s JSON."""

    protocol: str
    version: str
    k: int
    events: int
    rankings: dict[str, RankingMeasures]
    heads: dict[str, HeadMeasures]


def measure(ranker: Ranker, corpus: Corpus, positions: np.ndarray, k: int, cap_events: int,
            on_events: Callable[[int], None] = lambda count: None) -> RankingMeasures:  # fmt: skip
    """Rank before each of these events of the corpus (int64 [n]) and look for its item among the k best."""
    ranks = np.empty(len(positions), np.int64)
    order = np.argsort(np.minimum(positions - corpus.starts[positions], cap_events), kind="stable")  # like lengths meet
    for start in range(0, len(order), BATCH_USERS):
        chosen = order[start : start + BATCH_USERS]
        ranked = ranker.rank(corpus.before(positions[chosen], cap_events), k)
        ranks[chosen] = ranks_of(ranked.tokens, corpus.tokens[positions[chosen]])
        on_events(len(chosen))
    return ranking_measures(ranks)


def evaluate(artifact: Artifact, log: Log, score_from: float, options: PipelineOptions, k: int = 10,
             cap_events: int = 512, on_events: Callable[[int], None] = lambda count: None) -> Report:  # fmt: skip
    """Every measure over the log's events behind the share `score_from`.

    on_events is called with the number of events just ranked: len(rankings) times over all of them.
    """
    vocabulary = Vocabulary([*artifact.item_ids, *log.item_ids], options.max_items)
    corpus = Corpus.of(log.events, vocabulary.tokens(log.events["item"]), log.users)
    positions = np.flatnonzero(corpus.places >= place_of_share(log.ts_ms, score_from))
    hstu = HstuRung(artifact, vocabulary, options.exclusion, options.device, options.threads)

    def simple(state: Mapping[str, np.ndarray]) -> SimpleRung:
        return SimpleRung(frozen_counters(options, vocabulary, state), options.exclusion)

    rankers: Mapping[str, Ranker] = {
        "popularity": simple(without_neighbours(artifact.counters)),
        "cooccurrence": simple(artifact.counters),
        "hstu": hstu,
    }
    rankings = {name: measure(each, corpus, positions, k, cap_events, on_events) for name, each in rankers.items()}
    heads = measure_heads(hstu, corpus, positions, options.schema, cap_events)
    return Report("online", artifact.version, k, len(positions), rankings, heads)


def measure_heads(hstu: HstuRung, corpus: Corpus, positions: np.ndarray, schema: EventSchema,
                  cap_events: int) -> dict[str, HeadMeasures]:  # fmt: skip
    """The heads' odds of each event's item, asked just before the event, against what the event turned out to be."""
    positions = positions[positions > corpus.starts[positions]]
    labels = labels_of(corpus.histories, schema, int(corpus.histories.ts_ms.max(initial=0)))[positions - 1]  # [n, 3]
    odds = np.empty(labels.shape, np.float32)
    order = np.argsort(np.minimum(positions - corpus.starts[positions], cap_events), kind="stable")
    for start in range(0, len(order), BATCH_USERS):
        chosen = order[start : start + BATCH_USERS]
        histories = corpus.before(positions[chosen], cap_events)
        odds[chosen] = hstu.odds(histories, corpus.tokens[positions[chosen], None])[:, 0]
    return {task: head_measures(odds[:, i], labels[:, i]) for i, task in enumerate(TASKS)}
