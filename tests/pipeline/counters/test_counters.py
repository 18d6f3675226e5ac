"""Co-occurrence counters against a slow reference of the same formula; their bounds, decay and persistence."""

from collections import defaultdict
from collections.abc import Iterable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.counters.counters import Counters
from pipeline.counters.deltas import DeltaLog
from pipeline.data.log_io import EventLog
from pipeline.data.sequences import UserSequences
from pipeline.items.vocabulary import Vocabulary
from pipeline.jagged import find_rows, ranges
from pipeline.records import DAY_MS, EVENT_DTYPE, Histories, item_hash

START_MS = 1_700_000_000_000
HALF_LIFE_DAYS = 10.0


def history(*runs: list[tuple[str, int]]) -> Histories:
    """Pack one run of (item, minutes after the start) per user."""
    rings = []
    for run in runs:
        events = np.zeros(len(run), EVENT_DTYPE)
        events["item"] = [item_hash(item) for item, _ in run]
        events["ts_action_device"] = [START_MS + minute * 60_000 for _, minute in run]
        rings.append(events.tobytes())
    return Histories.from_rings(rings)


def new_counters(items: Iterable[str] = "abcdefgh", neighbours: int = 16, window: int = 3) -> Counters:
    return Counters(Vocabulary(items), HALF_LIFE_DAYS, neighbours, window)


def observe_latest(counters: Counters, histories: Histories, latest: np.ndarray) -> None:
    """Count the latest events of each user, int [n] of them."""
    first_new = np.repeat(histories.offsets[1:] - latest, histories.lengths)
    counters.observe(histories, np.arange(len(histories.events)) >= first_new)


def every(histories: Histories) -> np.ndarray:
    return np.ones(len(histories.events), bool)


def names(counters: Counters, tokens: np.ndarray) -> list[str]:
    return [counters.vocabulary.item_ids[token] for token in tokens]


class Reference:
    """The formula, event by event, without bounds."""

    def __init__(self, window: int) -> None:
        self.window = window
        self.popularity: dict[str, float] = defaultdict(float)
        self.pairs: dict[tuple[str, str], float] = defaultdict(float)

    def observe(self, run: list[tuple[str, int]], fresh: int) -> None:
        for position in range(len(run) - min(fresh, len(run)), len(run)):
            item, minute = run[position]
            weight = 2 ** (minute * 60_000 / (HALF_LIFE_DAYS * DAY_MS))
            self.popularity[item] += weight
            for distance, (other, _) in enumerate(reversed(run[max(0, position - self.window) : position]), 1):
                if other != item:
                    self.pairs[item, other] += weight * distance**-0.25
                    self.pairs[other, item] += weight * distance**-0.25

    def scores(self, run: list[tuple[str, int]]) -> dict[str, float]:
        scores: dict[str, float] = defaultdict(float)
        for age, (item, _) in enumerate(reversed(run[-10:])):
            for (one, other), count in self.pairs.items():
                if one == item and self.popularity[one] * self.popularity[other]:
                    scores[other] += 0.85**age * count / self.popularity[item] ** 0.5 / self.popularity[other] ** 0.35
        seen = {item for item, _ in run}
        return {item: score for item, score in scores.items() if item not in seen}


runs = st.lists(st.tuples(st.sampled_from("abcdefgh"), st.integers(0, 90 * 24 * 60)), min_size=1, max_size=14)


@settings(max_examples=60)
@given(
    st.lists(
        st.tuples(runs.map(lambda run: sorted(run, key=lambda e: e[1])), st.integers(0, 14)), min_size=1, max_size=6
    )
)
def test_top_k_equals_the_formula_without_excluded_items(batch: list):
    reference = Reference(window=3)
    counters = new_counters()
    for run, fresh in batch:
        reference.observe(run, fresh)
    histories = history(*(run for run, _ in batch))
    observe_latest(counters, histories, np.array([fresh for _, fresh in batch]))
    tokens, scores, cooccurring = counters.top_k(histories, every(histories), 8)
    for (run, _), row, values, from_pairs in zip(batch, tokens, scores, cooccurring, strict=True):
        expected = reference.scores(run)
        assert set(names(counters, row[from_pairs])) == set(expected)
        ranked = sorted(expected.values(), reverse=True)
        unit = values[0] / ranked[0] if ranked else 1.0  # stored units are relative to a reference time
        np.testing.assert_allclose(values[from_pairs], np.array(ranked) * unit, rtol=1e-4)
        seen = {item for item, _ in run}
        assert set(names(counters, row[row > 0])) == set("abcdefgh") - seen, "filled with every other item"
        assert (np.diff(values[row > 0]) <= 0).all()


def test_observing_in_one_call_or_many_counts_the_same():
    together = new_counters()
    apart = new_counters()
    batch = [[("a", 1), ("b", 2), ("c", 3)], [("b", 1), ("d", 9)]]
    observe_latest(together, history(*batch), np.array([3, 2]))
    for run in batch:
        for length in range(1, len(run) + 1):
            observe_latest(apart, history(run[:length]), np.array([1]))
    for name, array in together.state().items():
        np.testing.assert_allclose(array, apart.state()[name], rtol=1e-6, err_msg=name)


def test_full_neighbour_row_keeps_heavy_pairs_and_the_latest_newcomer():
    counters = new_counters([f"i{number}" for number in range(50)], neighbours=4, window=1)
    for number in (1, 2, 3):
        for _ in range(5):
            observe_latest(counters, history([("i0", 1), (f"i{number}", 2)]), np.array([2]))
    for number in range(10, 40):
        observe_latest(counters, history([("i0", 1), (f"i{number}", 2)]), np.array([2]))
    columns = counters.rows(np.array([counters.vocabulary.token("i0")])).columns[0]
    assert set(names(counters, columns)) == {"i1", "i2", "i3", "i39"}


def test_popularity_decays_with_event_time():
    counters = new_counters()
    observe_latest(counters, history(*[[("a", 0)]] * 8), np.ones(8, int))
    later = int(HALF_LIFE_DAYS * 24 * 60) * 3
    observe_latest(counters, history([("b", later)]), np.array([1]))
    assert names(counters, counters.popular(2)[0]) == ["a", "b"]
    np.testing.assert_allclose(counters.popular(2)[1], [1, 1], rtol=1e-5)
    observe_latest(counters, history([("b", later)]), np.array([1]))
    assert names(counters, counters.popular(2)[0]) == ["b", "a"]


def test_century_of_decay_stays_finite_and_ranks_recent_items():
    counters = new_counters()
    observe_latest(counters, history([("a", 0), ("b", 1)]), np.array([2]))
    century = 100 * 365 * 24 * 60
    observe_latest(counters, history([("c", century), ("d", century + 1)]), np.array([2]))
    assert names(counters, counters.popular(2)[0]) == ["d", "c"]
    assert all(np.isfinite(array).all() for array in counters.state().values())


def test_unknown_and_uncounted_items_do_not_disturb_ranking():
    counters = new_counters("ab")
    histories = history([("a", 1), ("zzz", 2), ("b", 3)], [("zzz", 1)])
    observe_latest(counters, histories, np.array([3, 1]))
    counters.vocabulary.admit([f"new{number}" for number in range(3000)])
    tokens, _, _ = counters.top_k(histories, every(histories), 5)
    assert (tokens > 0).all()
    assert names(counters, tokens[1][:2]) == ["b", "a"]


def test_empty_history_gets_popular_items_then_zeros():
    counters = new_counters("abc")
    observe_latest(counters, history([("c", 1)], [("c", 1), ("b", 2)]), np.array([1, 2]))
    empty = Histories.from_rings([b"", b""])
    tokens, _, cooccurring = counters.top_k(empty, every(empty), 5)
    assert names(counters, tokens[0]) == ["c", "b", "a", "", ""]
    assert not cooccurring.any()


def test_frozen_counters_do_not_change():
    counters = new_counters()
    observe_latest(counters, history([("a", 1), ("b", 2)]), np.array([2]))
    before = counters.state()
    counters.frozen = True
    observe_latest(counters, history([("c", 1), ("b", 2)]), np.array([2]))
    assert all((before[name] == array).all() for name, array in counters.state().items())


def test_restored_state_ranks_equally_under_another_vocabulary():
    counters = new_counters()
    other = new_counters("hgfedcba")
    batch = history([("a", 1), ("b", 2), ("c", 3)], [("b", 1), ("d", 9)])
    observe_latest(counters, batch, np.array([3, 2]))
    other.restore(counters.state())
    tokens, scores, cooccurring = counters.top_k(batch, every(batch), 6)
    other_tokens, other_scores, other_cooccurring = other.top_k(batch, every(batch), 6)
    assert names(counters, tokens[0][cooccurring[0]]) == names(other, other_tokens[0][other_cooccurring[0]])
    np.testing.assert_allclose(scores[cooccurring], other_scores[other_cooccurring], rtol=1e-5)


def test_deltas_hold_exactly_the_counts_since_the_last_take():
    counters = new_counters()
    counters.log = DeltaLog()
    observe_latest(counters, history([("a", 1), ("b", 2)]), np.array([2]))
    first = counters.take_deltas().summed(limit=8)
    assert names(counters, first.touched()) == ["a", "b"]
    own = first.select(np.array([counters.vocabulary.token("a")]))
    assert (names(counters, own.rows), names(counters, own.columns)) == (["a"], ["b"])
    assert [*own.popularity, *own.weights] == pytest.approx([1, 1], rel=1e-3)
    assert not len(counters.take_deltas().summed(limit=8).touched())
    counters.put_back(first)
    again = counters.take_deltas().summed(limit=8)
    np.testing.assert_allclose(again.weights, first.weights, rtol=1e-6)
    np.testing.assert_allclose(again.popularity, first.popularity, rtol=1e-6)


def test_delta_limit_keeps_the_heaviest_pairs_of_a_row():
    counters = new_counters()
    counters.log = DeltaLog()
    for other, times in (("b", 1), ("c", 3), ("d", 2)):
        observe_latest(counters, history(*[[("a", 1), (other, 2)]] * times), np.full(times, 2))
    deltas = counters.take_deltas().summed(limit=2).select(np.array([counters.vocabulary.token("a")]))
    assert names(counters, deltas.columns) == ["c", "d"]


def test_frozen_counters_reach_their_hit_rate_on_movielens(movielens_log: EventLog):
    counters = Counters(Vocabulary(movielens_log.item_ids), half_life_days=30.0, neighbours=64, window_events=10)
    sequences = UserSequences.from_log(movielens_log, counters.vocabulary)
    assert sequences.is_first_touch.all(), "every item of a history is a distinct one"
    positions = np.argsort(sequences.log_positions)  # of the log's events within the sequences
    for start in range(0, 80_000, 500):
        observe_latest(counters, *observed(sequences, positions[start : start + 500]))
    counters.frozen = True
    hits = 0
    popular_hits = 0
    for start in range(80_000, 100_000, 250):
        block = positions[start : start + 250]
        before = sequences.histories_before(block, max_events=1000)
        targets = sequences.tokens[block]
        hits += int((counters.top_k(before, every(before), 10)[0] == targets[:, None]).any(axis=1).sum())
        popular_hits += int((unseen_popularity_ranks(counters, before, targets) < 10).sum())
    assert hits / 20_000 > 0.195
    assert 0.07 < popular_hits / 20_000 < 0.09


def observed(sequences: UserSequences, new: np.ndarray) -> tuple[Histories, np.ndarray]:
    """Return the histories of these events' users up to their last one, and how many of the events each has."""
    users, fresh = np.unique(find_rows(sequences.offsets, new), return_counts=True)
    ends = np.sort(new)[np.cumsum(fresh) - 1] + 1  # sequences are sorted by user
    index, offsets = ranges(sequences.offsets[users], ends - sequences.offsets[users])
    return Histories(sequences.events[index], offsets), fresh


def unseen_popularity_ranks(counters: Counters, histories: Histories, targets: np.ndarray) -> np.ndarray:
    """Return each target's rank among the popular items that its user has not seen; 2^30 for a seen target.

    No history may name an item twice.
    """
    ranks = np.full(len(counters.vocabulary), 1 << 30)
    popular = counters.popular(2000)[0]
    ranks[popular] = np.arange(len(popular))
    users = histories.users
    tokens = counters.vocabulary.tokens(histories.items)
    better = np.bincount(users[ranks[tokens] < ranks[targets[users]]], minlength=len(targets))
    unseen_ranks = ranks[targets] - better
    unseen_ranks[users[tokens == targets[users]]] = 1 << 30
    return unseen_ranks


def row(counters: Counters, token: int) -> tuple[float, dict[int, float]]:
    """Return an item's popularity and neighbours."""
    rows = counters.rows(np.array([token]))
    return float(rows.popularity[0]), dict(zip(rows.columns[0].tolist(), rows.weights[0].tolist(), strict=True))


RUNS = [("a", 0), ("b", 1), ("c", 2), ("a", 3), ("b", 4)], [("b", 0), ("c", 1), ("a", 2)]


def test_delisted_item_counts_but_is_not_ranked_until_relisted():
    counters = new_counters("abcd")
    observe_latest(counters, history(*RUNS), np.array([9, 9]))
    request = history([("c", 0)]), np.ones(1, bool), 3
    before = names(counters, counters.top_k(*request)[0][0])
    counters.vocabulary.delist(["a"])
    assert before == ["a", "b", "d"]
    assert names(counters, counters.top_k(*request)[0][0]) == ["b", "d", ""]
    assert names(counters, counters.popular(4)[0]) == ["b", "c", "d"]
    assert counters.top_k(history([("a", 0)]), np.ones(1, bool), 1)[2].all(), "its neighbours are still recommended"
    counters.vocabulary.admit("ef")
    assert set(names(counters, counters.popular(9)[0])) == set("bcdef")
    counters.vocabulary.relist(["a"], counters.vocabulary.tokens_of_ids(["a"]))
    assert names(counters, counters.top_k(*request)[0][0]) == before


def test_item_on_an_evicted_token_inherits_no_counts():
    counters = new_counters("abc")
    fresh = new_counters("Xbc")
    counters.log = DeltaLog()
    observe_latest(counters, history(*RUNS), np.array([9, 9]))
    counters.vocabulary.evict(np.array([1]))
    assert counters.vocabulary.admit(["X"]).tolist() == [1]
    rest = history([("b", 1), ("c", 2), ("X", 4)])
    observe_latest(counters, rest, np.array([1]))
    observe_latest(fresh, rest, np.array([1]))
    assert row(counters, 1) == row(fresh, 1)
    deltas = counters.take_deltas().summed(16)
    assert deltas.select(np.array([1])).popularity == pytest.approx(row(fresh, 1)[0])
    pairs = set(zip(deltas.rows.tolist(), deltas.columns.tolist(), strict=True))
    assert pairs == {(2, 3), (3, 2), (1, 2), (2, 1), (1, 3), (3, 1)}


def test_frozen_counters_drop_evicted_items():
    counters = new_counters("abc")
    observe_latest(counters, history(*RUNS), np.array([9, 9]))
    frozen = Counters(counters.vocabulary, HALF_LIFE_DAYS, 16, 3)
    frozen.restore(counters.state())
    frozen.frozen = True
    counters.vocabulary.evict(np.array([2]))
    counters.vocabulary.admit(["X"])
    assert names(frozen, frozen.popular(3)[0]) == ["a", "c", "X"]
    assert frozen.popular(3)[1][2] == 0


FAR_MINUTES = 16 * 365 * 24 * 60


def shop_runs(*extra: list[tuple[str, int]]) -> list[list[tuple[str, int]]]:
    """Return 200 users of three items each, and others."""
    rng = np.random.default_rng(5)
    return [
        [(item, 10 * user + place) for place, item in enumerate(rng.choice([*"abcdef"], 3))] for user in range(200)
    ] + [*extra]


@pytest.mark.parametrize("extra", [[("g", FAR_MINUTES)], [("a", 7), ("g", FAR_MINUTES), ("h", 2 * FAR_MINUTES)]])
@pytest.mark.parametrize("batch", [1, 50, 1000])
def test_an_event_of_the_far_future_takes_nothing_from_the_other_counts(extra: list, batch: int) -> None:
    """The counts survive in the table and in its saved state, wherever in the stream the event comes."""
    honest = new_counters()
    observe_latest(honest, history(*shop_runs()), np.full(200, 3))
    for place in (0, 3, 150, 200):
        runs = shop_runs()
        runs.insert(place, extra)
        disturbed = new_counters()
        for start in range(0, len(runs), batch):
            part = runs[start : start + batch]
            observe_latest(disturbed, history(*part), np.array([len(run) for run in part]))
        restored = new_counters()
        restored.restore(disturbed.state())
        tokens = np.array([honest.vocabulary.token(item) for item in "abcdef"])
        expected = honest.neighbours.weights[tokens].sum() / honest.popularity[tokens].sum()
        for counters in (disturbed, restored):
            found = counters.neighbours.weights[tokens].sum() / counters.popularity[tokens].sum()
            assert found == pytest.approx(expected, rel=0.05)
            assert counters.newest_ms <= START_MS + 2000 * 60_000
            assert set(names(counters, counters.popular(6)[0])) == set("abcdef")


def test_a_merged_row_of_the_far_future_leaves_the_other_rows_as_they_are() -> None:
    counters = new_counters()
    observe_latest(counters, history(*shop_runs()), np.full(200, 3))
    tokens = np.arange(1, 7, dtype=np.int32)
    rows = counters.rows(tokens)
    rows.as_of_ms[0] += FAR_MINUTES * 60_000
    before = counters.neighbours.weights[tokens].copy()
    counters.replace_rows(rows)
    np.testing.assert_allclose(counters.neighbours.weights[tokens], before, rtol=1e-5)
    assert np.isfinite(counters.popularity).all()


def test_an_event_that_arrives_late_is_the_one_that_is_counted() -> None:
    counters = new_counters()
    rings: list[bytes] = [b""]
    for item, minute in (("a", 10), ("b", 20), ("c", 1)):
        event = np.zeros(1, EVENT_DTYPE)
        event["item"] = item_hash(item)
        event["ts_action_device"] = START_MS + minute * 60_000
        rings.append(rings[-1] + event.tobytes())
        counters.observe(*Histories.from_rings_and_new(rings[-1:], np.array([1])))
    at_once = new_counters()
    at_once.observe(*Histories.from_rings_and_new(rings[-1:], np.array([3])))
    tokens = np.array([counters.vocabulary.token(item) for item in "abc"])
    np.testing.assert_allclose(counters.rows(tokens).popularity, at_once.rows(tokens).popularity, rtol=1e-6)
    neighbours = counters.rows(tokens).columns
    assert [set(names(counters, row[row > 0])) for row in neighbours] == [set("bc"), set("ac"), set("ab")]


@given(st.lists(st.permutations(range(6)), min_size=1, max_size=4), st.integers(0, 6))
def test_events_are_marked_new_by_their_arrival_not_their_time(arrivals: list[list[int]], new: int) -> None:
    rings = []
    for minutes in arrivals:
        events = np.zeros(6, EVENT_DTYPE)
        events["ts_action_device"] = np.array(minutes) * 60_000
        rings.append(events.tobytes())
    histories, is_new = Histories.from_rings_and_new(rings, np.full(len(rings), new))
    for user, minutes in enumerate(arrivals):
        run = slice(histories.offsets[user], histories.offsets[user + 1])
        marked = histories.ts_ms[run][is_new[run]] // 60_000
        assert marked.tolist() == sorted(minutes[6 - new :])
