"""A file of frames that is only ever appended to: what was written whole is read again, whatever interrupted the rest.

8 bytes that name the format, then frames: u32 length, u32 CRC-32 of the content, content; little endian.
"""

import os
import struct
from collections.abc import Iterator
from pathlib import Path
from zlib import crc32

_HEAD = struct.Struct("<II")


class AppendOnlyFile:
    """One thread at a time. Every method raises OSError."""

    def __init__(self, path: Path, magic: bytes) -> None:
        """Opens it, or begins it where there is none, or a file of another format."""
        self.path = path
        self._file = path.open("a+b")
        self._file.seek(0)
        if self._file.read(len(magic)) != magic:
            self._file.truncate(0)
            self._file.write(magic)
        self._begin = len(magic)

    @property
    def size_bytes(self) -> int:
        return self._file.seek(0, os.SEEK_END)

    def frames(self) -> Iterator[bytes]:
        """The contents, oldest first. Behind the last whole frame the file is cut: that could not be read again."""
        at = self._begin
        while (content := self._frame(at)) is not None:
            yield content
            at += _HEAD.size + len(content)
        self._file.truncate(at)

    def append(self, content: bytes) -> None:
        self._file.write(_HEAD.pack(len(content), crc32(content)) + content)

    def sync(self) -> None:
        """Returns when all of it is on the disk."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def rename(self, path: Path) -> None:
        """In place of what is there."""
        self.path.replace(path)
        self.path = path

    def close(self) -> None:
        self._file.close()

    def _frame(self, at: int) -> bytes | None:
        self._file.seek(at)
        head = self._file.read(_HEAD.size)
        if len(head) < _HEAD.size:
            return None
        length, checksum = _HEAD.unpack(head)
        content = self._file.read(length)
        return content if len(content) == length and crc32(content) == checksum else None
