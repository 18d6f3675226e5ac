"""Models swapped during a real stream: no event is lost, slates name the model that ranked them, counts continue."""

import asyncio
import random
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path

import msgspec
import pytest
from prometheus_client import REGISTRY

from pipeline.artifact import Artifact, load
from pipeline.records import Event, item_hash
from tests import artifacts
from tests.kafka.broker import Broker
from tests.kafka.workers import running
from tests.oracle import Oracle
from worker.clock import WallClock
from worker.config import Config, CountersConfig, EventsConfig, PipelineConfig, RedisConfig
from worker.lookup.lookup import Lookup
from worker.process import Components, build_components
from worker.replay.feed import at_rate, produce
from worker.replay.local_servers import LocalValkey
from worker.stream.loop import Worker

PARTITIONS = 2
USERS = 40


class Stream:
    """Events of all users in random order, round after round until `stop`; half of the items are new to the model."""

    def __init__(self, items: list[str], from_ms: int) -> None:
        self._items = [*items[:20], *(f"new-{number}" for number in range(20))]
        self._from_ms = from_ms
        self._stopped = False

    def stop(self) -> None:
        self._stopped = True

    def events(self) -> Iterator[Event]:
        rng = random.Random(3)
        ts_ms = count(self._from_ms)
        while True:
            for user in rng.sample(range(USERS), USERS):
                if self._stopped:
                    return
                yield Event(f"u{user}", rng.choice(self._items), "view", next(ts_ms))


@pytest.fixture
def original(shop) -> Artifact:
    return load(shop.artifact)


@pytest.fixture
def stream(original: Artifact) -> Stream:
    """A stream that begins where the training log ends, so that nothing decays in between."""
    return Stream(original.item_ids, int(original.counters["as_of_ms"][0]))


@pytest.fixture
def valkey(tmp_path: Path) -> Iterator[str]:
    """A Valkey of this test alone: counters of the same items by other tests would be merged."""
    with LocalValkey(tmp_path / "valkey") as server:
        yield server.url


@pytest.fixture
async def config(broker: Broker, valkey: str, tmp_path: Path) -> Config:
    """A worker that follows the artifact behind the link `current`."""
    topics = {
        "events_topic": await broker.topic(PARTITIONS),
        "recommendations_topic": await broker.topic(PARTITIONS, "slates"),
        "dead_letter_topic": await broker.topic(1, "dead"),
    }
    return Config(
        kafka=broker.config(**topics),
        redis=RedisConfig(url=valkey),
        events=EventsConfig(max_age_days=0),
        pipeline=PipelineConfig(
            artifact=str(tmp_path / "current"), artifact_poll_interval_s=0.02, min_overlap=0.5, threads=1, device="cpu"
        ),
        counters=CountersConfig(merge_interval_s=0.1, half_life_days=36_500),
    )


class Publisher:
    """Publishes artifacts to a running worker and waits for its reaction."""

    def __init__(self, folder: Path, components: Components, worker: Worker, eventually: Callable) -> None:
        self._folder = folder
        self._components = components
        self._worker = worker
        self._eventually = eventually

    async def expect_accepted(self, name: str, artifact: Artifact) -> str:
        version = artifacts.save(self._folder / name, artifact)
        artifacts.point(self._folder / "current", self._folder / name)
        await self._eventually(lambda: self._components.ranker.pipeline.version == version)
        await self.wait_for_slates()
        return version

    async def expect_rejected(
        self, name: str, artifact: Artifact, damage: Callable[[Path], None] = lambda folder: None
    ) -> None:
        artifacts.save(self._folder / name, artifact)
        damage(self._folder / name)
        before = rejected_count()
        artifacts.point(self._folder / "current", self._folder / name)
        await self._eventually(lambda: rejected_count() > before)
        await self.wait_for_slates()

    async def wait_for_slates(self) -> None:
        """Wait until three events per user that are read from now on have slates of the serving model."""
        tracker = self._worker.tracker
        target = tracker.completed_count + tracker.open_count + 3 * USERS
        await self._eventually(lambda: tracker.completed_count >= target)


def rejected_count() -> float:
    return REGISTRY.get_sample_value("millrace_model_swaps_total", {"outcome": "rejected"}) or 0


def popularity(components: Components) -> dict[str, float]:
    """Return the popularity of every counted item."""
    counters = components.ranker.pipeline.counters
    ids = components.ranker.pipeline.vocabulary.item_ids
    rows = counters.rows(counters.counted())
    return dict(zip([ids[token] for token in rows.tokens], rows.popularity.tolist(), strict=True))


async def read_events(broker: Broker, config: Config) -> tuple[Oracle, Counter[str]]:
    """Return the oracle fed with the events topic, and the number of events per item."""
    oracle = Oracle(config.kafka.events_topic, config.sequences.max_events)
    events_per_item: Counter[str] = Counter()
    records = await broker.read(config.kafka.events_topic, 1)
    for record in sorted(records, key=lambda record: (record.partition, record.offset)):
        event = msgspec.json.decode(record.value)
        oracle.feed(record.partition, record.offset, event)
        events_per_item[event["item_id"]] += 1
    return oracle, events_per_item


async def read_slates(broker: Broker, config: Config) -> list[dict]:
    """Return all slates, those of one user in their order."""
    records = await broker.read(config.kafka.recommendations_topic, 1)
    records.sort(key=lambda record: (record.partition, record.offset))
    return [msgspec.json.decode(record.value) for record in records]


async def test_model_swaps_under_a_stream_lose_neither_events_nor_counts(
    broker: Broker, config: Config, original: Artifact, stream: Stream, eventually, tmp_path: Path
):
    first = artifacts.save(tmp_path / "first", original)
    artifacts.point(tmp_path / "current", tmp_path / "first")
    async with running(config) as (components, worker):
        producing = asyncio.create_task(produce(config.kafka, stream.events(), at_rate(500)))
        publisher = Publisher(tmp_path, components, worker, eventually)
        await publisher.wait_for_slates()
        second = await publisher.expect_accepted("second", artifacts.renumbered(original))
        await publisher.expect_rejected("damaged", artifacts.nudged(original, 1), artifacts.damage)
        await publisher.expect_rejected("foreign", artifacts.of_another_schema(original))
        await publisher.expect_rejected("diverged", artifacts.not_a_number(original))
        await publisher.expect_rejected("mixed-up", artifacts.mixed_up(original))
        third = await publisher.expect_accepted("third", artifacts.nudged(original, 2))
        stream.stop()
        event_count = await producing
        await eventually(lambda: worker.tracker.completed_count == event_count)

    oracle, events_per_item = await read_events(broker, config)
    slates = await read_slates(broker, config)
    oracle.check_slates(slates)
    for user in oracle.events:
        versions = [slate["model_version"] for slate in slates if slate["user_id"] == user]
        assert set(versions) == {first, second, third}
        assert versions == sorted(versions, key=[first, second, third].index), "a replaced model answered again"
    assert {slate["strategy"] for slate in slates} == {"hstu"}

    trained = dict(zip(original.counters["items"].tolist(), original.counters["popularity"].tolist(), strict=True))
    counted = popularity(components)
    assert sum(counted.values()) == pytest.approx(sum(trained.values()) + event_count, rel=1e-4)
    for item, events in events_per_item.items():
        assert counted[item] == pytest.approx(trained.get(item_hash(item), 0) + events, rel=1e-3)
    async with Lookup(config) as lookup:
        assert (await lookup.slate("nobody")).model_version == third
    async with build_components(config, WallClock()) as restarted:
        assert await restarted.counters.merge()
        assert popularity(restarted) == pytest.approx(counted, rel=1e-3)
