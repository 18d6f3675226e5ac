"""Items known across restarts: the same tokens and vectors, and a snapshot that does not fit is not used."""

import asyncio
from collections.abc import Coroutine
from pathlib import Path

import numpy as np
import pytest
from aiokafka import TopicPartition

from pipeline.artifact import load
from pipeline.records import Event, Item
from pipeline.serving.pipeline import Pipeline, PipelineOptions, load_strategy
from tests import artifacts as relatives
from worker import logging
from worker.clock import WallClock
from worker.config import LogConfig
from worker.errors import ConfigError
from worker.inference.ranker import PipelineRanker
from worker.items.journal import TOMBSTONE_MS, ItemJournal

ITEMS = [f"i{number}" for number in range(8)]
PLACE = TopicPartition("items", 0)
ASKED = [[Event("u", "i1", "view", 1_000), Event("u", "shoe", "view", 2_000)]]
SHOE, LAMP = Item("shoe", title="red shoe", price=5.0, created_ms=7), Item("lamp", title="a lamp", brand="x")


class Clock(WallClock):
    def __init__(self, now_ms: int = 1_000_000) -> None:
        self.time_ms = now_ms

    def now_ms(self) -> int:
        return self.time_ms


class Process:
    """A worker's knowledge of items. A killed one gives up its lock and saves nothing more, as the system has it."""

    def __init__(self, folder: Path, artifact: Path, clock: Clock, max_items: int = 1000) -> None:
        options = PipelineOptions(max_items=max_items, device="cpu", threads=1)
        self.ranker = PipelineRanker(Pipeline.load(artifact, options), 10, clock)
        self.state = ItemJournal(folder, "items", self.ranker, clock)

    async def learn(self, *items: Item, withdrawn: tuple[str, ...] = ()) -> None:
        await self.ranker.update_items(items, withdrawn, live=True)

    def kill(self) -> None:
        self.state.close()
        self.ranker.close()

    def known(self) -> dict[str, object]:
        """Everything that ranking reads of items, by id."""
        catalogue = self.ranker.pipeline.catalogue
        tokens = np.arange(1, len(catalogue.vocabulary))
        state = catalogue.state(tokens) | {"recorded": catalogue.has_records(tokens)}
        barred = catalogue.vocabulary.blocked[tokens].tolist()
        return {"ids": catalogue.vocabulary.item_ids, "barred": barred} | {
            name: column.tolist() for name, column in state.items()
        }

    def slates(self) -> list:
        return self.ranker.pipeline.recommend(ASKED, 20)[0].items


class Machine:
    """Starts processes on one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.artifact, self.clock = folder / "state", folder / "artifact", Clock()
        relatives.save(self.artifact, relatives.untrained(ITEMS))

    def start(self, **options: int) -> Process:
        return Process(self.folder, self.artifact, self.clock, **options)

    async def saved(self, *items: Item, offset: int = 5) -> Process:
        process = self.start()
        assert await process.state.restore({PLACE: offset}) == {}
        await process.learn(*items)
        await process.state.save({PLACE: offset})
        return process


@pytest.fixture
def machine(tmp_path: Path, capsys) -> Machine:
    """What is logged goes where `capsys` reads it."""
    logging.configure(LogConfig())
    return Machine(tmp_path)


def scenario(test: Coroutine) -> None:
    asyncio.run(asyncio.wait_for(test, 60))


def test_a_killed_process_starts_again_with_the_same_tokens_vectors_and_slates(machine: Machine) -> None:
    async def test() -> None:
        first = await machine.saved(SHOE, Item("i2", brand="now known"))
        first.ranker.pipeline.admit(["by-an-event"])
        await first.learn(LAMP, withdrawn=("i3", "never-seen"))
        await first.state.save({PLACE: 9})
        known, slates = first.known(), first.slates()
        first.kill()
        again = machine.start()
        assert await again.state.restore({PLACE: 30}) == {PLACE: 9}
        assert again.known() == known
        assert known["ids"][-3:] == ["shoe", "by-an-event", "lamp"]
        assert again.slates() == slates
        assert {"shoe", "lamp"} & {item.item_id for item in slates} == {"lamp"}
        again.ranker.pipeline.admit(["never-seen"])
        assert again.ranker.pipeline.vocabulary.blocked[again.ranker.pipeline.vocabulary.token("never-seen")]
        again.kill()

    scenario(test())


def test_a_save_that_was_interrupted_leaves_the_one_before(machine: Machine) -> None:
    async def test() -> None:
        first = await machine.saved(SHOE)
        await first.learn(LAMP)
        await first.state.save({PLACE: 9})
        first.kill()
        journal = machine.folder / "items.journal"
        journal.write_bytes(journal.read_bytes()[:-3])
        again = machine.start()
        assert await again.state.restore({PLACE: 9}) == {PLACE: 5}
        await again.learn(LAMP)
        await again.state.save({PLACE: 9})
        again.kill()
        third = machine.start()
        assert await third.state.restore({PLACE: 9}) == {PLACE: 9}
        assert third.ranker.pipeline.vocabulary.item_ids[-2:] == ["shoe", "lamp"]
        third.kill()

    scenario(test())


def test_what_came_before_a_tombstone_or_a_record_does_not_come_back(machine: Machine) -> None:
    async def test() -> None:
        first = await machine.saved(SHOE, LAMP)
        for offset, (items, withdrawn) in enumerate([((), ("shoe", "lamp")), ((SHOE,), ()), ((), ("i1",))], 6):
            await first.learn(*items, withdrawn=withdrawn)
            await first.state.save({PLACE: offset})
        known = first.known()
        first.kill()
        again = machine.start()
        assert await again.state.restore({PLACE: 8}) == {PLACE: 8}
        assert again.known() == known
        barred = {item_id for item_id, bar in zip(known["ids"][1:], known["barred"], strict=True) if bar}
        assert barred == {"lamp", "i1"}
        again.kill()

    scenario(test())


def test_a_file_is_written_anew_when_its_additions_outgrow_it_and_when_items_were_retired(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test() -> None:
        monkeypatch.setattr("worker.items.journal.SLACK_BYTES", 0)
        first = machine.start(max_items=10)
        await first.state.restore({PLACE: 0})
        sizes = []
        for offset in range(30):
            await first.learn(Item("shoe", title=f"red shoe {offset}"))
            await first.state.save({PLACE: offset})
            sizes.append((machine.folder / "items.journal").stat().st_size)
        assert max(sizes) < 4 * sizes[0]
        await first.learn(Item("a"), Item("b"))
        assert first.ranker.pipeline.vocabulary.evicted_count
        await first.state.save({PLACE: 31})
        first.kill()
        again = machine.start(max_items=1000)
        assert await again.state.restore({PLACE: 31}) == {PLACE: 31}
        assert again.ranker.pipeline.vocabulary.item_ids[len(ITEMS) + 1 :] == ["shoe", "a", "b"]
        again.kill()

    scenario(test())


def test_a_snapshot_of_another_artifact_is_not_used_and_said(machine: Machine, capsys) -> None:
    async def test() -> None:
        (await machine.saved(SHOE)).kill()
        relatives.save(machine.artifact, relatives.nudged(load(machine.artifact), 1))
        again = machine.start()
        assert await again.state.restore({PLACE: 5}) == {}
        assert not again.ranker.pipeline.vocabulary.token("shoe")
        again.kill()

    scenario(test())
    assert "it is of artifact" in capsys.readouterr().err


def test_a_snapshot_follows_the_artifact_that_serves(machine: Machine) -> None:
    async def test() -> None:
        first = await machine.saved(SHOE)
        version = relatives.save(machine.artifact, relatives.nudged(load(machine.artifact), 1))
        pipeline = first.ranker.pipeline
        await first.ranker.swap_model(
            load_strategy(load(machine.artifact), pipeline.catalogue, pipeline.options), version
        )
        await first.state.save({PLACE: 5})
        first.kill()
        again = machine.start()
        assert await again.state.restore({PLACE: 5}) == {PLACE: 5}
        assert again.ranker.pipeline.vocabulary.token("shoe")
        again.kill()

    scenario(test())


@pytest.mark.parametrize(
    ("end", "age_ms", "used"),
    [(4, 0, False), (5, 0, True), (6, TOMBSTONE_MS, True), (6, TOMBSTONE_MS + 1, False), (5, 99 * TOMBSTONE_MS, True)],
)
def test_a_snapshot_beyond_the_topics_end_or_that_may_have_missed_a_tombstone_is_not_used(
    machine: Machine, end: int, age_ms: int, used: bool
) -> None:
    async def test() -> None:
        (await machine.saved(SHOE)).kill()
        machine.clock.time_ms += age_ms
        again = machine.start()
        assert bool(await again.state.restore({PLACE: end})) == used
        again.kill()

    scenario(test())


def test_a_save_without_news_says_from_time_to_time_that_nothing_was_missed(machine: Machine) -> None:
    async def test() -> None:
        first = await machine.saved(SHOE)
        size = (machine.folder / "items.journal").stat().st_size
        await first.state.save({PLACE: 5})
        assert (machine.folder / "items.journal").stat().st_size == size
        machine.clock.time_ms += TOMBSTONE_MS
        await first.state.save({PLACE: 5})
        first.kill()
        machine.clock.time_ms += TOMBSTONE_MS
        again = machine.start()
        assert await again.state.restore({PLACE: 6}) == {PLACE: 5}
        again.kill()

    scenario(test())


def test_a_disk_that_cannot_be_written_costs_the_snapshot_alone(machine: Machine, capsys) -> None:
    async def test() -> None:
        first = await machine.saved(SHOE)
        machine.folder.rename(machine.folder.with_name("moved"))
        pipeline = first.ranker.pipeline
        await first.ranker.swap_model(
            load_strategy(load(machine.artifact), pipeline.catalogue, pipeline.options), "another"
        )
        await first.state.save({PLACE: 6})
        machine.folder.with_name("moved").rename(machine.folder)
        await first.state.save({PLACE: 7})
        assert first.state._saved.offsets == {0: 7}
        first.kill()

    scenario(test())
    assert "items are not saved" in capsys.readouterr().err


def test_a_folder_is_one_workers_alone_and_must_be_writable(machine: Machine, tmp_path: Path) -> None:
    first = machine.start()
    with pytest.raises(ConfigError, match=r"pipeline\.state_dir .*state: another worker is using it; give each"):
        machine.start()
    first.kill()
    machine.start().kill()
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"pipeline\.state_dir .*file: File exists; name a folder that this worker"):
        ItemJournal(tmp_path / "file", "items", first.ranker, machine.clock)
