"""HSTU: the sequence model of "Actions Speak Louder than Words" (Zhai et al., ICML 2024, arxiv.org/abs/2402.17152).

A layer is, on each user's rows X (equations 1 to 3):
    U, V, Q, K = split(SiLU(f1(norm(X))))
    A V        = SiLU(Q K^T + bias of relative position and time) / N  @ V     causal, N = max_events, no softmax
    X'         = X + f2(norm(A V) * U)

Users are packed: projections run on [total, width]; attention runs on blocks of users of like lengths (padding.py),
on a GPU by kernels.fused_attention_layernorm. Its reference.py is the specification, padded and naive.
"""

from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.fused_attention_layernorm.validation import WIDTHS
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

if TYPE_CHECKING:
    from kernels.fused_attention_layernorm.plan import AttentionPlan

NARROW_HEAD = 32  # of a head: the kernels' products in float32 do without the matrix units


class HstuLayer(nn.Module):
    """A layer on packed rows; with `last` only each user's newest row comes out: all that serving needs of the top."""

    def __init__(self, config: HstuConfig) -> None:
        super().__init__()
        self.config = config
        self.sizes = [config.heads * d for d in (config.d_v, config.d_qk, config.d_v, config.d_qk)]  # of u, q, v, k
        self.norm_in = make_norm(config.norm_in, config.width, config.eps)
        self.project_in = nn.Linear(config.width, sum(self.sizes))
        self.norm_out = make_norm(config.norm_out, config.heads * config.d_v, config.eps)
        self.project_out = nn.Linear(config.heads * config.d_v, config.width)
        self.position_bias = nn.Parameter(torch.zeros(config.heads, config.max_events))
        self.time_bias = nn.Parameter(torch.zeros(config.heads, TIME_BUCKETS))

    def forward(self, x: Tensor, layout: "PaddedBlocks | AttentionPlan", last: bool = False) -> Tensor:
        # x: [total, width] -> [total, width], or [users, width] if last
        if not isinstance(layout, PaddedBlocks):
            return x + self.project_out(F.dropout(self._fused(x, layout), self.config.dropout, self.training))
        rows = layout.last if last else None
        if rows is None:
            u, q, v, k = F.silu(self.project_in(self.norm_in(x))).split(self.sizes, dim=1)
        else:
            u, q, v, k = self._project_last(x, rows)
            x = x[rows]
        attended = self._attend(q, k, v, layout, last)  # [rows, heads * d_v]
        gated = self.norm_out(attended) * u
        return x + self.project_out(F.dropout(gated, self.config.dropout, self.training))

    def _fused(self, x: Tensor, plan: "AttentionPlan") -> Tensor:
        """norm(A V) * U of all rows, [total, heads * d_v]."""
        from kernels.fused_attention_layernorm.op import fused_attention_layernorm  # Triton

        config, norm = self.config, self.norm_out
        assert isinstance(norm, nn.LayerNorm)  # else the model is not `fusible`
        parts = F.silu(self.project_in(self.norm_in(x))).split(self.sizes, dim=1)
        u, q, v, k = (part.unflatten(1, (config.heads, -1)) for part in parts)
        dropout = config.attention_dropout if self.training else 0.0
        return fused_attention_layernorm(
            q, k, v, u, *self.tables(), norm.weight, norm.bias, plan, config.eps, config.max_events, dropout=dropout,
            seed=torch.randint(1 << 62, (), device=x.device) if dropout else None,
        )  # fmt: skip

    def tables(self) -> tuple[Tensor, Tensor]:
        """The biases of position and time, zero where the model has none."""
        position, time = self.position_bias, self.time_bias
        position = position if self.config.position_bias else torch.zeros_like(position)
        return position, time if self.config.time_bias else torch.zeros_like(time)

    def _project_last(self, x: Tensor, rows: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        weight, bias, cut = self.project_in.weight, self.project_in.bias, sum(self.sizes[:2])
        x = self.norm_in(x)
        u, q = F.silu(F.linear(x[rows], weight[:cut], bias[:cut])).split(self.sizes[:2], dim=1)
        v, k = F.silu(F.linear(x, weight[cut:], bias[cut:])).split(self.sizes[2:], dim=1)
        return u, q, v, k

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, layout: PaddedBlocks, last: bool) -> Tensor:
        blocks = [self._attend_block(q, k, v, block, last) for block in layout.blocks]
        return layout.pack(blocks, last)

    def _attend_block(self, q: Tensor, k: Tensor, v: Tensor, block: Block, last: bool) -> Tensor:
        heads = self.config.heads
        k, v = _by_head(block.pad(k), heads), _by_head(block.pad(v), heads)  # [heads, users, length, d]
        q = _by_head(q[block.users][:, None] if last else block.pad(q), heads)  # [heads, users, queries, d_qk]
        distances, buckets, mask = block.last_bias_index if last else block.bias_index
        scores = q @ k.transpose(2, 3)  # [heads, users, queries, length]
        if self.config.position_bias:
            scores = scores + _gather_bias(self.position_bias, distances)
        if self.config.time_bias:
            scores = scores + _gather_bias(self.time_bias, buckets)
        scores = F.dropout(F.silu(scores), self.config.attention_dropout, self.training)
        weights = scores * self._shares(mask)  # SiLU(-inf) is NaN: a mask multiplies
        return (weights @ v).permute(1, 2, 0, 3).flatten(2)  # [users, queries, heads * d_v]

    def _shares(self, mask: Tensor) -> Tensor:
        """The mask over N, or over the number of rows that each row sees: a user's own length would tell the future."""
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
        self.columns = [number for number, name in enumerate(FEATURE_COLUMNS) if name not in config.excluded_features]
        nn.init.normal_(self.feature_embedding.weight, std=0.02)
        nn.init.zeros_(self.log_strength.weight)
        # One vector an item, tied, but an event's is turned on the way in: else the residual path would score what is
        # like the last item, while what follows it differs. Validation hit rate@10 on a simulated log: 0.477, as the
        # identity 0.467, two tables 0.473 (width 128).
        nn.init.orthogonal_(self.rotation.weight)

    def forward(self, rows: Tensor, layout: "PaddedBlocks | AttentionPlan", last: bool = False) -> Tensor:
        """rows: of `sequences`, [total, width] -> unit states [total, width]; `last`, by a Layout: [users, width]."""
        x = F.dropout(rows, self.config.dropout, self.training)
        top = len(self.layers) - 1
        for number, layer in enumerate(self.layers):
            x = layer(x, layout, last and number == top)
        return F.normalize(x, dim=-1, eps=self.config.eps)

    def attention_layout(self, inputs: EncoderInputs) -> "PaddedBlocks | AttentionPlan":
        """Of rows to train on, on the model's device: on a GPU for the kernels, if they know the model's options and
        are faster, which they are not with wide heads in float32 (tests.benchmarks.training_steps)."""
        device = self.rotation.weight.device
        dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else torch.float32
        narrow = max(self.config.d_qk, self.config.d_v) <= NARROW_HEAD
        if device.type != "cuda" or not supports_kernels(self.config) or not (narrow or dtype.itemsize == 2):
            return PaddedBlocks.from_inputs(inputs, device)
        return attention_plan(inputs, self.config.max_events, dtype, device)

    def sequences(
        self, items: Tensor, codes: Tensor, inputs: EncoderInputs, recent: np.ndarray | None = None
    ) -> tuple[Tensor, EncoderInputs]:
        """The rows that attention reads, [m, width], and their offsets and seconds: one row an event, and with
        `config.recent_events` one row a session of the older ones.

        items, codes: see `event_rows`, of the events of `inputs`, at most `config.read_events` a user
        recent: int64 [users], the newest events that keep a row of their own, if not `config.recent_events`
        """
        config = self.config
        if not config.recent_events:
            return self.event_rows(items, codes), inputs
        sessions = config.max_events - config.recent_events
        condensed = SessionPooling.from_inputs(inputs, config.recent_events if recent is None else recent, sessions)
        return self._condensed_rows(items, codes, condensed), condensed.inputs()

    def event_rows(self, items: Tensor, codes: Tensor) -> Tensor:
        """What each event is by itself, [total, width]: its item, turned, by its strength, and its features.

        items: unit vectors [total, width]; codes: int [total, FEATURES]
        """
        turned, strength, features = self._event_parts(items, codes)
        return turned * strength + features

    def _condensed_rows(self, items: Tensor, codes: Tensor, condensed: SessionPooling) -> Tensor:
        """[m, width]: the newest events as `event_rows`, sessions by kernels.hierarchical_sequence_fusion: there an
        event's strength is its weight among the others'."""
        turned, strength, features = self._event_parts(items, codes)
        whole = torch.from_numpy(condensed.is_recent).to(items.device)[:, None]
        events = torch.where(whole, turned * strength, turned) + features
        return condensed.pool(events, strength.masked_fill(whole, 1.0))

    def _event_parts(self, items: Tensor, codes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of events their turned items [total, width], their strengths [total, 1] and their features [total, width]."""
        if self.config.excluded_features:
            codes = codes[:, self.columns]
        turned, kept = self.rotation(items), self._feature_mask(codes)
        strength = turned.new_ones(len(turned), 1)
        if self.config.strength:
            strength = self.log_strength(codes, per_sample_weights=kept).clamp(-STRENGTH_CAP, STRENGTH_CAP).exp()
        return turned, strength, self.feature_embedding(codes, per_sample_weights=kept)

    def scoring_table(self, vectors: Tensor) -> Tensor:
        """Items' unit vectors [n, width] over the temperature: dot products are logits within +-1/temperature."""
        return vectors / self.config.temperature

    def _feature_mask(self, codes: Tensor) -> Tensor | None:
        """float [total, columns]: in training some columns of some events are left out, the others count for them."""
        if not (self.training and self.config.feature_dropout):
            return None
        return F.dropout(torch.ones(codes.shape, device=codes.device), self.config.feature_dropout)


def attention_plan(
    inputs: EncoderInputs, max_events: int, dtype: torch.dtype, device: torch.device, kernels: bool | None = None
) -> "AttentionPlan":
    """These rows as attention's kernels want them. dtype: of q, k and v; kernels: see Plan.of."""
    from kernels.fused_attention_layernorm.plan import AttentionPlan  # Triton, which a CPU does not need

    columns = (inputs.seconds, inputs.offsets, np.array(TIME_THRESHOLDS, np.int32))
    seconds, offsets, thresholds = (torch.from_numpy(column).to(device) for column in columns)
    return AttentionPlan.from_batch(seconds, offsets, thresholds, max_events, dtype, kernels=kernels, trusted=True)


def supports_kernels(config: HstuConfig) -> bool:
    """Whether the kernels know this model's options."""
    plain = config.norm_in == config.norm_out == "layer" and config.attention_scale == "max_events"
    return plain and {config.d_qk, config.d_v} <= set(WIDTHS) and config.width % 8 == 0


def make_norm(kind: Norm, width: int, eps: float) -> nn.Module:
    match kind:
        case "layer":
            return nn.LayerNorm(width, eps)
        case "rms":
            return nn.RMSNorm(width, eps)
        case "none":
            return nn.Identity()


def _by_head(x: Tensor, heads: int) -> Tensor:
    """[users, rows, heads * d] -> [heads, users, rows, d]"""
    return x.unflatten(2, (heads, -1)).permute(2, 0, 1, 3)


def _gather_bias(table: Tensor, index: Tensor) -> Tensor:
    """table [heads, n] at index [users, queries, length] -> [heads, users, queries, length].

    `index_select`: 1.7 ms for a million cells and 1.5 ms backward; advanced indexing 5.3 and 6.5 ms (one core).
    """
    return table.index_select(1, index.reshape(-1)).view(len(table), *index.shape)
