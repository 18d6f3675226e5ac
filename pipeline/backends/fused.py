"""The encoder by this project's kernels, for serving on a GPU: a CUDA graph for each bucket of batches.

A batch is three columns and its offsets. One graph holds all that happens to them: embeddings are gathered, weighed and
summed, old sessions pooled (hierarchical_sequence_fusion), the layers run (fused_attention_layernorm), of the top one
each user's newest row alone.
"""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import LayerNorm

from kernels.fused_attention_layernorm.encoder import KernelEncoder, LayerWeights
from kernels.fused_attention_layernorm.launch import SHORT
from kernels.fused_attention_layernorm.plan import AttentionPlan
from kernels.graphs import BatchGraphs
from kernels.hierarchical_sequence_fusion.op import hierarchical_sequence_fusion
from kernels.launch import device_of
from pipeline.backends import GraphOptions
from pipeline.backends.staging import Staging
from pipeline.features.event_features import SESSION_GAP_MS, TIME_THRESHOLDS, EncoderInputs
from pipeline.model.hstu import Hstu, HstuLayer

ROOM = 1.25  # rows of the table for later items, by those it has: a table that moves takes all graphs with it


class FusedForward:
    """From a batch's columns to states, launch by launch: what a graph records."""

    def __init__(self, hstu: Hstu, dtype: torch.dtype) -> None:
        self.config, self.dtype, device = hstu.config, dtype, hstu.rotation.weight.device
        self._encoder = make_kernel_encoder(hstu, dtype)
        self._features = hstu.feature_embedding.weight.to(dtype)
        strength = hstu.log_strength.weight[:, 0].float()
        self._strength = strength.contiguous() if hstu.config.strength else torch.zeros_like(strength)
        self._thresholds = torch.tensor(TIME_THRESHOLDS, dtype=torch.int32, device=device)
        # Items' vectors as events have them.
        self.rotated = torch.empty(0, hstu.config.width, dtype=dtype, device=device)

    def __call__(self, columns: Sequence[Tensor], offsets: Tensor, longest: int) -> Tensor:
        """The unit states float32 [users, width] of users who all have events."""
        tokens, codes, seconds = columns
        rows, seconds, offsets = hierarchical_sequence_fusion(
            self.rotated, self._features, self._strength, tokens, codes, seconds, offsets,
            recent=self.config.recent_length, sessions=self.config.max_events - self.config.recent_length,
            gap_s=SESSION_GAP_MS // 1000, check_values=False,
        )  # fmt: skip
        longest = min(longest, self.config.max_events)
        plan = AttentionPlan.from_batch(
            seconds, offsets, self._thresholds, longest, self.dtype, trusted=True, kernels=True
        )
        return F.normalize(self._encoder(rows, plan, last=True).float(), dim=-1, eps=self.config.eps)


class FusedEncoder:
    """`hstu` on its device, products in `dtype`. vectors: float32 [items, width], of all items. On a CPU the kernels
    need Triton's interpreter."""

    def __init__(self, hstu: Hstu, vectors: Tensor, dtype: torch.dtype, graphs: GraphOptions) -> None:
        self._hstu, self._config, self._device = hstu, hstu.config, vectors.device
        self._encoding, self._stage = FusedForward(hstu, dtype), Staging(self._device)
        like = self._stage(np.zeros(1, np.int32), np.zeros((1, len(hstu.columns)), np.int32), np.zeros(1, np.int32))
        most = graphs.max_events if graphs.budget_mib else 0
        # NOTE: the graphs know the encoding, not this object: no cycle keeps a replaced model's memory.
        self._graphs = BatchGraphs(self._encoding, like, graphs.max_users, most, graphs.budget_mib << 20)
        longest = self._config.history_length
        self._classes = [longest] if self._config.max_events <= SHORT else [SHORT, longest]
        self.set_item_vectors(np.arange(len(vectors)), vectors)

    def set_item_vectors(self, rows: np.ndarray, vectors: Tensor) -> None:
        """The vectors of these rows, int64 [n], are new, of [items, width] in all."""
        turned = self._encoding.rotated
        if len(vectors) > len(turned):
            self._encoding.rotated = turned.new_zeros((int(len(vectors) * ROOM), self._config.width))
            self._encoding.rotated[: len(turned)] = turned
            self._graphs.clear()
        index = torch.from_numpy(rows).to(self._device)
        self._encoding.rotated[index] = self._hstu.rotation(vectors[index]).to(turned.dtype)

    def warm(self) -> int:
        """Makes the graphs of all batches to come, before they come; returns their number."""
        with device_of(self._encoding.rotated):
            return self._graphs.warm(self._classes)

    def encode(self, inputs: EncoderInputs) -> Tensor:
        """States float32 [n, width], as Encoder.encode."""
        lengths = np.diff(inputs.offsets)
        users = np.flatnonzero(lengths)
        if len(users) == len(lengths) > 0:
            return self._of_users_with_events(inputs).clone()
        states = torch.zeros(len(inputs), self._config.width, device=self._device)
        if len(users):
            inputs = inputs.gather_runs(inputs.offsets[users], lengths[users])
            states[torch.from_numpy(users).to(self._device)] = self._of_users_with_events(inputs)
        return states

    def _of_users_with_events(self, inputs: EncoderInputs) -> Tensor:
        """[users, width], valid until the next call."""
        codes = inputs.feature_ids[:, self._hstu.columns] if self._config.excluded_features else inputs.feature_ids
        longest = int(np.diff(inputs.offsets).max())
        assert longest <= self._classes[-1], "histories are cut by `tail(max_events)`"
        with device_of(self._encoding.rotated):  # streams and graphs are of the current GPU
            *columns, offsets = self._stage(inputs.item_rows, codes, inputs.seconds, inputs.offsets.astype(np.int32))
            longest = next(events for events in self._classes if longest <= events)
            return self._graphs(columns, offsets, longest)[: len(inputs)]


def make_kernel_encoder(hstu: Hstu, dtype: torch.dtype, fp8: bool = False) -> KernelEncoder:
    """The model's layers as the kernels want them; its options are `fusible`."""
    layers = []
    for layer in hstu.layers:
        assert isinstance(layer, HstuLayer)
        norms = layer.norm_in, layer.norm_out
        assert isinstance(norms[0], LayerNorm)
        assert isinstance(norms[1], LayerNorm)
        modules = norms[0], layer.project_in, norms[1], layer.project_out
        layers.append(LayerWeights.of(*modules, *layer.bias_tables(), dtype, fp8))
    config = hstu.config
    return KernelEncoder(layers, config.heads, config.d_qk, config.d_v, config.max_events, config.eps)
