"""Two paths change names in one step, also where the system has no call for it."""

import ctypes
import os
from collections.abc import Callable
from errno import EACCES, EINVAL
from pathlib import Path

import pytest

from pipeline.files import exchange


class FailingLibrary:
    """A C library whose renameat2 fails with an error number."""

    def __init__(self, number: int) -> None:
        self._number = number

    def renameat2(self, *_: object) -> int:
        ctypes.set_errno(self._number)
        return -1


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    for name in ("old", "new"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "name").write_text(name)
    return tmp_path / "old", tmp_path / "new"


def assert_exchanged(folders: tuple[Path, Path]) -> None:
    assert [(folder / "name").read_text() for folder in folders] == ["new", "old"]
    assert sorted(path.name for path in folders[0].parent.iterdir()) == ["new", "old"]


def test_folders_change_names(folders: tuple[Path, Path]) -> None:
    exchange(*folders)
    assert_exchanged(folders)


@pytest.mark.parametrize("library", [lambda: FailingLibrary(EINVAL), object], ids=["not on this filesystem", "no call"])
def test_folders_change_names_in_turn_without_the_call(
    folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, library: Callable[[], object]
) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda *_, **__: library())
    exchange(*folders)
    assert_exchanged(folders)


def test_error_names_both_paths(folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda *_, **__: FailingLibrary(EACCES))
    with pytest.raises(PermissionError, match=f"{os.strerror(EACCES)}: '{folders[0]}' -> '{folders[1]}'"):
        exchange(*folders)


def test_missing_path_is_an_error(folders: tuple[Path, Path]) -> None:
    with pytest.raises(FileNotFoundError):
        exchange(folders[0], folders[0].with_name("missing"))
    assert (folders[0] / "name").read_text() == "old"
