"""The simulated shop: one seed, one log; in order; believable; and its truth is worth something."""

from collections import Counter

import msgspec
import numpy as np
import pytest

from pipeline.data.log_io import read_log, read_log_by_time
from pipeline.simulation.choices import ChoiceModel, SessionStates
from pipeline.simulation.ground_truth import GroundTruth, simulate
from pipeline.simulation.simulator import EXCLUDED_EVENTS, Simulator
from pipeline.simulation.world import SimulatorConfig, World

SMALL = SimulatorConfig(events=12_000, users=400, items=300)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("shop")
    simulate(SMALL, path)
    return path


def test_one_seed_makes_one_log_to_the_byte(folder, tmp_path):
    simulate(SMALL, tmp_path)
    for name in ("events.jsonl", "items.jsonl", "truth.json"):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()
    simulate(msgspec.structs.replace(SMALL, seed=8), tmp_path)
    assert (tmp_path / "events.jsonl").read_bytes() != (folder / "events.jsonl").read_bytes()


def test_the_log_has_its_length_and_lies_in_event_time_order(folder):
    log = list(read_log(folder / "events.jsonl"))
    assert len(log) == SMALL.events
    assert log == list(read_log_by_time(folder / "events.jsonl"))


def test_users_come_in_sessions_with_all_kinds_of_actions(folder):
    log = list(read_log(folder / "events.jsonl"))
    actions = Counter(event.action for event in log)
    assert set(actions) == {"view", "click", "like", "cart", "purchase", "skip"}
    assert actions["view"] > actions["like"] > actions["purchase"] > 0
    assert all((event.value is not None) == (event.action in ("cart", "purchase")) for event in log)
    by_user: dict[str, list[int]] = {}
    for event in log:
        by_user.setdefault(event.user_id, []).append(event.ts_ms)
    gaps = np.concatenate([np.diff(times) for times in by_user.values()])
    assert 0.75 < (gaps < 30 * 60_000).mean() < 0.95  # within sessions
    assert (gaps > 6 * 3_600_000).sum() > 500  # between them


def test_late_items_are_not_touched_before_they_are_born():
    world = World.from_config(SMALL)
    start = SMALL.start_ms
    for event in (event for chunk, _ in Simulator(SMALL).chunks() for event in chunk):
        born_ms = start + int(world.born_day[int(event.item_id.removeprefix("item-"))]) * 86_400_000
        assert event.ts_ms >= born_ms


def test_the_truth_beats_popularity_and_its_odds_tell_outcomes_apart(folder):
    truth = msgspec.json.decode((folder / "truth.json").read_bytes(), type=GroundTruth)
    log = list(read_log(folder / "events.jsonl"))
    popular = {item for item, _ in Counter(event.item_id for event in log).most_common(10)}
    at_best = np.mean([event.item_id in popular for event in log[-truth.scored :]])
    assert truth.hit_rate > 2 * at_best
    assert truth.scored == pytest.approx(0.2 * SMALL.events, abs=5)
    assert all(head.auc is not None and head.auc > 0.65 for head in truth.heads.values())


def test_the_truth_hits_no_item_that_serving_excludes():
    heavy = SimulatorConfig(events=12_000, users=40, items=300, topics=10)  # 300 events a user: beyond the memory
    touched: dict[str, list[str]] = {}
    repeats = 0
    for chunk, truth in Simulator(heavy, truth_from=0.0).chunks():
        for event, hit in zip(chunk, truth["hit"].tolist(), strict=True):
            history = touched.setdefault(event.user_id, [])
            repeated = event.item_id in history[-EXCLUDED_EVENTS:]
            repeats += repeated
            assert not (hit and repeated)
            history.append(event.item_id)
    assert repeats > 1000


def test_after_an_event_the_session_goes_on_or_is_over():
    world, over = World.from_config(SMALL), 0.125
    choices, nothing = ChoiceModel(world, np.zeros(SMALL.items), day=40), np.full((1, 1), -1)
    after = SessionStates(
        price_level=np.array([2]), interests=np.array([[3, 7, 9]]), interest_weights=np.array([[0.5, 0.3, 0.2]]), intent=np.array([3]),
        last_item=np.array([20]), last_action=np.array([4]), seen=nothing,
    )  # fmt: skip
    goes_on, begins = choices.likelihood(after), choices.likelihood(after.after_session())
    assert not np.allclose(goes_on, begins)
    assert np.allclose(choices.likelihood(after, over), (1 - over) * goes_on + over * begins)
    assert choices.likelihood(after, over).sum() <= 1 + 1e-9


def test_what_is_drawn_has_the_likelihood_that_the_truth_states():
    world, dice, n = World.from_config(SMALL), np.random.default_rng(3), 60_000
    choices = ChoiceModel(world, np.zeros(SMALL.items), day=40)
    one = SessionStates(
        price_level=np.array([1]), interests=np.array([[3, 7, 9]]), interest_weights=np.array([[0.5, 0.3, 0.2]]), intent=np.array([7]),
        last_item=np.array([11]), last_action=np.array([1]), seen=np.array([[11, int(world.sequels[11][0])]]),
    )  # fmt: skip
    likelihood = choices.likelihood(one)[0]
    drawn, _ = choices.sample(dice, one.select(np.zeros(n, np.int64)))
    shares = np.bincount(drawn, minlength=SMALL.items) / n
    likely = np.argsort(-likelihood)[:20]
    assert np.allclose(shares[likely], likelihood[likely] / likelihood.sum(), atol=0.008)
