"""Entries on disk: all before the first truncated or damaged one are read again."""

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from worker.items.append_only_file import AppendOnlyFile

MAGIC = b"TESTFILE"


def write(path: Path, contents: list[bytes]) -> None:
    path.unlink(missing_ok=True)
    file = AppendOnlyFile(path, MAGIC)
    for content in contents:
        file.append(content)
    file.sync()
    file.close()


@settings(suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
@given(st.lists(st.binary(max_size=20), max_size=6), st.integers(0, 200))
def test_truncated_file_yields_its_complete_entries_and_appends_after_them(
    tmp_path: Path, contents: list[bytes], size: int
) -> None:
    path = tmp_path / "entries"
    write(path, contents)
    path.write_bytes(path.read_bytes()[:size])
    complete: list[bytes] = []
    end = len(MAGIC)
    for content in contents:
        end += 8 + len(content)
        if end <= size:
            complete.append(content)
    file = AppendOnlyFile(path, MAGIC)
    assert list(file.entries()) == complete
    file.append(b"more")
    assert list(file.entries()) == [*complete, b"more"]
    file.close()


@pytest.mark.parametrize(("position", "intact"), [(9, []), (13, []), (17, []), (30, [b"first"])])
def test_entries_from_a_damaged_byte_on_are_dropped(tmp_path: Path, position: int, intact: list[bytes]) -> None:
    path = tmp_path / "entries"
    write(path, [b"first", b"second", b"third"])
    content = bytearray(path.read_bytes())
    content[position] ^= 0xFF
    path.write_bytes(content)
    assert list(AppendOnlyFile(path, MAGIC).entries()) == intact


def test_file_of_another_format_is_started_from_scratch(tmp_path: Path) -> None:
    path = tmp_path / "entries"
    write(path, [b"first"])
    assert list(AppendOnlyFile(path, b"ANOTHER1").entries()) == []
    assert list(AppendOnlyFile(path, b"ANOTHER1").entries()) == []
    assert path.read_bytes() == b"ANOTHER1"
