"""Item vectors: an item's own embedding blended with its content.

    vector = unit(g * unit(own embedding) + (1 - g) * unit(content)),   g by the number of the item's training events

An item with many events relies on its own embedding; one that came later, or had few, on its content: text, categories,
brand, tags and price, each field a mean of hashed embeddings, summed with gates. In training each batch treats some
items as new (Volkovs et al., DropoutNet, NIPS 2017), so content learns to stand in, in the same softmax.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.items.catalogue import FIELDS
from pipeline.items.content import COUNT_BUCKETS, ItemContent

EVEN_EVENTS = 1.0  # initial blend: an item with this many training events is half embedding, half content


class ContentEncoder(nn.Module):
    """Encodes the content of n items: ItemContent -> [n, width]. rows: size of the table that hashes index, modulo."""

    def __init__(self, rows: int, width: int) -> None:
        super().__init__()
        self.rows = rows
        self.words = nn.EmbeddingBag(rows, width, mode="mean")
        self.price_proj = nn.Linear(2, width)
        self.missing_embedding = nn.Parameter(torch.zeros(len(FIELDS) + 1, width))
        self.gate = nn.Parameter(torch.zeros(len(FIELDS) + 1, width))
        self.gate_bias = nn.Parameter(torch.zeros(len(FIELDS) + 1))
        nn.init.normal_(self.words.weight, std=0.02)

    def forward(self, content: ItemContent) -> Tensor:
        """Return content vectors [n, width], not normalised."""
        fields = self.words(content.ids % self.rows, content.offsets).unflatten(0, (-1, len(FIELDS)))
        fields = torch.cat([fields, self.price_proj(content.numbers)[:, None]], dim=1)  # [n, fields, width]
        fields = torch.where(content.missing[:, :, None], self.missing_embedding, fields)
        gates = ((fields * self.gate).sum(-1) + self.gate_bias).sigmoid()
        return (fields * gates[:, :, None]).sum(1)


class ItemEmbedding(nn.Module):
    """Unit vectors by item row; row 0, the unknown item, is learned like any other. With `content_rows` = 0 content is
    not read."""

    def __init__(self, items: int, width: int, content_rows: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.item_content: ItemContent | None = None  # of all rows; None: items by their ids alone
        self.embedding = nn.Embedding(items, width)
        nn.init.normal_(self.embedding.weight, std=0.02)
        if content_rows:
            self.content_encoder = ContentEncoder(content_rows, width)
            events = np.exp2(np.arange(COUNT_BUCKETS, dtype=np.float32)) - 1  # the most in each bucket
            self.blend = nn.Parameter((torch.from_numpy(events).clamp(min=0.01) / EVEN_EVENTS).log())

    def forward(self, rows: np.ndarray | None = None, cold: np.ndarray | None = None) -> Tensor:
        """Return vectors [n, width] of `rows` (int64 [n]; None: all rows). cold: bool [n], items treated as new, whose
        content alone counts."""
        index = slice(None) if rows is None else torch.from_numpy(rows).to(self.embedding.weight.device)
        return self.vectors(self.embedding.weight[index], rows, cold)

    def vectors(self, own: Tensor, rows: np.ndarray | None = None, cold: np.ndarray | None = None) -> Tensor:
        """Return vectors [n, width] from the items' own embeddings, [n, width]; the others as in `forward`."""
        own = self._unit(own)
        if self.item_content is None or not hasattr(self, "content_encoder"):
            return own
        self.item_content = self.item_content.to(own.device)
        content = self.item_content if rows is None else self.item_content.select(rows)
        gate = self.blend[content.counts].sigmoid()
        if cold is not None:
            gate = gate.masked_fill(torch.from_numpy(cold).to(gate.device), 0.0)
        gate = gate.masked_fill(content.missing.all(1), 1.0)[:, None]  # without content, the own embedding alone
        return self._unit(gate * own + (1 - gate) * self.from_content(content))

    def from_content(self, content: ItemContent) -> Tensor:
        """Return vectors [n, width] of items that came after training: a pure function of their records."""
        return self._unit(self.content_encoder(content))

    def _unit(self, x: Tensor) -> Tensor:
        return F.normalize(x, dim=-1, eps=self.eps)
