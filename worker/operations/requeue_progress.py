"""Which dead letters of a partition were requeued, as one committed offset with metadata."""

import msgspec
from aiokafka.structs import OffsetAndMetadata

from worker.errors import SinkError

METADATA_BYTES = 4000  # brokers accept 4,096 (offset.metadata.max.bytes)
Runs = tuple[tuple[int, int], ...]


class RequeueProgress(msgspec.Struct, frozen=True):
    """The offsets of a partition that were requeued: all before `offset`, and the runs (first, last) after it."""

    offset: int = 0
    runs: Runs = ()

    def __contains__(self, offset: int) -> bool:
        return offset < self.offset or any(first <= offset <= last for first, last in self.runs)

    @property
    def end(self) -> int:
        """One past the last offset that was requeued."""
        return max([self.offset, *(last + 1 for _, last in self.runs)])

    def to_offset(self, group: str) -> OffsetAndMetadata:
        """Return the commit that stores it. SinkError when the runs do not fit into its metadata."""
        metadata = ",".join(f"{first}-{last}" for first, last in self.runs)
        if len(metadata) > METADATA_BYTES:
            raise SinkError(
                f"group {group} cannot store {len(self.runs)} separate runs of requeued dead letters; requeue without "
                f"--reason, or fewer with --limit"
            )
        return OffsetAndMetadata(self.offset, metadata)

    @classmethod
    def from_offset(cls, committed: OffsetAndMetadata) -> "RequeueProgress":
        runs = [tuple(map(int, run.split("-"))) for run in (committed.metadata or "").split(",") if run]
        return cls(committed.offset, tuple((first, last) for first, last in runs))


class ProgressWalk:
    """Extends a partition's progress while its dead letters, from `before.offset` on, are passed in offset order."""

    def __init__(self, before: RequeueProgress) -> None:
        self._before = before
        self._offset = before.offset
        self._runs: list[tuple[int, int]] = []
        self._passed = before.offset - 1  # the last offset that was passed
        self._has_gap = False  # a letter was left for later
        self._in_run = False  # the last letter ended a run

    def add(self, offset: int, is_done: bool) -> None:
        """Pass the next dead letter. is_done: it was requeued, or never can be."""
        self._passed = offset
        if is_done and not self._has_gap:
            self._offset = offset + 1
        elif is_done and self._in_run:
            self._runs[-1] = self._runs[-1][0], offset
        elif is_done:
            self._runs.append((offset, offset))
        self._has_gap |= not is_done
        self._in_run = is_done and self._has_gap

    def progress(self) -> RequeueProgress:
        """Return the progress so far; what was requeued before, after the last letter passed, still is."""
        later = [(max(first, self._passed + 1), last) for first, last in self._before.runs if last > self._passed]
        return RequeueProgress(self._offset, (*self._runs, *later))
