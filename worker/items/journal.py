"""A worker's items in a local file, so that a restart reads only the tail of the items topic.

`items.journal` in `pipeline.state_dir` starts with a full snapshot; each save appends the changes since, and the topic
offsets read so far. It is compacted, which writes a new file and replaces the old one, when the changes outgrow the
snapshot, when items were evicted, or when another artifact serves. It is used only with the artifact and the topic that
it was written for; what it lacks is read from the topic.
"""

import fcntl
from collections.abc import Mapping
from pathlib import Path
from typing import IO

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
from worker.items.append_only_file import AppendOnlyFile

log = logging.get("items")
MAGIC = b"MLRITEM2"  # change the number when an entry's fields or the hashes of Catalogue change
CHUNK_ITEMS = 2000  # items per call in the pipeline's thread: a call delays ranking by 10 ms
SLACK_BYTES = 1 << 20  # changes below this size are never worth a compaction
HEARTBEAT_MS = 600_000  # a save without changes is written this often: it proves that nothing was missed until then
# Kafka drops a tombstone `delete.retention.ms` after it was written, by default a day later: a worker that has not read
# for longer may have missed one.
TOMBSTONE_MS = DAY_MS
Offsets = Mapping[TopicPartition, int]


class JournalHeader(msgspec.Struct, frozen=True):
    """offsets: next offset to read, by partition; empty: the save continues in the next entry."""

    artifact: str
    topic: str
    saved_ms: int
    offsets: dict[int, int]


class JournalEntry(JournalHeader, frozen=True):
    chunk: SnapshotChunk


class ItemJournal:
    """Used by one task: restore once, then save. ConfigError for a folder that is not writable or already used."""

    def __init__(self, folder: Path, topic: str, ranker: PipelineRanker, clock: Clock) -> None:
        self._path = folder / "items.journal"
        self._topic = topic
        self._ranker = ranker
        self._clock = clock
        self._lock, self._file = _open(folder, self._path)
        self._executor = SingleThreadExecutor("items-journal")
        # The artifact's items need not be saved.
        self._artifact_version = CatalogueVersion(admitted=ranker.pipeline.vocabulary.admitted_count)
        self._saved_version = self._artifact_version
        self._saved = self._no_save()
        self._snapshot_bytes = 0
        self._saved_evictions = 0

    async def restore(self, ends: Offsets) -> dict[TopicPartition, int]:
        """Load the saved items; return the offsets to continue from, empty when the whole topic must be read.

        ends: end offsets of the topic's partitions
        """
        header = await self._executor.run(self._last_header)
        reason = "it holds no complete save" if header is None else self._mismatch(header, ends)
        if header is None or reason:
            log.info("items journal not used, reading the whole topic", path=str(self._path), reason=reason)
            return {}
        entries = self._file.entries()
        while content := await self._executor.run(lambda: next(entries, b"")):
            chunk = msgspec.msgpack.decode(content, type=JournalEntry).chunk
            await self._ranker.run_in_thread(lambda chunk=chunk: apply_chunk(self._ranker.pipeline.catalogue, chunk))
        self._saved = header
        self._snapshot_bytes = self._file.size_bytes
        self._saved_version = (await self._changes_since(self._artifact_version)).version
        log.info("items restored", path=str(self._path), items=len(self._ranker.pipeline.vocabulary) - 1)
        return {TopicPartition(self._topic, partition): offset for partition, offset in header.offsets.items()}

    async def save(self, positions: Offsets) -> None:
        """Append the changes since the last save. A failure is logged, and the next save writes everything.

        positions: next offset to read, by partition
        """
        header = JournalHeader(
            artifact=self._ranker.pipeline.version,
            topic=self._topic,
            saved_ms=self._clock.now_ms(),
            offsets={partition.partition: offset for partition, offset in positions.items()},
        )
        try:
            if self._needs_compaction(header):
                await self._compact(header)
            else:
                await self._append_changes(header)
        except OSError as error:
            self._saved = self._no_save()  # the next save compacts
            log.warning("items not saved: a restart reads the whole topic", path=str(self._path), error=str(error))

    def close(self) -> None:
        self._executor.close()
        self._file.close()
        self._lock.close()

    async def _append_changes(self, header: JournalHeader) -> None:
        changes = await self._changes_since(self._saved_version)
        is_recent = header.saved_ms < self._saved.saved_ms + HEARTBEAT_MS
        if changes or header.offsets != self._saved.offsets or not is_recent:
            await self._write(self._file, header, changes)

    async def _compact(self, header: JournalHeader) -> None:
        evictions = self._ranker.pipeline.vocabulary.evicted_count
        changes = await self._changes_since(self._artifact_version)
        draft = self._path.with_suffix(".draft")
        draft.unlink(missing_ok=True)
        file = AppendOnlyFile(draft, MAGIC)
        await self._write(file, header, changes)
        file.rename(self._path)
        self._file.close()
        self._file = file
        self._snapshot_bytes = file.size_bytes
        self._saved_evictions = evictions

    async def _write(self, file: AppendOnlyFile, header: JournalHeader, changes: CatalogueChanges) -> None:
        unfinished = msgspec.structs.replace(header, offsets={})
        for start in range(0, len(changes.tokens), CHUNK_ITEMS):
            chunk = await self._snapshot(changes.tokens[start : start + CHUNK_ITEMS], [])
            await self._executor.run(file.append, _encode(unfinished, chunk))
        chunk = await self._snapshot(changes.tokens[:0], changes.delisted)
        await self._executor.run(file.append, _encode(header, chunk))
        await self._executor.run(file.sync)
        self._saved_version = changes.version
        self._saved = header

    def _needs_compaction(self, header: JournalHeader) -> bool:
        return (
            header.artifact != self._saved.artifact
            or self._saved_evictions != self._ranker.pipeline.vocabulary.evicted_count
            or self._file.size_bytes > 2 * self._snapshot_bytes + SLACK_BYTES
        )

    def _mismatch(self, header: JournalHeader, ends: Offsets) -> str | None:
        """Return why the file must not be used, or None."""
        if (header.artifact, header.topic) != (self._ranker.pipeline.version, self._topic):
            return f"it belongs to artifact {header.artifact} and topic {header.topic}"
        saved = {TopicPartition(self._topic, partition): offset for partition, offset in header.offsets.items()}
        if any(offset > ends.get(partition, 0) for partition, offset in saved.items()):
            return "its offsets are past the end of the topic: the topic was re-created"
        if saved != ends and self._clock.now_ms() > header.saved_ms + TOMBSTONE_MS:
            return "it is older than a day, so tombstones may have been missed"
        return None

    def _last_header(self) -> JournalHeader | None:
        """Return the header of the last complete save."""
        headers = [msgspec.msgpack.decode(content, type=JournalHeader) for content in self._file.entries()]
        return next((header for header in reversed(headers) if header.offsets), None)

    def _no_save(self) -> JournalHeader:
        return JournalHeader("", self._topic, 0, {})

    async def _changes_since(self, version: CatalogueVersion) -> CatalogueChanges:
        return await self._ranker.run_in_thread(lambda: changes_since(self._ranker.pipeline.catalogue, version))

    async def _snapshot(self, tokens: np.ndarray, delisted: list[str]) -> SnapshotChunk:
        return await self._ranker.run_in_thread(
            lambda: snapshot_chunk(self._ranker.pipeline.catalogue, tokens, delisted)
        )


def _encode(header: JournalHeader, chunk: SnapshotChunk) -> bytes:
    return msgspec.msgpack.encode(JournalEntry(**msgspec.structs.asdict(header), chunk=chunk))


def _open(folder: Path, path: Path) -> tuple[IO[str], AppendOnlyFile]:
    """Return the lock file that reserves the folder for this process, until it exits, and the journal."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / "items.lock").open("w")
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return lock, AppendOnlyFile(path, MAGIC)
    except BlockingIOError as error:
        raise ConfigError(
            f"pipeline.state_dir {folder}: another worker is using it; give each worker a folder of its own"
        ) from error
    except OSError as error:
        raise ConfigError(
            f"pipeline.state_dir {folder}: {error.strerror}; choose a folder that this worker can write"
        ) from error
