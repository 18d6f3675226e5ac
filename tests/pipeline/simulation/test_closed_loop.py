"""Users of the simulated shop react to slates: what they are shown changes what they take, do and pay."""

from copy import deepcopy

import numpy as np
import pytest
from msgspec.structs import replace

from pipeline.data.event_log import EventLog
from pipeline.items.vocabulary import Vocabulary
from pipeline.records import EventSchema, Histories
from pipeline.serving.strategy import RankedItems
from pipeline.simulation.choices import PURCHASE, SessionStates, appeal, choose_from_slates
from pipeline.simulation.closed_loop import ColumnPacker, PolicyUnderTest, run, warm_up
from pipeline.simulation.simulator import Simulator
from pipeline.simulation.world import SimulatorConfig, World

SHOP = SimulatorConfig(events=12_000, users=150, items=100, days=30)
DAYS = 6


class Always:
    """A rung that shows everyone the same items, and remembers the histories that it was asked with."""

    name = "always"

    def __init__(self, tokens: np.ndarray) -> None:
        self._tokens = tokens
        self.asked: list[Histories] = []

    def rank(self, histories: Histories, k: int) -> RankedItems:
        self.asked.append(histories)
        tokens = np.tile(self._tokens[:k], (len(histories), 1)).astype(np.int32)
        return RankedItems(tokens, np.zeros(tokens.shape), None, self.name)


@pytest.fixture(scope="module")
def warm() -> tuple[Simulator, EventLog]:
    simulator = Simulator(SHOP)
    return simulator, warm_up(simulator, DAYS)[0]


def best(simulator: Simulator, sign: int) -> list[str]:
    """The ten items of the highest (1) or lowest (-1) quality that are there from the first day on."""
    world = simulator.world
    order = np.argsort(-sign * np.where(world.born_day == 0, world.quality, -sign * np.inf))
    return [f"item-{number}" for number in order[:10]]


def shown(warm: tuple[Simulator, EventLog], ids: list[str]) -> tuple[Simulator, PolicyUnderTest, Always]:
    simulator, log = deepcopy(warm[0]), warm[1]
    vocabulary = Vocabulary(log.item_ids)
    rung = Always(np.array([vocabulary.token(one) for one in ids]))
    return simulator, PolicyUnderTest(simulator, rung, vocabulary, log), rung


def test_a_warm_up_is_a_log_like_any_other(warm) -> None:
    log = warm[1]
    assert (np.diff(log.ts_ms) >= 0).all()
    assert log.user_ids == sorted(log.user_ids)
    assert (log.events["item"] == ColumnPacker(warm[0], EventSchema()).hashes[_numbers(log.item_ids)[log.items]]).all()
    assert len(np.unique(log.users)) > 75


def test_nobody_who_shows_nothing_changes_the_shop(warm) -> None:
    simulator, showcase, _ = shown(warm, [])
    assert run(deepcopy(warm[0]), DAYS, 3, None).events > 100
    simulator = deepcopy(simulator)
    simulator.config = replace(SHOP, slate_take_rate=0.0)
    assert run(simulator, DAYS, 1, None) == run(deepcopy(warm[0]), DAYS, 1, None)
    assert showcase.slates(np.array([0, 1])).tolist() == [[], []]


def test_good_items_on_the_slate_engage_pay_and_bring_users_back_more_than_poor_ones(warm) -> None:
    simulator, showcase, _ = shown(warm, best(warm[0], 1))
    good = run(simulator, DAYS, 9, showcase)
    simulator, showcase, _ = shown(warm, best(warm[0], -1))
    poor = run(simulator, DAYS, 9, showcase)
    assert good.engaged_share > 1.5 * poor.engaged_share
    assert good.purchases > 1.5 * poor.purchases
    assert good.sessions > poor.sessions
    assert good.returned_share is not None
    assert poor.returned_share is not None


def test_the_model_is_asked_with_everything_that_has_happened_so_far(warm) -> None:
    simulator, showcase, rung = shown(warm, best(warm[0], 1))
    before = np.bincount(warm[1].users, minlength=SHOP.users)
    reaction = run(simulator, DAYS, 2, showcase)
    first = rung.asked[0]
    asked = len(first)
    assert sum(len(histories) for histories in rung.asked) == reaction.events, "one slate an event"
    assert first.lengths.sum() <= before.sum()
    assert set(first.lengths.tolist()) <= set(before.tolist()), "before the first step: the warm-up's histories"
    second = rung.asked[1]
    assert len(second) <= asked
    assert all((np.diff(second.ts_ms[start:end]) >= 0).all()
               for start, end in zip(second.offsets[:-1], second.offsets[1:], strict=True))  # fmt: skip


def test_forks_of_a_shop_begin_alike_and_a_seed_has_one_future(warm) -> None:
    one, same, other = (run(warm[0].fork(seed), DAYS, 2, None) for seed in (1, 1, 2))
    assert one == same != other


def test_the_truth_of_a_warm_up_tells_its_outcomes_apart() -> None:
    log, truth = warm_up(Simulator(SHOP), 5)
    codes = EventSchema().action_codes()
    paid = np.isin(Histories(log.events, np.array([0, len(log)])).actions, [codes["cart"], codes["purchase"]])
    assert (truth["monetized"][paid].mean()) > 2 * truth["monetized"][~paid].mean()


def test_money_is_the_price_of_what_was_bought(warm) -> None:
    simulator = deepcopy(warm[0])
    days = [deepcopy(simulator).day(DAYS)]
    bought = days[0]["item"][days[0]["action"] == PURCHASE]
    reaction = run(simulator, DAYS, 1, None)
    assert reaction.purchases == len(bought)
    assert reaction.money == pytest.approx(simulator.world.price[bought].sum())
    assert reaction.returned_share is None, "a single day shows no return"


def test_of_a_slate_the_first_and_the_appealing_are_taken_more_often_and_no_item_never() -> None:
    world, n = World.from_config(SHOP), 40_000
    one = SessionStates(
        price_level=np.array([1]), interests=np.array([[3, 7, 9]]), interest_weights=np.array([[0.5, 0.3, 0.2]]), intent=np.array([7]),
        last_item=np.array([11]), last_action=np.array([1]), seen=np.array([[-1]]),
    )  # fmt: skip
    states, slate = one.select(np.zeros(n, np.int64)), np.array([4, 30, 60, -1])
    items = choose_from_slates(np.random.default_rng(0), world, states, np.tile(slate, (n, 1)))
    weights = np.exp(appeal(world, one, slate[None, :3])[0]) / np.array([1, 2, 3])
    shares = [(items == item).mean() for item in slate[:3]]
    np.testing.assert_allclose(shares, weights / weights.sum(), atol=0.01)
    assert (items >= 0).all()
    assert (choose_from_slates(np.random.default_rng(0), world, one, np.array([[-1, -1]])) == -1).all()


def _numbers(ids: list[str]) -> np.ndarray:
    return np.array([int(one.removeprefix("item-")) for one in ids])
