"""An artifact's manifest: what the model is, and the hash of each of its other files."""

import hashlib
import platform
from collections.abc import Mapping
from importlib.metadata import version as installed_version
from pathlib import Path

import msgspec

from pipeline.data.split import TrainingProvenance
from pipeline.errors import ArtifactError
from pipeline.features.event_features import FEATURE_LAYOUT
from pipeline.features.labels import LabelOptions
from pipeline.files import sha256
from pipeline.model.config import HstuConfig
from pipeline.records import EventSchema

FORMAT = 5
MANIFEST = "manifest.json"
WEIGHTS = "hstu.safetensors"
VOCABULARY = "vocabulary.msgpack"
ITEMS = "items.safetensors"
COUNTERS = "counters.safetensors"
FILES = (WEIGHTS, VOCABULARY, ITEMS, COUNTERS)
TOOLS = ("torch", "numpy", "safetensors", "msgspec")
COPY_AGAIN = "copy the whole folder again, or make one with `millrace train LOG --out DIR`"  # next step of errors


class Manifest(msgspec.Struct, frozen=True):
    """The description of an artifact, with the hash of each of its other files.

    version: hash of the content, 16 hex digits: equal versions rank equally; created: ISO 8601, UTC
    """

    format: int
    name: str
    version: str
    created: str
    config: HstuConfig
    schema: EventSchema
    labels: LabelOptions
    metrics: dict[str, float]
    files: dict[str, str]
    tools: dict[str, str]
    features: str  # FEATURE_LAYOUT of the code that trained the model
    trained_on: TrainingProvenance | None = None  # None: not made by training


class ManifestFormat(msgspec.Struct):
    """The field to check first: in another format the others may have another meaning."""

    format: int


def read_manifest(folder: Path) -> Manifest:
    """Read and check a manifest. ArtifactError when it is missing, broken, edited, incomplete or incompatible."""
    path = folder / MANIFEST
    manifest = _decode_manifest(path)
    if manifest.features != FEATURE_LAYOUT:
        raise ArtifactError(
            f"artifact {path}: trained on features {manifest.features}, this millrace makes {FEATURE_LAYOUT};"
            " train again"
        )
    if missing := set(FILES) - manifest.files.keys():
        raise ArtifactError(f"artifact {path}: no hash of {', '.join(sorted(missing))}; {COPY_AGAIN}")
    version = _content_hash(manifest, manifest.files)
    if version != manifest.version:
        raise ArtifactError(
            f"artifact {path}: content hash {version}, the manifest says {manifest.version}; {COPY_AGAIN}"
        )
    return manifest


def make_manifest(folder: Path, name: str, draft: Manifest, metrics: Mapping[str, float], created: str) -> Manifest:
    """Return the manifest of the FILES in `folder`, with the options and provenance of a draft."""
    files = {file: sha256(folder / file) for file in FILES}
    return Manifest(
        format=FORMAT,
        name=name,
        version=_content_hash(draft, files),
        created=created,
        config=draft.config,
        schema=draft.schema,
        labels=draft.labels,
        metrics=dict(metrics),
        files=files,
        tools={"python": platform.python_version(), **{tool: installed_version(tool) for tool in TOOLS}},
        features=FEATURE_LAYOUT,
        trained_on=draft.trained_on,
    )


def _decode_manifest(path: Path) -> Manifest:
    try:
        content = path.read_bytes()
        found = msgspec.json.decode(content, type=ManifestFormat).format
        if found != FORMAT:
            raise ArtifactError(f"artifact {path}: format {found}, this millrace reads {FORMAT}; train again")
        return msgspec.json.decode(content, type=Manifest)
    except OSError as error:
        raise ArtifactError(
            f"artifact {path}: {error.strerror}; make one with `millrace train LOG --out DIR`"
        ) from error
    except msgspec.DecodeError as error:
        raise ArtifactError(f"artifact {path}: not a manifest ({error}); {COPY_AGAIN}") from error


def _content_hash(manifest: Manifest, files: Mapping[str, str]) -> str:
    content = msgspec.json.encode((manifest.config, manifest.schema, manifest.labels, dict(files)), order="sorted")
    return hashlib.sha256(content).hexdigest()[:16]
