"""Artifacts made in milliseconds, for tests that publish several versions of a model.

`untrained` makes a model of items with records; the other functions vary a model that was trained without records.
"""

from collections.abc import Sequence
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import msgspec
import numpy as np
import torch

from pipeline import artifact as artifacts
from pipeline.artifact import Artifact
from pipeline.backends.manifest import EXPORT_MANIFEST, ExportManifest, export_folder
from pipeline.items.catalogue import Catalogue
from pipeline.items.metadata import ItemMetadata
from pipeline.items.vocabulary import Vocabulary
from pipeline.manifest import WEIGHTS, read_manifest
from pipeline.model.config import HstuConfig
from pipeline.records import EventSchema, Item, encode_value, item_hash
from pipeline.training.multi_task_model import MultiTaskModel
from pipeline.weights import ITEM_TABLE

CREATED = "2026-01-01T00:00:00+00:00"
ITEM_BIAS = "heads.interaction.item_bias.weight"  # [1 + items, 2]


def untrained(item_ids: Sequence[str]) -> Artifact:
    """Return a model that reads content, of items with records and a usual value of 10."""
    torch.manual_seed(3)
    config = HstuConfig(items=1 + len(item_ids), width=16, heads=2, d_qk=8, d_v=8, max_events=20, content_rows=256)
    catalogue = Catalogue(Vocabulary(item_ids))
    catalogue.upsert(Item(item_id, title=f"thing {item_id}", price=10.0) for item_id in item_ids)
    metadata = ItemMetadata.from_catalogue(catalogue, np.arange(1, config.items), np.full(len(item_ids), 5))
    weights = MultiTaskModel(config, metadata.content()).state_dict()
    weights[ITEM_BIAS] = torch.randn(config.items, 2)
    counters = {
        "items": np.array([item_hash(item_id) for item_id in item_ids], np.uint64),
        "popularity": np.ones(len(item_ids)),
        "values": np.full(len(item_ids), 10.0, np.float32),
        "offsets": np.zeros(config.items, np.int64),
        "neighbours": np.zeros(0, np.int32),
        "weights": np.zeros(0, np.float32),
        "as_of_ms": np.zeros(1, np.int64),
    }
    return artifacts.draft(config, EventSchema(), weights, list(item_ids), counters, metadata)


def renumbered(artifact: Artifact) -> Artifact:
    """Return the same model with its items in reverse order: another version, the same slates."""
    tables = {name: artifact.weights[name] for name in (ITEM_TABLE, ITEM_BIAS)}
    reversed_tables = {name: torch.cat([table[:1], table[1:].flip(0)]) for name, table in tables.items()}
    return replace(artifact, weights=dict(artifact.weights) | reversed_tables, item_ids=artifact.item_ids[::-1])


def mixed_up(artifact: Artifact) -> Artifact:
    """Return a model whose items have each other's ids, as after a wrong join: it loads and answers, but is wrong."""
    return replace(artifact, item_ids=artifact.item_ids[::-1])


def priced(artifact: Artifact, price: float) -> Artifact:
    """Return the model with one price for all of its items."""
    codes = np.full(len(artifact.item_ids), encode_value(price), np.uint16)
    return replace(
        artifact, metadata=replace(artifact.metadata, state=artifact.metadata.state | {"price_codes": codes})
    )


def nudged(artifact: Artifact, seed: int) -> Artifact:
    """Return the model with a little noise on every weight: another version, nearly the same slates."""
    torch.manual_seed(seed)
    weights = {name: weight + 1e-3 * torch.randn_like(weight) for name, weight in artifact.weights.items()}
    return replace(artifact, weights=weights)


def with_new_items(artifact: Artifact, item_ids: Sequence[str]) -> Artifact:
    """Return the model with its last items replaced by these."""
    return replace(artifact, item_ids=[*artifact.item_ids[: -len(item_ids)], *item_ids])


def not_a_number(artifact: Artifact) -> Artifact:
    """Return the model with NaN item vectors, as after a training that diverged."""
    diverged = {ITEM_TABLE: artifact.weights[ITEM_TABLE] * float("nan")}
    return replace(artifact, weights=dict(artifact.weights) | diverged)


def of_another_schema(artifact: Artifact) -> Artifact:
    """Return the model with other meanings of the action codes."""
    schema = EventSchema(artifact.manifest.schema.actions[::-1])
    return replace(artifact, manifest=msgspec.structs.replace(artifact.manifest, schema=schema))


def save(folder: Path, artifact: Artifact, **metrics: float) -> str:
    """Save the artifact with its own metrics, updated by `metrics`, and return its version."""
    return artifacts.save(folder, artifact, artifact.manifest.metrics | metrics, CREATED).version


def damage(folder: Path) -> None:
    """Change one byte of the weights, as a broken copy would."""
    content = bytearray((folder / WEIGHTS).read_bytes())
    content[len(content) // 2] ^= 1
    (folder / WEIGHTS).write_bytes(content)


def add_export(folder: Path, backend: str = "onnxruntime-cpu") -> Path:
    """Add an export of two files to a saved artifact, as an exporter would, and return its folder."""
    export = export_folder(folder, backend)
    contents = {"model.onnx": b"graph", "weights/0.bin": bytes(1000)}
    for name, content in contents.items():
        path = export / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    manifest = ExportManifest(
        format=1,
        backend=backend,
        artifact_version=read_manifest(folder).version,
        created=CREATED,
        files={name: sha256(content).hexdigest() for name, content in contents.items()},
        tools={"onnx": "1.20.0"},
        metrics={"state_error": 1e-6},
    )
    (export / EXPORT_MANIFEST).write_bytes(msgspec.json.encode(manifest))
    return export


def point(link: Path, folder: Path) -> None:
    """Point a symlink at the folder atomically, as `ln -sfn` or a registry does."""
    draft = link.with_name(f".{link.name}.draft")
    draft.symlink_to(folder)
    draft.replace(link)
