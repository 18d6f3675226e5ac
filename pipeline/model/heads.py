"""Three task heads on (user, item): the odds of engagement, retention and monetization if the item is next.

The labels are those of labels.py; the odds are calibrated (calibration.py) before anyone sees them.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.features.affinity import N_AFFINITY_FEATURES, SAME_ITEM
from pipeline.features.labels import TASKS
from pipeline.features.visit_frequency import N_VISIT_FEATURES
from pipeline.items.vocabulary import UNKNOWN
from pipeline.model.calibration import IDENTITY

N_RECENT = 32  # newest events that the heads read one by one
DROPOUT = 0.2  # of the hidden layer of taste
ITEM_SCALE = 0.2  # of an item in a return: with 1 its noise costs 0.008 of AUC, with 0 no slate could be ranked by it
BIAS_SCALE = 3.0  # an item's bias is met by few batches: so it learns faster than its optimizer's steps


@dataclass(slots=True)
class RecentEvents:
    """Where the newest events of n users are among packed event rows, newest first.

    rows: int64 [n, RECENT], some row where there is none; outside: bool [n, RECENT], there is none
    """

    rows: Tensor
    missing: Tensor

    @classmethod
    def from_offsets(cls, offsets: np.ndarray, device: torch.device) -> "RecentEvents":
        """Of each user of packed rows, int64 [n + 1]."""
        return cls._of(offsets[1:] - 1, offsets[:-1], device)

    @classmethod
    def from_each_event(cls, offsets: np.ndarray, device: torch.device) -> "RecentEvents":
        """Of every event as its user's newest at its own time: n is the number of rows."""
        return cls._of(np.arange(offsets[-1]), np.repeat(offsets[:-1], np.diff(offsets)), device)

    @classmethod
    def _of(cls, ends: np.ndarray, starts: np.ndarray, device: torch.device) -> "RecentEvents":
        rows = ends[:, None] - np.arange(N_RECENT)
        outside = torch.from_numpy(rows < starts[:, None])
        return cls(torch.from_numpy(np.maximum(rows, 0)).to(device), outside.to(device))


@dataclass(slots=True)
class HeadContext:
    """What the heads read of n users beside their states.

    events: float [m, width], packed rows of what each event was; items: float [m, width], unit vectors of their items
    newest: which of those rows are whose; rhythm: float32 [n, RHYTHMS]
    affinity: float32 [n, k, AFFINITIES], of the items asked for
    """

    events: Tensor
    items: Tensor
    recent: RecentEvents
    visit_frequency: Tensor
    affinity: Tensor


class TaskHeads(nn.Module):
    """Engagement and monetization by `Taste`, retention by `Visits`, and the calibration of all three."""

    calibration: Tensor

    def __init__(self, items: int, width: int, hidden: int = 32) -> None:
        super().__init__()
        self.interaction, self.retention = InteractionHead(items, width, hidden), RetentionHead(width, hidden)
        self.register_buffer("calibration", torch.tensor([IDENTITY] * len(TASKS)))  # [3, 2] scales and shifts

    def forward(self, states: Tensor, tokens: Tensor, items: Tensor, context: HeadContext) -> Tensor:
        """Logits [n, k, 3], not calibrated, of the items being next.

        states: [n, width]; tokens: int [n, k]; items: [n, k, width], their unit vectors
        """
        engagement, monetization = self.interaction(states, tokens, items, context).unbind(2)
        return torch.stack([engagement, self.retention(items, context.visit_frequency), monetization], dim=2)

    def probabilities(self, logits: Tensor) -> Tensor:
        """Calibrated probabilities of logits [..., 3]."""
        return (logits * self.calibration[:, 0] + self.calibration[:, 1]).sigmoid()


class InteractionHead(nn.Module):
    """What a user will do with an item: reads the state, the item and their product, the newest event, and the newest
    events as the item sees them; on top of it every item has a bias of its own."""

    def __init__(self, items: int, width: int, hidden: int) -> None:
        super().__init__()
        self.state_proj = nn.Linear(width, hidden)
        self.item_proj = nn.Linear(width, hidden, bias=False)
        self.product_proj = nn.Linear(width, hidden, bias=False)
        self.newest_proj = nn.Linear(width, hidden, bias=False)
        self.target_attention_proj = nn.Linear(width, hidden, bias=False)
        self.affinity_proj = nn.Linear(N_AFFINITY_FEATURES, hidden, bias=False)
        self.same_item_proj = nn.Linear(width, hidden, bias=False)
        self.sharpness = nn.Parameter(torch.tensor(8.0))
        self.attention = nn.Linear(width, 1)
        self.age_bias = nn.Parameter(torch.full((N_RECENT,), -4.0))
        self.out = nn.Linear(hidden, 2)
        self.item_bias = nn.Embedding(items, 2)
        nn.init.zeros_(self.item_bias.weight)

    def forward(self, states: Tensor, tokens: Tensor, items: Tensor, context: HeadContext) -> Tensor:
        """Logits [n, k, 2] of engagement and monetization; arguments as `Heads`."""
        newest = context.events[context.recent.rows[:, 0]].masked_fill(context.recent.missing[:, :1], 0)
        of_user = (self.state_proj(states) + self.newest_proj(newest))[:, None]
        of_items = (
            self.item_proj(items) + self.product_proj(states[:, None] * items) + self._target_attention(items, context)
        )
        again = (
            context.affinity[..., SAME_ITEM, None] * self.same_item_proj(newest)[:, None]
        )  # after a cart, a purchase
        hidden = F.silu(of_user + of_items + self.affinity_proj(context.affinity) + again)
        hidden = F.dropout(hidden, DROPOUT, self.training)
        return self.out(hidden) + BIAS_SCALE * self.item_bias(self._bias_rows(tokens))

    def _bias_rows(self, tokens: Tensor) -> Tensor:
        """An item that came after training, with a token beyond the biases, has the unknown item's."""
        return tokens.where(tokens < self.item_bias.num_embeddings, UNKNOWN)

    def _target_attention(self, items: Tensor, context: HeadContext) -> Tensor:
        """[n, k, hidden]: the newest events by how much their items are like this one (target attention, as DIN: Zhou
        et al., KDD 2018). The softmax has one more, empty place: where nothing is alike, it takes the weight."""
        rows = context.recent.rows
        alike = items @ _gathered(context.items, rows).transpose(1, 2)  # [n, k, RECENT] cosines
        scores = self.sharpness * alike + (self.attention(context.events)[rows, 0] + self.age_bias)[:, None]
        scores = scores.masked_fill(context.recent.missing[:, None], -torch.inf)
        weights = F.pad(scores, (1, 0)).softmax(dim=2)[..., 1:]
        return weights @ _gathered(self.target_attention_proj(context.events), rows)


class RetentionHead(nn.Module):
    """Whether a user comes back: reads the rhythm of the visits and the item.

    With all that `Taste` reads it learns who returned instead of who returns: its AUC on a simulated log was 0.740
    then, 0.747 without (truth: 0.780).
    """

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.visit_mlp = nn.Sequential(nn.Linear(N_VISIT_FEATURES, hidden), nn.SiLU(), nn.Linear(hidden, hidden))
        self.item_proj = nn.Linear(width, hidden, bias=False)
        self.out = nn.Linear(hidden, 1)

    def forward(self, items: Tensor, rhythm: Tensor) -> Tensor:
        """items: [n, k, width]; rhythm: [n, RHYTHMS] -> logits [n, k]"""
        return self.out(F.silu(self.visit_mlp(rhythm)[:, None] + ITEM_SCALE * self.item_proj(items)))[..., 0]


def _gathered(x: Tensor, rows: Tensor) -> Tensor:
    """x [m, d] at rows [n, r] -> [n, r, d]. 65 k rows of 64: `index_select` takes 1.6 ms, x[rows] 11.5 (one core)."""
    return x.index_select(0, rows.flatten()).view(*rows.shape, x.shape[1])


def head_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean binary cross entropy of each task, [3]. logits, labels: [n, 3]; NaN labels do not count."""
    known = labels.isfinite()
    losses = F.binary_cross_entropy_with_logits(logits, labels.nan_to_num(), reduction="none") * known
    return losses.sum(0) / known.sum(0).clamp(min=1)
