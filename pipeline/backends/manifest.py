"""The manifest of an export: an artifact's encoder in another runtime's form, with the hash of each of its files.

ARTIFACT/exports/<backend>/export.json   the manifest, next to the files that it lists

An export belongs to one version of its artifact but is not part of it: adding one changes neither that version nor a
file of the artifact, so no worker swaps its model. Saving an artifact over another removes the older one's exports.
"""

import os
from pathlib import Path, PurePosixPath
from typing import Annotated

import msgspec

from pipeline.errors import ArtifactError
from pipeline.files import hash_mismatch, sha256
from pipeline.manifest import ManifestFormat

FORMAT = 1
EXPORTS = "exports"
EXPORT_MANIFEST = "export.json"
_EXPORT_AGAIN = "export the artifact again"
_COPY_AGAIN = f"copy the whole folder again, or {_EXPORT_AGAIN}"


class ExportManifest(msgspec.Struct, frozen=True):
    """The description of an export, with the hash of each of its other files.

    backend: as slates and metrics name it, such as `onnxruntime-cpu`; also the name of the export's folder
    artifact_version: the artifact that it was made from; created: ISO 8601, UTC
    files: SHA-256 by path, relative to the export's folder; tools: versions by package
    metrics: how far the export's states and rankings are from the reference's (see export.verify)
    """

    format: int
    backend: Annotated[str, msgspec.Meta(pattern=r"^[a-z0-9][a-z0-9._-]*$")]
    artifact_version: str
    created: str
    files: Annotated[dict[str, str], msgspec.Meta(min_length=1)]
    tools: dict[str, str]
    metrics: dict[str, float]


def export_folder(artifact_folder: Path, backend: str) -> Path:
    return artifact_folder / EXPORTS / backend


def list_exports(artifact_folder: Path) -> list[str]:
    """Return the backends whose exports are in an artifact's folder, sorted, without reading them.

    Folders whose names begin with a dot are skipped: they are still being written. ArtifactError when the folder of the
    exports cannot be listed.
    """
    folder = artifact_folder / EXPORTS
    try:
        return sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    except FileNotFoundError:
        return []
    except OSError as error:
        raise ArtifactError(f"exports {folder}: {error.strerror}; want a readable folder, or none") from error


def read_export(artifact_folder: Path, backend: str, artifact_version: str) -> ExportManifest:
    """Read an export's manifest and check it, and every file against it. ArtifactError names file, fault and next step.

    artifact_version: of the artifact that is loaded. No file outside of the export's folder is read.
    """
    artifact_folder = artifact_folder.resolve()
    folder = export_folder(artifact_folder, backend)
    path = folder / EXPORT_MANIFEST
    _resolve_inside(folder, artifact_folder)
    manifest = _decode_export(_resolve_inside(path, folder))
    if manifest.backend != backend:
        raise ArtifactError(
            f"export {path}: of backend '{manifest.backend}', its folder is named '{backend}'; rename the folder"
        )
    if manifest.artifact_version != artifact_version:
        raise ArtifactError(
            f"export {path}: made from artifact {manifest.artifact_version}, this one is {artifact_version};"
            f" {_EXPORT_AGAIN}"
        )
    for name, expected in manifest.files.items():
        _check_file(folder, name, expected)
    return manifest


def _decode_export(path: Path) -> ExportManifest:
    try:
        content = path.read_bytes()
        found = msgspec.json.decode(content, type=ManifestFormat).format
        if found != FORMAT:
            raise ArtifactError(f"export {path}: format {found}, this millrace reads {FORMAT}; {_EXPORT_AGAIN}")
        return msgspec.json.decode(content, type=ExportManifest)
    except OSError as error:
        raise ArtifactError(f"export {path}: {error.strerror}; {_COPY_AGAIN}") from error
    except msgspec.DecodeError as error:
        raise ArtifactError(f"export {path}: not a manifest of an export ({error}); {_COPY_AGAIN}") from error


def _check_file(folder: Path, name: str, expected: str) -> None:
    path = folder / name
    if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
        raise ArtifactError(f"export {folder / EXPORT_MANIFEST}: file {name!r} leads out of {folder}; {_EXPORT_AGAIN}")
    real_path = _resolve_inside(path, folder)
    if not real_path.is_file():
        raise ArtifactError(f"export {path}: not a regular file; {_COPY_AGAIN}")
    try:
        mismatch = hash_mismatch(sha256(real_path), expected)
    except OSError as error:
        raise ArtifactError(f"export {path}: {error.strerror}; {_COPY_AGAIN}") from error
    if mismatch:
        raise ArtifactError(f"export {path}: {mismatch}; {_COPY_AGAIN}")


def _resolve_inside(path: Path, folder: Path) -> Path:
    """Return the real path of an existing file or folder. ArtifactError when it is missing or not inside `folder`."""
    try:
        real_path = Path(os.path.realpath(path, strict=True))
        real_folder = Path(os.path.realpath(folder, strict=True))
    except OSError as error:
        raise ArtifactError(f"export {path}: {error.strerror}; {_COPY_AGAIN}") from error
    except ValueError as error:  # a null byte in the name
        raise ArtifactError(f"export {str(path)!r}: {error}; {_EXPORT_AGAIN}") from error
    if not real_path.is_relative_to(real_folder):
        raise ArtifactError(f"export {path}: leads out of {folder}, to {real_path}; {_COPY_AGAIN}")
    return real_path
