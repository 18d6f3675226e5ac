"""What a worker knows of items, kept in a file, so that a restart reads the tail of the items topic alone.

`items.journal` in `pipeline.state_dir` begins with everything; each save adds what has come since, and where the topic
had been read to. When the additions outgrow the beginning, when items were retired, or when another artifact serves, it
is written anew beside the old one, and takes its place. It is used only for the artifact and the topic that it was
written for; what it does not hold is read from the topic.
"""

import asyncio
import fcntl
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, TypeVar

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
from worker.inference.ranker import PipelineRanker
from worker.interfaces import Clock
from worker.items.append_only_file import AppendOnlyFile

log = logging.get("items")
MAGIC = b"MLRITEM1"  # another number when Catalogue hashes otherwise
CHUNK_ITEMS = 2000  # gathered at once: so long ranking waits, 10 ms
SLACK_BYTES = 1 << 20  # additions below it are never worth a new file
BEAT_MS = 600_000  # a save without news is still one so often: it says that nothing was missed
# Kafka forgets a tombstone `delete.retention.ms` after it was written, a day unless the topic says otherwise: who has
# not read for longer may have missed one.
TOMBSTONE_MS = DAY_MS
Offsets = Mapping[TopicPartition, int]
T = TypeVar("T")


class JournalHeader(msgspec.Struct, frozen=True):
    """offsets: by partition, where reading goes on; empty: the save goes on in the next frame."""

    artifact: str
    topic: str
    saved_ms: int
    offsets: dict[int, int]


class JournalEntry(JournalHeader, frozen=True):
    piece: SnapshotChunk


class ItemJournal:
    """One task restores once and saves. ConfigError unless the folder can be written and is nobody else's."""

    def __init__(self, folder: Path, topic: str, ranker: PipelineRanker, clock: Clock) -> None:
        self._path, self._topic, self._ranker, self._clock = folder / "items.journal", topic, ranker, clock
        self._lock, self._file = _opened(folder, self._path)
        self._thread = ThreadPoolExecutor(1, "itemstate")
        self._trained = CatalogueVersion(
            admitted=ranker.pipeline.vocabulary.admitted_count
        )  # the artifact's items need not be kept
        self._mark, self._saved = self._trained, JournalHeader("", topic, 0, {})
        self._whole_bytes = self._retired = 0

    async def restore(self, ends: Offsets) -> dict[TopicPartition, int]:
        """Know what the file knows; returns where reading of the topic goes on, empty where it is to be read whole.

        ends: of the topic's partitions
        """
        head = await self._aside(self._last_head)
        reason = "there is none" if head is None else self._unfit(head, ends)
        if head is None or reason:
            log.info("the snapshot of items is not used, the topic is read whole", path=str(self._path), reason=reason)
            return {}
        frames = self._file.frames()
        while content := await self._aside(lambda: next(frames, b"")):
            piece = msgspec.msgpack.decode(content, type=JournalEntry).piece
            await self._ranker.run_in_thread(lambda piece=piece: apply_chunk(self._ranker.pipeline.catalogue, piece))
        self._saved, self._whole_bytes = head, self._file.size_bytes
        self._mark = (await self._ranker.run_in_thread(lambda: self._news(self._trained))).version
        log.info("items are restored", path=str(self._path), items=len(self._ranker.pipeline.vocabulary) - 1)
        return {TopicPartition(self._topic, partition): offset for partition, offset in head.offsets.items()}

    async def save(self, positions: Offsets) -> None:
        """Keep what has come since the last save. positions: up to where the topic is known; what fails is said, and
        made up for by the next save."""
        head = JournalHeader(
            self._ranker.pipeline.version,
            self._topic,
            self._clock.now_ms(),
            {tp.partition: offset for tp, offset in positions.items()},
        )
        try:
            if self._is_outgrown(head):
                await self._compact(head)
            else:
                await self._add(head)
        except OSError as error:
            self._saved = JournalHeader("", self._topic, 0, {})  # anew by the next save
            log.warning("items are not saved: a restart reads the topic whole", path=str(self._path), error=str(error))

    def close(self) -> None:
        self._thread.shutdown(wait=True)
        self._file.close()
        self._lock.close()

    async def _add(self, head: JournalHeader) -> None:
        news = await self._ranker.run_in_thread(lambda: self._news(self._mark))
        if not news and head.offsets == self._saved.offsets and head.saved_ms < self._saved.saved_ms + BEAT_MS:
            return
        await self._write(self._file, head, news)

    async def _compact(self, head: JournalHeader) -> None:
        retired = self._ranker.pipeline.vocabulary.evicted_count
        news = await self._ranker.run_in_thread(lambda: self._news(self._trained))
        draft = self._path.with_suffix(".draft")
        draft.unlink(missing_ok=True)
        file = AppendOnlyFile(draft, MAGIC)
        await self._write(file, head, news)
        file.rename(self._path)
        self._file.close()
        self._file, self._whole_bytes, self._retired = file, file.size_bytes, retired

    async def _write(self, file: AppendOnlyFile, head: JournalHeader, news: CatalogueChanges) -> None:
        for start in range(0, len(news.tokens), CHUNK_ITEMS):
            tokens = news.tokens[start : start + CHUNK_ITEMS]
            piece = await self._piece(tokens, [])
            await self._aside(file.append, _frame(head, {}, piece))
        await self._aside(file.append, _frame(head, head.offsets, await self._piece(news.tokens[:0], news.delisted)))
        await self._aside(file.sync)
        self._mark, self._saved = news.version, head

    def _is_outgrown(self, head: JournalHeader) -> bool:
        return (
            head.artifact != self._saved.artifact
            or self._retired != self._ranker.pipeline.vocabulary.evicted_count
            or self._file.size_bytes > 2 * self._whole_bytes + SLACK_BYTES
        )

    def _unfit(self, head: JournalHeader, ends: Offsets) -> str | None:
        """Why the file must not be used."""
        if (head.artifact, head.topic) != (self._ranker.pipeline.version, self._topic):
            return f"it is of artifact {head.artifact} and topic {head.topic}"
        known = {TopicPartition(self._topic, partition): offset for partition, offset in head.offsets.items()}
        if any(offset > ends.get(tp, 0) for tp, offset in known.items()):
            return "its offsets lie beyond the topic's end: the topic was made anew"
        if known != ends and self._clock.now_ms() > head.saved_ms + TOMBSTONE_MS:
            return "it is older than a day, so that tombstones may be missed"
        return None

    def _last_head(self) -> JournalHeader | None:
        """Of the last save that was ended."""
        heads = [msgspec.msgpack.decode(content, type=JournalHeader) for content in self._file.frames()]
        return next((head for head in reversed(heads) if head.offsets), None)

    def _news(self, mark: CatalogueVersion) -> CatalogueChanges:
        return changes_since(self._ranker.pipeline.catalogue, mark)

    async def _piece(self, tokens: np.ndarray, withdrawn: list[str]) -> SnapshotChunk:
        return await self._ranker.run_in_thread(
            lambda: snapshot_chunk(self._ranker.pipeline.catalogue, tokens, withdrawn)
        )

    async def _aside(self, act: Callable[..., T], *arguments: object) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, act, *arguments)


def _frame(head: JournalHeader, offsets: dict[int, int], piece: SnapshotChunk) -> bytes:
    return msgspec.msgpack.encode(JournalEntry(head.artifact, head.topic, head.saved_ms, offsets, piece))


def _opened(folder: Path, path: Path) -> tuple[IO[str], AppendOnlyFile]:
    """A file whose lock says that the folder is ours, which the system gives up with the process; and the journal."""
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
            f"pipeline.state_dir {folder}: {error.strerror}; name a folder that this worker may write"
        ) from error
