"""A trained model's folder: manifest.json beside the files that it signs. No pickle anywhere.

manifest.json         what it is: version, config, metrics, the SHA-256 of every other file, the event schema, the tools
hstu.safetensors      weights of the encoder ("hstu.") and of the heads ("heads.")
vocabulary.msgpack    item ids in the order of their tokens, beginning with token 1
items.safetensors     what is known of those items (see KnownItems)
counters.safetensors  popularity and co-occurrence of the training log, for pipeline.counters.Counters.restore
"""

import hashlib
import platform
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version as installed
from pathlib import Path
from tempfile import mkdtemp

import msgspec
import numpy as np
import safetensors.numpy
import safetensors.torch
from torch import Tensor

from pipeline.data.split import TrainingProvenance
from pipeline.errors import ArtifactError
from pipeline.features.event_features import FEATURE_LAYOUT
from pipeline.items.catalogue import Catalogue
from pipeline.items.metadata import ItemMetadata
from pipeline.model.config import HstuConfig
from pipeline.records import EventSchema

FORMAT = 4
MANIFEST = "manifest.json"
WEIGHTS, VOCABULARY, COUNTERS = "hstu.safetensors", "vocabulary.msgpack", "counters.safetensors"
ITEMS = "items.safetensors"
FILES = (WEIGHTS, VOCABULARY, ITEMS, COUNTERS)
TOOLS = ("torch", "numpy", "safetensors", "msgspec")
_COPY_AGAIN = "copy the whole folder again, or make one with `millrace train LOG --out DIR`"


class Manifest(msgspec.Struct, frozen=True):
    """`version` is the content's hash (16 hex digits): equal versions rank equally. `created` is ISO 8601, UTC."""

    format: int
    name: str
    version: str
    created: str
    config: HstuConfig
    schema: EventSchema
    metrics: dict[str, float]
    files: dict[str, str]
    tools: dict[str, str]
    features: str  # FEATURE_LAYOUT of the code that trained it
    trained_on: TrainingProvenance | None = None  # None: not made by training


class _Format(msgspec.Struct):
    """The first thing to read of a manifest: another format's fields may mean anything."""

    format: int


@dataclass(slots=True)
class Artifact:
    """A trained model in memory. item_ids[i] has token i + 1."""

    manifest: Manifest
    weights: dict[str, Tensor]
    item_ids: list[str]
    counters: dict[str, np.ndarray]
    metadata: ItemMetadata

    @property
    def version(self) -> str:
        return self.manifest.version

    @property
    def config(self) -> HstuConfig:
        return self.manifest.config

    def module_weights(self, name: str) -> dict[str, Tensor]:
        """The weights below a prefix: 'hstu' or 'heads'."""
        start = len(name) + 1
        return {key[start:]: value for key, value in self.weights.items() if key.startswith(f"{name}.")}

    def load_into(self, catalogue: Catalogue) -> None:
        """Tell what is known of the items; the catalogue's vocabulary has them."""
        tokens = np.array([catalogue.vocabulary.token(item_id) for item_id in self.item_ids], np.int64)
        catalogue.restore_facts(
            tokens[tokens > 0], {name: column[tokens > 0] for name, column in self.metadata.facts.items()}
        )

    def check_schema(self, schema: EventSchema) -> None:
        """ArtifactError unless the codes that the model was trained with mean the same in `schema`."""
        trained = self.manifest.schema
        for field in ("actions", "devices"):
            got, wanted = getattr(schema, field), getattr(trained, field)
            if got[: len(wanted)] != wanted:
                raise ArtifactError(
                    f"artifact {self.version}: events.{field} is {list(got)}, the model was trained with"
                    f" {list(wanted)}; lists may only grow at their end: restore the order or train again"
                )


def draft(config: HstuConfig, schema: EventSchema, weights: dict[str, Tensor], item_ids: list[str],
          counters: dict[str, np.ndarray], metadata: ItemMetadata | None = None,
          trained_on: TrainingProvenance | None = None) -> Artifact:  # fmt: skip
    """A model that is not saved yet."""
    manifest = Manifest(FORMAT, "draft", "unsigned", "", config, schema, {}, {}, {}, FEATURE_LAYOUT, trained_on)
    return Artifact(manifest, weights, item_ids, counters, metadata or ItemMetadata.unknown(len(item_ids)))


def save(folder: Path, artifact: Artifact, metrics: Mapping[str, float], created: str) -> Manifest:
    """Sign the model and write it, whole or not at all; an artifact that is there already is replaced."""
    folder = folder.absolute()
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        weights = {name: weight.detach().contiguous() for name, weight in artifact.weights.items()}
        safetensors.torch.save_file(weights, draft / WEIGHTS)
        (draft / VOCABULARY).write_bytes(msgspec.msgpack.encode(artifact.item_ids))
        for name, arrays in ((COUNTERS, artifact.counters), (ITEMS, artifact.metadata.arrays())):
            arrays = {key: np.ascontiguousarray(array) for key, array in arrays.items()}
            safetensors.numpy.save_file(arrays, draft / name)
        manifest = _sign(draft, folder.name, artifact, metrics, created)
        (draft / MANIFEST).write_bytes(msgspec.json.format(msgspec.json.encode(manifest), indent=2) + b"\n")
        draft.chmod(0o755)
        _replace(draft, folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return manifest


def check_target(folder: Path) -> None:
    """ArtifactError unless an artifact may be written there: a new folder, an empty one, or an artifact's."""
    if folder.is_file():
        raise ArtifactError(f"artifact {folder}: a file; give an empty or a new folder")
    if folder.exists() and not (folder / MANIFEST).exists() and any(folder.iterdir()):
        raise ArtifactError(f"artifact {folder}: a folder with other files in it; give an empty or a new one")


def load(folder: Path) -> Artifact:
    """The artifact, every file checked against the manifest. ArtifactError names the file, what it is and what next.

    A symlink is followed once: all files are those of the folder that it named then.
    """
    folder = folder.resolve()
    manifest = read_manifest(folder)
    for name, wanted in manifest.files.items():
        _check(folder / name, wanted)
    item_ids = _item_ids(folder / VOCABULARY)
    counters, items = (safetensors.numpy.load_file(folder / name) for name in (COUNTERS, ITEMS))
    return Artifact(manifest, _weights(folder / WEIGHTS), item_ids, counters, ItemMetadata.from_arrays(items))


def _sign(draft: Path, name: str, artifact: Artifact, metrics: Mapping[str, float], created: str) -> Manifest:
    config, schema = artifact.config, artifact.manifest.schema
    files = {name: _sha256(draft / name) for name in FILES}
    tools = {"python": platform.python_version(), **{tool: installed(tool) for tool in TOOLS}}
    version = _content_hash(config, schema, files)
    taught = artifact.manifest.trained_on
    return Manifest(FORMAT, name, version, created, config, schema, dict(metrics), files, tools, FEATURE_LAYOUT, taught)


def read_manifest(folder: Path) -> Manifest:
    """Raises ArtifactError unless it is one, of this format, that signs itself and all that a model needs."""
    path = folder / MANIFEST
    try:
        content = path.read_bytes()
        found = msgspec.json.decode(content, type=_Format).format
        if found != FORMAT:
            raise ArtifactError(f"artifact {path}: format {found}, this millrace reads {FORMAT}; train again")
        manifest = msgspec.json.decode(content, type=Manifest)
    except OSError as error:
        raise ArtifactError(
            f"artifact {path}: {error.strerror}; make one with `millrace train LOG --out DIR`"
        ) from error
    except msgspec.DecodeError as error:
        raise ArtifactError(f"artifact {path}: not a manifest ({error}); {_COPY_AGAIN}") from error
    if manifest.features != FEATURE_LAYOUT:
        raise ArtifactError(
            f"artifact {path}: trained on features {manifest.features}, this millrace makes {FEATURE_LAYOUT};"
            " train again"
        )
    if missing := set(FILES) - manifest.files.keys():
        raise ArtifactError(f"artifact {path}: no hash of {', '.join(sorted(missing))}; {_COPY_AGAIN}")
    version = _content_hash(manifest.config, manifest.schema, manifest.files)
    if version != manifest.version:
        raise ArtifactError(
            f"artifact {path}: content hash {version}, the manifest says {manifest.version}; {_COPY_AGAIN}"
        )
    return manifest


def _item_ids(path: Path) -> list[str]:
    item_ids = msgspec.msgpack.decode(path.read_bytes(), type=list[str])
    places: dict[str, int] = {}
    for place, item_id in enumerate(item_ids, 1):
        if (first := places.setdefault(item_id, place)) != place:
            raise ArtifactError(
                f"artifact {path}: item '{item_id}' is there twice, at {first} and {place}; {_COPY_AGAIN}"
            )
    return item_ids


def _weights(path: Path) -> dict[str, Tensor]:
    # NOTE: load_file maps the file. A copy, or who overwrites the file in place changes or ends a process that serves.
    weights = {name: weight.clone() for name, weight in safetensors.torch.load_file(path).items()}
    for name, weight in weights.items():
        if not weight.isfinite().all():
            raise ArtifactError(f"artifact {path}: {name} has numbers that are not finite; train again")
    return weights


def _check(path: Path, wanted: str) -> None:
    try:
        got = _sha256(path)
    except OSError as error:
        raise ArtifactError(f"artifact {path}: {error.strerror}; {_COPY_AGAIN}") from error
    if got != wanted:
        raise ArtifactError(f"artifact {path}: SHA-256 is {got[:16]}…, the manifest says {wanted[:16]}…; {_COPY_AGAIN}")


def _content_hash(config: HstuConfig, schema: EventSchema, files: Mapping[str, str]) -> str:
    content = msgspec.json.encode((config, schema, dict(files)), order="sorted")
    return hashlib.sha256(content).hexdigest()[:16]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _replace(draft: Path, folder: Path) -> None:
    check_target(folder)
    old = draft.with_name(f"{draft.name}.old")
    if folder.exists():
        folder.rename(old)
    draft.rename(folder)
    shutil.rmtree(old, ignore_errors=True)
