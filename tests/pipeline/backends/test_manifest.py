"""Exports next to an artifact: they are listed, checked against their manifests, and never part of the artifact."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from pipeline import artifact as artifacts
from pipeline.backends.manifest import EXPORT_MANIFEST, EXPORTS, list_exports, read_export
from pipeline.errors import ArtifactError
from pipeline.manifest import read_manifest
from tests.artifacts import CREATED, add_export, nudged, untrained

BACKEND = "onnxruntime-cpu"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Folder of an artifact without exports."""
    artifacts.save(tmp_path / "model", untrained(["a", "b", "c"]), {}, CREATED)
    return tmp_path / "model"


@pytest.fixture
def version(folder: Path) -> str:
    return read_manifest(folder).version


@pytest.fixture
def export(folder: Path) -> Path:
    """Folder of the artifact's export."""
    return add_export(folder, BACKEND)


def update(export: Path, **fields: Any) -> None:
    path = export / EXPORT_MANIFEST
    path.write_bytes(msgspec.json.encode(msgspec.json.decode(path.read_bytes()) | fields))


def test_exports_are_listed_by_backend_and_unfinished_ones_are_not(folder: Path) -> None:
    assert list_exports(folder) == []
    for backend in (BACKEND, "inductor", "tensorrt-fp16"):
        add_export(folder, backend)
    (folder / EXPORTS / ".inductor.1234").mkdir()
    (folder / EXPORTS / "notes").write_text("of an operator")
    assert list_exports(folder) == ["inductor", BACKEND, "tensorrt-fp16"]


def test_exports_that_are_not_a_folder_are_one_sentence(folder: Path) -> None:
    (folder / EXPORTS).write_text("")
    with pytest.raises(ArtifactError, match=r"exports .*/model/exports: Not a directory; want a readable folder"):
        list_exports(folder)


def test_export_is_read_with_its_manifest(folder: Path, export: Path, version: str) -> None:
    manifest = read_export(folder, BACKEND, version)
    assert (manifest.backend, manifest.artifact_version) == (BACKEND, version)
    assert manifest.metrics == {"state_error": 1e-6}
    assert set(manifest.files) == {"model.onnx", "weights/0.bin"}


def test_export_of_a_symlinked_artifact_is_read(tmp_path: Path, folder: Path, export: Path, version: str) -> None:
    (tmp_path / "current").symlink_to(folder)
    assert list_exports(tmp_path / "current") == [BACKEND]
    assert read_export(tmp_path / "current", BACKEND, version).backend == BACKEND


def test_symlink_within_the_export_is_followed(folder: Path, export: Path, version: str) -> None:
    (export / "model.onnx").rename(export / "graph")
    (export / "model.onnx").symlink_to("graph")
    assert read_export(folder, BACKEND, version).backend == BACKEND


MISMATCHES = {
    "format": ({"format": 9, "backend": 5}, r"format 9, this millrace reads 1; export the artifact again"),
    "folder": ({"backend": "inductor"}, r"of backend 'inductor', its folder is named 'onnxruntime-cpu'; rename"),
    "version": ({"artifact_version": "0f"}, r"made from artifact 0f, this one is \w{16}; export the artifact again"),
    "backend": ({"backend": "../onnx"}, r"not a manifest of an export \(.*backend`\); copy the whole folder again"),
    "no files": ({"files": {}}, r"not a manifest of an export \(.*files`\); copy the whole folder again"),
    "no field": ({"format": None}, r"not a manifest of an export \(.*format`\); copy the whole folder again"),
}


@pytest.mark.parametrize(("fields", "reason"), MISMATCHES.values(), ids=MISMATCHES)
def test_manifest_that_does_not_fit_is_rejected(
    folder: Path, export: Path, version: str, fields: dict[str, Any], reason: str
) -> None:
    update(export, **fields)
    with pytest.raises(ArtifactError, match=rf"^export .*/exports/{BACKEND}/export\.json: {reason}"):
        read_export(folder, BACKEND, version)


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"\xff"])
def test_broken_manifest_is_rejected(folder: Path, export: Path, version: str, content: bytes) -> None:
    (export / EXPORT_MANIFEST).write_bytes(content)
    with pytest.raises(ArtifactError, match=r"export\.json: not a manifest of an export .*; copy the whole folder"):
        read_export(folder, BACKEND, version)


@pytest.mark.parametrize("name", ["model.onnx", "weights/0.bin"])
def test_changed_file_of_an_export_is_named(folder: Path, export: Path, version: str, name: str) -> None:
    content = bytearray((export / name).read_bytes())
    content[-1] ^= 1
    (export / name).write_bytes(content)
    with pytest.raises(ArtifactError, match=rf"{name}: SHA-256 is \w+…, the manifest says \w+…; copy the whole"):
        read_export(folder, BACKEND, version)


@pytest.mark.parametrize("name", ["model.onnx", "weights/0.bin", EXPORT_MANIFEST])
def test_missing_file_of_an_export_is_named(folder: Path, export: Path, version: str, name: str) -> None:
    (export / name).unlink()
    with pytest.raises(ArtifactError, match=f"{name}: No such file or directory; copy the whole folder again"):
        read_export(folder, BACKEND, version)


def test_missing_export_is_one_sentence(folder: Path, version: str) -> None:
    with pytest.raises(ArtifactError, match=r"exports/inductor: No such file or directory; .*export the artifact"):
        read_export(folder, "inductor", version)


@pytest.mark.parametrize(
    "name", ["../inductor/model.onnx", "weights/../../x", "/etc/hostname", "weights/../model.onnx"]
)
def test_file_name_that_could_leave_the_folder_is_rejected(folder: Path, export: Path, version: str, name: str) -> None:
    add_export(folder, "inductor")
    update(export, files={name: "0" * 64})
    with pytest.raises(ArtifactError, match=rf"export\.json: file '{name}' leads out of .*; export the artifact again"):
        read_export(folder, BACKEND, version)


@pytest.mark.parametrize(("name", "reason"), [(".", "not a regular file"), ("a\0b", "null byte"), ("fifo", "regular")])
def test_name_of_something_other_than_a_file_is_rejected(
    folder: Path, export: Path, version: str, name: str, reason: str
) -> None:
    os.mkfifo(export / "fifo")
    update(export, files={name: "0" * 64})
    with pytest.raises(ArtifactError, match=reason):
        read_export(folder, BACKEND, version)


def turn_into_symlink(path: Path, target: Path) -> None:
    """Move a file or folder and leave a symlink to it."""
    shutil.move(path, target)
    path.symlink_to(target)


LINKS: dict[str, Callable[[Path], Path]] = {
    "file": lambda export: export / "model.onnx",
    "folder of a file": lambda export: export / "weights",
    "manifest": lambda export: export / EXPORT_MANIFEST,
    "export": lambda export: export,
}


@pytest.mark.parametrize("linked", LINKS.values(), ids=LINKS)
def test_symlink_that_leaves_the_folder_is_rejected(
    tmp_path: Path, folder: Path, export: Path, version: str, linked: Callable[[Path], Path]
) -> None:
    turn_into_symlink(linked(export), tmp_path / "elsewhere")
    with pytest.raises(ArtifactError, match=r"leads out of .*, to .*/elsewhere\S*; copy the whole folder again"):
        read_export(folder, BACKEND, version)


def test_symlink_to_itself_is_one_sentence(folder: Path, export: Path, version: str) -> None:
    (export / "model.onnx").unlink()
    (export / "model.onnx").symlink_to("model.onnx")
    with pytest.raises(ArtifactError, match=r"model\.onnx: Too many levels of symbolic links; copy"):
        read_export(folder, BACKEND, version)


def test_export_changes_neither_the_artifact_nor_its_version(folder: Path, version: str) -> None:
    before = artifacts.load(folder)
    add_export(folder)
    after = artifacts.load(folder)
    assert after.manifest == before.manifest
    assert read_manifest(folder).version == version


def test_saving_over_an_artifact_removes_its_exports(tmp_path: Path, folder: Path, export: Path) -> None:
    artifacts.save(folder, nudged(artifacts.load(folder), 1), {}, CREATED)
    assert list_exports(folder) == []
    assert not (folder / EXPORTS).exists()
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_export_copied_into_another_artifact_is_rejected(tmp_path: Path, folder: Path, export: Path) -> None:
    newer = artifacts.save(tmp_path / "newer", nudged(artifacts.load(folder), 1), {}, CREATED).version
    shutil.copytree(folder / EXPORTS, tmp_path / "newer" / EXPORTS)
    with pytest.raises(ArtifactError, match=f"this one is {newer}; export the artifact again"):
        read_export(tmp_path / "newer", BACKEND, newer)
