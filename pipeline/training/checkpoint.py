"""Training's saved state: one safetensors file, replaced as a whole after every epoch. No pickle."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

import msgspec
import safetensors
import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from pipeline.errors import TrainingError

Notes = TypeVar("Notes", bound=msgspec.Struct)


def save(path: Path, tensors: Mapping[str, Tensor], notes: msgspec.Struct) -> None:
    """Tensors and a struct of notes, written beside the old file and then put in its place. TrainingError where that
    cannot be: the old file is still whole."""
    draft = path.with_name(f".{path.name}.draft")
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        safetensors.torch.save_file(contiguous, draft, {"notes": msgspec.json.encode(notes).decode()})
        os.replace(draft, path)
    except (OSError, SafetensorError) as error:
        raise TrainingError(
            f"checkpoint {path}: cannot be written ({error}); make room, then go on by --resume"
        ) from error


def load(path: Path, notes: type[Notes]) -> tuple[dict[str, Tensor], Notes]:
    """What `save` wrote. TrainingError if there is nothing to resume from or it cannot be read."""
    try:
        with safetensors.safe_open(path, "pt") as file:
            text = (file.metadata() or {})["notes"]
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
            return tensors, msgspec.json.decode(text, type=notes)
    except FileNotFoundError as error:
        raise TrainingError(f"checkpoint {path}: there is none to resume from; train without --resume") from error
    except (SafetensorError, KeyError, msgspec.DecodeError) as error:
        raise TrainingError(f"checkpoint {path}: cannot be read ({error}); train without --resume") from error
