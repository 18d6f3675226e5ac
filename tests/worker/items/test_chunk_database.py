"""Saves on disk: each is there entirely or not at all, and what is damaged or not ours is not read."""

import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, closing
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from worker.items.chunk_database import FORMAT, ChunkDatabase, is_locked

Content = tuple[bytes | None, list[bytes]]  # state and chunks
NO_SAVE: Content = (None, [])
SAVED: Content = (b"the state", [b"first" * 9, b"second" * 9, b"third" * 9000])
MIB = 1 << 20
# Prints a line within each save and after it, where it waits for the next line of its input.
WRITER = """
import sys
from pathlib import Path
from worker.items.chunk_database import ChunkDatabase

database = ChunkDatabase(Path(sys.argv[1]))
for number in range(1, 1000):
    database.begin(replace=number % 3 == 1)
    database.append(b"%d" % number * 4_000_000)  # more than SQLite keeps in memory
    print("saving", flush=True) or input()
    database.append(b"%d" % number)
    database.commit(b"%d" % number)
    print("saved", flush=True) or input()
"""


def save(database: ChunkDatabase, content: Content, replace: bool = True) -> None:
    state, chunks = content
    database.begin(replace)
    for chunk in chunks:
        database.append(chunk)
    database.commit(state or b"")


def read(path: Path) -> Content:
    with closing(ChunkDatabase(path)) as database:
        state = database.load()
        return NO_SAVE if state is None else (state, list(database.chunks()))


def write(path: Path, content: Content = SAVED) -> bytes:
    """Save to a new file; return its bytes."""
    path.unlink(missing_ok=True)
    with closing(ChunkDatabase(path)) as database:
        save(database, content)
    return path.read_bytes()


def log_of(path: Path) -> Path:
    return path.with_name(path.name + "-wal")


def flip(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 0xFF
    path.write_bytes(content)


def test_later_saves_append_or_replace(tmp_path: Path) -> None:
    path = tmp_path / "database"
    assert read(path) == NO_SAVE
    write(path)
    with closing(ChunkDatabase(path)) as database:
        assert database.load() == SAVED[0]
        save(database, (b"appended", [b"more"]), replace=False)
        assert database.content_bytes == len(b"".join(SAVED[1])) + len(b"more")
    assert read(path) == (b"appended", [*SAVED[1], b"more"])
    with closing(ChunkDatabase(path)) as database:
        save(database, (b"replaced", [b"all"]))
        assert database.content_bytes == len(b"all")
    assert read(path) == (b"replaced", [b"all"])


@settings(suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture], max_examples=50)
@given(st.lists(st.tuples(st.booleans(), st.lists(st.binary(max_size=20000), max_size=3)), max_size=4), st.data())
def test_truncated_log_yields_its_last_complete_save_and_takes_the_next(
    tmp_path: Path, saves: list[tuple[bool, list[bytes]]], data: st.DataObject
) -> None:
    path = tmp_path / "written"
    torn = tmp_path / "torn"
    path.unlink(missing_ok=True)
    database = ChunkDatabase(path)
    save(database, SAVED)
    database.truncate_log()
    contents = [SAVED]
    ends = [0]
    for number, (replace, chunks) in enumerate(saves):
        save(database, (b"%d" % number, chunks), replace)
        contents.append((b"%d" % number, chunks if replace else contents[-1][1] + chunks))
        ends.append(log_of(path).stat().st_size)
    size = data.draw(st.integers(0, ends[-1]))
    shutil.copy(path, torn)
    log_of(torn).write_bytes(log_of(path).read_bytes()[:size])
    database.close()
    complete = next(content for content, end in zip(reversed(contents), reversed(ends), strict=True) if end <= size)
    assert read(torn) == complete
    with closing(ChunkDatabase(torn)) as database:
        database.load()
        save(database, (b"next", [b"more"]), replace=False)
    assert read(torn) == (b"next", [*complete[1], b"more"])


@pytest.mark.parametrize("text", [b"second", b"third", b"the state"])
def test_damaged_content_is_not_read_and_the_next_save_replaces_it(tmp_path: Path, text: bytes) -> None:
    path = tmp_path / "database"
    flip(path, write(path).index(text))
    with closing(ChunkDatabase(path)) as database:
        with pytest.raises(sqlite3.DatabaseError, match="its checksum does not match its content") as error:
            database.load()
        database.reopen(error.value)
        assert database.load() is None
        save(database, SAVED)
    assert read(path) == SAVED


@settings(suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture], max_examples=150)
@given(st.data())
def test_file_with_a_damaged_byte_yields_all_or_nothing_and_can_be_saved_to(
    tmp_path: Path, data: st.DataObject
) -> None:
    path = tmp_path / "database"
    content = write(path)
    used = [position for position, byte in enumerate(content) if byte]
    flip(path, data.draw(st.one_of(st.sampled_from(used), st.integers(0, len(content) - 1))))
    with closing(ChunkDatabase(path)) as database:
        for _ in range(2):
            try:
                state = database.load()
                assert (state, list(database.chunks())) == SAVED if state else state is None
                save(database, (b"next", [b"more" * 9000]))
                break
            except sqlite3.Error as error:
                database.reopen(error)
    assert read(path) == (b"next", [b"more" * 9000])


def test_damaged_log_yields_the_save_before(tmp_path: Path) -> None:
    path = tmp_path / "written"
    copy = tmp_path / "copy"
    with closing(ChunkDatabase(path)) as database:
        save(database, SAVED)
        save(database, (b"next", [b"more"]), replace=False)
        shutil.copy(path, copy)
        shutil.copy(log_of(path), log_of(copy))
    flip(log_of(copy), log_of(copy).read_bytes().rindex(b"more"))
    assert read(copy) == SAVED


@pytest.mark.parametrize("content", [b"short", b"no database\n" * 3000, b"SQLite format 3\0" + bytes(5000)])
def test_foreign_file_is_started_from_scratch(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "database"
    path.write_bytes(content)
    assert read(path) == NO_SAVE
    with closing(ChunkDatabase(path)) as database:
        save(database, SAVED)
    assert read(path) == SAVED


@pytest.mark.parametrize("version", [0, FORMAT - 1, FORMAT + 1])
def test_database_of_another_format_is_started_from_scratch(tmp_path: Path, version: int) -> None:
    path = tmp_path / "database"
    write(path)
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("CREATE TABLE foreign_rows (x)")
        connection.execute(f"PRAGMA user_version = {version}")
    assert read(path) == NO_SAVE
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("SELECT count(*) FROM sqlite_master").fetchone() == (0,)


def test_replacing_saves_reuse_the_pages_of_those_before(tmp_path: Path) -> None:
    path = tmp_path / "database"
    with closing(ChunkDatabase(path)) as database:
        for number in range(10):
            save(database, (b"%d" % number, [b"%d" % number * MIB]))
            database.truncate_log()
            assert log_of(path).stat().st_size == 0
            assert path.stat().st_size < 1.1 * MIB


def test_save_past_a_full_disk_is_undone(
    tmp_path: Path, limit_file_size: Callable[[int], AbstractContextManager[None]]
) -> None:
    path = tmp_path / "database"
    write(path)
    with closing(ChunkDatabase(path)) as database:
        with limit_file_size(MIB), pytest.raises(sqlite3.Error) as error:
            save(database, (b"next", [b"some", b"more" * MIB]), replace=False)
        database.reopen(error.value)
        assert database.load() == SAVED[0]
        assert list(database.chunks()) == SAVED[1]


@pytest.mark.parametrize(
    ("code", "kept"),
    [
        (sqlite3.SQLITE_FULL, True),
        (sqlite3.SQLITE_IOERR_WRITE, True),
        (sqlite3.SQLITE_CANTOPEN, True),
        (sqlite3.SQLITE_IOERR_READ, False),
        (sqlite3.SQLITE_CORRUPT, False),
        (sqlite3.SQLITE_NOTADB, False),
    ],
)
def test_reopening_empties_a_file_that_is_damaged_and_no_other(tmp_path: Path, code: int, kept: bool) -> None:
    path = tmp_path / "database"
    write(path)
    error = sqlite3.DatabaseError("injected")
    error.sqlite_errorcode = code
    with closing(ChunkDatabase(path)) as database:
        database.begin(replace=True)
        database.reopen(error)
        assert database.load() == (SAVED[0] if kept else None)


def test_file_that_another_process_has_is_not_emptied(tmp_path: Path) -> None:
    path = tmp_path / "database"
    database = ChunkDatabase(path)
    database.close()
    process = run_writer(path, 2)
    with pytest.raises(sqlite3.OperationalError) as error:
        database.reopen(sqlite3.DatabaseError("it was damaged"))
    assert is_locked(error.value)
    kill(process)
    assert read(path)[0] == b"1"


def test_save_to_a_deleted_file_is_rejected(tmp_path: Path) -> None:
    path = tmp_path / "database"
    with closing(ChunkDatabase(path)) as database:
        path.unlink()
        with pytest.raises(FileNotFoundError) as error:
            database.begin(replace=False)
        database.reopen(error.value)
        save(database, SAVED)
    assert read(path) == SAVED


def run_writer(path: Path, steps: int) -> "subprocess.Popen[str]":
    """Start a process that saves; return it after so many lines, half of them written within a save."""
    process = subprocess.Popen(
        [sys.executable, "-c", WRITER, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdin is not None
    assert process.stdout is not None
    for step in range(steps):
        if step:
            process.stdin.write("\n")
            process.stdin.flush()
        assert process.stdout.readline() in ("saving\n", "saved\n")
    return process


def kill(process: "subprocess.Popen[str]") -> None:
    process.kill()
    process.communicate()


@pytest.mark.parametrize("steps", range(1, 10))
@pytest.mark.parametrize("resumed", [False, True])
def test_killed_process_leaves_its_last_complete_save(tmp_path: Path, steps: int, resumed: bool) -> None:
    path = tmp_path / "database"
    process = run_writer(path, steps)
    if resumed:  # killed at some moment of the next step
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    kill(process)
    state, chunks = read(path)
    saves = int(state or 0)
    assert saves in ((steps // 2, (steps + 1) // 2) if resumed else (steps // 2,))
    first = saves - (saves - 1) % 3
    numbers = range(first, saves + 1) if saves else ()
    assert chunks == [chunk for number in numbers for chunk in (b"%d" % number * 4_000_000, b"%d" % number)]


def test_file_in_use_is_locked_until_its_process_ends(tmp_path: Path) -> None:
    path = tmp_path / "database"
    for steps in (1, 2, 3):  # a file without tables; one with a save; one within the next save
        process = run_writer(path, steps)
        with pytest.raises(sqlite3.OperationalError) as error:
            ChunkDatabase(path)
        assert is_locked(error.value)
        kill(process)
        assert read(path)[0] == (b"1" if steps > 1 else None)
