"""The simulated shop is deterministic, ordered and realistic, and its ground truth is better than popularity."""

from collections import Counter
from pathlib import Path

import msgspec
import numpy as np
import pytest
from msgspec.structs import replace

from pipeline.data.log_io import read_log, read_log_by_time
from pipeline.records import DAY_MS, Event
from pipeline.simulation.choices import CLICK, PURCHASE, ChoiceModel, SessionStates
from pipeline.simulation.ground_truth import GroundTruth, simulate
from pipeline.simulation.simulator import EXCLUDED_EVENTS, Simulator
from pipeline.simulation.world import SimulatorConfig, World

SMALL = SimulatorConfig(events=12_000, users=400, items=300)
TINY = SimulatorConfig(events=1500, users=60, items=80, days=15)
MINUTE_MS = 60_000
HOUR_MS = 60 * MINUTE_MS


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("shop")
    simulate(SMALL, path)
    return path


@pytest.fixture(scope="module")
def log(folder: Path) -> list[Event]:
    events = list(read_log(folder / "events.jsonl"))
    assert all(isinstance(event, Event) for event in events)
    return events  # pyright: ignore[reportReturnType]


@pytest.fixture(scope="module")
def choices() -> ChoiceModel:
    return ChoiceModel(World.from_config(SMALL), np.zeros(SMALL.items), day=40)


def one_session(
    price_level: int = 1, intent: int = 7, last_item: int = 11, last_action: int = CLICK, seen: tuple[int, ...] = (-1,)
) -> SessionStates:
    return SessionStates(
        price_level=np.array([price_level]),
        interests=np.array([[3, 7, 9]]),
        interest_weights=np.array([[0.5, 0.3, 0.2]]),
        intent=np.array([intent]),
        last_item=np.array([last_item]),
        last_action=np.array([last_action]),
        seen=np.array([seen]),
    )


def test_same_seed_writes_the_same_bytes_and_another_seed_others(tmp_path: Path) -> None:
    simulate(TINY, tmp_path / "one")
    simulate(TINY, tmp_path / "same")
    simulate(replace(TINY, seed=8), tmp_path / "other")
    for name in ("events.jsonl", "items.jsonl", "truth.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "same" / name).read_bytes()
    assert (tmp_path / "one" / "events.jsonl").read_bytes() != (tmp_path / "other" / "events.jsonl").read_bytes()


def test_log_has_the_configured_length_in_event_time_order(folder: Path, log: list[Event]) -> None:
    assert len(log) == SMALL.events
    assert log == list(read_log_by_time(folder / "events.jsonl"))


def test_users_come_in_sessions_with_every_action(log: list[Event]) -> None:
    actions = Counter(event.action for event in log)
    assert set(actions) == {"view", "click", "like", "cart", "purchase", "skip"}
    assert actions["view"] > actions["like"] > actions["purchase"] > 0
    assert all((event.value is not None) == (event.action in ("cart", "purchase")) for event in log)
    times_by_user: dict[str, list[int]] = {}
    for event in log:
        times_by_user.setdefault(event.user_id, []).append(event.ts_ms)
    gaps_ms = np.concatenate([np.diff(times) for times in times_by_user.values()])
    assert 0.75 < (gaps_ms < 30 * MINUTE_MS).mean() < 0.95  # within sessions
    assert (gaps_ms > 6 * HOUR_MS).sum() > 500  # between sessions


def test_late_items_have_no_events_before_their_first_day(log: list[Event]) -> None:
    world = World.from_config(SMALL)
    assert (world.born_day > 0).any()
    for event in log:
        born_day = int(world.born_day[int(event.item_id.removeprefix("item-"))])
        assert event.ts_ms >= SMALL.start_ms + born_day * DAY_MS


def test_truth_beats_popularity_and_its_probabilities_predict_outcomes(folder: Path, log: list[Event]) -> None:
    truth = msgspec.json.decode((folder / "truth.json").read_bytes(), type=GroundTruth)
    popular = {item for item, _ in Counter(event.item_id for event in log).most_common(10)}
    popular_hit_rate = np.mean([event.item_id in popular for event in log[-truth.scored :]])
    assert truth.hit_rate > 2 * popular_hit_rate
    assert truth.scored == pytest.approx(0.2 * SMALL.events, abs=5)
    assert all(head.auc is not None and head.auc > 0.65 for head in truth.heads.values())


def test_truth_never_hits_an_item_that_serving_excludes() -> None:
    # 600 events per user: more than EXCLUDED_EVENTS, so that old items may be hit again.
    config = SimulatorConfig(events=6000, users=10, items=300, topics=10, session_events=30.0, days=30)
    histories: dict[str, list[str]] = {}
    repeats = 0
    for chunk, truth in Simulator(config, truth_from=0.0).chunks():
        for event, hit in zip(chunk, truth["hit"].tolist(), strict=True):
            history = histories.setdefault(event.user_id, [])
            is_repeat = event.item_id in history[-EXCLUDED_EVENTS:]
            repeats += is_repeat
            assert not (hit and is_repeat)
            history.append(event.item_id)
    assert repeats > 1000
    assert max(len(history) for history in histories.values()) > EXCLUDED_EVENTS


def test_likelihood_mixes_a_continued_and_an_ended_session(choices: ChoiceModel) -> None:
    over = 0.125
    states = one_session(price_level=2, intent=3, last_item=20, last_action=PURCHASE)
    continued = choices.likelihood(states)
    ended = choices.likelihood(states.after_session())
    mixed = choices.likelihood(states, over)
    assert not np.allclose(continued, ended)
    assert np.allclose(mixed, (1 - over) * continued + over * ended)
    assert mixed.sum() <= 1 + 1e-9


def test_samples_follow_the_stated_likelihood(choices: ChoiceModel) -> None:
    n = 60_000
    sequel = int(World.from_config(SMALL).sequels[11][0])
    states = one_session(seen=(11, sequel))
    likelihood = choices.likelihood(states)[0]
    items, _ = choices.sample(np.random.default_rng(3), states.select(np.zeros(n, np.int64)))
    frequency = np.bincount(items, minlength=SMALL.items) / n
    likeliest = np.argsort(-likelihood)[:20]
    assert np.allclose(frequency[likeliest], likelihood[likeliest] / likelihood.sum(), atol=0.008)
