"""Frames on disk: what was written whole is read again, whatever was cut or damaged behind it."""

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from worker.items.append_only_file import AppendOnlyFile

MAGIC = b"TESTFILE"


def written(path: Path, contents: list[bytes]) -> None:
    path.unlink(missing_ok=True)
    file = AppendOnlyFile(path, MAGIC)
    for content in contents:
        file.append(content)
    file.sync()
    file.close()


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.binary(max_size=20), max_size=6), st.integers(0, 200))
def test_a_file_that_is_cut_anywhere_tells_its_whole_frames_and_goes_on_behind_them(
    tmp_path: Path, contents: list[bytes], cut: int
) -> None:
    path = tmp_path / "frames"
    written(path, contents)
    whole = path.read_bytes()
    path.write_bytes(whole[:cut])
    kept, at = [], len(MAGIC)
    for content in contents:
        at += 8 + len(content)
        if at <= cut:
            kept.append(content)
    file = AppendOnlyFile(path, MAGIC)
    assert list(file.frames()) == kept
    file.append(b"more")
    assert list(file.frames()) == [*kept, b"more"]
    file.close()


@pytest.mark.parametrize("place", [9, 13, 17, 30])
def test_nothing_behind_a_damaged_byte_is_told(tmp_path: Path, place: int) -> None:
    path = tmp_path / "frames"
    written(path, [b"first", b"second", b"third"])
    damaged = bytearray(path.read_bytes())
    damaged[place] ^= 0xFF
    path.write_bytes(damaged)
    assert list(AppendOnlyFile(path, MAGIC).frames()) == ([b"first"] if place == 30 else [])


def test_a_file_of_another_format_is_begun_anew(tmp_path: Path) -> None:
    path = tmp_path / "frames"
    written(path, [b"first"])
    assert list(AppendOnlyFile(path, b"ANOTHER1").frames()) == []
    assert list(AppendOnlyFile(path, b"ANOTHER1").frames()) == []
    assert path.read_bytes() == b"ANOTHER1"
