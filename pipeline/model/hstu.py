"""HSTU: the sequence model of "Actions Speak Louder than Words" (Zhai et al., ICML 2024, arxiv.org/abs/2402.17152).

A layer computes, on each user's rows X (equations 1 to 3):
    U, V, Q, K = split(SiLU(f1(norm(X))))
    A V        = SiLU(Q K^T + bias of relative position and time) / N  @ V     causal, N = max_events, no softmax
    X'         = X + f2(norm(A V) * U)

Users are packed: projections run on [total, width]; attention runs on blocks of users of similar lengths (padding.py),
on a GPU in kernels.fused_attention_layernorm. Its reference.py is the specification, padded and naive.
"""

from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.fused_attention_layernorm.validation import HEAD_WIDTHS
from kernels.hierarchical_sequence_fusion.reference import STRENGTH_CAP
from pipeline.features.event_features import (
    FEATURE_COLUMNS,
    N_FEATURE_IDS,
    TIME_BUCKETS,
    TIME_THRESHOLDS,
    EncoderInputs,
)
from pipeline.model.config import HstuConfig, Norm
from pipeline.model.item_embedding import ItemEmbedding
from pipeline.model.padding import Block, PaddedBlocks
from pipeline.model.session_pooling import SessionPooling
from pipeline.tensors import to_device

if TYPE_CHECKING:
    from kernels.fused_attention_layernorm.plan import AttentionPlan

NARROW_HEAD = 32  # columns of a head: wider ones are slow in float32, where the kernels do not use the matrix units
# Events per user. With 2.5, a training step takes the kernels 1.27 times as long as torch in float32 with narrow heads
# and 1.07 times in bfloat16 with wide ones (`python -m tests.benchmarks.training_steps`, H200); with 4, 0.6 times.
SHORT_HISTORY = 3


class HstuLayer(nn.Module):
    """One layer on packed rows. With `last` it returns each user's newest row only: all that serving needs of the top
    layer."""

    def __init__(self, config: HstuConfig) -> None:
        super().__init__()
        self.config = config
        # Columns of u, q, v and k.
        self.sizes = [config.heads * d for d in (config.d_v, config.d_qk, config.d_v, config.d_qk)]
        self.norm_in = _make_norm(config.norm_in, config.width, config.eps)
        self.project_in = nn.Linear(config.width, sum(self.sizes))
        self.norm_out = _make_norm(config.norm_out, config.heads * config.d_v, config.eps)
        self.project_out = nn.Linear(config.heads * config.d_v, config.width)
        self.position_bias = nn.Parameter(torch.zeros(config.heads, config.max_events))
        self.time_bias = nn.Parameter(torch.zeros(config.heads, TIME_BUCKETS))

    def forward(self, x: Tensor, layout: "PaddedBlocks | AttentionPlan", last: bool = False) -> Tensor:
        """Return the layer's rows [total, width]; with `last`, which needs PaddedBlocks, [users, width].

        x: [total, width]
        """
        if not isinstance(layout, PaddedBlocks):
            return x + self._residual(self._gated_by_kernels(x, layout))
        if last:
            u, q, v, k = self._project_last(x, layout.last)
            x = x[layout.last]
        else:
            u, q, v, k = F.silu(self.project_in(self.norm_in(x))).split(self.sizes, dim=1)
        blocks = [self._attend_block(q, k, v, block, last) for block in layout.blocks]
        attended = layout.pack(blocks, last)  # [rows, heads * d_v]
        return x + self._residual(self.norm_out(attended) * u)

    def _residual(self, gated: Tensor) -> Tensor:
        return self.project_out(F.dropout(gated, self.config.dropout, self.training))

    def _gated_by_kernels(self, x: Tensor, plan: "AttentionPlan") -> Tensor:
        """Return norm(A V) * U of all rows, [total, heads * d_v]."""
        from kernels.fused_attention_layernorm.op import fused_attention_layernorm  # Triton

        config = self.config
        norm = self.norm_out
        assert isinstance(norm, nn.LayerNorm), "supports_kernels(config)"
        parts = F.silu(self.project_in(self.norm_in(x))).split(self.sizes, dim=1)
        u, q, v, k = (part.unflatten(1, (config.heads, -1)) for part in parts)
        dropout = config.attention_dropout if self.training else 0.0
        seed = torch.randint(1 << 62, (), device=x.device) if dropout else None
        tables = (*self.bias_tables(), norm.weight, norm.bias)
        return fused_attention_layernorm(
            q, k, v, u, *tables, plan, config.eps, config.max_events, dropout=dropout, seed=seed
        )

    def bias_tables(self) -> tuple[Tensor, Tensor]:
        """Return the biases of position and time, zeros where the model has none."""
        position = self.position_bias if self.config.position_bias else torch.zeros_like(self.position_bias)
        time = self.time_bias if self.config.time_bias else torch.zeros_like(self.time_bias)
        return position, time

    def _project_last(self, x: Tensor, last: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return u and q of the last rows, v and k of all rows."""
        weight = self.project_in.weight
        bias = self.project_in.bias
        split = sum(self.sizes[:2])
        x = self.norm_in(x)
        u, q = F.silu(F.linear(x[last], weight[:split], bias[:split])).split(self.sizes[:2], dim=1)
        v, k = F.silu(F.linear(x, weight[split:], bias[split:])).split(self.sizes[2:], dim=1)
        return u, q, v, k

    def _attend_block(self, q: Tensor, k: Tensor, v: Tensor, block: Block, last: bool) -> Tensor:
        heads = self.config.heads
        k = _by_head(block.pad(k), heads)  # [heads, users, length, d_qk]
        v = _by_head(block.pad(v), heads)  # [heads, users, length, d_v]
        q = _by_head(q[block.users][:, None] if last else block.pad(q), heads)  # [heads, users, queries, d_qk]
        distances, buckets, mask = block.last_bias_index if last else block.bias_index
        scores = q @ k.transpose(2, 3)  # [heads, users, queries, length]
        if self.config.position_bias:
            scores = scores + _gather_bias(self.position_bias, distances)
        if self.config.time_bias:
            scores = scores + _gather_bias(self.time_bias, buckets)
        scores = F.dropout(F.silu(scores), self.config.attention_dropout, self.training)
        weights = scores * self._scaled(mask)  # SiLU(-inf) is NaN: a mask multiplies
        return (weights @ v).permute(1, 2, 0, 3).flatten(2)  # [users, queries, heads * d_v]

    def _scaled(self, mask: Tensor) -> Tensor:
        """Return the mask divided by N, or by the number of rows that each row sees.

        A user's full length would leak the future.
        """
        by_length = self.config.attention_scale == "length"
        return mask / (mask.sum(-1, keepdim=True) if by_length else self.config.max_events)


class Hstu(nn.Module):
    """From packed events to states; a state's dot product with a row of the item table scores the item."""

    def __init__(self, config: HstuConfig) -> None:
        super().__init__()
        self.config = config
        self.items = ItemEmbedding(config.items, config.width, config.content_rows, config.eps)
        self.rotation = nn.Linear(config.width, config.width, bias=False)
        self.feature_embedding = nn.EmbeddingBag(N_FEATURE_IDS, config.width, mode="sum")
        self.log_strength = nn.EmbeddingBag(N_FEATURE_IDS, 1, mode="sum")
        self.layers = nn.ModuleList(HstuLayer(config) for _ in range(config.layers))
        self.columns = [column for column, name in enumerate(FEATURE_COLUMNS) if name not in config.excluded_features]
        nn.init.normal_(self.feature_embedding.weight, std=0.02)
        nn.init.zeros_(self.log_strength.weight)
        # One tied vector per item, but rotated on the way in: otherwise the residual path would score items similar to
        # the last one, while its successors differ. Validation hit rate@10 on a simulated log: 0.477, with the identity
        # 0.467, with two tables 0.473 (width 128).
        nn.init.orthogonal_(self.rotation.weight)

    def forward(self, rows: Tensor, layout: "PaddedBlocks | AttentionPlan", last: bool = False) -> Tensor:
        """Return unit states [total, width]; with `last`, which needs PaddedBlocks, [users, width].

        rows: [total, width], of `sequences`
        """
        x = F.dropout(rows, self.config.dropout, self.training)
        top = len(self.layers) - 1
        for depth, layer in enumerate(self.layers):
            x = layer(x, layout, last and depth == top)
        return F.normalize(x, dim=-1, eps=self.config.eps)

    def attention_layout(self, inputs: EncoderInputs) -> "PaddedBlocks | AttentionPlan":
        """Return the layout of rows to train on, on the model's device.

        On a GPU it is the kernels', if they support the model's options and are faster: see `trains_faster`.
        """
        device = self.rotation.weight.device
        dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else torch.float32
        is_fast = supports_kernels(self.config) and trains_faster(self.config, dtype, inputs.offsets)
        if device.type != "cuda" or not is_fast:
            return PaddedBlocks.from_inputs(inputs, device)
        return attention_plan(inputs, self.config.max_events, dtype, device)

    def sequences(
        self, items: Tensor, feature_ids: Tensor, inputs: EncoderInputs, recent: np.ndarray | None = None
    ) -> tuple[Tensor, EncoderInputs]:
        """Return the rows that attention reads, [m, width], and their offsets and seconds.

        There is one row per event; with `config.recent_events`, one row per session of the older events.

        items, feature_ids: as in `event_rows`, of the events of `inputs`, at most `config.history_length` per user
        recent: int64 [users], newest events with a row each; None: `config.recent_events`
        """
        config = self.config
        if not config.recent_events:
            return self.event_rows(items, feature_ids), inputs
        sessions = config.max_events - config.recent_events
        pooling = SessionPooling.from_inputs(inputs, config.recent_events if recent is None else recent, sessions)
        return self._pooled_rows(items, feature_ids, pooling), pooling.inputs()

    def event_rows(self, items: Tensor, feature_ids: Tensor) -> Tensor:
        """Return each event's own row, [total, width]: strength * rotated item + features.

        items: unit vectors [total, width]; feature_ids: int [total, N_FEATURES]
        """
        rotated, strength, features = self._event_parts(items, feature_ids)
        return rotated * strength + features

    def _pooled_rows(self, items: Tensor, feature_ids: Tensor, pooling: SessionPooling) -> Tensor:
        """Return [m, width]: the newest events as in `event_rows`, sessions as in kernels.hierarchical_sequence_fusion,
        where an event's strength is its weight in its session."""
        rotated, strength, features = self._event_parts(items, feature_ids)
        is_recent = to_device(pooling.is_recent, items.device)[:, None]
        events = torch.where(is_recent, rotated * strength, rotated) + features
        return pooling.pool(events, strength.masked_fill(is_recent, 1.0))

    def _event_parts(self, items: Tensor, feature_ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the events' rotated items [total, width], strengths [total, 1] and features [total, width]."""
        if self.config.excluded_features:
            feature_ids = feature_ids[:, self.columns]
        rotated = self.rotation(items)
        mask = self._feature_mask(feature_ids)
        strength = rotated.new_ones(len(rotated), 1)
        if self.config.strength:
            log_strength = self.log_strength(feature_ids, per_sample_weights=mask)
            strength = log_strength.clamp(-STRENGTH_CAP, STRENGTH_CAP).exp()
        return rotated, strength, self.feature_embedding(feature_ids, per_sample_weights=mask)

    def scoring_table(self, vectors: Tensor) -> Tensor:
        """Return the items' unit vectors [n, width] over the temperature: a state's dot products with them are logits
        within +-1/temperature. Serving divides the states instead, which are fewer."""
        return vectors / self.config.temperature

    def _feature_mask(self, feature_ids: Tensor) -> Tensor | None:
        """Return the dropout mask of single features in training, float [total, columns]; None where there is none."""
        if not (self.training and self.config.feature_dropout):
            return None
        return F.dropout(torch.ones(feature_ids.shape, device=feature_ids.device), self.config.feature_dropout)


def attention_plan(
    inputs: EncoderInputs, max_events: int, dtype: torch.dtype, device: torch.device, kernels: bool | None = None
) -> "AttentionPlan":
    """Return the rows' plan for the attention kernels. dtype: of q, k and v; kernels: see AttentionPlan.from_batch."""
    from kernels.fused_attention_layernorm.plan import AttentionPlan  # Triton, which a CPU does not need

    arrays = (inputs.seconds, inputs.offsets, np.array(TIME_THRESHOLDS, np.int32))
    seconds, offsets, thresholds = (to_device(array, device) for array in arrays)
    return AttentionPlan.from_batch(seconds, offsets, thresholds, max_events, dtype, kernels=kernels, trusted=True)


def supports_kernels(config: HstuConfig) -> bool:
    """Whether the kernels support this model's options."""
    plain = config.norm_in == config.norm_out == "layer" and config.attention_scale == "max_events"
    return plain and {config.d_qk, config.d_v} <= set(HEAD_WIDTHS) and config.width % 8 == 0


def trains_faster(config: HstuConfig, dtype: torch.dtype, offsets: np.ndarray) -> bool:
    """Whether the kernels train on such a batch in less time than torch. offsets: int64 [users + 1] of its rows"""
    is_narrow = max(config.d_qk, config.d_v) <= NARROW_HEAD
    is_half = dtype.itemsize == 2
    is_long = int(offsets[-1]) >= SHORT_HISTORY * (len(offsets) - 1)
    return (is_narrow and is_half) or ((is_narrow or is_half) and is_long)


def _make_norm(kind: Norm, width: int, eps: float) -> nn.Module:
    match kind:
        case "layer":
            return nn.LayerNorm(width, eps)
        case "rms":
            return nn.RMSNorm(width, eps)
        case "none":
            return nn.Identity()


def _by_head(x: Tensor, heads: int) -> Tensor:
    """Return [users, rows, heads * d] as [heads, users, rows, d]."""
    return x.unflatten(2, (heads, -1)).permute(2, 0, 1, 3)


def _gather_bias(table: Tensor, index: Tensor) -> Tensor:
    """Return table [heads, n] at index [users, queries, length]: [heads, users, queries, length].

    `index_select`: 1.7 ms for a million cells and 1.5 ms backward; advanced indexing 5.3 and 6.5 ms (one core).
    """
    return table.index_select(1, index.reshape(-1)).view(len(table), *index.shape)
