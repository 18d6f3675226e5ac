"""The encoder by torch: eager in float32, the reference of all other backends and the CPU's way; or, on a GPU, by this
project's kernels in half precision."""

from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.artifact import Artifact
from pipeline.backends import GraphOptions
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
    """HSTU and its heads from an artifact. `device`: torch's name, or 'auto' for CUDA when there is one.

    `threads` > 0 sets the number of torch's threads, of the whole process. graphs: on a GPU the kernels run, as CUDA
    graphs of these batches; None: eager torch there too.
    """

    def __init__(
        self, artifact: Artifact, device: str = "auto", threads: int = 0, graphs: GraphOptions | None = None
    ) -> None:
        if threads:
            torch.set_num_threads(threads)
        self.device = resolve_device(device)
        with torch.device("meta"):  # no weights are drawn at random only to be replaced
            self._hstu, self._heads = Hstu(artifact.config), TaskHeads(artifact.config.items, artifact.config.width)
        for module, name in ((self._hstu, "hstu"), (self._heads, "heads")):
            _load(module, artifact, name)
        check_calibration(self._heads.calibration.numpy(), artifact.version)
        for module in (self._hstu, self._heads):
            module.eval().requires_grad_(False).to(self.device)
        self._hstu.items.item_content = artifact.metadata.content()
        self.max_events = artifact.config.history_length
        self.reads_content = artifact.config.content_rows > 0
        self._vectors = self._hstu.items()
        self.table = self._hstu.scoring_table(self._vectors)
        self._fused = self._fused_encoder(graphs) if graphs and self.device.type == "cuda" else None

    @torch.inference_mode()
    def encode(self, inputs: EncoderInputs) -> Tensor:
        """States float32 [n, width]; see Encoder."""
        if self._fused is not None:
            return self._fused.encode(inputs)
        states = torch.zeros(len(inputs), self.table.shape[1], device=self.device)
        ordered, users = inputs.by_length()
        if len(users):
            tokens, codes = (
                torch.from_numpy(column).to(self.device) for column in (ordered.item_rows, ordered.feature_ids)
            )
            rows, sequences = self._hstu.sequences(F.embedding(tokens, self._vectors), codes, ordered)
            encoded = self._hstu(rows, PaddedBlocks.from_inputs(sequences, self.device), last=True)
            states[torch.from_numpy(users).to(self.device)] = encoded
        return states

    @torch.inference_mode()
    def head_probabilities(
        self, states: Tensor, inputs: EncoderInputs, rhythm: np.ndarray, affinity: np.ndarray, tokens: np.ndarray
    ) -> np.ndarray:
        """Probabilities by labels.TASKS, float32 [n, k, 3], of items int32 [n, k] being next.

        states: of `encode(inputs)`; rhythm: float32 [n, RHYTHMS] and affinity: float32 [n, k, AFFINITIES] at each
        user's newest event
        """
        asked = torch.from_numpy(tokens).to(self.device)
        context = self._context(inputs.tail(N_RECENT), rhythm, affinity)
        logits = self._heads(states, asked, F.embedding(asked, self._vectors), context)
        return self._heads.probabilities(logits).cpu().numpy()

    @torch.inference_mode()
    def set_item_vectors(self, rows: np.ndarray, content: ItemContent) -> None:
        """These rows of the table, int64 [n], some of them perhaps beyond its end without a gap, are of items that came
        after training, by what is known of them."""
        further = int(rows.max(initial=0)) + 1 - len(self._vectors)
        self._vectors = F.pad(self._vectors, (0, 0, 0, max(0, further)))
        self._vectors[torch.from_numpy(rows).to(self.device)] = self._hstu.items.from_content(content.to(self.device))
        self.table = self._hstu.scoring_table(self._vectors)
        if self._fused is not None:
            self._fused.set_item_vectors(rows, self._vectors)

    @torch.inference_mode()
    def warm(self) -> int:
        """On a GPU makes the graphs of all batches within the options, so that none waits for one; their number."""
        return 0 if self._fused is None else self._fused.warm()

    @torch.inference_mode()
    def _fused_encoder(self, graphs: GraphOptions) -> "FusedEncoder | None":
        from pipeline.backends.fused import FusedEncoder  # Triton, which a CPU does not need

        dtype = torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
        return FusedEncoder(self._hstu, self._vectors, dtype, graphs) if supports_kernels(self._hstu.config) else None

    def _context(self, inputs: EncoderInputs, rhythm: np.ndarray, affinity: np.ndarray) -> HeadContext:
        # One row more: a place to look where a batch has no events at all.
        tokens = torch.from_numpy(np.append(inputs.item_rows, UNKNOWN)).to(self.device)
        codes = torch.from_numpy(
            np.concatenate([inputs.feature_ids, np.zeros_like(inputs.feature_ids, shape=(1, N_FEATURES))])
        )
        items = F.embedding(tokens, self._vectors)
        rows = self._hstu.event_rows(items, codes.to(self.device))
        beside = (torch.from_numpy(column).to(self.device) for column in (rhythm, affinity))
        return HeadContext(rows, items, RecentEvents.from_offsets(inputs.offsets, self.device), *beside)


def _load(module: nn.Module, artifact: Artifact, name: str) -> None:
    try:
        module.load_state_dict(artifact.module_weights(name), assign=True)
    except RuntimeError as error:  # torch's sentence names every weight that is missing, unknown or of another shape
        reasons = " ".join(str(error).split())
        raise ArtifactError(f"artifact {artifact.version}: its weights are not of its config: {reasons}") from error


def resolve_device(name: str) -> torch.device:
    """Torch's device of that name; 'auto': CUDA when there is one. DeviceError when it cannot be used here."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:  # no such name; no such card; a torch that was built without it
        reason = str(error).partition("\n")[0]
        raise DeviceError(f"pipeline.device '{name}': {reason}; want auto, cpu, cuda or cuda:N") from error
    return torch.device(name)
