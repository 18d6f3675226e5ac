"""Saved training state: one safetensors file, replaced atomically after every epoch. No pickle."""

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

State = TypeVar("State", bound=msgspec.Struct)


def save(path: Path, tensors: Mapping[str, Tensor], state: msgspec.Struct) -> None:
    """Write tensors and a state struct to a draft file, then rename it over the old checkpoint.

    TrainingError when either fails; the old checkpoint is then intact.
    """
    draft = path.with_name(f".{path.name}.draft")
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        safetensors.torch.save_file(contiguous, draft, {"state": msgspec.json.encode(state).decode()})
        os.replace(draft, path)
    except (OSError, SafetensorError) as error:
        raise TrainingError(
            f"checkpoint {path}: cannot be written ({error}); make room, then continue with --resume"
        ) from error


def load(path: Path, state_type: type[State]) -> tuple[dict[str, Tensor], State]:
    """Return the tensors and the state that `save` wrote. TrainingError if the file is missing or unreadable."""
    try:
        with safetensors.safe_open(path, "pt") as file:
            text = (file.metadata() or {})["state"]
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is not a mapping
            return tensors, msgspec.json.decode(text, type=state_type)
    except FileNotFoundError as error:
        raise TrainingError(f"checkpoint {path}: not found, nothing to resume from; train without --resume") from error
    except (SafetensorError, KeyError, msgspec.DecodeError) as error:
        raise TrainingError(f"checkpoint {path}: cannot be read ({error}); train without --resume") from error
