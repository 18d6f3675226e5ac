"""A trained model's folder: a manifest and the files whose hashes it holds. No pickle anywhere.

manifest.json         version, config, metrics, the SHA-256 of every other file, event schema, versions of the tools
hstu.safetensors      weights of the encoder ("hstu.") and of the heads ("heads.")
vocabulary.msgpack    item ids in the order of the model's item table, whose row 0 is the unknown item
items.safetensors     metadata of those items (see ItemMetadata)
counters.safetensors  popularity and co-occurrence of the training log, for pipeline.counters.Counters.restore
exports/<backend>/    the encoder in another runtime's form, not part of the version (see pipeline.backends.manifest)
"""

import hashlib
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
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
from pipeline.features.labels import LabelOptions, LabelRules
from pipeline.files import exchange, flush, hash_mismatch
from pipeline.items.catalogue import Catalogue, ItemFacts
from pipeline.items.metadata import ItemMetadata
from pipeline.items.vocabulary import UNKNOWN, Vocabulary
from pipeline.manifest import (
    COPY_AGAIN,
    COUNTERS,
    FORMAT,
    ITEMS,
    MANIFEST,
    VOCABULARY,
    WEIGHTS,
    Manifest,
    make_manifest,
    read_manifest,
)
from pipeline.model.config import HstuConfig
from pipeline.records import EventSchema
from pipeline.weights import ITEM_TABLE, WeightsFile


@dataclass(slots=True)
class Artifact:
    """A trained model in memory, but for the item table of a saved one (WeightsFile).

    item_ids[i] is row i + 1 of the item table
    """

    manifest: Manifest
    weights: Mapping[str, Tensor]
    item_ids: list[str]
    counters: dict[str, np.ndarray]
    metadata: ItemMetadata

    @property
    def version(self) -> str:
        return self.manifest.version

    @property
    def config(self) -> HstuConfig:
        return self.manifest.config

    @property
    def label_rules(self) -> LabelRules:
        """Rules of the labels that the model was trained on, which its features count engaged events by, too."""
        return LabelRules.from_options(self.manifest.schema, self.manifest.labels)

    def module_weights(self, name: str) -> dict[str, Tensor]:
        """Return the state dict of one module, 'hstu' or 'heads', without the item table (see item_table_parts)."""
        prefix = f"{name}."
        names = [key for key in self.weights if key.startswith(prefix) and key != ITEM_TABLE]
        return {key.removeprefix(prefix): self.weights[key] for key in names}

    def tokens(self, vocabulary: Vocabulary) -> np.ndarray:
        """Return the items' tokens in this vocabulary, UNKNOWN for an item without one: int64 [n]."""
        return vocabulary.tokens_of_ids(self.item_ids).astype(np.int64)

    def load_into(self, catalogue: Catalogue, tokens: np.ndarray | None = None, part: slice = slice(None)) -> None:
        """Restore the items' metadata in a catalogue; items without a token in its vocabulary are skipped.

        tokens: of `tokens(catalogue.vocabulary)`, if it was called before; part: of the items
        """
        if tokens is None:
            tokens = self.tokens(catalogue.vocabulary)
        admitted = tokens[part] != UNKNOWN
        facts = {name: column[part][admitted] for name, column in self.metadata.facts.items()}
        catalogue.restore_facts(tokens[part][admitted], facts)

    def exchange_facts(self, catalogue: Catalogue, tokens: np.ndarray, part: slice) -> ItemFacts:
        """Restore the items' metadata as `load_into` does, and return the facts that the items of the part had."""
        before = catalogue.facts(tokens[part])
        self.load_into(catalogue, tokens, part)
        return before

    def check_schema(self, schema: EventSchema) -> None:
        """Raise ArtifactError unless the codes that the model was trained with mean the same in `schema`."""
        for field in ("actions", "devices"):
            configured: tuple[str, ...] = getattr(schema, field)
            trained: tuple[str, ...] = getattr(self.manifest.schema, field)
            if configured[: len(trained)] != trained:
                raise ArtifactError(
                    f"artifact {self.version}: events.{field} is {list(configured)}, the model was trained with"
                    f" {list(trained)}; lists may only grow at their end: restore the order or train again"
                )


def draft(
    config: HstuConfig,
    schema: EventSchema,
    weights: Mapping[str, Tensor],
    item_ids: list[str],
    counters: dict[str, np.ndarray],
    metadata: ItemMetadata | None = None,
    trained_on: TrainingProvenance | None = None,
    labels: LabelOptions | None = None,
) -> Artifact:
    """Return an artifact that is not saved yet: without a version, hashes and metrics."""
    manifest = Manifest(
        format=FORMAT,
        name="draft",
        version="unsigned",
        created="",
        config=config,
        schema=schema,
        labels=labels or LabelOptions(),
        metrics={},
        files={},
        tools={},
        features=FEATURE_LAYOUT,
        trained_on=trained_on,
    )
    return Artifact(manifest, weights, item_ids, counters, metadata or ItemMetadata.unknown(len(item_ids)))


def save(folder: Path, artifact: Artifact, metrics: Mapping[str, float], created: str) -> Manifest:
    """Write the artifact, completely or not at all, and return its manifest. An older artifact is replaced.

    Raises ArtifactError when the folder has other content.
    """
    folder = folder.absolute()
    folder.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        _write_content(staging, artifact)
        manifest = make_manifest(staging, folder.name, artifact.manifest, metrics, created)
        (staging / MANIFEST).write_bytes(msgspec.json.format(msgspec.json.encode(manifest), indent=2) + b"\n")
        staging.chmod(0o755)
        for path in (*staging.iterdir(), staging):
            flush(path)
        _replace(staging, folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return manifest


def check_target(folder: Path) -> None:
    """Raise ArtifactError unless an artifact may be written there: a new folder, an empty one, or an artifact's."""
    if folder.is_file():
        raise ArtifactError(f"artifact {folder}: is a file; give an empty or a new folder")
    if folder.exists() and not (folder / MANIFEST).exists() and any(folder.iterdir()):
        raise ArtifactError(f"artifact {folder}: is a folder with other files in it; give an empty or a new one")


def load(folder: Path) -> Artifact:
    """Read an artifact and check every file against its manifest. ArtifactError names file, fault and next step.

    A symlink is resolved once: all files come from the folder that it pointed to then. An artifact that is replaced
    meanwhile is read again.
    """
    folder = folder.resolve()
    while True:
        before = _identity(folder)
        try:
            return _read(folder)
        except ArtifactError:
            if _identity(folder) == before:
                raise


def _identity(folder: Path) -> int | None:
    """Return a number that another folder in this place would not have; None without a folder."""
    return folder.stat().st_ino if folder.exists() else None


def _read(folder: Path) -> Artifact:
    manifest = read_manifest(folder)

    def read(name: str) -> bytes:
        return _read_checked(folder / name, manifest.files[name])

    return Artifact(
        manifest=manifest,
        weights=WeightsFile(folder / WEIGHTS, manifest.files[WEIGHTS]),
        item_ids=_decode_item_ids(folder / VOCABULARY, read(VOCABULARY)),
        counters=safetensors.numpy.load(read(COUNTERS)),
        metadata=ItemMetadata.from_arrays(safetensors.numpy.load(read(ITEMS))),
    )


def _decode_item_ids(path: Path, content: bytes) -> list[str]:
    item_ids = msgspec.msgpack.decode(content, type=list[str])
    rows: dict[str, int] = {}
    for row, item_id in enumerate(item_ids, 1):
        if (first := rows.setdefault(item_id, row)) != row:
            raise ArtifactError(f"artifact {path}: item '{item_id}' is in rows {first} and {row}; {COPY_AGAIN}")
    return item_ids


def _read_checked(path: Path, expected: str) -> bytes:
    """Return the file's bytes. They are read once: a file that is replaced meanwhile is not a mixture of both."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ArtifactError(f"artifact {path}: {error.strerror}; {COPY_AGAIN}") from error
    if mismatch := hash_mismatch(hashlib.sha256(content).hexdigest(), expected):
        raise ArtifactError(f"artifact {path}: {mismatch}; {COPY_AGAIN}")
    return content


def _write_content(folder: Path, artifact: Artifact) -> None:
    """Write every file but the manifest."""
    weights = {name: weight.detach().contiguous() for name, weight in artifact.weights.items()}
    safetensors.torch.save_file(weights, folder / WEIGHTS)
    (folder / VOCABULARY).write_bytes(msgspec.msgpack.encode(artifact.item_ids))
    for name, arrays in ((COUNTERS, artifact.counters), (ITEMS, artifact.metadata.arrays())):
        contiguous = {key: np.ascontiguousarray(array) for key, array in arrays.items()}
        safetensors.numpy.save_file(contiguous, folder / name)


def _replace(staging: Path, folder: Path) -> None:
    """Put the new folder in the old one's place in one step: at no time is there no artifact, or half of one."""
    check_target(folder)
    if folder.exists():
        exchange(staging, folder)
    else:
        staging.rename(folder)
    flush(folder.parent)
