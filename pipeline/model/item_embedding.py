"""An item's vector: what training learnt of the item itself, blended with what its record says.

    vector = unit(g * unit(own embedding) + (1 - g) * unit(content)),   g by the number of the item's training events

An item with many events is known by itself; one that came later, or that had few, by its content: text, categories,
brand, tags and price, each field a mean of hashed embeddings, summed under gates. In training some items are taken as
new in each batch (Volkovs et al., DropoutNet, NIPS 2017): content then learns to stand in, in the same softmax.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.items.catalogue import FIELDS
from pipeline.items.content import COUNT_BUCKETS, ItemContent

EVEN_EVENTS = 1.0  # before training: an item of so many training events is half itself, half its content


class ContentEncoder(nn.Module):
    """Contents -> [items, width]."""

    def __init__(self, rows: int, width: int) -> None:
        """rows: of the table that hashes fall into."""
        super().__init__()
        self.rows = rows
        self.words = nn.EmbeddingBag(rows, width, mode="mean")
        self.price_proj = nn.Linear(2, width)
        self.missing_embedding = nn.Parameter(torch.zeros(len(FIELDS) + 1, width))
        self.gate = nn.Parameter(torch.zeros(len(FIELDS) + 1, width))
        self.gate_bias = nn.Parameter(torch.zeros(len(FIELDS) + 1))
        nn.init.normal_(self.words.weight, std=0.02)

    def forward(self, contents: ItemContent) -> Tensor:
        fields = self.words(contents.ids % self.rows, contents.offsets).unflatten(0, (-1, len(FIELDS)))
        fields = torch.cat([fields, self.price_proj(contents.numbers)[:, None]], dim=1)  # [items, fields, width]
        fields = torch.where(contents.missing[:, :, None], self.missing_embedding, fields)
        gates = ((fields * self.gate).sum(-1) + self.gate_bias).sigmoid()
        return (fields * gates[:, :, None]).sum(1)


class ItemEmbedding(nn.Module):
    """Unit vectors of items by their rows; row 0, the unknown item's, is learnt as any other. A model without
    `content_rows` reads no contents."""

    def __init__(self, items: int, width: int, content_rows: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.item_content: ItemContent | None = None  # of all rows; None: items are known by their ids alone
        self.embedding = nn.Embedding(items, width)
        nn.init.normal_(self.embedding.weight, std=0.02)
        if content_rows:
            self.content_encoder = ContentEncoder(content_rows, width)
            events = torch.arange(COUNT_BUCKETS).exp2() - 1
            self.blend = nn.Parameter((events.clamp(min=0.01) / EVEN_EVENTS).log())

    def forward(self, rows: np.ndarray | None = None, cold: np.ndarray | None = None) -> Tensor:
        """[n, width] of these rows, int64 [n], None: of all. cold: bool [n], taken as new: their contents alone."""
        index = slice(None) if rows is None else torch.from_numpy(rows).to(self.embedding.weight.device)
        own = self._unit(self.embedding.weight[index])
        if self.item_content is None or not hasattr(self, "content_encoder"):
            return own
        self.item_content = self.item_content.to(own.device)
        content = self.item_content if rows is None else self.item_content.select(rows)
        share = self.blend[content.counts].sigmoid()
        if cold is not None:
            share = share.masked_fill(torch.from_numpy(cold).to(share.device), 0.0)
        share = share.masked_fill(content.missing.all(1), 1.0)[:, None]  # nothing is known of it but itself
        return self._unit(share * own + (1 - share) * self.from_content(content))

    def from_content(self, content: ItemContent) -> Tensor:
        """[n, width] of items that came after training: a pure function of their records."""
        return self._unit(self.content_encoder(content))

    def _unit(self, x: Tensor) -> Tensor:
        return F.normalize(x, dim=-1, eps=self.eps)
