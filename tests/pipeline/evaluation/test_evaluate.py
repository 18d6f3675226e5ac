import os
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline import artifact as artifacts
from pipeline.artifact import Artifact
from pipeline.data.event_log import EventLog, event_log_from_blocks
from pipeline.data.log_io import read_event_log
from pipeline.data.sequences import UserSequences, split_index
from pipeline.data.split import Split, TrainingProvenance
from pipeline.errors import EvaluationError
from pipeline.evaluation.evaluate import EvaluationOptions, EvaluationReport, evaluate
from pipeline.evaluation.metrics import auc, head_metrics, ranking_metrics, target_ranks
from pipeline.evaluation.negatives import NegativeSampling
from pipeline.items.catalogue import Catalogue
from pipeline.items.vocabulary import Vocabulary
from pipeline.model.config import HstuConfig
from pipeline.records import Event, EventSchema, Histories, Item
from pipeline.serving.hstu_strategy import HstuStrategy
from pipeline.serving.pipeline import Pipeline, PipelineOptions, new_counters
from pipeline.training.multi_task_model import MultiTaskModel

SCHEMA = EventSchema()
OPTIONS = PipelineOptions(device="cpu", threads=1)


def log_of(events: int = 400, users: int = 12, items: int = 40) -> tuple[list[Event], EventLog]:
    random = np.random.default_rng(8)
    popular = np.minimum(random.geometric(0.1, events), items)
    rows = [
        Event(f"u{random.integers(users)}", f"i{item}", str(random.choice(SCHEMA.actions)), 60_000 * (place // 2))
        for place, item in enumerate(popular)
    ]
    rows.sort(key=lambda event: (event.ts_ms, event.user_id, event.item_id))
    return rows, event_log_from_blocks([rows], SCHEMA)


def model_of(rows: list[Event]) -> Artifact:
    """An untrained model of the first half's items: what it answers is arbitrary, but it is an answer."""
    torch.manual_seed(4)
    vocabulary = Vocabulary(sorted({event.item_id for event in rows[: len(rows) // 2]}))
    counters = new_counters(OPTIONS, vocabulary)
    histories = event_log_from_blocks([rows[: len(rows) // 2]], SCHEMA)
    corpus = UserSequences.from_columns(histories.events, histories.items, histories.users).histories
    counters.observe(corpus, corpus.lengths)
    config = HstuConfig(items=len(vocabulary), width=16, heads=2, d_qk=8, d_v=8, max_events=20)
    weights = MultiTaskModel(config).state_dict()
    return artifacts.draft(
        config,
        SCHEMA,
        weights,
        vocabulary.item_ids[1:],
        counters.state() | {"values": np.zeros(len(counters.counted()), np.float32)},
    )


def hit_rate(report: EvaluationReport, ranking: str) -> float:
    return report.rankings[ranking].at[10].hit_rate.value


def test_the_table_equals_a_plain_walk_through_the_log(tmp_path: Path) -> None:
    """One event after another through the library's front door, frozen, against the batched evaluation."""
    rows, log = log_of()
    model, cap = model_of(rows), 30
    artifacts.save(tmp_path / "model", model, {}, "")
    pipeline = Pipeline.load(tmp_path / "model", OPTIONS)
    popular = [item.item_id for item in pipeline.popular(10)]
    histories: dict[str, list[Event]] = {}
    first, hits = split_index(log.ts_ms, 0.6), {"hstu": 0, "simple": 0}
    for place, event in enumerate(rows):
        history = histories.setdefault(event.user_id, [])
        if place >= first:
            for rung in hits:
                slate = pipeline.recommend([history[-cap:]], 10, rung)[0] if history else None
                shown = popular if slate is None else [item.item_id for item in slate.items]
                hits[rung] += event.item_id in shown
        history.append(event)
    report = evaluate(model, log, OPTIONS, EvaluationOptions(Split(0.6), max_events=cap))
    assert report.events == len(rows) - first
    assert hit_rate(report, "hstu") == pytest.approx(hits["hstu"] / report.events)
    assert hit_rate(report, "cooccurrence") == pytest.approx(hits["simple"] / report.events)
    assert hit_rate(report, "hstu") > 0


def test_the_newest_events_are_scored_one_after_another_from_all_that_came_before(tmp_path: Path) -> None:
    rows, log = log_of()
    model = model_of(rows)
    artifacts.save(tmp_path / "model", model, {}, "")
    pipeline = Pipeline.load(tmp_path / "model", OPTIONS)
    popular = [item.item_id for item in pipeline.popular(10)]
    hits = scored = 0
    for user in sorted({event.user_id for event in rows}):
        own = [event for event in rows if event.user_id == user]
        for place in range(max(0, len(own) - 3), len(own)):
            slate = [item.item_id for item in pipeline.recommend([own[:place]], 10, "hstu")[0].items]
            hits += own[place].item_id in (slate if place else popular)
            scored += 1
    report = evaluate(model, log, OPTIONS, EvaluationOptions(Split(leave_last_out=3)))
    assert (report.events, report.users) == (scored, 12)
    assert hit_rate(report, "hstu") == pytest.approx(hits / scored)


def test_the_models_scores_order_items_as_its_slates_do() -> None:
    rows, _ = log_of()
    model = model_of(rows)
    vocabulary = Vocabulary([*model.item_ids, "new"])
    rung = HstuStrategy(model, Catalogue(vocabulary), OPTIONS.exclusion, "cpu", 1)
    histories = Histories.from_events([rows[:9], [], rows[20:21]], SCHEMA)
    slates = rung.rank(histories, len(model.item_ids)).tokens
    scores = rung.scores(histories, slates)
    assert ((scores[:, 1:] <= scores[:, :-1]) | (slates[:, 1:] == 0)).all()
    new = np.full((3, 1), vocabulary.token("new"), np.int32)
    assert np.isneginf(rung.scores(histories, new)[[0, 2]]).all(), "the model does not know it"


def test_sampled_negatives_flatter_every_ranking_and_are_named_in_the_report() -> None:
    rows, log = log_of()
    model = model_of(rows)
    among_all = evaluate(model, log, OPTIONS, EvaluationOptions(Split(0.6)))
    among_few = evaluate(model, log, OPTIONS, EvaluationOptions(Split(0.6), negatives=NegativeSampling(5, 3)))
    assert among_few.candidates == "5 uniform negatives, seed 3"
    for name, ranking in among_few.rankings.items():
        assert ranking.at[10].hit_rate.value > hit_rate(among_all, name)
        assert ranking.slates is None
    assert among_few == evaluate(model, log, OPTIONS, EvaluationOptions(Split(0.6), negatives=NegativeSampling(5, 3)))


def test_cold_items_and_cold_users_are_slices_of_their_own() -> None:
    rows, log = log_of()
    report = evaluate(model_of(rows), log, OPTIONS, EvaluationOptions(Split(0.2)))
    first = split_index(log.ts_ms, 0.2)
    known = [event.item_id for event in rows[:first]]
    seen = [sum(event.user_id == other.user_id for other in rows[:place]) for place, event in enumerate(rows)]
    for ranking in report.rankings.values():
        assert ranking.slices["cold_items"].events == sum(known.count(event.item_id) < 5 for event in rows[first:])
        assert ranking.slices["cold_users"].events == sum(count < 5 for count in seen[first:])
    assert report.rankings["cooccurrence"].slices["cold_items"].events > 0


def test_records_of_items_bring_the_baseline_that_reads_them() -> None:
    """Twins, whose records are alike, follow each other: who reads records finds what nobody has touched before."""
    rows = [Event(f"u{n // 2}", f"{'ab'[n % 2]}{n // 2}", "view", n) for n in range(80)]
    log, records = (
        event_log_from_blocks([rows], EventSchema()),
        [Item(f"{one}{n}", tags=[f"t{n}"]) for n in range(40) for one in "ab"],
    )
    asked = EvaluationOptions(Split(0.5), cutoffs=(1,))
    without = evaluate(model_of(rows), log, OPTIONS, asked)
    told = evaluate(model_of(rows), log, OPTIONS, asked, records)
    assert set(told.rankings) - set(without.rankings) == {"contentknn"}
    assert told.rankings["contentknn"].at[1].hit_rate.value == 0.5, "every second event has a predecessor, its twin"
    assert told.rankings["contentknn"].slices["cold_items"].hit_rate == 0.5
    assert told.rankings["itemknn"].at[1].hit_rate.value < 0.1


def test_events_that_taught_the_artifact_are_refused_and_doubt_is_said() -> None:
    rows, log = log_of()
    cut = Split(leave_last_out=3)
    taught = TrainingProvenance.from_log(cut, log.select(~cut.test_mask(log)))
    model = model_of(rows)
    model.manifest = msgspec.structs.replace(model.manifest, trained_on=taught)
    assert evaluate(model, log, OPTIONS, EvaluationOptions(cut)).warning is None
    with pytest.raises(EvaluationError, match=r"artifact unsigned was trained on \d+ of the \d+ events to score"):
        evaluate(model, log, OPTIONS)
    other = log.select(np.arange(len(log)) % 2 == 0)
    warning = evaluate(model, other, OPTIONS).warning
    assert warning is not None
    assert "may have been trained on events scored here" in warning


@pytest.mark.parametrize(
    "rows",
    [
        [Event("u", f"i{n % 7}", "view", 1000 * n) for n in range(40)],
        [Event(f"u{n % 4}", "i", "view", 1000 * n) for n in range(40)],
        [Event(f"u{n}", f"i{n % 7}", "view", 1000 * n) for n in range(40)],
        [Event(f"u{n % 4}", f"i{n % 7}", "view", 5) for n in range(40)],
    ],
    ids=["one user", "one item", "users with one event", "all at one time"],
)
@pytest.mark.parametrize("cut", [Split(0.6), Split(leave_last_out=2)], ids=["online", "last"])
def test_degenerate_logs_are_measured_without_a_word(rows: list[Event], cut: Split) -> None:
    report = evaluate(model_of(rows), event_log_from_blocks([rows], SCHEMA), OPTIONS, EvaluationOptions(cut))
    for ranking in report.rankings.values():
        measures = [ranking.at[10].hit_rate, ranking.at[10].ndcg, ranking.at[50].mrr]
        assert all(0 <= each.low <= each.value <= each.high <= 1 for each in measures)


def test_a_log_with_nothing_to_score_is_one_sentence() -> None:
    rows, log = log_of()
    for empty, cut in [
        (log, Split(1.0)),
        (event_log_from_blocks([], SCHEMA), Split()),
        (event_log_from_blocks([], SCHEMA), Split(leave_last_out=3)),
    ]:
        with pytest.raises(EvaluationError, match="is left to score"):
            evaluate(model_of(rows), empty, OPTIONS, EvaluationOptions(cut))


def test_evaluation_leaves_the_counters_as_they_were() -> None:
    rows, log = log_of()
    model = model_of(rows)
    before = {name: array.copy() for name, array in model.counters.items()}
    first, second = (evaluate(model, log, OPTIONS, EvaluationOptions(Split(0.5))) for _ in range(2))
    assert first == second
    assert all((model.counters[name] == array).all() for name, array in before.items())


def test_ranks_count_from_one_and_an_unknown_item_never_hits() -> None:
    slates = np.array([[4, 2, 9], [4, 2, 9], [0, 0, 0], [1, 0, 0]])
    assert target_ranks(slates, np.array([9, 3, 0, 1])).tolist() == [3, 0, 0, 1]


def test_events_without_a_hit_stay_in_the_denominator() -> None:
    measures = ranking_metrics(np.array([1, 0, 3, 0]), 10)
    assert measures.events == 4
    assert measures.hit_rate == 0.5
    assert measures.ndcg == pytest.approx((1 + 0.5) / 4)
    assert measures.mrr == pytest.approx((1 + 1 / 3) / 4)


@given(st.lists(st.tuples(st.integers(0, 5), st.booleans()), min_size=1, max_size=40))
def test_auc_is_the_share_of_pairs_in_the_right_order_ties_counting_half(rows: list[tuple[int, bool]]) -> None:
    ones = [score for score, positive in rows if positive]
    zeros = [score for score, positive in rows if not positive]
    got = auc(np.array([score for score, _ in rows], float), np.array([positive for _, positive in rows]))
    if not ones or not zeros:
        assert got is None
    else:
        wins = sum((one > zero) + 0.5 * (one == zero) for one in ones for zero in zeros)
        assert got == pytest.approx(wins / (len(ones) * len(zeros)))


def test_unknown_labels_are_left_out_of_a_heads_measures() -> None:
    odds, labels = np.array([0.9, 0.2, 0.5, 0.4], np.float32), np.array([1, 0, np.nan, 1], np.float32)
    measures = head_metrics(odds, labels)
    assert (measures.labels, measures.auc) == (3, 1.0)
    assert measures.log_loss == pytest.approx(-np.log([0.9, 0.8, 0.4]).mean(), rel=1e-5)
    assert head_metrics(odds, np.full(4, np.nan)).auc is None


def test_baselines_on_the_real_log_are_where_the_counters_left_them() -> None:
    path = Path(os.environ.get("MILLRACE_DATA", "../shared/data")) / "ml-100k" / "ml-100k.inter"
    if not path.exists():
        pytest.skip(f"no log at {path}: set MILLRACE_DATA to the folder that holds ml-100k")
    log = read_event_log(path)
    first = split_index(log.ts_ms, 0.8)
    vocabulary = Vocabulary(log.item_ids[item] for item in np.unique(log.items[:first]))
    known = UserSequences.from_columns(log.events[:first], np.zeros(first, np.int32), log.users[:first]).histories
    counters = new_counters(OPTIONS, vocabulary)
    counters.observe(known, known.lengths)
    config = HstuConfig(items=len(vocabulary), layers=1, width=8, heads=1, d_qk=4, d_v=4, max_events=4)
    weights = MultiTaskModel(config).state_dict()
    draft = artifacts.draft(
        config,
        SCHEMA,
        weights,
        vocabulary.item_ids[1:],
        counters.state() | {"values": np.zeros(len(counters.counted()), np.float32)},
    )
    report = evaluate(draft, log, OPTIONS)
    assert report.events == len(log) - first
    assert 0.07 < hit_rate(report, "popularity") < 0.09
    assert 0.18 < hit_rate(report, "cooccurrence") < 0.22
