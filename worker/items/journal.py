"""A worker's items in a local database, so that a restart reads only the tail of the items topic.

`items.sqlite` in `pipeline.state_dir` starts with a full snapshot; each save appends the changes since, and replaces
the topic offsets read so far. A new snapshot replaces everything when the changes outgrow the old one, when items were
evicted, or when another artifact serves. The saved items are used only with the artifact and the topic that they were
saved for; what they lack is read from the topic.
"""

import asyncio
import sqlite3
from collections.abc import Callable, Mapping
from pathlib import Path

import msgspec
import numpy as np
from aiokafka import TopicPartition

from pipeline.items.snapshot import (
    CatalogueChanges,
    CatalogueVersion,
    SnapshotChunk,
    apply_chunk,
    changes_since,
    snapshot_chunk,
)
from pipeline.records import DAY_MS
from worker import logging
from worker.errors import ConfigError
from worker.executor import SingleThreadExecutor
from worker.inference.ranker import PipelineRanker
from worker.interfaces import Clock
from worker.items.chunk_database import ChunkDatabase, is_locked

log = logging.get("items")
CHUNK_ITEMS = 2000  # items per call in the pipeline's thread: a call delays ranking by 10 ms
SAVE_INTERVAL_S = 10.0  # between two saves: a restart reads at most this much of the topic again
SLACK_BYTES = 1 << 20  # changes below this size are never worth a new snapshot
HEARTBEAT_MS = 600_000  # a save without changes is written this often: it proves that nothing was missed until then
# Kafka drops a tombstone `delete.retention.ms` after it was written, by default a day later: a worker that has not read
# for longer may have missed one.
TOMBSTONE_MS = DAY_MS
Offsets = Mapping[TopicPartition, int]


class Save(msgspec.Struct, frozen=True):
    """State of a save. offsets: next offset to read, by partition; snapshot_bytes: size of the snapshot's chunks.

    Change the number in `chunk_database.FORMAT` when a field, SnapshotChunk or the hashes of Catalogue change.
    """

    artifact: str
    topic: str
    saved_ms: int
    offsets: dict[int, int]
    snapshot_bytes: int = 0


class ItemJournal:
    """Restore once, then save, one call at a time. ConfigError for a folder that is not writable or already used."""

    def __init__(self, folder: Path, topic: str, ranker: PipelineRanker, clock: Clock) -> None:
        self._path = folder / "items.sqlite"
        self._topic = topic
        self._ranker = ranker
        self._clock = clock
        self._executor = SingleThreadExecutor("items-journal")  # the only thread that uses the database
        try:
            self._database = self._executor.submit(_open, self._path).result()
        except ConfigError:
            self._executor.close()
            raise
        # The artifact's items need not be saved.
        self._artifact_version = CatalogueVersion(admitted=ranker.pipeline.vocabulary.admitted_count)
        self._saved_version = self._artifact_version
        self._saved = self._no_save()
        self._saved_evictions = 0
        self._failure: Exception | None = None  # of the last save or restore

    async def restore(self, ends: Offsets) -> dict[TopicPartition, int]:
        """Load the saved items; return the offsets to continue from, empty when the whole topic must be read.

        ends: end offsets of the topic's partitions
        """
        try:
            state = await self._executor.run(self._database.load)
            if state is None:
                return self._reject("it holds no complete save")
            saved = msgspec.json.decode(state, type=Save)
            if reason := self._mismatch(saved, ends):
                return self._reject(reason)
            await self._apply_chunks()
        except Exception as error:  # whatever is wrong with a save, the topic has everything
            self._failure = error
            return self._reject(f"it cannot be read: {error}")
        self._saved = saved
        self._saved_version = (await self._changes_since(self._artifact_version)).version
        log.info("items restored", path=str(self._path), items=len(self._ranker.pipeline.vocabulary) - 1)
        return self._positions(saved)

    async def run(self, positions: Callable[[], Offsets]) -> None:
        """Save every SAVE_INTERVAL_S until cancelled. positions: returns the next offset to read, by partition"""
        while True:
            await asyncio.sleep(SAVE_INTERVAL_S)
            await self.save(positions())

    async def save(self, positions: Offsets) -> None:
        """Add the changes since the last save. A failure is logged, and the next save writes everything.

        positions: next offset to read, by partition; everything before it has been applied
        """
        save = Save(
            artifact=self._ranker.pipeline.version,
            topic=self._topic,
            saved_ms=self._clock.now_ms(),
            offsets={partition.partition: offset for partition, offset in positions.items()},
            snapshot_bytes=self._saved.snapshot_bytes,
        )
        try:
            await self._recover()
            if self._needs_snapshot(save):
                await self._save_snapshot(save)
            else:
                await self._save_changes(save)
        except Exception as error:
            self._failure = error
            self._saved = self._no_save()
            if not isinstance(error, OSError | sqlite3.Error):
                raise
            log.warning("items not saved: a restart reads the whole topic", path=str(self._path), error=str(error))

    def close(self) -> None:
        self._executor.submit(self._database.close)
        self._executor.close()

    def _reject(self, reason: str) -> dict[TopicPartition, int]:
        log.info("items journal not used, reading the whole topic", path=str(self._path), reason=reason)
        return {}

    async def _apply_chunks(self) -> None:
        contents = self._database.chunks()
        while content := await self._executor.run(lambda: next(contents, b"")):
            chunk = msgspec.msgpack.decode(content, type=SnapshotChunk)
            await self._ranker.run_in_thread(lambda chunk=chunk: apply_chunk(self._ranker.pipeline.catalogue, chunk))

    async def _recover(self) -> None:
        if self._failure is not None:
            await self._executor.run(self._database.reopen, self._failure)
            self._failure = None

    async def _save_changes(self, save: Save) -> None:
        changes = await self._changes_since(self._saved_version)
        is_recent = save.saved_ms < self._saved.saved_ms + HEARTBEAT_MS
        if changes or save.offsets != self._saved.offsets or not is_recent:
            await self._executor.run(self._database.begin, False)
            await self._append(changes)
            await self._commit(save, changes)

    async def _save_snapshot(self, save: Save) -> None:
        evictions = self._ranker.pipeline.vocabulary.evicted_count
        changes = await self._changes_since(self._artifact_version)
        await self._executor.run(self._database.begin, True)
        await self._append(changes)
        await self._commit(msgspec.structs.replace(save, snapshot_bytes=self._database.content_bytes), changes)
        self._saved_evictions = evictions
        await self._executor.run(self._database.truncate_log)

    async def _append(self, changes: CatalogueChanges) -> None:
        for start in range(0, len(changes.tokens), CHUNK_ITEMS):
            chunk = await self._snapshot(changes.tokens[start : start + CHUNK_ITEMS], [])
            await self._executor.run(self._append_chunk, chunk)
        if changes.delisted:
            chunk = await self._snapshot(changes.tokens[:0], changes.delisted)
            await self._executor.run(self._append_chunk, chunk)

    def _append_chunk(self, chunk: SnapshotChunk) -> None:
        self._database.append(msgspec.msgpack.encode(chunk))

    async def _commit(self, save: Save, changes: CatalogueChanges) -> None:
        await self._executor.run(self._database.commit, msgspec.json.encode(save))
        self._saved_version = changes.version
        self._saved = save

    def _needs_snapshot(self, save: Save) -> bool:
        return (
            save.artifact != self._saved.artifact
            or self._saved_evictions != self._ranker.pipeline.vocabulary.evicted_count
            or self._database.content_bytes > 2 * self._saved.snapshot_bytes + SLACK_BYTES
        )

    def _mismatch(self, saved: Save, ends: Offsets) -> str | None:
        """Return why the saved items must not be used, or None."""
        if (saved.artifact, saved.topic) != (self._ranker.pipeline.version, self._topic):
            return f"it belongs to artifact {saved.artifact} and topic {saved.topic}"
        positions = self._positions(saved)
        if any(offset > ends.get(partition, 0) for partition, offset in positions.items()):
            return "its offsets are past the end of the topic: the topic was re-created"
        if positions != ends and self._clock.now_ms() > saved.saved_ms + TOMBSTONE_MS:
            return "it is older than a day, so tombstones may have been missed"
        return None

    def _positions(self, saved: Save) -> dict[TopicPartition, int]:
        return {TopicPartition(self._topic, partition): offset for partition, offset in saved.offsets.items()}

    def _no_save(self) -> Save:
        return Save("", self._topic, 0, {})

    async def _changes_since(self, version: CatalogueVersion) -> CatalogueChanges:
        return await self._ranker.run_in_thread(lambda: changes_since(self._ranker.pipeline.catalogue, version))

    async def _snapshot(self, tokens: np.ndarray, delisted: list[str]) -> SnapshotChunk:
        return await self._ranker.run_in_thread(
            lambda: snapshot_chunk(self._ranker.pipeline.catalogue, tokens, delisted)
        )


def _open(path: Path) -> ChunkDatabase:
    """Return the database, reserved for this process until it exits."""
    setting = f"pipeline.state_dir {path.parent}"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()  # its error says why the folder cannot be written; SQLite's does not
        return ChunkDatabase(path)
    except sqlite3.Error as error:
        if is_locked(error):
            raise ConfigError(f"{setting}: another worker is using it; give each worker a folder of its own") from error
        raise ConfigError(f"{setting}: {error}; choose a folder that this worker can write") from error
    except OSError as error:
        raise ConfigError(f"{setting}: {error.strerror}; choose a folder that this worker can write") from error
