"""The grocery log's benchmark: how its log is made, what its baselines count, and that all stages run."""

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from msgspec.structs import replace as replaced

from pipeline.data.event_log import EventLog, event_log_from_blocks
from pipeline.data.item_file import read_items
from pipeline.data.log_io import read_event_log
from pipeline.data.sequences import UserSequences
from pipeline.evaluation.ranking import HeldOutEvents
from pipeline.items.vocabulary import Vocabulary
from pipeline.records import DAY_MS, Event, EventSchema
from pipeline.strategies.exclusion import Exclusion
from pipeline.strategies.options import PipelineOptions
from tests.benchmarks import journey, results
from tests.benchmarks.accuracy_stages import run_tests, tune, write_report
from tests.benchmarks.journey_prepare import ITEMS, LOG, Columns, prepare, to_events
from tests.benchmarks.journey_rankers import (
    CountingCooccurrence,
    CountingOptions,
    CountingPopularity,
    PersonalFrequency,
)

HOUSEHOLDS = 45
PRODUCTS = 60
BASKET = 4


def purchases(baskets: int) -> Columns:
    """Return baskets of BASKET products in ascending order, one after the other, of households that repeat a lot."""
    rng = np.random.default_rng(0)
    households = rng.integers(HOUSEHOLDS, size=baskets)
    products = [np.sort((7 * household + rng.integers(12, size=BASKET)) % PRODUCTS) for household in households]
    times = np.datetime64("2017-01-01T10:00:00", "ns") + 3600 * np.arange(baskets) * np.timedelta64(1, "s")
    return {
        "household_id": np.repeat(households, BASKET),
        "product_id": np.concatenate(products),
        "transaction_timestamp": np.repeat(times, BASKET),
        "sales_value": rng.random(baskets * BASKET),
    }


def product_table() -> Columns:
    names = np.array([f"d{number % 5}" for number in range(PRODUCTS)], object)
    missing = np.array([None] * PRODUCTS, object)
    ids = np.arange(PRODUCTS)
    return {"product_id": ids, "manufacturer_id": ids % 3, "department": names, "brand": names} | dict.fromkeys(
        ("product_category", "product_type", "package_size"), missing
    )


def make_test(log: EventLog, positions: slice = slice(None)) -> tuple[HeldOutEvents, Vocabulary]:
    vocabulary = Vocabulary(log.item_ids)
    sequences = UserSequences.from_log(log, vocabulary)
    return HeldOutEvents(sequences, np.arange(len(sequences))[positions], 100), vocabulary


def make_log(*rows: tuple[str, str, float]) -> EventLog:
    """Return a log of (user, item, day)."""
    events = [Event(user, item, "purchase", int(DAY_MS * (100 + day))) for user, item, day in rows]
    return event_log_from_blocks([list(events)], EventSchema())


def test_products_of_a_basket_are_in_an_order_that_says_nothing_about_their_numbers() -> None:
    events = list(to_events(purchases(500), min_purchases=1))
    tied = [(one, two) for one, two in pairwise(events) if one.ts_ms == two.ts_ms and one.item_id != two.item_id]
    ascending = [int(one.item_id) < int(two.item_id) for one, two in tied]
    assert 0.45 < np.mean(ascending) < 0.55
    assert events == list(to_events(purchases(500), min_purchases=1)), "the same order again"
    assert [each.ts_ms for each in events] == sorted(each.ts_ms for each in events)


def test_files_hold_the_products_that_are_bought_often_enough(tmp_path: Path) -> None:
    columns = purchases(100)
    counts = np.bincount(columns["product_id"], minlength=PRODUCTS)
    events, items = prepare(columns, product_table(), tmp_path, min_purchases=8)
    assert (events, items) == (counts[counts >= 8].sum(), (counts >= 8).sum())
    log = read_event_log(tmp_path / LOG)
    assert len(log) == events
    records = {item.item_id: item for item in read_items(tmp_path / ITEMS).items}
    assert records.keys() == set(log.item_ids)
    item = records[log.item_ids[0]]
    assert item.category == [f"d{int(item.item_id) % 5}"]
    assert item.brand == f"manufacturer {int(item.item_id) % 3}"


def test_popularity_counts_every_earlier_event_of_its_window_and_no_later_one() -> None:
    rows = [("a", "old", 0), ("a", "old", 1), ("b", "new", 9), ("c", "new", 10), ("c", "x", 10.5), ("d", "y", 12)]
    log = make_log(*rows)
    test_events, vocabulary = make_test(log)
    ids = [vocabulary.item_ids[token] for token in test_events.targets]
    week = CountingPopularity(len(vocabulary), CountingOptions(window_days=7)).slates(test_events, 2)
    all_time = CountingPopularity(len(vocabulary), CountingOptions()).slates(test_events, 2)
    decayed = CountingPopularity(len(vocabulary), CountingOptions(half_life_days=1)).slates(test_events, 1)
    names = [[vocabulary.item_ids[token] for token in row if token] for row in week]
    assert names[ids.index("old")] == [], "the first event of the log"
    assert names[ids.index("x")] == ["new"]
    assert names[ids.index("y")] == ["new", "x"]
    assert {vocabulary.item_ids[token] for token in all_time[ids.index("y")]} == {"old", "new"}
    assert vocabulary.item_ids[decayed[ids.index("y"), 0]] in ("x", "new"), "old events are worth little"


def test_cooccurrence_counts_held_out_events_before_the_scored_ones() -> None:
    """Bread is bought with milk, later with jam: jam is recommended once it has occurred more often."""
    rows = [
        (f"u{n}", item, n + part)
        for n in range(1500)
        for part, item in ((0.0, "bread"), (0.1, "milk" if n < 500 else "jam"))
    ]
    test_events, vocabulary = make_test(make_log(*rows))
    options = PipelineOptions(neighbours=8, half_life_days=10_000.0)
    slates = CountingCooccurrence(vocabulary, Exclusion(), options).slates(test_events, 1)
    names = np.array(["", *vocabulary.item_ids[1:]])
    is_jam = names[test_events.targets] == "jam"
    order = np.argsort(test_events.sequences.histories.ts_ms[test_events.positions][is_jam])
    recommended = names[slates[is_jam, 0]][order]
    assert set(recommended[:10]) == {"milk"}
    assert set(recommended[-10:]) == {"jam"}


def test_user_gets_what_they_bought_most_and_lately() -> None:
    bought = [("milk", 0), ("milk", 1), ("milk", 2), ("tea", 30), ("tea", 31)]
    log = make_log(*(("a", item, day) for item, day in bought), ("b", "x", 1))
    test_events, vocabulary = make_test(log)
    histories = test_events.sequences.histories
    tokens = test_events.sequences.tokens
    best = {}
    for half_life_days in (10_000.0, 5.0):
        scorer = PersonalFrequency(test_events.sequences, len(vocabulary), half_life_days)
        best[half_life_days] = vocabulary.item_ids[scorer.score(histories, tokens)[0].argmax()]
    assert best == {10_000.0: "milk", 5.0: "tea"}


@pytest.mark.parametrize("users", [None, 40])
def test_dry_run_goes_through_all_stages(users: int | None, tmp_path: Path) -> None:
    if users is None:
        prepare(purchases(600), product_table(), tmp_path, min_purchases=1)
        setting = replaced(journey.QUICK.setting, log=tmp_path / LOG, items=tmp_path / ITEMS, device="cpu")
    elif journey.SETTING.log.exists():
        setting = replaced(journey.QUICK.setting, users=users, device="cpu")
    else:
        pytest.skip("needs MILLRACE_DATA with journey/, see tests.benchmarks.journey_prepare")
    quick = replace(journey.QUICK, setting=setting, trials=1)
    tune(quick, tmp_path / "out", 2, None)
    run_tests(quick, tmp_path / "out", 2, None)
    write_report(quick, tmp_path / "out", tmp_path)
    metrics = results.load(tmp_path / "journey.json").metrics
    assert {f"ndcg10_{model}{steps}" for model in quick.contenders for steps in ("", "_untied")} <= metrics.keys()
    assert metrics["tied_share"] > 0.5
    assert metrics["hr10_personal_frequency"] > 0.2 or users
