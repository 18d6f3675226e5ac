"""SASRec, the sequence model to compare with: Kang and McAuley, ICDM 2018 (arxiv.org/abs/1808.09781).

As in the paper's code: learned positions counted from the latest event, item vectors times sqrt(width), causal softmax
attention with a norm on the queries only, residuals from the normalised input, one item table in and out. Losses: the
paper's binary cross entropy with one uniform negative per row, or the full softmax, which ranks better (Klenitskiy and
Vasilev, RecSys 2023).
"""

from typing import Literal

import msgspec
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.evaluation.popularity import Popularity
from pipeline.features.event_features import EncoderInputs
from pipeline.model.padding import Block, PaddedBlocks
from pipeline.records import Histories
from pipeline.training.batches import TrainingBatch
from pipeline.training.losses import next_item_loss, sample_candidates
from pipeline.training.multi_task_model import Trainable
from pipeline.types import PositiveInt, Rate


class SasRecConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The model's shape and loss. `max_events`: number of latest events that a state reads."""

    items: PositiveInt = 1  # rows of the item table, with that of the unknown item
    layers: PositiveInt = 2
    width: PositiveInt = 64
    heads: PositiveInt = 1
    max_events: PositiveInt = 200
    dropout: Rate = 0.2
    loss: Literal["bce", "softmax"] = "bce"
    eps: float = 1e-8


class SasRecLayer(nn.Module):
    """Attention and a two-layer network on packed rows."""

    def __init__(self, config: SasRecConfig) -> None:
        super().__init__()
        self.config = config
        width = config.width
        self.norm_attention = nn.LayerNorm(width, config.eps)
        self.norm_forward = nn.LayerNorm(width, config.eps)
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.out = nn.Linear(width, width)
        self.inner = nn.Linear(width, width)
        self.outer = nn.Linear(width, width)

    def forward(self, x: Tensor, layout: PaddedBlocks) -> Tensor:
        # x: [total, width] -> [total, width]
        normed = self.norm_attention(x)
        q = self.query(normed)
        k = self.key(x)
        v = self.value(x)
        attn_out = layout.pack([self._attend(q, k, v, block) for block in layout.blocks], last=False)
        x = self.norm_forward(normed + self.out(attn_out))
        hidden = self._dropout(F.relu(self.inner(x)))
        return x + self._dropout(self.outer(hidden))

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, block: Block) -> Tensor:
        q, k, v = (block.pad(x).unflatten(2, (self.config.heads, -1)).transpose(1, 2) for x in (q, k, v))
        dropout = self.config.dropout if self.training else 0.0
        attn_out = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
        return attn_out.transpose(1, 2).flatten(2)  # [users, length, width]

    def _dropout(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.config.dropout, self.training)


class SasRec(Trainable):
    """Packed tokens to states, whose dot products with the item table's rows score the items."""

    def __init__(self, config: SasRecConfig) -> None:
        super().__init__()
        self.config = config
        self.item_embedding = nn.Embedding(config.items, config.width)
        self.position_embedding = nn.Embedding(config.max_events, config.width)
        self.layers = nn.ModuleList(SasRecLayer(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width, config.eps)
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_normal_(parameter)

    def forward(self, inputs: EncoderInputs) -> Tensor:
        """Return states [total, width] of users who have between 1 and max_events events each."""
        device = self.item_embedding.weight.device
        back = np.repeat(inputs.offsets[1:], np.diff(inputs.offsets)) - 1 - np.arange(len(inputs.item_rows))
        tokens, positions = (torch.from_numpy(column).to(device) for column in (inputs.item_rows, back))
        x = self.item_embedding(tokens) * self.config.width**0.5 + self.position_embedding(positions)
        x = F.dropout(x, self.config.dropout, self.training)
        layout = PaddedBlocks.from_inputs(inputs, device)
        for layer in self.layers:
            x = layer(x, layout)
        return self.norm(x)

    def losses(self, batch: TrainingBatch, frequency: np.ndarray, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        """See Trainable. There are no side tasks."""
        states = self(batch.inputs)
        states = states[torch.from_numpy(batch.target_rows).to(states.device)]
        targets = batch.targets
        table = self.item_embedding.weight
        if self.config.loss == "bce":
            loss = _binary_loss(states, table, targets, batch.excluded, rng)
        else:
            candidates = sample_candidates((batch.full_batch or batch).targets, frequency, rng)
            table = table if candidates.tokens is None else table[candidates.tokens.to(table.device)]
            loss = next_item_loss(states, table, targets, batch.excluded, candidates)
        return loss, loss.new_zeros(0)


def _binary_loss(
    states: Tensor,
    table: Tensor,
    targets: np.ndarray,
    excluded: tuple[np.ndarray, np.ndarray],
    rng: np.random.Generator,
) -> Tensor:
    """Return the mean over rows of -log s(target) - log(1 - s(negative)), with one uniform negative per row.

    A negative that is the row's target, or that the row excludes, does not count.
    """
    negatives = rng.integers(1, len(table), len(targets))
    counted = negatives != targets
    counted[excluded[0][negatives[excluded[0]] == excluded[1]]] = False
    target_rows, negative_rows, weights = (
        torch.from_numpy(column).to(states.device) for column in (targets, negatives, counted)
    )
    positive = F.logsigmoid((states * table[target_rows]).sum(1))
    negative = F.logsigmoid(-(states * table[negative_rows]).sum(1)) * weights
    return -(positive + negative).mean()


class SasRecScorer:
    """A CatalogueScorer of pipeline/evaluation/full_ranking.py. A user without events gets popularity scores."""

    name = "sasrec"

    def __init__(self, model: SasRec, popularity: Popularity) -> None:
        self._model = model.eval()
        self._popularity = popularity

    @torch.inference_mode()
    def score(self, histories: Histories, tokens: np.ndarray) -> np.ndarray:
        """See CatalogueScorer. Items beyond the model's table score -inf."""
        scores = self._popularity.score(histories, tokens)
        table = self._model.item_embedding.weight
        item_rows = np.where(tokens < len(table), tokens, 0).astype(np.int32)
        zeros = np.zeros(len(item_rows), np.int32)
        inputs = EncoderInputs(item_rows, zeros[:, None], zeros, histories.offsets).tail(self._model.config.max_events)
        present, present_users = inputs.present()
        ordered, order = present.by_length()
        users = present_users[order]
        if len(users):
            states = self._model(ordered)[torch.from_numpy(ordered.offsets[1:] - 1).to(table.device)]
            scores[users] = -np.inf
            scores[users, : len(table)] = (states @ table.T).cpu().numpy()
        return scores
