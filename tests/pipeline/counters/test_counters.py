"""Co-occurrence counters against a dense, slow model of the same formula; their bounds, decay and persistence."""

import os
from collections import defaultdict
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.counters.counters import Counters
from pipeline.counters.deltas import DeltaLog
from pipeline.items.vocabulary import Vocabulary
from pipeline.records import DAY_MS, EVENT_DTYPE, Histories, item_hash

START_MS = 1_700_000_000_000
HALF_LIFE_DAYS = 10.0


def history(*runs: list[tuple[str, int]]) -> Histories:
    """One run of (item, minutes after the start) a user."""
    rings = []
    for run in runs:
        events = np.zeros(len(run), EVENT_DTYPE)
        events["item"] = [item_hash(item) for item, _ in run]
        events["ts_action_device"] = [START_MS + minute * 60_000 for _, minute in run]
        rings.append(events.tobytes())
    return Histories.from_rings(rings)


def counters(items: str = "abcdefgh", neighbours: int = 16, window: int = 3) -> Counters:
    return Counters(Vocabulary(items), HALF_LIFE_DAYS, neighbours, window)


def every(histories: Histories) -> np.ndarray:
    return np.ones(len(histories.events), bool)


def names(made: Counters, tokens: np.ndarray) -> list[str]:
    return [made.vocabulary.item_ids[token] for token in tokens]


class Model:
    """The formula, event by event, without bounds."""

    def __init__(self, window: int) -> None:
        self.window, self.newest = window, START_MS
        self.popularity: dict[str, float] = defaultdict(float)
        self.pairs: dict[tuple[str, str], float] = defaultdict(float)

    def observe(self, run: list[tuple[str, int]], fresh: int) -> None:
        for at in range(len(run) - min(fresh, len(run)), len(run)):
            item, minute = run[at]
            weight = 2 ** (minute * 60_000 / (HALF_LIFE_DAYS * DAY_MS))
            self.popularity[item] += weight
            for distance, (other, _) in enumerate(reversed(run[max(0, at - self.window) : at]), 1):
                if other != item:
                    self.pairs[item, other] += weight * distance**-0.25
                    self.pairs[other, item] += weight * distance**-0.25

    def scores(self, run: list[tuple[str, int]]) -> dict[str, float]:
        total: dict[str, float] = defaultdict(float)
        for age, (item, _) in enumerate(reversed(run[-10:])):
            for (one, other), count in self.pairs.items():
                if one == item and self.popularity[one] * self.popularity[other]:
                    total[other] += 0.85**age * count / self.popularity[item] ** 0.5 / self.popularity[other] ** 0.35
        return {item: score for item, score in total.items() if item not in {seen for seen, _ in run}}


runs = st.lists(st.tuples(st.sampled_from("abcdefgh"), st.integers(0, 90 * 24 * 60)), min_size=1, max_size=14)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(runs.map(lambda run: sorted(run, key=lambda e: e[1])), st.integers(0, 14)), min_size=1, max_size=6
    )
)
def test_scores_are_those_of_the_formula_and_never_an_excluded_item(batch: list):
    model, made = Model(3), counters()
    for run, fresh in batch:
        model.observe(run, fresh)
    histories = history(*(run for run, _ in batch))
    made.observe(histories, np.array([fresh for _, fresh in batch]))
    tokens, scores, cooccurring = made.top_k(histories, every(histories), 8)
    for (run, _), row, values, from_pairs in zip(batch, tokens, scores, cooccurring, strict=True):
        expected = model.scores(run)
        assert set(names(made, row[from_pairs])) == set(expected)
        ranked = sorted(expected.values(), reverse=True)
        unit = values[0] / ranked[0] if ranked else 1.0  # stored units are relative to a reference time
        np.testing.assert_allclose(values[from_pairs], np.array(ranked) * unit, rtol=1e-4)
        seen = {item for item, _ in run}
        assert set(names(made, row[row > 0])) == set("abcdefgh") - seen, "full as far as the catalogue allows"
        assert (np.diff(values[row > 0]) <= 0).all()


def test_one_call_counts_what_many_calls_count():
    together, apart = counters(), counters()
    batch = [[("a", 1), ("b", 2), ("c", 3)], [("b", 1), ("d", 9)]]
    together.observe(history(*batch), np.array([3, 2]))
    for run in batch:
        for length in range(1, len(run) + 1):
            apart.observe(history(run[:length]), np.array([1]))
    for name, array in together.state().items():
        np.testing.assert_allclose(array, apart.state()[name], rtol=1e-6, err_msg=name)


def test_a_full_row_stays_bounded_keeps_its_heavy_pairs_and_still_learns_newcomers():
    made = counters([f"i{number}" for number in range(50)], neighbours=4, window=1)
    for number in (1, 2, 3):
        for _ in range(5):
            made.observe(history([("i0", 1), (f"i{number}", 2)]), np.array([2]))
    for number in range(10, 40):
        made.observe(history([("i0", 1), (f"i{number}", 2)]), np.array([2]))
    columns = made.rows(np.array([made.vocabulary.token("i0")])).columns[0]
    assert set(names(made, columns)) == {"i1", "i2", "i3", "i39"}


def test_an_old_favourite_yields_to_a_new_one_as_event_time_passes():
    made = counters()
    made.observe(history(*[[("a", 0)]] * 8), np.ones(8, int))
    later = int(HALF_LIFE_DAYS * 24 * 60) * 3
    made.observe(history([("b", later)]), np.array([1]))
    assert names(made, made.popular(2)[0]) == ["a", "b"]
    np.testing.assert_allclose(made.popular(2)[1], [1, 1], rtol=1e-5)
    made.observe(history([("b", later)]), np.array([1]))
    assert names(made, made.popular(2)[0]) == ["b", "a"]


def test_a_century_of_decay_neither_overflows_nor_forgets_the_present():
    made = counters()
    made.observe(history([("a", 0), ("b", 1)]), np.array([2]))
    century = 100 * 365 * 24 * 60
    made.observe(history([("c", century), ("d", century + 1)]), np.array([2]))
    assert names(made, made.popular(2)[0]) == ["d", "c"]
    assert all(np.isfinite(array).all() for array in made.state().values())


def test_unknown_items_and_new_ones_do_no_harm():
    made = counters("ab")
    histories = history([("a", 1), ("zzz", 2), ("b", 3)], [("zzz", 1)])
    made.observe(histories, np.array([3, 1]))
    made.vocabulary.admit([f"new{number}" for number in range(3000)])
    tokens, _, _ = made.top_k(histories, every(histories), 5)
    assert (tokens > 0).all()
    assert names(made, tokens[1][:2]) == ["b", "a"]


def test_an_empty_history_gets_the_popular_items_and_an_exhausted_catalogue_leaves_zeros():
    made = counters("abc")
    made.observe(history([("c", 1)], [("c", 1), ("b", 2)]), np.array([1, 2]))
    empty = Histories.from_rings([b"", b""])
    tokens, _, cooccurring = made.top_k(empty, every(empty), 5)
    assert names(made, tokens[0]) == ["c", "b", "a", "", ""]
    assert not cooccurring.any()


def test_frozen_counters_do_not_change():
    made = counters()
    made.observe(history([("a", 1), ("b", 2)]), np.array([2]))
    before = made.state()
    made.frozen = True
    made.observe(history([("c", 1), ("b", 2)]), np.array([2]))
    assert all((before[name] == array).all() for name, array in made.state().items())


def test_a_restored_state_answers_the_same_under_another_vocabulary():
    made, batch = counters(), history([("a", 1), ("b", 2), ("c", 3)], [("b", 1), ("d", 9)])
    made.observe(batch, np.array([3, 2]))
    other = counters("hgfedcba")
    other.restore(made.state())
    here, there = made.top_k(batch, every(batch), 6), other.top_k(batch, every(batch), 6)
    assert names(made, here[0][0][here[2][0]]) == names(other, there[0][0][there[2][0]])
    np.testing.assert_allclose(here[1][here[2]], there[1][there[2]], rtol=1e-5)


def test_deltas_hold_exactly_what_was_counted_since_the_last_take():
    made = counters()
    made.log = DeltaLog()
    made.observe(history([("a", 1), ("b", 2)]), np.array([2]))
    first = made.take_deltas().summed(limit=8)
    assert names(made, first.touched()) == ["a", "b"]
    own = first.select(np.array([made.vocabulary.token("a")]))
    assert (names(made, own.rows), names(made, own.columns)) == (["a"], ["b"])
    assert [*own.popularity, *own.weights] == pytest.approx([1, 1], rel=1e-3)
    assert not len(made.take_deltas().summed(limit=8).touched())
    made.put_back(first)
    again = made.take_deltas().summed(limit=8)
    np.testing.assert_allclose(again.weights, first.weights, rtol=1e-6)
    np.testing.assert_allclose(again.popularity, first.popularity, rtol=1e-6)


def test_of_a_long_row_of_deltas_the_heaviest_pairs_go_to_the_merge():
    made = counters()
    made.log = DeltaLog()
    for other, times in (("b", 1), ("c", 3), ("d", 2)):
        made.observe(history(*[[("a", 1), (other, 2)]] * times), np.full(times, 2))
    deltas = made.take_deltas().summed(limit=2).select(np.array([made.vocabulary.token("a")]))
    assert names(made, deltas.columns) == ["c", "d"]


def test_the_frozen_counters_hit_a_fifth_of_the_last_fifth_of_the_real_log():
    path = Path(os.environ.get("MILLRACE_DATA", "../shared/data")) / "ml-100k" / "ml-100k.inter"
    if not path.exists():
        pytest.skip(f"{path} is not there: set MILLRACE_DATA")
    lines = [line.split("\t") for line in path.read_text().splitlines()[1:]]
    lines.sort(key=lambda line: (float(line[3]), line[0], line[1]))
    made = Counters(Vocabulary(sorted({line[1] for line in lines})), 30.0, 64, 10)
    rings: dict[str, bytes] = defaultdict(bytes)
    for start in range(0, 80_000, 500):
        new = append(rings, lines[start : start + 500])
        made.observe(Histories.from_rings([rings[user] for user in new]), np.array(list(new.values())))
    made.frozen = True
    hits = popular_hits = 0
    ranking = made.popular(2000)[0].tolist()
    for start in range(80_000, 100_000, 250):
        part = lines[start : start + 250]
        before = Histories.from_rings([(rings[line[0]], append(rings, [line]))[0] for line in part])
        targets = made.vocabulary.tokens(np.array([item_hash(line[1]) for line in part], np.uint64))
        hits += int((made.top_k(before, every(before), 10)[0] == targets[:, None]).any(axis=1).sum())
        seen = np.split(made.vocabulary.tokens(before.items), before.offsets[1:-1])
        popular_hits += sum(
            first_unseen(ranking, set(row.tolist()), 10, t) for row, t in zip(seen, targets, strict=True)
        )
    assert hits / 20_000 > 0.195
    assert 0.07 < popular_hits / 20_000 < 0.09


def append(rings: dict[str, bytes], lines: list[list[str]]) -> dict[str, int]:
    """Add the lines to their users' rings; how many each user got."""
    fresh: dict[str, int] = defaultdict(int)
    for user, item, _, seconds in lines:
        event = np.zeros(1, EVENT_DTYPE)
        event["item"], event["ts_action_device"] = item_hash(item), int(float(seconds)) * 1000
        rings[user] += event.tobytes()
        fresh[user] += 1
    return fresh


def first_unseen(ranking: list[int], seen: set[int], k: int, target: int) -> bool:
    return target in list(islice((token for token in ranking if token not in seen), k))


def row(made: Counters, token: int) -> tuple[float, dict[int, float]]:
    """Popularity and neighbours."""
    rows = made.rows(np.array([token]))
    return float(rows.popularity[0]), dict(zip(rows.columns[0].tolist(), rows.weights[0].tolist(), strict=True))


RUNS = [("a", 0), ("b", 1), ("c", 2), ("a", 3), ("b", 4)], [("b", 0), ("c", 1), ("a", 2)]


def test_a_withdrawn_item_is_no_ones_neighbour_and_not_popular_but_still_counts_and_may_come_back():
    made = counters("abcd")
    made.observe(history(*RUNS), np.array([9, 9]))
    asked = history([("c", 0)]), np.ones(1, bool), 3
    before = names(made, made.top_k(*asked)[0][0])
    made.vocabulary.delist(["a"])
    assert before == ["a", "b", "d"]
    assert names(made, made.top_k(*asked)[0][0]) == ["b", "d", ""]
    assert names(made, made.popular(4)[0]) == ["b", "c", "d"]
    assert made.top_k(history([("a", 0)]), np.ones(1, bool), 1)[2].all(), "a user who took it has neighbours of it"
    made.vocabulary.admit("ef")
    assert set(names(made, made.popular(9)[0])) == set("bcdef")
    made.vocabulary.relist(["a"])
    assert names(made, made.top_k(*asked)[0][0]) == before


def test_an_item_that_takes_over_a_token_takes_over_nothing_that_was_counted():
    made, fresh = counters("abc"), counters("Xbc")
    made.log = DeltaLog()
    made.observe(history(*RUNS), np.array([9, 9]))
    made.vocabulary.evict(np.array([1]))
    assert made.vocabulary.admit(["X"]).tolist() == [1]
    rest = history([("b", 1), ("c", 2), ("X", 4)])
    made.observe(rest, np.array([1]))
    fresh.observe(rest, np.array([1]))
    assert row(made, 1) == row(fresh, 1)
    deltas = made.take_deltas().summed(16)
    assert deltas.select(np.array([1])).popularity == pytest.approx(row(fresh, 1)[0])
    pairs = set(zip(deltas.rows.tolist(), deltas.columns.tolist(), strict=True))
    assert pairs == {(2, 3), (3, 2), (1, 2), (2, 1), (1, 3), (3, 1)}


def test_counters_that_only_look_on_forget_what_was_retired():
    made = counters("abc")
    made.observe(history(*RUNS), np.array([9, 9]))
    shadow = Counters(made.vocabulary, HALF_LIFE_DAYS, 16, 3)
    shadow.restore(made.state())
    shadow.frozen = True
    made.vocabulary.evict(np.array([2]))
    made.vocabulary.admit(["X"])
    assert names(shadow, shadow.popular(3)[0]) == ["a", "c", "X"]
    assert shadow.popular(3)[1][2] == 0
