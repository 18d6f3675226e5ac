"""A published artifact is taken up, or refused with its reason, while batches go on being ranked."""

import asyncio
import gc
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from prometheus_client import REGISTRY

from pipeline.artifact import Artifact, load
from pipeline.data.log_io import read_log_by_time
from pipeline.records import Event, EventPacker, Slate
from tests import artifacts as relatives
from worker import logging
from worker.clock import WallClock
from worker.config import Config, CountersConfig, LogConfig, SequencesConfig
from worker.config import PipelineConfig as PipelineConfig
from worker.inference.fingerprint import fingerprint
from worker.inference.hot_swap import HotSwap
from worker.inference.load import load_pipeline
from worker.inference.ranker import PipelineRanker
from worker.interfaces import Batch, ConsumedEvent, Entry, Partition, RecordOffset

K = 5


class Serving:
    """A ranker, and what follows its artifact: `link`, which names the folder `first`."""

    def __init__(
        self, folder: Path, artifact: Path, max_events: int = 512, max_items: int = 1000, **options: Any
    ) -> None:
        logging.configure(LogConfig())
        self.folder, self.link = folder, folder / "current"
        self.publish("first", load(artifact))
        pipeline = PipelineConfig(str(self.link), slate_size=K, threads=1, device="cpu", **options)
        config = Config(
            pipeline=pipeline,
            sequences=SequencesConfig(max_events=max_events),
            counters=CountersConfig(max_items=max_items),
        )
        self.ranker = PipelineRanker(load_pipeline(config), K, WallClock())
        self.swap = HotSwap(config, self.ranker, WallClock())

    def publish(self, name: str, artifact: Artifact, **metrics: float) -> str:
        version = relatives.save(self.folder / name, artifact, **metrics)
        relatives.point(self.link, self.folder / name)
        return version

    async def looks(self, count: int = 2) -> str:
        """The version that serves after so many looks."""
        for _ in range(count):
            await self.swap.check()
        return self.ranker.pipeline.version


@pytest.fixture
def serving(shop, tmp_path: Path):
    made: list[Serving] = []

    def make(**options: Any) -> Serving:
        made.append(Serving(tmp_path, shop.artifact, **options))
        return made[-1]

    yield make
    for each in made:
        each.ranker.close()


@pytest.fixture
def original(shop) -> Artifact:
    return load(shop.artifact)


@pytest.fixture
def batch(shop) -> Batch:
    """Thirty users of the shop with their histories."""
    rings: dict[str, list[bytes]] = {}
    pack = EventPacker(Config().schema).pack
    for event in read_log_by_time(shop.log):
        assert isinstance(event, Event)
        rings.setdefault(event.user_id, []).append(pack(event))
    entries = []
    for offset, (user, events) in enumerate(list(rings.items())[:30]):
        record_offset, event = RecordOffset(Partition("events", 0), 1, offset), Event(user, "i", "view", 5)
        entries.append(
            Entry(user, [ConsumedEvent(event, b"", record_offset, 99, 0, 0.0, ring=b"".join(events))], 0, offset)
        )
    return Batch(entries, 512)


@pytest.fixture
def said(capsys) -> Callable[[], list[dict]]:
    """What was logged since the last call."""
    return lambda: [msgspec.json.decode(line) for line in capsys.readouterr().err.splitlines()]


def ids(slates: list[Slate]) -> list[list[str]]:
    return [[item.item_id for item in slate.items] for slate in slates]


def outcomes() -> dict[str, float]:
    read = REGISTRY.get_sample_value
    return {name: read("millrace_model_swaps_total", {"outcome": name}) or 0 for name in ("accepted", "rejected")}


def test_a_turned_symlink_brings_the_next_slates_the_new_model(run, serving, original, batch, said):
    async def story() -> None:
        now, before = serving(), outcomes()
        first = now.ranker.pipeline.version
        served = await now.ranker.rank(batch)
        assert await now.looks() == first
        second = now.publish("second", relatives.renumbered(original))
        assert await now.looks(1) == first, "one look cannot tell whether a copy is complete"
        assert await now.looks(1) == second
        again = await now.ranker.rank(batch)
        assert {slate.model_version for slate in served} == {first}
        assert {slate.model_version for slate in again} == {second}
        assert ids(again) == ids(served), "it is the same model in another order"
        assert outcomes() == before | {"accepted": before["accepted"] + 1}
        assert REGISTRY.get_sample_value("millrace_model_info", {"version": first}) is None
        assert REGISTRY.get_sample_value("millrace_model_info", {"version": second}) == 1
        [line] = said()
        assert (line["event"], line["before"], line["version"], line["overlap"]) == ("model swapped", first, second, 1)

    run(story())


def test_a_folder_that_is_replaced_in_place_is_taken_up(run, serving, original):
    async def story() -> None:
        now = serving()
        await now.looks()
        version = relatives.save(now.folder / "first", relatives.nudged(original, 1))
        assert await now.looks() == version

    run(story())


def test_the_same_content_under_another_name_is_no_news(run, serving, original):
    async def story() -> None:
        now = serving()
        model, before = now.ranker.pipeline.strategies, outcomes()
        now.publish("copy", original)
        await now.looks(3)
        assert now.ranker.pipeline.strategies is model
        assert outcomes() == before

    run(story())


def test_a_full_vocabulary_makes_room_for_a_new_models_items_and_the_old_model_serves_on_until_then(
    run, serving, original, batch
):
    async def story() -> None:
        items = len(original.item_ids)
        now = serving(max_items=items + 5)
        vocabulary = now.ranker.pipeline.vocabulary
        await now.ranker.run_in_thread(lambda: now.ranker.pipeline.admit([f"crowd{number}" for number in range(5)]))
        new = [f"new{number}" for number in range(8)]
        version = now.publish("second", relatives.with_new_items(original, new))
        slates = [await now.ranker.rank(batch)]
        assert await now.looks() == version
        slates.append(await now.ranker.rank(batch))
        assert vocabulary.evicted_count == 8
        assert not any(map(vocabulary.token, original.item_ids[-8:])), "those that the new model does not know go first"
        assert all(map(vocabulary.token, [*original.item_ids[:-8], *new]))
        assert not vocabulary.pinned
        old, known = ids(slates[0]), set(original.item_ids[:-8]) | set(new)
        assert all(len(slate) == K for slate in old)
        assert all(len(slate) == K and set(slate) <= known for slate in ids(slates[1]))

    run(story())


def test_withdrawn_items_do_not_make_a_new_models_slates_too_short(run, serving, original):
    async def story() -> None:
        now = serving()
        await now.ranker.update_items([], original.item_ids[3:], live=True)
        second = now.publish("second", relatives.nudged(original, 1))
        assert await now.looks() == second

    run(story())


BROKEN = {
    "weights are no numbers": (relatives.not_a_number, "items.embedding.weight has numbers that are not finite"),
    "actions mean something else": (relatives.of_another_schema, "events.actions is"),
    "items have each other's ids": (relatives.mixed_up, "pipeline.min_overlap is 50.0%"),
}


@pytest.mark.parametrize(("break_", "reason"), BROKEN.values(), ids=BROKEN)
def test_a_broken_artifact_is_refused_once_and_the_old_model_goes_on(
    run, serving, original, batch, said, break_, reason: str
):
    async def story() -> None:
        now, before = serving(min_overlap=0.5), outcomes()
        first = now.ranker.pipeline.version
        served = await now.ranker.rank(batch)
        await now.looks()
        now.publish("broken", break_(original))
        assert await now.looks(5) == first
        assert ids(await now.ranker.rank(batch)) == ids(served)
        assert outcomes() == before | {"rejected": before["rejected"] + 1}
        [line] = said()
        assert reason in line["reason"]
        assert line["artifact"] == str((now.folder / "broken").resolve())
        good = now.publish("good", relatives.nudged(original, 1))
        assert await now.looks() == good, "the next one is judged for itself"

    run(story())


def test_a_damaged_file_is_refused_until_it_is_copied_again(run, serving, original, said):
    async def story() -> None:
        now = serving()
        first = now.ranker.pipeline.version
        await now.looks()
        second = now.publish("second", relatives.nudged(original, 1))
        whole = shutil.copytree(now.folder / "second", now.folder / "whole")
        relatives.damage(now.folder / "second")
        assert await now.looks(4) == first
        [line] = said()
        assert "hstu.safetensors: SHA-256 is" in line["reason"]
        shutil.copytree(whole, now.folder / "second", dirs_exist_ok=True)
        assert await now.looks() == second

    run(story())


def test_a_copy_under_way_is_left_alone_until_it_is_complete(run, serving, original, said):
    async def story() -> None:
        now = serving()
        first = now.ranker.pipeline.version
        await now.looks()
        version = relatives.save(now.folder / "whole", relatives.nudged(original, 1))
        (now.folder / "slow").mkdir()
        relatives.point(now.link, now.folder / "slow")
        for path in sorted((now.folder / "whole").iterdir()):
            shutil.copy(path, now.folder / "slow")
            assert await now.looks(1) == first
        assert await now.looks(1) == version
        [line] = said()
        assert (line["event"], line["overlap"]) == ("model swapped", None), "nothing was served yet"

    run(story())


def test_a_pointer_to_nothing_is_said_once_and_mended_without_a_swap(run, serving, said):
    async def story() -> None:
        now, before = serving(), outcomes()
        first = now.ranker.pipeline.version
        relatives.point(now.link, now.folder / "nowhere")
        assert await now.looks(4) == first
        [line] = said()
        assert "manifest.json: No such file" in line["reason"]
        relatives.point(now.link, now.folder / "first")
        assert await now.looks() == first
        assert outcomes() == before | {"rejected": before["rejected"] + 1}

    run(story())


def test_a_model_that_training_judged_worse_is_refused_but_the_way_back_is_open(run, serving, original):
    async def story() -> None:
        now = serving(max_hit_rate_drop=0.2)
        first = now.publish("better", original, validation_hit_rate=0.4)
        await now.looks()
        better = now.publish("best", relatives.nudged(original, 1), validation_hit_rate=0.6)
        assert await now.looks() == better
        now.publish("worse", relatives.nudged(original, 2), validation_hit_rate=0.47)
        assert await now.looks() == better
        relatives.point(now.link, now.folder / "better")
        assert await now.looks() == first, "it has served before: an operator's way back is not barred"

    run(story())


def test_only_answers_of_the_model_that_serves_are_compared(run, serving, original, batch):
    async def story() -> None:
        now = serving()
        await now.ranker.rank(Batch(batch.entries[:10], 512, "simple"))
        assert await now.ranker.served_samples() == []
        slates = await now.ranker.rank(batch)
        served = await now.ranker.served_samples()
        assert [ring for ring, _ in served] == [entry.ring for entry in batch.entries]
        assert [items for _, items in served] == [slate.items for slate in slates]
        await now.looks()
        now.publish("second", relatives.nudged(original, 1))
        await now.looks()
        assert await now.ranker.served_samples() == []

    run(story())


def test_the_model_before_is_freed(run, serving, original, batch):
    async def story() -> None:
        now = serving()
        await now.ranker.rank(batch)
        await now.looks()
        old = [weakref.ref(rung) for rung in now.ranker.pipeline.strategies.candidates(None) if rung.name == "hstu"]
        now.publish("second", relatives.nudged(original, 1))
        await now.looks()
        gc.collect()
        assert [rung() for rung in old] == [None]

    run(story())


def test_what_is_published_while_another_is_loaded_is_what_serves(run, serving, original, monkeypatch):
    async def story() -> None:
        now = serving()
        await now.looks()
        now.publish("second", relatives.nudged(original, 1))
        third, served = "", now.ranker.served_samples

        async def overtaken():
            nonlocal third
            third = now.publish("third", relatives.nudged(original, 2))
            return await served()

        monkeypatch.setattr(now.ranker, "served_samples", overtaken)
        first = now.ranker.pipeline.version
        assert await now.looks() == first
        monkeypatch.undo()
        assert await now.looks() == third

    run(story())


def test_it_looks_by_itself_until_it_is_cancelled(run, serving, original, eventually):
    async def story() -> None:
        now = serving(artifact_poll_interval_s=0.01)
        following = asyncio.create_task(now.swap.run())
        version = now.publish("second", relatives.nudged(original, 1))
        await eventually(lambda: now.ranker.pipeline.version == version)
        following.cancel()
        await asyncio.gather(following, return_exceptions=True)
        assert following.cancelled()

    run(story())


def test_every_change_of_a_path_is_another_sight_and_nothing_else_is(tmp_path: Path):
    link, folder, other = tmp_path / "link", tmp_path / "a", tmp_path / "b"
    seen = [fingerprint(link)]
    for each in (folder, other):
        each.mkdir()
        (each / "file").write_text("1")
    for change in (
        lambda: relatives.point(link, folder),
        lambda: relatives.point(link, other),
        lambda: (other / "more").touch(),
        lambda: (other / "file").write_text("22"),
        lambda: (other / "file").unlink(),
    ):
        change()
        assert fingerprint(link) == fingerprint(link)
        seen.append(fingerprint(link))
    assert len(set(seen)) == len(seen)
    relatives.point(link, folder)
    assert fingerprint(link) == seen[1]


@pytest.mark.parametrize(("max_events", "warnings"), [(200 + 254, 2), (200 + 255, 0)])
def test_rings_within_the_models_reach_are_warned_of_at_its_load_and_at_a_swap(
    serving, original: Artifact, run, capsys, max_events: int, warnings: int
):
    capsys.readouterr()
    at = serving(max_events=max_events)
    at.publish("second", relatives.nudged(original, 1))
    assert run(at.looks()) != original.version
    assert capsys.readouterr().err.count("raise sequences.max_events") == warnings
