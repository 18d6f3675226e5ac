"""Models exchanged under a real stream: nothing is lost, slates say which model ranked them, counts go on."""

import asyncio
import random
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import asynccontextmanager
from itertools import count
from pathlib import Path

import msgspec
import pytest
from prometheus_client import REGISTRY

from pipeline.artifact import Artifact, load
from pipeline.records import Event, item_hash
from tests import artifacts as relatives
from tests.kafka.broker import Broker
from tests.oracle import Oracle
from worker.clock import WallClock
from worker.config import Config, CountersConfig, EventsConfig, PipelineConfig, RedisConfig
from worker.kafka.sink import KafkaSink
from worker.kafka.source import KafkaSource
from worker.lookup.lookup import Lookup
from worker.process import Components, build_components, supervise
from worker.replay.feed import at_rate, produce
from worker.replay.local_servers import LocalValkey
from worker.stream.health import HealthState
from worker.stream.loop import Worker

PARTITIONS = 2


class Stream:
    """Events of 40 users, until it is told that it is enough; half of the items are new to the model."""

    def __init__(self, items: list[str], from_ms: int) -> None:
        self._items, self._from_ms = [*items[:20], *(f"new-{number}" for number in range(20))], from_ms
        self.enough = False

    def events(self) -> Iterator[Event]:
        dice = random.Random(3)
        for number in count():
            if self.enough:
                return
            yield Event(f"u{dice.randrange(40)}", dice.choice(self._items), "view", self._from_ms + number)


@pytest.fixture
def original(shop) -> Artifact:
    return load(shop.artifact)


@pytest.fixture
def stream(original: Artifact) -> Stream:
    """It begins where the training log ends, so that nothing decays in between."""
    return Stream(original.item_ids, int(original.counters["as_of_ms"][0]))


@pytest.fixture
def valkey(tmp_path: Path) -> Iterator[str]:
    """One of its own: counters of the same items by other tests would be merged."""
    with LocalValkey(tmp_path / "valkey") as server:
        yield server.url


async def settings(broker: Broker, valkey: str, link: Path) -> Config:
    topics = {
        "events_topic": await broker.topic(PARTITIONS),
        "recommendations_topic": await broker.topic(PARTITIONS, "slates"),
        "dead_letter_topic": await broker.topic(1, "dead"),
    }
    return Config(
        kafka=broker.config(**topics),
        redis=RedisConfig(url=valkey),
        events=EventsConfig(max_age_days=0),
        pipeline=PipelineConfig(str(link), artifact_poll_interval_s=0.02, min_overlap=0.5, threads=1, device="cpu"),
        counters=CountersConfig(merge_interval_s=0.1, half_life_days=36_500),
    )


@asynccontextmanager
async def serving(config: Config):
    """A whole worker, and what goes on beside it, as `millrace run` has them; drained at the end."""
    clock = WallClock()
    async with build_components(config, clock) as made, KafkaSink(config, made.slates) as sink:
        worker = made.worker(KafkaSource(config.kafka, clock), sink, HealthState(clock, clock.monotonic()))
        running = asyncio.create_task(supervise(worker, made))
        try:
            yield made, worker
        finally:
            worker.stop()
            await running


class Published:
    """The folder that the worker follows, and what came of it."""

    def __init__(self, folder: Path, made: Components, worker: Worker, eventually: Callable) -> None:
        self._folder, self._made, self._worker, self._eventually = folder, made, worker, eventually

    async def adopted(self, name: str, artifact: Artifact) -> str:
        version = relatives.save(self._folder / name, artifact)
        relatives.point(self._folder / "current", self._folder / name)
        await self._eventually(lambda: self._made.ranker.pipeline.version == version)
        await self.served()
        return version

    async def refused(self, name: str, artifact: Artifact, after: Callable[[Path], None] = lambda folder: None) -> None:
        relatives.save(self._folder / name, artifact)
        after(self._folder / name)
        before = refusals()
        relatives.point(self._folder / "current", self._folder / name)
        await self._eventually(lambda: refusals() > before)
        await self.served()

    async def served(self) -> None:
        """Some hundred events more are settled: with slates of the model that serves now."""
        until = self._worker.tracker.completed_count + 300
        await self._eventually(lambda: self._worker.tracker.completed_count >= until)


def refusals() -> float:
    return REGISTRY.get_sample_value("millrace_model_swaps_total", {"outcome": "rejected"}) or 0


def popularity(made: Components) -> dict[str, float]:
    counters, ids = made.ranker.pipeline.counters, made.ranker.pipeline.vocabulary.item_ids
    rows = counters.rows(counters.counted())
    return dict(zip([ids[token] for token in rows.tokens], rows.popularity.tolist(), strict=True))


async def read(broker: Broker, config: Config) -> tuple[Oracle, Counter[str], list[dict]]:
    """What the stream was: for the oracle and by item; and all slates, each user's in their order."""
    oracle, items = Oracle(config.kafka.events_topic, config.sequences.max_events), Counter()
    for record in sorted(await broker.read(config.kafka.events_topic, 1), key=lambda r: (r.partition, r.offset)):
        event = msgspec.json.decode(record.value)
        oracle.feed(record.partition, record.offset, event)
        items[event["item_id"]] += 1
    records = await broker.read(config.kafka.recommendations_topic, 1)
    records.sort(key=lambda record: (record.partition, record.offset))
    return oracle, items, [msgspec.json.decode(record.value) for record in records]


def test_models_come_and_go_under_a_stream_and_neither_an_event_nor_a_count_is_lost(
    run, broker: Broker, valkey: str, original: Artifact, stream: Stream, eventually, tmp_path: Path
):
    async def story() -> None:
        first = relatives.save(tmp_path / "first", original)
        relatives.point(tmp_path / "current", tmp_path / "first")
        config = await settings(broker, valkey, tmp_path / "current")
        async with serving(config) as (made, worker):
            producing = asyncio.create_task(produce(config.kafka, stream.events(), at_rate(500)))
            publish = Published(tmp_path, made, worker, eventually)
            await publish.served()
            second = await publish.adopted("second", relatives.renumbered(original))
            await publish.refused("damaged", relatives.nudged(original, 1), relatives.damage)
            await publish.refused("foreign", relatives.of_another_schema(original))
            await publish.refused("diverged", relatives.not_a_number(original))
            await publish.refused("mixed-up", relatives.mixed_up(original))
            third = await publish.adopted("third", relatives.nudged(original, 2))
            stream.enough = True
            events = await producing
            await eventually(lambda: worker.tracker.completed_count == events)
        oracle, items, slates = await read(broker, config)
        oracle.check_slates(slates)
        for user in oracle.events:
            versions = [slate["model_version"] for slate in slates if slate["user_id"] == user]
            assert set(versions) == {first, second, third}
            assert versions == sorted(versions, key=[first, second, third].index), "no model comes back"
        assert {slate["strategy"] for slate in slates} == {"hstu"}
        trained = dict(zip(original.counters["items"].tolist(), original.counters["popularity"].tolist(), strict=True))
        counted = popularity(made)
        assert sum(counted.values()) == pytest.approx(sum(trained.values()) + events, rel=1e-4)
        for item, number in items.items():
            known = trained.get(item_hash(item), 0)
            assert counted[item] == pytest.approx(known + number, rel=1e-3)
        async with Lookup(config.redis) as lookup:
            assert (await lookup.slate("nobody")).model_version == third
        async with build_components(config, WallClock()) as again:
            assert await again.counters.merge()
            assert popularity(again) == pytest.approx(counted, rel=1e-3)

    run(story(), 150)
