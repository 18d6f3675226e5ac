"""The slates that a policy shows change what the simulated shop's users take, do and pay."""

from copy import deepcopy
from dataclasses import dataclass

import numpy as np
import pytest
from msgspec.structs import replace

from pipeline.data.event_log import EventLog
from pipeline.items.vocabulary import Vocabulary
from pipeline.records import EventSchema, Histories
from pipeline.simulation.choices import CLICK, PURCHASE, SessionStates, appeal, choose_from_slates
from pipeline.simulation.closed_loop import ColumnPacker, PolicyUnderTest, run, warm_up
from pipeline.simulation.simulator import Simulator, user_id
from pipeline.simulation.world import SimulatorConfig, World, item_id
from pipeline.strategies.strategy import RankedItems, Request

SHOP = SimulatorConfig(events=12_000, users=150, items=100, days=30)
DAYS = 6


class ConstantStrategy:
    """Recommends the same items to everyone and keeps the histories of its requests."""

    name = "constant"
    backend = "numpy"

    def __init__(self, tokens: np.ndarray) -> None:
        self._tokens = tokens
        self.requests: list[Histories] = []

    def prepare(self, request: Request) -> Request:
        self.requests.append(request.histories)
        return request

    def launch(self, prepared: Request) -> Request:
        return prepared

    def finish(self, pending: Request) -> RankedItems:
        tokens = np.tile(self._tokens[: pending.k], (len(pending.histories), 1)).astype(np.int32)
        return RankedItems(tokens, np.zeros(tokens.shape), None, self.name)

    def close(self) -> None: ...


@dataclass
class WarmShop:
    """A shop after DAYS days, and their log and truth."""

    simulator: Simulator
    log: EventLog
    truth: dict[str, np.ndarray]

    def items_by_quality(self, sign: int) -> list[str]:
        """Return the ten items of highest (1) or lowest (-1) quality among those of the first day."""
        world = self.simulator.world
        order = np.argsort(-sign * np.where(world.born_day == 0, world.quality, -sign * np.inf))
        return [f"item-{number}" for number in order[:10]]

    def with_policy(self, ids: list[str]) -> tuple[Simulator, PolicyUnderTest, ConstantStrategy]:
        """Return a copy of the shop, with a policy that always shows these items."""
        simulator = deepcopy(self.simulator)
        vocabulary = Vocabulary(self.log.item_ids)
        strategy = ConstantStrategy(np.array([vocabulary.token(item_id) for item_id in ids]))
        return simulator, PolicyUnderTest(simulator, strategy, vocabulary, self.log), strategy


@pytest.fixture(scope="module")
def shop() -> WarmShop:
    simulator = Simulator(SHOP)
    return WarmShop(simulator, *warm_up(simulator, DAYS))


def test_warm_up_returns_a_log_in_time_order_with_sorted_ids(shop: WarmShop) -> None:
    log = shop.log
    numbers = np.array([int(item_id.removeprefix("item-")) for item_id in log.item_ids])
    assert (np.diff(log.ts_ms) >= 0).all()
    assert log.user_ids == sorted(log.user_ids)
    assert (log.events["item"] == ColumnPacker(shop.simulator, EventSchema()).hashes[numbers[log.items]]).all()
    assert len(np.unique(log.users)) > 75


def test_warm_up_keeps_the_order_in_which_simultaneous_events_were_drawn() -> None:
    simulator = Simulator(replace(SHOP, events=400_000, users=4000))
    day = deepcopy(simulator).day(0)
    log, _ = warm_up(simulator, 1)
    order = np.argsort(day["ts_ms"], kind="stable")
    assert (np.diff(log.ts_ms) == 0).sum() > 5
    assert [log.user_ids[user] for user in log.users] == [user_id(user) for user in day["user"][order]]
    assert [log.item_ids[item] for item in log.items] == [item_id(item) for item in day["item"][order]]


def test_slates_that_nobody_takes_change_nothing(shop: WarmShop) -> None:
    assert run(deepcopy(shop.simulator), DAYS, 3, None).events > 100
    futures = []
    for item_ids, take_rate in (
        (shop.items_by_quality(1), 0.0),
        (shop.items_by_quality(-1), 0.0),
        (["no such item"] * 10, SHOP.slate_take_rate),
    ):
        simulator, policy, _ = shop.with_policy(item_ids)
        simulator.config = replace(SHOP, slate_take_rate=take_rate)
        futures.append(run(simulator, DAYS, 3, policy))
    assert futures[0] == futures[1] == futures[2]
    simulator, policy, _ = shop.with_policy([])
    assert policy.slates(np.array([0, 1])).tolist() == [[], []]


def test_good_slates_raise_engagement_purchases_and_sessions(shop: WarmShop) -> None:
    simulator, policy, _ = shop.with_policy(shop.items_by_quality(1))
    good = run(simulator, DAYS, 9, policy)
    simulator, policy, _ = shop.with_policy(shop.items_by_quality(-1))
    poor = run(simulator, DAYS, 9, policy)
    assert good.engaged_share > 1.5 * poor.engaged_share
    assert good.purchases > 1.5 * poor.purchases
    assert good.sessions > poor.sessions
    assert good.returned_share is not None
    assert poor.returned_share is not None


def test_policy_ranks_from_everything_that_has_happened_so_far(shop: WarmShop) -> None:
    simulator, policy, strategy = shop.with_policy(shop.items_by_quality(1))
    warm_up_lengths = np.bincount(shop.log.users, minlength=SHOP.users)
    metrics = run(simulator, DAYS, 2, policy)
    first, second = strategy.requests[:2]
    assert sum(len(histories) for histories in strategy.requests) == metrics.events, "one slate per event"
    assert first.lengths.sum() <= warm_up_lengths.sum()
    assert set(first.lengths.tolist()) <= set(warm_up_lengths.tolist()), "the warm-up's histories before the first step"
    assert len(second) <= len(first)
    assert all(
        (np.diff(second.ts_ms[begin:end]) >= 0).all()
        for begin, end in zip(second.offsets[:-1], second.offsets[1:], strict=True)
    )


def test_forks_with_one_seed_have_one_future(shop: WarmShop) -> None:
    one, same, other = (run(shop.simulator.fork(seed), DAYS, 2, None) for seed in (1, 1, 2))
    assert one == same != other


def test_warm_up_truth_separates_paid_from_unpaid_events(shop: WarmShop) -> None:
    codes = EventSchema().action_codes()
    actions = Histories(shop.log.events, np.array([0, len(shop.log)])).actions
    is_paid = np.isin(actions, [codes["cart"], codes["purchase"]])
    assert shop.truth["monetized"][is_paid].mean() > 2 * shop.truth["monetized"][~is_paid].mean()


def test_money_is_the_price_of_all_purchased_items(shop: WarmShop) -> None:
    simulator = deepcopy(shop.simulator)
    day = deepcopy(simulator).day(DAYS)
    purchased = day["item"][day["action"] == PURCHASE]
    metrics = run(simulator, DAYS, 1, None)
    assert metrics.purchases == len(purchased)
    assert metrics.money == pytest.approx(simulator.world.price[purchased].sum())
    assert metrics.returned_share is None, "a single day shows no return"


def test_slate_items_are_taken_by_rank_and_appeal() -> None:
    """One item is always taken, unless the slate is empty."""
    world = World.from_config(SHOP)
    n = 40_000
    session = SessionStates(
        price_level=np.array([1]),
        interests=np.array([[3, 7, 9]]),
        interest_weights=np.array([[0.5, 0.3, 0.2]]),
        intent=np.array([7]),
        last_item=np.array([11]),
        last_action=np.array([CLICK]),
        seen=np.array([[-1]]),
    )
    slate = np.array([4, 30, 60, -1])
    sessions = session.select(np.zeros(n, np.int64))
    items = choose_from_slates(np.random.default_rng(0), world, sessions, np.tile(slate, (n, 1)))
    weights = np.exp(appeal(world, session, slate[None, :3])[0]) / np.array([1, 2, 3])
    frequency = [(items == item).mean() for item in slate[:3]]
    np.testing.assert_allclose(frequency, weights / weights.sum(), atol=0.01)
    assert (items >= 0).all()
    assert (choose_from_slates(np.random.default_rng(0), world, session, np.array([[-1, -1]])) == -1).all()
