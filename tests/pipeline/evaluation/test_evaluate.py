import numpy as np
import pytest
import torch
from msgspec.structs import replace

from pipeline import artifact as artifacts
from pipeline.artifact import Artifact
from pipeline.data.event_log import EventLog, event_log_from_blocks
from pipeline.data.sequences import UserSequences
from pipeline.data.split import Split, TrainingProvenance, split_index
from pipeline.errors import EvaluationError
from pipeline.evaluation.evaluate import EvaluationOptions, EvaluationReport, TrainTest, evaluate, fit_baselines
from pipeline.evaluation.negatives import NegativeSampling
from pipeline.evaluation.ranking import evaluate_ranking
from pipeline.items.catalogue import Catalogue
from pipeline.items.vocabulary import Vocabulary
from pipeline.model.config import HstuConfig
from pipeline.records import Event, EventSchema, Histories, Item
from pipeline.serving.pipeline import Pipeline, PipelineOptions, new_counters
from pipeline.strategies.hstu_strategy import load_hstu_strategy
from pipeline.strategies.strategy import rank
from pipeline.training.multi_task_model import MultiTaskModel

SCHEMA = EventSchema()
OPTIONS = PipelineOptions(device="cpu", threads=1, ring_events=30)
SMALL = HstuConfig(width=16, heads=2, d_qk=8, d_v=8, max_events=20)
TINY = HstuConfig(layers=1, width=8, heads=1, d_qk=4, d_v=4, max_events=4)


def random_events(events: int = 400, users: int = 12, items: int = 40) -> list[Event]:
    rng = np.random.default_rng(8)
    popular = np.minimum(rng.geometric(0.1, events), items)
    return [
        Event(f"u{rng.integers(users)}", f"i{item}", str(rng.choice(SCHEMA.actions)), 60_000 * (number // 2))
        for number, item in enumerate(popular)
    ]


def as_log(events: list[Event]) -> EventLog:
    return event_log_from_blocks([events] if events else [], SCHEMA)


def untrained_model(train: EventLog, config: HstuConfig = SMALL) -> Artifact:
    """Return a model with random weights and with the counters of a log; its slates are arbitrary but real."""
    torch.manual_seed(4)
    vocabulary = Vocabulary(train.item_ids[item] for item in np.unique(train.items))
    counters = new_counters(OPTIONS, vocabulary)
    histories = UserSequences.from_columns(train.events, train.items, train.users).histories
    counters.observe(histories, np.ones(len(histories.events), bool))
    config = replace(config, items=len(vocabulary))
    return artifacts.draft(
        config,
        SCHEMA,
        MultiTaskModel(config).state_dict(),
        vocabulary.item_ids[1:],
        counters.state() | {"values": np.zeros(len(counters.counted()), np.float32)},
    )


def half_trained_model(events: list[Event]) -> Artifact:
    return untrained_model(as_log(events[: len(events) // 2]))


EVENTS = random_events()
LOG = as_log(EVENTS)


@pytest.fixture(scope="module")
def model() -> Artifact:
    return half_trained_model(EVENTS)


@pytest.fixture(scope="module")
def pipeline(model: Artifact, tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    folder = tmp_path_factory.mktemp("evaluate") / "model"
    artifacts.save(folder, model, {}, "")
    return Pipeline.load(folder, OPTIONS)


@pytest.fixture(scope="module")
def report(model: Artifact) -> EvaluationReport:
    return evaluate(model, LOG, OPTIONS, EvaluationOptions(Split(0.6)))


def hit_rate(report: EvaluationReport, ranking: str) -> float:
    return report.rankings[ranking].at[10].hit_rate.value


def popular_items(pipeline: Pipeline, k: int) -> list[str]:
    return [pipeline.vocabulary.item_ids[token] for token in pipeline.counters.popular(k)[0]]


def test_hit_rates_equal_a_plain_walk_through_the_log(pipeline: Pipeline, report: EvaluationReport) -> None:
    """Compare the batched evaluation with one call of the frozen library per event."""
    popular = popular_items(pipeline, 10)
    histories: dict[str, list[Event]] = {}
    hits = {"hstu": 0, "simple": 0}
    first = split_index(LOG.ts_ms, 0.6)
    for position, event in enumerate(EVENTS):
        history = histories.setdefault(event.user_id, [])
        if position >= first:
            for strategy in hits:
                slate = pipeline.recommend([history[-30:]], 10, strategy)[0] if history else None
                shown = popular if slate is None else [item.item_id for item in slate.items]
                hits[strategy] += event.item_id in shown
        history.append(event)
    assert report.events == len(EVENTS) - first
    assert hit_rate(report, "hstu") == pytest.approx(hits["hstu"] / report.events)
    assert hit_rate(report, "cooccurrence") == pytest.approx(hits["simple"] / report.events)
    assert hit_rate(report, "hstu") > 0


def test_leave_last_out_scores_each_event_from_all_events_before_it(model: Artifact, pipeline: Pipeline) -> None:
    popular = popular_items(pipeline, 10)
    hits = 0
    scored = 0
    for user in sorted({event.user_id for event in EVENTS}):
        own = [event for event in EVENTS if event.user_id == user]
        for position in range(max(0, len(own) - 3), len(own)):
            slate = [item.item_id for item in pipeline.recommend([own[:position]], 10, "hstu")[0].items]
            hits += own[position].item_id in (slate if position else popular)
            scored += 1
    report = evaluate(model, LOG, replace(OPTIONS, ring_events=512), EvaluationOptions(Split(leave_last_out=3)))
    assert (report.events, report.users) == (scored, 12)
    assert hit_rate(report, "hstu") == pytest.approx(hits / scored)


def test_model_scores_order_items_as_its_slates_do(model: Artifact) -> None:
    vocabulary = Vocabulary([*model.item_ids, "new"])
    strategy = load_hstu_strategy(model, Catalogue(vocabulary), OPTIONS.exclusion, "cpu", 1)
    histories = Histories.from_events([EVENTS[:9], [], EVENTS[20:21]], SCHEMA)
    slates = rank(strategy, histories, len(model.item_ids)).tokens
    scores = strategy.scores(histories, slates)
    assert ((scores[:, 1:] <= scores[:, :-1]) | (slates[:, 1:] == 0)).all()
    new = np.full((3, 1), vocabulary.token("new"), np.int32)
    assert np.isneginf(strategy.scores(histories, new)[[0, 2]]).all(), "an item that the model does not have"


def test_sampled_negatives_raise_every_hit_rate_and_are_named_in_the_report(
    model: Artifact, report: EvaluationReport
) -> None:
    request = EvaluationOptions(Split(0.6), negatives=NegativeSampling(5, 3))
    sampled = evaluate(model, LOG, OPTIONS, request)
    assert sampled.candidates == "5 uniform negatives, seed 3"
    for name, ranking in sampled.rankings.items():
        assert ranking.at[10].hit_rate.value > hit_rate(report, name)
        assert ranking.slates is None
    assert sampled == evaluate(model, LOG, OPTIONS, request)


def test_cold_items_and_cold_users_are_slices_of_their_own(model: Artifact) -> None:
    report = evaluate(model, LOG, OPTIONS, EvaluationOptions(Split(0.2)))
    first = split_index(LOG.ts_ms, 0.2)
    train_items = [event.item_id for event in EVENTS[:first]]
    earlier = [sum(event.user_id == other.user_id for other in EVENTS[:n]) for n, event in enumerate(EVENTS)]
    cold_items = sum(train_items.count(event.item_id) < 5 for event in EVENTS[first:])
    cold_users = sum(count < 5 for count in earlier[first:])
    for ranking in report.rankings.values():
        assert ranking.slices["cold_items"].events == cold_items
        assert ranking.slices["cold_users"].events == cold_users
    assert report.rankings["cooccurrence"].slices["cold_items"].events > 0


def test_item_records_add_the_content_baseline_which_finds_untouched_items() -> None:
    """Each user touches an item and its twin, which has the same tags and no other user."""
    events = [Event(f"u{n // 2}", f"{'ab'[n % 2]}{n // 2}", "view", n) for n in range(80)]
    log = as_log(events)
    records = [Item(f"{letter}{n}", tags=[f"t{n}"]) for n in range(40) for letter in "ab"]
    request = EvaluationOptions(Split(0.5), cutoffs=(1,))
    without = evaluate(half_trained_model(events), log, OPTIONS, request)
    with_records = evaluate(half_trained_model(events), log, OPTIONS, request, records)
    assert set(with_records.rankings) - set(without.rankings) == {"contentknn"}
    content_knn = with_records.rankings["contentknn"]
    assert content_knn.at[1].hit_rate.value == 0.5, "every second event has a predecessor, its twin"
    assert content_knn.slices["cold_items"].hit_rate == 0.5
    assert with_records.rankings["itemknn"].at[1].hit_rate.value < 0.1


def test_events_that_the_artifact_was_trained_on_are_rejected_and_doubt_is_a_warning() -> None:
    split = Split(leave_last_out=3)
    model = half_trained_model(EVENTS)
    provenance = TrainingProvenance.from_log(split, LOG.select(~split.test_mask(LOG)))
    model.manifest = replace(model.manifest, trained_on=provenance)
    assert evaluate(model, LOG, OPTIONS, EvaluationOptions(split)).warning is None
    with pytest.raises(EvaluationError, match=r"artifact unsigned was trained on \d+ of the \d+ events to score"):
        evaluate(model, LOG, OPTIONS)
    other = LOG.select(np.arange(len(LOG)) % 2 == 0)
    warning = evaluate(model, other, OPTIONS).warning
    assert warning is not None
    assert "may have been trained on events scored here" in warning


@pytest.mark.parametrize(
    "events",
    [
        [Event("u", f"i{n % 7}", "view", 1000 * n) for n in range(40)],
        [Event(f"u{n % 4}", "i", "view", 1000 * n) for n in range(40)],
        [Event(f"u{n}", f"i{n % 7}", "view", 1000 * n) for n in range(40)],
        [Event(f"u{n % 4}", f"i{n % 7}", "view", 5) for n in range(40)],
    ],
    ids=["one user", "one item", "users with one event", "all at one time"],
)
@pytest.mark.parametrize("split", [Split(0.6), Split(leave_last_out=2)], ids=["temporal", "leave-last-out"])
def test_degenerate_logs_are_evaluated_without_error(events: list[Event], split: Split) -> None:
    report = evaluate(half_trained_model(events), as_log(events), OPTIONS, EvaluationOptions(split))
    for ranking in report.rankings.values():
        estimates = [ranking.at[10].hit_rate, ranking.at[10].ndcg, ranking.at[50].mrr]
        assert all(0 <= estimate.low <= estimate.value <= estimate.high <= 1 for estimate in estimates)


@pytest.mark.parametrize(
    ("events", "split"),
    [(EVENTS, Split(1.0)), ([], Split()), ([], Split(leave_last_out=3))],
    ids=["nothing held out", "empty, temporal", "empty, leave-last-out"],
)
def test_log_without_events_to_score_is_rejected(model: Artifact, events: list[Event], split: Split) -> None:
    with pytest.raises(EvaluationError, match="is left to score"):
        evaluate(model, as_log(events), OPTIONS, EvaluationOptions(split))


def test_evaluation_does_not_change_the_counters() -> None:
    model = half_trained_model(EVENTS)
    before = {name: array.copy() for name, array in model.counters.items()}
    first, second = (evaluate(model, LOG, OPTIONS, EvaluationOptions(Split(0.5))) for _ in range(2))
    assert first == second
    assert all((model.counters[name] == array).all() for name, array in before.items())


def test_baselines_on_a_real_log_reach_their_usual_hit_rates(movielens_log: EventLog) -> None:
    log = movielens_log
    test_mask = Split().test_mask(log)
    model = untrained_model(log.select(~test_mask), TINY)
    data = TrainTest.from_log(log, test_mask, Vocabulary(dict.fromkeys([*model.item_ids, *log.item_ids])), 512)
    baselines = fit_baselines(model, data, OPTIONS, None)
    assert len(data.test) == len(log) - split_index(log.ts_ms, 0.8)
    assert 0.07 < evaluate_ranking(baselines["popularity"], data.test, 10).hit_rate < 0.09
    assert 0.18 < evaluate_ranking(baselines["cooccurrence"], data.test, 10).hit_rate < 0.22
