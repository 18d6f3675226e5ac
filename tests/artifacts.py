"""Artifacts made in milliseconds: relatives of one that was trained without items' records, as other versions that
tests publish; and an untrained one of items with records."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from msgspec.structs import replace

from pipeline import artifact as artifacts
from pipeline.artifact import WEIGHTS, Artifact
from pipeline.items.catalogue import Catalogue
from pipeline.items.metadata import ItemMetadata
from pipeline.items.vocabulary import Vocabulary
from pipeline.model.config import HstuConfig
from pipeline.records import EventSchema, Item, item_hash
from pipeline.training.trainer import MultiTaskModel

CREATED = "2026-01-01T00:00:00+00:00"
TABLE = "hstu.items.embedding.weight"  # [1 + items, width]
BIAS = "heads.interaction.item_bias.weight"  # [1 + items, 2]


def untrained(item_ids: Sequence[str]) -> Artifact:
    """A model that reads contents, of items with records, each usually bringing 10."""
    torch.manual_seed(3)
    config = HstuConfig(items=1 + len(item_ids), width=16, heads=2, d_qk=8, d_v=8, max_events=20, content_rows=256)
    catalogue = Catalogue(Vocabulary(item_ids))
    catalogue.upsert(Item(item_id, title=f"thing {item_id}", price=10.0) for item_id in item_ids)
    known = ItemMetadata.from_catalogue(catalogue, np.arange(1, config.items), np.full(len(item_ids), 5))
    weights = MultiTaskModel(config, known.content()).state_dict()
    weights["heads.interaction.item_bias.weight"] = torch.randn(config.items, 2)
    zeros = np.zeros(0)
    counters = {
        "items": np.array([item_hash(item_id) for item_id in item_ids], np.uint64),
        "popularity": np.ones(len(item_ids)),
        "values": np.full(len(item_ids), 10.0, np.float32),
        "offsets": np.zeros(config.items, np.int64),
        "neighbours": zeros.astype(np.int32),
        "weights": zeros.astype(np.float32),
        "as_of_ms": np.zeros(1, np.int64),
    }
    return artifacts.draft(config, EventSchema(), weights, list(item_ids), counters, known)


def renumbered(artifact: Artifact) -> Artifact:
    """The same model with its items in the opposite order: another version, the same slates."""
    tables = {name: artifact.weights[name] for name in (TABLE, BIAS)}
    turned = {name: torch.cat([rows[:1], rows[1:].flip(0)]) for name, rows in tables.items()}
    weights = artifact.weights | turned
    return Artifact(artifact.manifest, weights, artifact.item_ids[::-1], artifact.counters, artifact.metadata)


def mixed_up(artifact: Artifact) -> Artifact:
    """Items have each other's ids, as after a wrong join: it loads, answers, and is wrong."""
    return Artifact(artifact.manifest, artifact.weights, artifact.item_ids[::-1], artifact.counters, artifact.metadata)


def nudged(artifact: Artifact, seed: int) -> Artifact:
    """Every weight a little off: another version, about the same slates."""
    torch.manual_seed(seed)
    weights = {name: weight + 1e-3 * torch.randn_like(weight) for name, weight in artifact.weights.items()}
    return Artifact(artifact.manifest, weights, artifact.item_ids, artifact.counters, artifact.metadata)


def with_new_items(artifact: Artifact, item_ids: Sequence[str]) -> Artifact:
    """Its last items are others."""
    ids = [*artifact.item_ids[: -len(item_ids)], *item_ids]
    return Artifact(artifact.manifest, artifact.weights, ids, artifact.counters, artifact.metadata)


def not_a_number(artifact: Artifact) -> Artifact:
    """Training diverged."""
    return Artifact(artifact.manifest, artifact.weights | {TABLE: artifact.weights[TABLE] * float("nan")},
                    artifact.item_ids, artifact.counters, artifact.metadata)  # fmt: skip


def of_another_schema(artifact: Artifact) -> Artifact:
    """The codes of actions mean something else."""
    schema = EventSchema(artifact.manifest.schema.actions[::-1])
    return Artifact(
        replace(artifact.manifest, schema=schema),
        artifact.weights,
        artifact.item_ids,
        artifact.counters,
        artifact.metadata,
    )


def save(folder: Path, artifact: Artifact, **metrics: float) -> str:
    """The version that was written; the artifact's metrics unless others are given."""
    return artifacts.save(folder, artifact, artifact.manifest.metrics | metrics, CREATED).version


def damage(folder: Path) -> None:
    """A byte of the weights flips on the way."""
    content = bytearray((folder / WEIGHTS).read_bytes())
    content[len(content) // 2] ^= 1
    (folder / WEIGHTS).write_bytes(content)


def point(link: Path, folder: Path) -> None:
    """Turn a symlink in one step, as `ln -sfn` or a registry does."""
    draft = link.with_name(f".{link.name}.draft")
    draft.symlink_to(folder)
    draft.replace(link)
