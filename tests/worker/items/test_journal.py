"""Items across restarts: the same tokens and vectors, and a journal that does not fit is not used."""

import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from aiokafka import TopicPartition

from pipeline.artifact import load
from pipeline.records import Event, Item
from pipeline.serving.pipeline import Pipeline
from pipeline.slates import SlateItem
from pipeline.strategies.options import PipelineOptions
from pipeline.strategies.strategies import strategies_of
from tests import artifacts as relatives
from worker.clock import WallClock
from worker.errors import ConfigError
from worker.inference.ranker import PipelineRanker
from worker.items.chunk_database import ChunkDatabase
from worker.items.journal import TOMBSTONE_MS, ItemJournal

ITEM_IDS = [f"i{number}" for number in range(8)]
PARTITION = TopicPartition("items", 0)
SHOE = Item("shoe", title="red shoe", price=5.0, created_ms=7)
LAMP = Item("lamp", title="a lamp", brand="x")
Logged = Callable[[], list[dict[str, Any]]]
LimitFileSize = Callable[[int], AbstractContextManager[None]]


class Clock(WallClock):
    def __init__(self, now_ms: int = 1_000_000) -> None:
        self.time_ms = now_ms

    def now_ms(self) -> int:
        return self.time_ms


class Process:
    """The part of a worker that knows items. A stopped one gives up its lock and saves nothing more."""

    def __init__(self, folder: Path, artifact: Path, clock: Clock, max_items: int = 1000) -> None:
        options = PipelineOptions(max_items=max_items, device="cpu", threads=1)
        self.pipeline = Pipeline.load(artifact, options)
        self.ranker = PipelineRanker(self.pipeline, 10, clock)
        self.journal = ItemJournal(folder, "items", self.ranker, clock)

    async def update(self, *items: Item, delisted: tuple[str, ...] = ()) -> None:
        await self.ranker.update_items(items, delisted, live=True)

    async def swap(self, artifact: Path, version: str) -> None:
        await self.ranker.swap(strategies_of(self.pipeline.context(load(artifact))), version)

    def stop(self) -> None:
        self.journal.close()
        self.ranker.close()

    def items(self) -> dict[str, Any]:
        """Return everything that ranking reads of items, by id."""
        catalogue = self.pipeline.catalogue
        tokens = np.arange(1, len(catalogue.vocabulary))
        state = catalogue.state(tokens) | {"recorded": catalogue.has_records(tokens)}
        blocked = catalogue.vocabulary.blocked[tokens].tolist()
        columns = {name: column.tolist() for name, column in state.items()}
        return {"ids": catalogue.vocabulary.item_ids, "blocked": blocked} | columns

    def slate(self) -> list[SlateItem]:
        history = [Event("u", "i1", "view", 1_000), Event("u", "shoe", "view", 2_000)]
        return self.pipeline.recommend([history], 20)[0].items


class Machine:
    """Starts processes on one state folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "state"
        self.artifact = folder / "artifact"
        self.clock = Clock()
        relatives.save(self.artifact, relatives.untrained(ITEM_IDS))

    @property
    def journal(self) -> Path:
        return self.folder / "items.sqlite"

    @property
    def state_bytes(self) -> int:
        return sum(path.stat().st_size for path in self.folder.iterdir())

    def kill(self, process: Process) -> None:
        """Stop the process, and leave the files as a SIGKILL would have left them."""
        copy = self.folder.with_name("copy")
        shutil.copytree(self.folder, copy)
        process.stop()
        shutil.rmtree(self.folder)
        copy.rename(self.folder)

    def start(self, **options: int) -> Process:
        return Process(self.folder, self.artifact, self.clock, **options)

    async def start_and_save(self, *items: Item, offset: int = 5) -> Process:
        """Return a process that has read these items up to the offset and saved them."""
        process = self.start()
        assert await process.journal.restore({PARTITION: offset}) == {}
        await process.update(*items)
        await process.journal.save({PARTITION: offset})
        return process


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


async def test_killed_process_restarts_with_equal_tokens_vectors_and_slates(machine: Machine) -> None:
    first = await machine.start_and_save(SHOE, Item("i2", brand="now known"))
    first.pipeline.admit(["by-an-event"])
    await first.update(LAMP, delisted=("i3", "never-seen"))
    await first.journal.save({PARTITION: 9})
    items = first.items()
    slate = first.slate()
    machine.kill(first)
    second = machine.start()
    assert await second.journal.restore({PARTITION: 30}) == {PARTITION: 9}
    assert second.items() == items
    assert items["ids"][-3:] == ["shoe", "by-an-event", "lamp"]
    assert second.slate() == slate
    assert {"shoe", "lamp"} & {item.item_id for item in slate} == {"lamp"}
    second.pipeline.admit(["never-seen"])
    vocabulary = second.pipeline.vocabulary
    assert vocabulary.blocked[vocabulary.token("never-seen")]
    second.stop()


async def test_interrupted_save_leaves_the_save_before(machine: Machine) -> None:
    first = await machine.start_and_save(SHOE)
    await first.update(LAMP)
    await first.journal.save({PARTITION: 9})
    machine.kill(first)
    log = machine.journal.with_name("items.sqlite-wal")
    log.write_bytes(log.read_bytes()[:-3])
    second = machine.start()
    assert await second.journal.restore({PARTITION: 9}) == {PARTITION: 5}
    await second.update(LAMP)
    await second.journal.save({PARTITION: 9})
    second.stop()
    third = machine.start()
    assert await third.journal.restore({PARTITION: 9}) == {PARTITION: 9}
    assert third.pipeline.vocabulary.item_ids[-2:] == ["shoe", "lamp"]
    third.stop()


async def test_state_before_a_tombstone_or_a_record_does_not_come_back(machine: Machine) -> None:
    first = await machine.start_and_save(SHOE, LAMP)
    updates = [((), ("shoe", "lamp")), ((SHOE,), ()), ((), ("i1",))]
    for offset, (items, delisted) in enumerate(updates, 6):
        await first.update(*items, delisted=delisted)
        await first.journal.save({PARTITION: offset})
    expected = first.items()
    first.stop()
    second = machine.start()
    assert await second.journal.restore({PARTITION: 8}) == {PARTITION: 8}
    assert second.items() == expected
    blocked = {item_id for item_id, blocked in zip(expected["ids"][1:], expected["blocked"], strict=True) if blocked}
    assert blocked == {"lamp", "i1"}
    second.stop()


async def test_new_snapshot_replaces_changes_that_outgrow_the_old_one_and_follows_an_eviction(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker.items.journal.SLACK_BYTES", 0)
    first = machine.start(max_items=10)
    await first.journal.restore({PARTITION: 0})
    sizes = []
    for offset in range(30):
        await first.update(Item("shoe", title=f"red shoe {offset}"))
        await first.journal.save({PARTITION: offset})
        sizes.append(machine.state_bytes)
    assert max(sizes) < 4 * sizes[0]
    await first.update(Item("a"), Item("b"))
    assert first.pipeline.vocabulary.evicted_count
    await first.journal.save({PARTITION: 31})
    first.stop()
    second = machine.start(max_items=1000)
    assert await second.journal.restore({PARTITION: 31}) == {PARTITION: 31}
    assert second.pipeline.vocabulary.item_ids[len(ITEM_IDS) + 1 :] == ["shoe", "a", "b"]
    second.stop()


async def test_journal_of_another_artifact_is_not_used_and_logged(machine: Machine, logged: Logged) -> None:
    (await machine.start_and_save(SHOE)).stop()
    relatives.save(machine.artifact, relatives.nudged(load(machine.artifact), 1))
    second = machine.start()
    assert await second.journal.restore({PARTITION: 5}) == {}
    assert not second.pipeline.vocabulary.token("shoe")
    second.stop()
    assert "it belongs to artifact" in logged()[-1]["reason"]


async def test_journal_follows_the_serving_artifact(machine: Machine) -> None:
    first = await machine.start_and_save(SHOE)
    version = relatives.save(machine.artifact, relatives.nudged(load(machine.artifact), 1))
    await first.swap(machine.artifact, version)
    await first.journal.save({PARTITION: 5})
    first.stop()
    second = machine.start()
    assert await second.journal.restore({PARTITION: 5}) == {PARTITION: 5}
    assert second.pipeline.vocabulary.token("shoe")
    second.stop()


@pytest.mark.parametrize(
    ("end", "age_ms", "used"),
    [(4, 0, False), (5, 0, True), (6, TOMBSTONE_MS, True), (6, TOMBSTONE_MS + 1, False), (5, 99 * TOMBSTONE_MS, True)],
)
async def test_journal_past_the_topic_end_or_older_than_tombstones_is_not_used(
    machine: Machine, end: int, age_ms: int, used: bool
) -> None:
    (await machine.start_and_save(SHOE)).stop()
    machine.clock.time_ms += age_ms
    second = machine.start()
    assert bool(await second.journal.restore({PARTITION: end})) == used
    second.stop()


async def test_save_without_changes_is_written_as_a_heartbeat(machine: Machine) -> None:
    first = await machine.start_and_save(SHOE)
    size = machine.state_bytes
    await first.journal.save({PARTITION: 5})
    assert machine.state_bytes == size
    machine.clock.time_ms += TOMBSTONE_MS
    await first.journal.save({PARTITION: 5})
    first.stop()
    machine.clock.time_ms += TOMBSTONE_MS
    second = machine.start()
    assert await second.journal.restore({PARTITION: 6}) == {PARTITION: 5}
    second.stop()


async def test_journal_stays_small_over_restarts(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("worker.items.journal.SLACK_BYTES", 0)
    (await machine.start_and_save(SHOE, offset=0)).stop()
    size = machine.state_bytes
    for offset in range(1, 31):
        process = machine.start()
        assert await process.journal.restore({PARTITION: offset}) == {PARTITION: offset - 1}
        await process.update(*(Item(f"i{number}", title=f"thing {offset}") for number in range(8)))
        await process.journal.save({PARTITION: offset})
        process.stop()
        assert machine.state_bytes < 2 * size


async def test_damaged_journal_is_not_used_and_logged_and_the_next_save_replaces_it(
    machine: Machine, logged: Logged
) -> None:
    (await machine.start_and_save(SHOE)).stop()
    content = machine.journal.read_bytes()
    machine.journal.write_bytes(content.replace(b"shoe", b"shoo"))
    second = await machine.start_and_save(LAMP, offset=6)
    assert not second.pipeline.vocabulary.token("shoo")
    second.stop()
    assert "its checksum does not match" in logged()[-1]["reason"]
    third = machine.start()
    assert await third.journal.restore({PARTITION: 6}) == {PARTITION: 6}
    assert third.pipeline.vocabulary.item_ids[-1] == "lamp"
    third.stop()


@pytest.mark.parametrize(
    ("chunk", "state"), [(b"", b"no json"), (b"no chunk", None)], ids=["its state", "one of its chunks"]
)
async def test_intact_journal_that_cannot_be_understood_is_not_used_and_replaced(
    machine: Machine, logged: Logged, chunk: bytes, state: bytes | None
) -> None:
    (await machine.start_and_save(SHOE)).stop()
    database = ChunkDatabase(machine.journal)
    saved = database.load() or b""
    database.begin(replace=False)
    if chunk:
        database.append(chunk)
    database.commit(state or saved)
    database.close()
    second = machine.start()
    assert await second.journal.restore({PARTITION: 5}) == {}
    assert "it cannot be read" in logged()[-1]["reason"]
    await second.update(LAMP)
    await second.journal.save({PARTITION: 6})
    second.stop()
    third = machine.start()
    assert await third.journal.restore({PARTITION: 6}) == {PARTITION: 6}
    assert third.pipeline.vocabulary.token("lamp")
    third.stop()


async def test_foreign_file_is_replaced(machine: Machine) -> None:
    machine.folder.mkdir()
    machine.journal.write_text("not a database\n" * 1000)
    (await machine.start_and_save(SHOE)).stop()
    second = machine.start()
    assert await second.journal.restore({PARTITION: 5}) == {PARTITION: 5}
    second.stop()


async def test_full_disk_is_logged_and_the_save_before_it_stays(
    machine: Machine, logged: Logged, limit_file_size: LimitFileSize
) -> None:
    first = await machine.start_and_save(SHOE)
    new_items = [f"new-{number}" for number in range(900)]
    with limit_file_size(machine.state_bytes):
        first.pipeline.admit(new_items)
        await first.journal.save({PARTITION: 6})
        await first.journal.save({PARTITION: 7})
    assert [line["event"] for line in logged() if "items not saved" in line["event"]] == [
        "items not saved: a restart reads the whole topic"
    ] * 2
    machine.kill(first)
    second = machine.start()
    assert await second.journal.restore({PARTITION: 7}) == {PARTITION: 5}
    second.pipeline.admit(new_items)
    await second.journal.save({PARTITION: 8})
    second.stop()
    third = machine.start()
    assert await third.journal.restore({PARTITION: 8}) == {PARTITION: 8}
    assert third.pipeline.vocabulary.item_ids[-901:] == ["shoe", *new_items]
    third.stop()


async def test_worker_starts_on_a_full_disk_and_saves_once_there_is_room(
    machine: Machine, logged: Logged, limit_file_size: LimitFileSize
) -> None:
    with limit_file_size(0):
        first = machine.start()
    with limit_file_size(4096):
        assert await first.journal.restore({PARTITION: 5}) == {}
        await first.update(SHOE)
        await first.journal.save({PARTITION: 5})
    assert "items not saved" in logged()[-1]["event"]
    with pytest.raises(ConfigError, match="another worker is using it"):
        machine.start()
    await first.journal.save({PARTITION: 5})
    first.stop()
    second = machine.start()
    assert await second.journal.restore({PARTITION: 5}) == {PARTITION: 5}
    second.stop()


async def test_failed_save_is_logged_and_the_next_save_makes_up_for_it(machine: Machine, logged: Logged) -> None:
    first = await machine.start_and_save(SHOE)
    moved = machine.folder.with_name("moved")
    machine.folder.rename(moved)
    await first.swap(machine.artifact, "another")
    await first.journal.save({PARTITION: 6})
    moved.rename(machine.folder)
    await first.journal.save({PARTITION: 7})
    assert first.journal._saved.offsets == {0: 7}
    first.stop()
    assert "items not saved" in logged()[-1]["event"]


def test_state_folder_must_be_writable_and_used_by_one_worker(machine: Machine, tmp_path: Path) -> None:
    first = machine.start()
    with pytest.raises(ConfigError, match=r"pipeline\.state_dir .*state: another worker is using it; give each"):
        machine.start()
    first.stop()
    machine.start().stop()
    machine.journal.unlink()
    machine.journal.mkdir()
    with pytest.raises(ConfigError, match=r"unable to open database file; choose a folder that this worker can write"):
        machine.start()
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"pipeline\.state_dir .*file: File exists; choose a folder that this worker"):
        ItemJournal(tmp_path / "file", "items", first.ranker, machine.clock)
