"""The encoder in torch: eager float32, the reference of all other backends; on a GPU it can switch to the kernels."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from pipeline.artifact import Artifact
from pipeline.backends.encoder import GraphOptions
from pipeline.errors import ArtifactError, DeviceError
from pipeline.features.event_features import N_FEATURES, EncoderInputs
from pipeline.items.content import ItemContent
from pipeline.items.vocabulary import UNKNOWN
from pipeline.model.calibration import check_calibration
from pipeline.model.heads import N_RECENT, HeadContext, RecentEvents, TaskHeads
from pipeline.model.hstu import Hstu, supports_kernels
from pipeline.model.padding import PaddedBlocks

if TYPE_CHECKING:
    from pipeline.backends.fused import FusedEncoder


class TorchEncoder:
    """HSTU and its heads from an artifact, on one device.

    device: torch's name, or 'auto' for CUDA when there is one; threads: > 0 sets torch's threads for the entire process
    graphs: on a GPU, encode with the kernels, as CUDA graphs of these batches; None: eager torch
    """

    def __init__(
        self, artifact: Artifact, device: str = "auto", threads: int = 0, graphs: GraphOptions | None = None
    ) -> None:
        if threads:
            torch.set_num_threads(threads)
        config = artifact.config
        self.device = resolve_device(device)
        with torch.device("meta"), _SkipInitialisation():  # the artifact's weights replace the parameters
            self._hstu = Hstu(config)
            self._heads = TaskHeads(config.items, config.width)
        for module, name in ((self._hstu, "hstu"), (self._heads, "heads")):
            _load_weights(module, artifact, name)
        check_calibration(self._heads.calibration.numpy(), artifact.version)
        for module in (self._hstu, self._heads):
            module.eval().requires_grad_(False).to(self.device)
        self._hstu.items.item_content = artifact.metadata.content()
        self.max_events = config.history_length
        self.reads_content = config.content_rows > 0
        self._vectors = self._hstu.items()
        self.table = self._hstu.scoring_table(self._vectors)
        self._fused = self._make_fused_encoder(graphs) if graphs and self.device.type == "cuda" else None

    @torch.inference_mode()
    def encode(self, inputs: EncoderInputs) -> Tensor:
        """Return states float32 [n, width]; see Encoder.encode."""
        if self._fused is not None:
            return self._fused.encode(inputs)
        states = torch.zeros(len(inputs), self.table.shape[1], device=self.device)
        ordered, users = inputs.by_length()
        if len(users):
            item_rows = torch.from_numpy(ordered.item_rows).to(self.device)
            feature_ids = torch.from_numpy(ordered.feature_ids).to(self.device)
            rows, sequences = self._hstu.sequences(F.embedding(item_rows, self._vectors), feature_ids, ordered)
            encoded = self._hstu(rows, PaddedBlocks.from_inputs(sequences, self.device), last=True)
            states[torch.from_numpy(users).to(self.device)] = encoded
        return states

    @torch.inference_mode()
    def head_probabilities(
        self,
        states: Tensor,
        inputs: EncoderInputs,
        visit_frequency: np.ndarray,
        affinity: np.ndarray,
        item_rows: np.ndarray,
    ) -> np.ndarray:
        """Return calibrated probabilities by labels.TASKS, float32 [n, k, 3], if each item is the user's next.

        states: of `encode(inputs)`; item_rows: int32 [n, k]
        visit_frequency: float32 [n, N_VISIT_FEATURES], affinity: float32 [n, k, N_AFFINITY_FEATURES], both as of each
        user's newest event
        """
        rows = torch.from_numpy(item_rows).to(self.device)
        context = self._head_context(inputs.tail(N_RECENT), visit_frequency, affinity)
        logits = self._heads(states, rows, F.embedding(rows, self._vectors), context)
        return self._heads.probabilities(logits).cpu().numpy()

    @torch.inference_mode()
    def set_item_vectors(self, rows: np.ndarray, content: ItemContent) -> None:
        """Set the vectors of items that came after training from their content.

        rows: int64 [n] of the table; rows after its end extend it and leave no gap
        """
        n_added = max(0, int(rows.max(initial=0)) + 1 - len(self._vectors))
        self._vectors = F.pad(self._vectors, (0, 0, 0, n_added))
        self._vectors[torch.from_numpy(rows).to(self.device)] = self._hstu.items.from_content(content.to(self.device))
        self.table = self._hstu.scoring_table(self._vectors)
        if self._fused is not None:
            self._fused.set_item_vectors(rows, self._vectors)

    @torch.inference_mode()
    def warm(self) -> int:
        """Capture the CUDA graphs of all batch sizes, so that no batch waits, and return their number; 0 on a CPU."""
        return 0 if self._fused is None else self._fused.warm()

    @torch.inference_mode()
    def _make_fused_encoder(self, graphs: GraphOptions) -> "FusedEncoder | None":
        from pipeline.backends.fused import FusedEncoder  # Triton, which a CPU does not need

        dtype = torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
        return FusedEncoder(self._hstu, self._vectors, dtype, graphs) if supports_kernels(self._hstu.config) else None

    def _head_context(self, inputs: EncoderInputs, visit_frequency: np.ndarray, affinity: np.ndarray) -> HeadContext:
        # One extra row, so that `recent` has a row to point to where a batch has no events.
        no_features = np.zeros_like(inputs.feature_ids, shape=(1, N_FEATURES))
        item_rows = torch.from_numpy(np.append(inputs.item_rows, UNKNOWN)).to(self.device)
        feature_ids = torch.from_numpy(np.concatenate([inputs.feature_ids, no_features])).to(self.device)
        items = F.embedding(item_rows, self._vectors)
        return HeadContext(
            events=self._hstu.event_rows(items, feature_ids),
            items=items,
            recent=RecentEvents.from_offsets(inputs.offsets, self.device),
            visit_frequency=torch.from_numpy(visit_frequency).to(self.device),
            affinity=torch.from_numpy(affinity).to(self.device),
        )


class _SkipInitialisation(TorchFunctionMode):
    """Leaves parameters as they are created; drawing them on the meta device imports sympy, 2 s of CPU."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.normal_ or getattr(func, "__module__", None) == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


def _load_weights(module: nn.Module, artifact: Artifact, name: str) -> None:
    try:
        module.load_state_dict(artifact.module_weights(name), assign=True)
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
