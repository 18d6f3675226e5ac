"""The model in torch: its weights on a device, and the eager float32 encoder, the reference of all other backends."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from pipeline.artifact import Artifact
from pipeline.backends.encoder import EncoderBatch, ItemVectors
from pipeline.errors import ArtifactError, DeviceError
from pipeline.model.calibration import check_calibration
from pipeline.model.heads import TaskHeads
from pipeline.model.hstu import Hstu
from pipeline.model.padding import PaddedBlocks
from pipeline.tensors import to_device
from pipeline.weights import ITEM_TABLE


@dataclass(slots=True)
class TorchModel:
    """An artifact's modules on one device, for inference, without the item table: see ItemTable."""

    hstu: Hstu
    heads: TaskHeads
    device: torch.device

    @classmethod
    def from_artifact(cls, artifact: Artifact, device: str = "auto", threads: int = 0) -> "TorchModel":
        """Load the weights. Raises ArtifactError, DeviceError.

        device: torch's name, or 'auto' for CUDA when there is one; threads: > 0 sets torch's threads for the process
        """
        if threads:
            torch.set_num_threads(threads)
        config = artifact.config
        resolved = resolve_device(device)
        with torch.device("meta"), _SkipInitialisation():  # the artifact's weights replace the parameters
            hstu = Hstu(config)
            heads = TaskHeads(config.items, config.width)
        for module, name in ((hstu, "hstu"), (heads, "heads")):
            _load_weights(module, artifact, name, resolved)
            module.eval().requires_grad_(False)
        check_calibration(heads.calibration.cpu().numpy(), artifact.version)
        hstu.items.item_content = artifact.metadata.content()
        return cls(hstu, heads, resolved)


class TorchEncoder:
    """Implements Encoder in eager float32."""

    backend = "torch"

    def __init__(self, hstu: Hstu, table: ItemVectors) -> None:
        self._hstu = hstu
        self._table = table
        self.max_events = hstu.config.history_length

    @torch.inference_mode()
    def encode(self, batch: EncoderBatch) -> Tensor:
        """See Encoder.encode."""
        vectors = self._table.vectors
        device = vectors.device
        ordered, users = batch.inputs.by_length()
        items = F.embedding(to_device(ordered.item_rows, device), vectors)
        rows, sequences = self._hstu.sequences(items, to_device(ordered.feature_ids, device), ordered)
        states = self._hstu(rows, PaddedBlocks.from_inputs(sequences, device), last=True)
        return torch.empty_like(states).index_copy_(0, to_device(users, device), states)

    def update_items(self, rows: np.ndarray) -> None:
        """Do nothing: the table's vectors are read at each call."""

    def warm(self) -> int:
        """Return 0: there is nothing to capture."""
        return 0

    def close(self) -> None:
        """Do nothing: the weights go with the last reference to them."""


class _SkipInitialisation(TorchFunctionMode):
    """Leaves parameters as they are created; drawing them on the meta device imports sympy, 2 s of CPU."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.normal_ or getattr(func, "__module__", None) == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


def _load_weights(module: nn.Module, artifact: Artifact, name: str, device: torch.device) -> None:
    """Load the weights onto the device; the item table stays without memory, because an ItemTable replaces it."""
    weights = {key: weight.to(device) for key, weight in artifact.module_weights(name).items()}
    if isinstance(module, Hstu):
        weights[ITEM_TABLE.removeprefix("hstu.")] = module.items.embedding.weight
    try:
        module.load_state_dict(weights, assign=True)
    except RuntimeError as error:  # torch's message names every weight that is missing, unexpected or of another shape
        reasons = " ".join(str(error).split())
        raise ArtifactError(
            f"artifact {artifact.version}: its weights do not fit its config: {reasons}; train again"
        ) from error


def resolve_device(name: str) -> torch.device:
    """Return torch's device of that name; 'auto': CUDA when there is one. DeviceError when it cannot be used here."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:  # unknown name, no such GPU, or a torch built without its support
        reason = str(error).partition("\n")[0]
        raise DeviceError(f"pipeline.device '{name}': {reason}; want auto, cpu, cuda or cuda:N") from error
    return torch.device(name)
