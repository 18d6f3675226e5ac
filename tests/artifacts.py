"""Relatives of an artifact trained without items' records, made in milliseconds: other versions that tests publish."""

from pathlib import Path

import torch
from msgspec.structs import replace

from pipeline import artifact as artifacts
from pipeline.artifact import WEIGHTS, Artifact
from pipeline.records import EventSchema

CREATED = "2026-01-01T00:00:00+00:00"
TABLE = "hstu.items.embedding.weight"  # [1 + items, width]
BIAS = "heads.taste.item_bias.weight"  # [1 + items, 2]


def renumbered(artifact: Artifact) -> Artifact:
    """The same model with its items in the opposite order: another version, the same slates."""
    tables = {name: artifact.weights[name] for name in (TABLE, BIAS)}
    turned = {name: torch.cat([rows[:1], rows[1:].flip(0)]) for name, rows in tables.items()}
    weights = artifact.weights | turned
    return Artifact(artifact.manifest, weights, artifact.item_ids[::-1], artifact.counters, artifact.items)


def mixed_up(artifact: Artifact) -> Artifact:
    """Items have each other's ids, as after a wrong join: it loads, answers, and is wrong."""
    return Artifact(artifact.manifest, artifact.weights, artifact.item_ids[::-1], artifact.counters, artifact.items)


def nudged(artifact: Artifact, seed: int) -> Artifact:
    """Every weight a little off: another version, about the same slates."""
    torch.manual_seed(seed)
    weights = {name: weight + 1e-3 * torch.randn_like(weight) for name, weight in artifact.weights.items()}
    return Artifact(artifact.manifest, weights, artifact.item_ids, artifact.counters, artifact.items)


def not_a_number(artifact: Artifact) -> Artifact:
    """Training diverged."""
    return Artifact(artifact.manifest, artifact.weights | {TABLE: artifact.weights[TABLE] * float("nan")},
                    artifact.item_ids, artifact.counters, artifact.items)  # fmt: skip


def of_another_schema(artifact: Artifact) -> Artifact:
    """The codes of actions mean something else."""
    schema = EventSchema(artifact.manifest.schema.actions[::-1])
    return Artifact(
        replace(artifact.manifest, schema=schema),
        artifact.weights,
        artifact.item_ids,
        artifact.counters,
        artifact.items,
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
