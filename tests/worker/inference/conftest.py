"""A serving ranker whose artifact is followed, and a batch for it."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline.artifact import Artifact, load
from pipeline.data.log_io import read_log_by_time
from pipeline.records import Event, EventPacker
from tests import artifacts as relatives
from worker.clock import WallClock
from worker.config import Config, CountersConfig, PipelineConfig, SequencesConfig
from worker.inference.hot_swap import HotSwap
from worker.inference.load import load_pipeline
from worker.inference.ranker import PipelineRanker
from worker.interfaces import Batch, Clock, ConsumedEvent, Entry, Partition, RecordOffset

SLATE_SIZE = 5
Logged = Callable[[], list[dict[str, Any]]]


class Serving:
    """A ranker and the hot swap that follows its artifact: `link`, a symlink to the folder `first`."""

    def __init__(
        self,
        folder: Path,
        artifact: Path,
        max_events: int = 512,
        max_items: int = 1000,
        clock: Clock | None = None,
        **options: Any,
    ) -> None:
        self.folder = folder
        self.link = folder / "current"
        self.publish("first", load(artifact))
        pipeline = PipelineConfig(str(self.link), slate_size=SLATE_SIZE, threads=1, device="cpu", **options)
        config = Config(
            pipeline=pipeline,
            sequences=SequencesConfig(max_events=max_events),
            counters=CountersConfig(max_items=max_items),
        )
        self.ranker = PipelineRanker(load_pipeline(config), SLATE_SIZE, WallClock())
        self.swap = HotSwap(config, self.ranker, clock or WallClock())

    @property
    def version(self) -> str:
        return self.ranker.pipeline.version

    def publish(self, name: str, artifact: Artifact, **metrics: float) -> str:
        """Save the artifact, turn the link to it, return its version."""
        version = relatives.save(self.folder / name, artifact, **metrics)
        self.point_to(name)
        return version

    def point_to(self, name: str) -> None:
        relatives.point(self.link, self.folder / name)

    async def check(self, times: int = 2) -> str:
        """Return the version that serves after this many checks."""
        for _ in range(times):
            await self.swap.check()
        return self.version


@pytest.fixture
def serve(shop, tmp_path: Path, logged: Logged) -> Iterator[Callable[..., Serving]]:
    """Return a function that starts serving."""
    started: list[Serving] = []

    def start(**options: Any) -> Serving:
        started.append(Serving(tmp_path, shop.artifact, **options))
        return started[-1]

    yield start
    for each in started:
        each.swap.close()
        each.ranker.close()


@pytest.fixture
def serving(serve: Callable[..., Serving]) -> Serving:
    return serve()


@pytest.fixture
def original(shop) -> Artifact:
    return load(shop.artifact)


@pytest.fixture(scope="module")
def batch(shop) -> Batch:
    """Thirty users of the shop with their histories."""
    rings: dict[str, list[bytes]] = {}
    pack = EventPacker(Config().schema).pack
    for event in read_log_by_time(shop.log):
        assert isinstance(event, Event)
        rings.setdefault(event.user_id, []).append(pack(event))
    entries = []
    for offset, (user, events) in enumerate(list(rings.items())[:30]):
        consumed = ConsumedEvent(
            event=Event(user, "i", "view", 5),
            packed=b"",
            record_offset=RecordOffset(Partition("events", 0), 1, offset),
            end_offset=99,
            polled_ms=0,
            polled_s=0.0,
            ring=b"".join(events),
        )
        entries.append(Entry(user, [consumed], deadline_ms=0, order=offset))
    return Batch(entries, 512)
