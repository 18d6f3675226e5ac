"""The optimisation: one epoch after another, a pure function of the options, the examples and the epochs done.

Every epoch seeds its own randomness from (seed, epoch). So a trainer restored from `state` goes on bit for bit as the
one that was never interrupted.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Generic, TypeVar

import msgspec
import numpy as np
import torch
import torch.nn.functional as F
from msgspec import Meta
from torch import Tensor, nn

from pipeline.contents import Contents
from pipeline.heads import Heads, head_loss
from pipeline.hstu import Hstu, HstuConfig
from pipeline.jagged import Layout
from pipeline.losses import Candidates, next_item_loss, sample_candidates
from pipeline.sampling import Examples, TrainingBatch, batch_of, batches, crops

Positive = Annotated[int, Meta(gt=0)]
Share = Annotated[float, Meta(ge=0, le=1)]
FLOOR = 0.05  # of the learning rate: where the cosine ends


class TrainerOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How to optimise. Defaults were chosen on the first 80 % of a film-rating log of 100 k events."""

    epochs: Positive = 40
    seed: int = 0
    crop_events: Positive = 64
    batch_events: Positive = 2048
    learning_rate: Annotated[float, Meta(gt=0)] = 2e-3
    weight_decay: Annotated[float, Meta(ge=0)] = 0.01
    warmup_share: Share = 0.05  # of all steps
    clip_norm: Annotated[float, Meta(gt=0)] = 1.0
    cold_share: Share = 0.1  # items taken as new in a batch: their contents learn to stand in for them
    unknown_share: Share = 0.05  # input items made unknown: the model learns what to do with items new in service
    repeats: bool = False  # train to retrieve items the user has touched before: only if serving does not exclude them


class Trainable(nn.Module, ABC):
    """What a Trainer trains."""

    @abstractmethod
    def losses(self, batch: TrainingBatch, shares: np.ndarray, random: np.random.Generator) -> tuple[Tensor, Tensor]:
        """Of the retrieval, a scalar in nats a row, and of the side tasks, weighted [tasks]: their sum is minimised.

        shares: float64 [items], see Examples.shares; random: draws the candidates.
        """


class Model(Trainable):
    """What is trained together and saved together."""

    def __init__(self, config: HstuConfig, contents: Contents | None = None, cold_share: float = 0.0) -> None:
        """contents: of the item table's rows; cold_share: of the items of a batch, taken as new where there are any."""
        super().__init__()
        self.hstu, self.heads = Hstu(config), Heads(config.width)
        self.hstu.items.contents = contents
        self._cold_share = cold_share

    def losses(self, batch: TrainingBatch, shares: np.ndarray, random: np.random.Generator) -> tuple[Tensor, Tensor]:
        """See Trainable."""
        hstu, inputs, targets = self.hstu, batch.inputs, batch.successors[batch.asked]
        device = hstu.rotation.weight.device
        candidates = sample_candidates(targets, shares, random)
        items = _Items.of(hstu, batch, candidates, random.random(len(shares)) < self._cold_share)
        codes, asked, labels = (torch.from_numpy(c).to(device) for c in (inputs.codes, batch.asked, batch.labels))
        states = hstu(items.of_events, codes, Layout.of(inputs, device))  # [total, width]
        loss = next_item_loss(states[asked], hstu.scorer(items.of_candidates), targets, batch.seen, candidates)
        logits = self.heads(states, items.of_successors[:, None])[:, 0]  # [total, 3]
        return loss, head_loss(logits, labels)[None]


@dataclass(slots=True)
class _Items:
    """Vectors of a batch's events, of their successors [total, width] and of the candidates [c, width]."""

    of_events: Tensor
    of_successors: Tensor
    of_candidates: Tensor

    @classmethod
    def of(cls, hstu: Hstu, batch: TrainingBatch, candidates: Candidates, cold: np.ndarray) -> "_Items":
        """Each item's vector is made once. cold: bool [items]."""
        device, tokens = hstu.rotation.weight.device, batch.inputs.tokens
        if candidates.tokens is None:
            vectors, places = hstu.items(cold=cold), (tokens, batch.successors)
            of_candidates = vectors
        else:
            sampled = candidates.tokens.numpy()
            rows, place = np.unique(np.concatenate([sampled, tokens, batch.successors]), return_inverse=True)
            vectors, places = hstu.items(rows.astype(np.int64), cold[rows]), np.split(place[len(sampled) :], 2)
            of_candidates = F.embedding(torch.from_numpy(place[: len(sampled)]).to(device), vectors)
        events, successors = (F.embedding(torch.from_numpy(index).to(device), vectors) for index in places)
        return cls(events, successors, of_candidates)


M = TypeVar("M", bound=Trainable)


class Trainer(Generic[M]):
    """The model, its optimizer and how many epochs are behind them."""

    def __init__(self, build: Callable[[], M], items: int, options: TrainerOptions, examples: Examples,
                 device: torch.device) -> None:  # fmt: skip
        """build: makes the model, from torch's randomness; items: rows of its item table."""
        self.options, self.examples, self.epochs_done = options, examples, 0
        with _seeded(options.seed, 0):
            self.model = build().to(device)
        self._optimizer = torch.optim.AdamW(
            self.model.parameters(), options.learning_rate, betas=(0.9, 0.98), weight_decay=options.weight_decay
        )
        self._shares = examples.shares(items)

    def epoch(self, on_batch: Callable[[float, int, int], None] = lambda loss, done, total: None) -> float:
        """Train through every sequence once; mean retrieval loss (nats). on_batch gets (loss, batches done, of)."""
        random = np.random.default_rng([self.options.seed, self.epochs_done])
        parts = batches(
            *crops(self.examples.inputs.offsets, self.options.crop_events, random), self.options.batch_events, random
        )
        losses = []
        self.model.train()
        with _seeded(self.options.seed, self.epochs_done + 1):
            for done, part in enumerate(parts):
                batch = batch_of(self.examples, *part, self.options.unknown_share, random)
                self._schedule(self.epochs_done + done / len(parts))
                losses.append(self._step(batch, random))
                on_batch(losses[-1], done + 1, len(parts))
        self.epochs_done += 1
        return float(np.mean(losses))

    def weights(self) -> dict[str, Tensor]:
        """A copy of the model's weights, as an artifact keeps them."""
        return {name: weight.detach().cpu().clone() for name, weight in self.model.state_dict().items()}

    def state(self) -> dict[str, Tensor]:
        """Everything `restore` needs: the weights, the optimizer's moments, the epochs done."""
        moments = self._optimizer.state_dict()["state"]
        state = {f"model.{name}": weight for name, weight in self.weights().items()}
        state |= {f"optimizer.{i}.{name}": value for i, slots in moments.items() for name, value in slots.items()}
        return state | {"epochs_done": torch.tensor(self.epochs_done)}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        prefix = "model."
        self.model.load_state_dict({k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)})
        moments: dict[int, dict[str, Tensor]] = {}
        for key, value in state.items():
            if key.startswith("optimizer."):
                _, number, name = key.split(".")
                moments.setdefault(int(number), {})[name] = value
        self._optimizer.load_state_dict({**self._optimizer.state_dict(), "state": moments})
        self.epochs_done = int(state["epochs_done"])

    def _step(self, batch: TrainingBatch, random: np.random.Generator) -> float:
        loss, of_sides = self.model.losses(batch, self._shares, random)
        total = loss + of_sides.sum()
        self._optimizer.zero_grad(set_to_none=True)
        total.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.options.clip_norm)
        self._optimizer.step()
        return loss.item()

    def _schedule(self, epochs: float) -> None:
        done = epochs / self.options.epochs
        warm = min(1.0, (done + 1e-3) / max(self.options.warmup_share, 1e-3))
        cosine = FLOOR + (1 - FLOOR) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
        for group in self._optimizer.param_groups:
            group["lr"] = self.options.learning_rate * warm * cosine


@contextmanager
def _seeded(seed: int, epoch: int) -> Iterator[None]:
    """Torch's global generator seeded from (seed, epoch) inside, and as it was outside."""
    number = int(np.random.SeedSequence([seed, epoch]).generate_state(1, np.uint64)[0] >> 1)
    with torch.random.fork_rng():
        torch.manual_seed(number)
        yield
