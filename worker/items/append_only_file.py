"""A file of checksummed entries that only grows: after a crash, everything up to the first incomplete entry is read.

8 bytes that name the format, then entries: u32 length, u32 CRC-32 of the content, content; little endian.
"""

import os
import struct
from collections.abc import Iterator
from pathlib import Path
from zlib import crc32

_HEADER = struct.Struct("<II")


class AppendOnlyFile:
    """Used by one thread at a time. Every method may raise OSError."""

    def __init__(self, path: Path, magic: bytes) -> None:
        """Open the file; start it from scratch when it is missing or in another format."""
        self.path = path
        self._file = path.open("a+b")
        self._file.seek(0)
        if self._file.read(len(magic)) != magic:
            self._file.truncate(0)
            self._file.write(magic)
        self._start = len(magic)

    @property
    def size_bytes(self) -> int:
        return self._file.seek(0, os.SEEK_END)

    def entries(self) -> Iterator[bytes]:
        """Yield the entries' contents, oldest first; then truncate the file after the last complete entry.

        An entry appended after an incomplete one could not be read again.
        """
        position = self._start
        while (content := self._read_entry(position)) is not None:
            yield content
            position += _HEADER.size + len(content)
        self._file.truncate(position)

    def append(self, content: bytes) -> None:
        self._file.write(_HEADER.pack(len(content), crc32(content)) + content)

    def sync(self) -> None:
        """Return when everything is on the disk."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def rename(self, path: Path) -> None:
        """Move the open file to `path`, replacing the file there."""
        self.path.replace(path)
        self.path = path

    def close(self) -> None:
        self._file.close()

    def _read_entry(self, position: int) -> bytes | None:
        self._file.seek(position)
        header = self._file.read(_HEADER.size)
        if len(header) < _HEADER.size:
            return None
        length, checksum = _HEADER.unpack(header)
        content = self._file.read(length)
        return content if len(content) == length and crc32(content) == checksum else None
