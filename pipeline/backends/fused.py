"""The encoder on this project's kernels, for serving on a GPU: a CUDA graph for each bucket of batch sizes.

A batch is three columns and its offsets. One graph holds everything done with them: embeddings are gathered, weighted
and summed, old sessions pooled (hierarchical_sequence_fusion), and the layers run (fused_attention_layernorm), the top
one for each user's newest row only.
"""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import LayerNorm

from kernels.fused_attention_layernorm.encoder import KernelEncoder, LayerWeights
from kernels.fused_attention_layernorm.launch import SHORT_LENGTH
from kernels.fused_attention_layernorm.plan import AttentionPlan
from kernels.graphs import BatchGraphs
from kernels.hierarchical_sequence_fusion.op import hierarchical_sequence_fusion
from kernels.launch import device_guard
from pipeline.backends.encoder import EncoderBatch, GraphOptions, ItemVectors
from pipeline.backends.item_table import GROWTH
from pipeline.features.event_features import SESSION_GAP_S, TIME_THRESHOLDS
from pipeline.model.hstu import Hstu, HstuLayer
from pipeline.tensors import to_device


class FusedForward:
    """The forward pass from a batch's columns to states, launch by launch: the function that a graph captures."""

    def __init__(self, hstu: Hstu, dtype: torch.dtype) -> None:
        device = hstu.rotation.weight.device
        self.config = hstu.config
        self.dtype = dtype
        self._encoder = make_kernel_encoder(hstu, dtype)
        self._features = hstu.feature_embedding.weight.to(dtype)
        strength = hstu.log_strength.weight[:, 0].float()
        self._strength = strength.contiguous() if hstu.config.strength else torch.zeros_like(strength)
        self._thresholds = torch.tensor(TIME_THRESHOLDS, dtype=torch.int32, device=device)
        self.rotated = torch.empty(0, hstu.config.width, dtype=dtype, device=device)  # item vectors as events read them

    def __call__(self, columns: Sequence[Tensor], offsets: Tensor, longest: int) -> Tensor:
        """Return unit states float32 [users, width] of users who all have events.

        columns: item rows, feature ids, seconds; longest: most events of a user, or more
        """
        item_rows, feature_ids, seconds = columns
        rows, seconds, offsets = hierarchical_sequence_fusion(
            self.rotated,
            self._features,
            self._strength,
            item_rows,
            feature_ids,
            seconds,
            offsets,
            recent=self.config.recent_length,
            sessions=self.config.max_events - self.config.recent_length,
            gap_s=SESSION_GAP_S,
            check_values=False,
        )
        longest = min(longest, self.config.max_events)
        plan = AttentionPlan.from_batch(
            seconds, offsets, self._thresholds, longest, self.dtype, trusted=True, kernels=True
        )
        return F.normalize(self._encoder(rows, plan, last=True).float(), dim=-1, eps=self.config.eps)


class FusedEncoder:
    """Implements Encoder on the kernels, with products in `dtype`. On a CPU they need Triton's interpreter."""

    backend = "kernels"

    @torch.inference_mode()
    def __init__(self, hstu: Hstu, table: ItemVectors, dtype: torch.dtype, graphs: GraphOptions) -> None:
        self._hstu = hstu
        self._table = table
        self._config = hstu.config
        self.max_events = hstu.config.history_length
        self._device = table.vectors.device
        self._forward = FusedForward(hstu, dtype)
        self._columns = to_device(np.array(hstu.columns), self._device) if hstu.config.excluded_features else None
        ids = torch.zeros(1, dtype=torch.int32, device=self._device)
        like = [ids, ids.expand(1, len(hstu.columns)), ids]
        max_events = graphs.max_events if graphs.budget_mib else 0
        # NOTE: the graphs refer to the forward pass, not to this object: no cycle keeps a replaced model's memory.
        self._graphs = BatchGraphs(self._forward, like, graphs.max_users, max_events, graphs.budget_mib << 20)
        longest = self._config.history_length
        self._length_buckets = [longest] if self._config.max_events <= SHORT_LENGTH else [SHORT_LENGTH, longest]
        self.update_items(np.arange(len(table.vectors)))

    @torch.inference_mode()
    def update_items(self, rows: np.ndarray) -> None:
        """See Encoder.update_items."""
        vectors = self._table.vectors
        rotated = self._forward.rotated
        if len(vectors) > len(rotated):
            self._forward.rotated = rotated.new_zeros((int(len(vectors) * GROWTH), self._config.width))
            self._forward.rotated[: len(rotated)] = rotated
            self._graphs.clear()  # they refer to the table that moved
        index = to_device(rows, self._device)
        self._forward.rotated[index] = self._hstu.rotation(vectors[index]).to(rotated.dtype)

    @torch.inference_mode()
    def warm(self) -> int:
        """Capture the graphs of all batch sizes ahead of time and return their number."""
        with device_guard(self._forward.rotated):
            return self._graphs.warm(self._length_buckets)

    @torch.inference_mode()
    def encode(self, batch: EncoderBatch) -> Tensor:
        """See Encoder.encode."""
        longest = int(batch.inputs.lengths.max())
        assert longest <= self._length_buckets[-1], "histories are cut by `tail(max_events)`"
        bucket = next(length for length in self._length_buckets if longest <= length)
        with device_guard(self._forward.rotated):  # streams and graphs belong to the current GPU
            columns = batch.item_rows, self._read(batch.feature_ids), batch.seconds
            return self._graphs(columns, batch.offsets, bucket)[: len(batch.inputs)]

    def close(self) -> None:
        """See Encoder.close."""
        self._graphs.clear()
        self._forward.rotated = self._forward.rotated[:0].clone()

    def _read(self, feature_ids: Tensor) -> Tensor:
        """Return the columns of the features that the model reads: int32 [events, columns]."""
        return feature_ids if self._columns is None else feature_ids.index_select(1, self._columns)


def make_kernel_encoder(hstu: Hstu, dtype: torch.dtype) -> KernelEncoder:
    """Return the model's layers on the kernels; its configuration is one that `supports_kernels`."""
    layers = []
    for layer in hstu.layers:
        assert isinstance(layer, HstuLayer)
        assert isinstance(layer.norm_in, LayerNorm)
        assert isinstance(layer.norm_out, LayerNorm)
        modules = layer.norm_in, layer.project_in, layer.norm_out, layer.project_out
        layers.append(LayerWeights.from_modules(*modules, *layer.bias_tables(), dtype))
    config = hstu.config
    return KernelEncoder(layers, config.heads, config.d_qk, config.d_v, config.max_events, config.eps)
