"""Chunks of bytes and the state that they add up to, in one SQLite file that one process may open.

A save is one transaction: after a crash all of it is there, or none. With `synchronous = NORMAL` a power cut may also
take the last saves, each of them entirely: only checkpoints wait for the disk. A checksum over all chunks and the state
finds what SQLite, whose pages have none, cannot: a byte that changed on the disk.
"""

import os
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from zlib import crc32

FORMAT = int.from_bytes(b"MLR3")  # change the digit when the tables or their content change
# NOTE: all before the first access. So locked, SQLite needs no shared memory, and keeps the lock on the file until the
# connection is closed or the process ends.
_CONNECT = (
    "PRAGMA locking_mode = EXCLUSIVE",
    "PRAGMA synchronous = NORMAL",
    "PRAGMA page_size = 16384",  # a snapshot of 57 MB is written in 0.4 s; with the default of 4096 in 0.7 s
    "PRAGMA wal_autocheckpoint = 256",  # pages, 4 MiB
    "PRAGMA secure_delete = OFF",  # some builds overwrite freed pages unless told
    "BEGIN EXCLUSIVE",
    "COMMIT",
    "PRAGMA user_version",  # reads the schema, so damage there shows before the connection is returned
)
_REPLACE = (
    "DROP TABLE IF EXISTS chunks",
    "DROP TABLE IF EXISTS save",
    "CREATE TABLE chunks (number INTEGER PRIMARY KEY, content BLOB NOT NULL)",
    "CREATE TABLE save (number INTEGER PRIMARY KEY, state BLOB NOT NULL, checksum INTEGER NOT NULL)",
    f"PRAGMA user_version = {FORMAT}",
)
# Not the file's fault: it is kept. Any other error of SQLite means that the file is damaged or not ours; so may
# SQLITE_READONLY, and a file that is really read-only cannot be emptied either.
_ENVIRONMENT_ERRORS = (
    sqlite3.SQLITE_BUSY,
    sqlite3.SQLITE_CANTOPEN,
    sqlite3.SQLITE_FULL,
    sqlite3.SQLITE_IOERR,
    sqlite3.SQLITE_PERM,
)


class ChunkDatabase:
    """Used by one thread, which also opens it. Every method may raise sqlite3.Error; those that open or begin, OSError.

    content_bytes: size of all chunks
    """

    def __init__(self, path: Path) -> None:
        """Open the file and lock it; start it from scratch when it is missing, damaged or in another format.

        `is_locked` of the error: another process has the file.
        """
        self._path = path
        self._connection = _open(path)
        self._reset_count()

    def load(self) -> bytes | None:
        """Return the state of the last save, None when there is none. DatabaseError when anything is damaged."""
        if _format(self._connection) != FORMAT:
            return None
        self._reset_count()
        for content in self.chunks():
            self._count(content)
        row = self._connection.execute("SELECT CAST(state AS BLOB), checksum FROM save").fetchone()
        if row is None or crc32(row[0] or b"", self._checksum) != row[1]:
            raise sqlite3.DatabaseError("its checksum does not match its content")
        return row[0]

    def chunks(self) -> Iterator[bytes]:
        """Yield the chunks in the order in which they were appended."""
        # A damaged byte may have changed a value's type; the checksum will tell.
        for (content,) in self._connection.execute("SELECT CAST(content AS BLOB) FROM chunks ORDER BY number"):
            yield content or b""

    def begin(self, replace: bool) -> None:
        """Begin a save. replace: without the chunks of earlier saves, whose pages it reuses.

        FileNotFoundError: the file was moved or deleted, so no restart would find the save.
        """
        self._path.stat()
        if replace:
            self._connection.execute("PRAGMA journal_mode = WAL")
        self._connection.execute("BEGIN IMMEDIATE")
        if replace:
            for statement in _REPLACE:
                self._connection.execute(statement)
            self._reset_count()

    def append(self, content: bytes) -> None:
        self._connection.execute("INSERT INTO chunks (content) VALUES (?)", (content,))
        self._count(content)

    def commit(self, state: bytes) -> None:
        """End the save."""
        row = (1, state, crc32(state, self._checksum))
        self._connection.execute("INSERT OR REPLACE INTO save VALUES (?, ?, ?)", row)
        self._connection.execute("COMMIT")

    def truncate_log(self) -> None:
        """Move everything from the write-ahead log to the file. Otherwise the log keeps its largest size."""
        self._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()

    def reopen(self, error: Exception) -> None:
        """Undo an unfinished save after this error, and empty a damaged file. The next save must replace."""
        self._connection.close()
        self._connection = _open(self._path, from_scratch=_is_damage(error))

    def close(self) -> None:
        """Close the file and give up its lock; an unfinished save is undone."""
        self._connection.close()

    def _reset_count(self) -> None:
        self._checksum = 0
        self.content_bytes = 0

    def _count(self, content: bytes) -> None:
        # With the length, an empty chunk counts too, and so do the boundaries.
        self._checksum = crc32(content, crc32(b"%d " % len(content), self._checksum))
        self.content_bytes += len(content)


def is_locked(error: sqlite3.Error) -> bool:
    """Return whether another process has the file."""
    return _code(error) == sqlite3.SQLITE_BUSY


class _Connection(sqlite3.Connection):
    def execute(self, *statement: Any) -> sqlite3.Cursor:
        try:
            return super().execute(*statement)
        except UnicodeDecodeError as error:  # a message of SQLite that quotes a damaged name
            raise sqlite3.DatabaseError("database schema is malformed") from error


def _open(path: Path, from_scratch: bool = False) -> sqlite3.Connection:
    try:
        connection = _connect(path)
        if _format(connection) == FORMAT and not from_scratch:
            return connection
        connection.close()
    except sqlite3.Error as error:
        if not _is_damage(error):
            raise
    _erase(path)  # not before another process would have been noticed
    return _connect(path)


def _connect(path: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(path, timeout=0, isolation_level=None, factory=_Connection)
    try:
        for statement in _CONNECT:
            connection.execute(statement)
    except sqlite3.Error as error:
        if not _is_full(error):
            connection.close()
            raise
        connection.rollback()  # the lock is kept; the first save will report the full disk
    return connection


def _format(connection: sqlite3.Connection) -> int:
    return connection.execute("PRAGMA user_version").fetchone()[0]


def _erase(path: Path) -> None:
    """Empty the database. The file stays: another process may be waiting to lock it."""
    for log in ("-wal", "-journal"):
        path.with_name(path.name + log).unlink(missing_ok=True)
    if path.exists():
        os.truncate(path, 0)


def _is_damage(error: Exception) -> bool:
    if _extended_code(error) == sqlite3.SQLITE_IOERR_READ:  # a bad block would fail every save that reuses its page
        return True
    return isinstance(error, sqlite3.Error) and _code(error) not in _ENVIRONMENT_ERRORS


def _is_full(error: sqlite3.Error) -> bool:
    return _extended_code(error) in (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR_WRITE)  # no space; a file-size limit


def _code(error: Exception) -> int:
    return _extended_code(error) & 0xFF


def _extended_code(error: Exception) -> int:
    """Return the result code, 0 for an error that SQLite did not report."""
    return getattr(error, "sqlite_errorcode", 0)
