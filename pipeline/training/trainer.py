"""The optimisation: one epoch after another, a pure function of the options, the examples and the epochs done.

Every epoch seeds its own randomness from (seed, epoch). So a trainer restored from `state` goes on bit for bit as the
one that was never interrupted.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Generic, Literal, TypeVar

import msgspec
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.features.labels import TASKS
from pipeline.items.content import ItemContent
from pipeline.items.vocabulary import UNKNOWN
from pipeline.jagged import ranges
from pipeline.model.config import HstuConfig
from pipeline.model.heads import HeadContext, RecentEvents, TaskHeads, head_losses
from pipeline.model.hstu import Hstu
from pipeline.training.batches import TrainingBatch, TrainingColumns, batch_crops, make_batch, random_crops
from pipeline.training.distributed import SINGLE_PROCESS, ProcessGroup
from pipeline.training.loss_weighting import WeightingName, make_weighting
from pipeline.training.losses import Candidates, next_item_loss, sample_candidates
from pipeline.types import Fraction, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

Precision = Literal["fp32", "bf16"]
INTERACTION_LR_SCALE = 4.0  # its learning rate by the encoder's: a few hundred steps must do
MIN_LR_RATIO = 0.05  # of the learning rate: where the cosine ends


class TrainerOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How to optimise. Defaults were chosen on the first 80 % of a film-rating log of 100 k events."""

    epochs: PositiveInt = 40
    seed: int = 0
    crop_length: PositiveInt = 200  # of the pieces that sequences are cut into, if the model reads as many
    events_per_batch: PositiveInt = 2048
    learning_rate: PositiveFloat = 2e-3
    weight_decay: NonNegativeFloat = 0.01
    warmup_fraction: Fraction = 0.05  # of all steps
    clip_norm: PositiveFloat = 1.0
    item_dropout: Fraction = 0.1  # items taken as new in a batch: their contents learn to stand in for them
    unknown_item_rate: Fraction = (
        0.05  # input items made unknown: the model learns what to do with items new in service
    )
    head_weights: tuple[NonNegativeFloat, NonNegativeFloat, NonNegativeFloat] = (
        1.0,
        1.0,
        1.0,
    )  # of their losses, by labels.TASKS; retrieval: 1
    weighting: WeightingName = "fixed"  # how the weights change while training, see loss_weighting.py
    events_per_epoch: NonNegativeInt = 0  # of one epoch, other ones in each; 0: all
    precision: Precision = "fp32"  # bf16: of the matrix products; weights, sums and the retrieval's loss stay float32
    train_on_repeats: bool = (
        False  # train to retrieve items the user has touched before: only if serving does not exclude them
    )


class Trainable(nn.Module, ABC):
    """What a Trainer trains. tasks: how many losses it has beside the retrieval's."""

    tasks = 0

    @abstractmethod
    def losses(self, batch: TrainingBatch, shares: np.ndarray, random: np.random.Generator) -> tuple[Tensor, Tensor]:
        """Of the retrieval, a scalar in nats a row, and of the side tasks, [tasks].

        shares: float64 [items], see Examples.shares; random: draws the candidates.
        """

    def lr_scales(self) -> list[tuple[nn.Module, float]]:
        """Its parts, each with its learning rate as a multiple of the options'."""
        return [(self, 1.0)]


class MultiTaskModel(Trainable):
    """What is trained together and saved together."""

    tasks = len(TASKS)

    def __init__(self, config: HstuConfig, contents: ItemContent | None = None, item_dropout: float = 0.0) -> None:
        """contents: of the item table's rows; cold_share: of the items of a batch, taken as new where there are any."""
        super().__init__()
        self.hstu, self.heads = Hstu(config), TaskHeads(config.items, config.width)
        self.hstu.items.item_content = contents
        self._item_dropout = item_dropout if contents is not None else 0.0

    def losses(self, batch: TrainingBatch, shares: np.ndarray, random: np.random.Generator) -> tuple[Tensor, Tensor]:
        """See Trainable."""
        hstu, inputs, targets = self.hstu, batch.inputs, batch.targets
        device = hstu.rotation.weight.device
        candidates = sample_candidates((batch.full_batch or batch).targets, shares, random)
        cold = random.random(len(shares)) < self._item_dropout
        items = _Items.of(hstu, batch, candidates, cold)
        known = np.where(cold[batch.successors], UNKNOWN, batch.successors)  # to the heads, too, they are new
        columns = inputs.feature_ids, batch.target_rows, known, batch.labels, batch.visit_frequency, batch.affinity
        codes, asked, known, labels, rhythm, affinity = (torch.from_numpy(each).to(device) for each in columns)
        rows, sequences = hstu.sequences(items.of_events, codes, inputs, np.diff(batch.offsets))
        states = hstu(rows, hstu.attention_layout(sequences))
        states, rows = (_newest(x, sequences.offsets, batch.offsets) for x in (states, rows))  # [total, width]
        of_events = _newest(items.of_events, inputs.offsets, batch.offsets)
        loss = next_item_loss(states[asked], hstu.scoring_table(items.of_candidates), targets, batch.seen, candidates)
        newest = RecentEvents.from_each_event(batch.offsets, device)
        context = HeadContext(rows, of_events, newest, rhythm, affinity[:, None])
        logits = self.heads(states, known[:, None], items.of_successors[:, None], context)
        return loss, head_losses(logits[:, 0], labels)

    def lr_scales(self) -> list[tuple[nn.Module, float]]:
        return [(self.hstu, 1.0), (self.heads.interaction, INTERACTION_LR_SCALE), (self.heads.retention, 1.0)]


@dataclass(slots=True)
class _Items:
    """Vectors of a batch's shown events, of the successors [total, width] and of the candidates [c, width]."""

    of_events: Tensor
    of_successors: Tensor
    of_candidates: Tensor

    @classmethod
    def of(cls, hstu: Hstu, batch: TrainingBatch, candidates: Candidates, cold: np.ndarray) -> "_Items":
        """Each item's vector is made once. cold: bool [items]."""
        device, item_rows = hstu.rotation.weight.device, batch.inputs.item_rows
        if candidates.tokens is None:
            vectors, places = hstu.items(cold=cold), (item_rows, batch.successors)
            of_candidates = vectors
        else:
            sampled = candidates.tokens.numpy()
            rows, place = np.unique(np.concatenate([sampled, item_rows, batch.successors]), return_inverse=True)
            vectors = hstu.items(rows.astype(np.int64), cold[rows])
            sampled, *places = np.split(place, np.cumsum([len(sampled), len(item_rows)]))
            of_candidates = F.embedding(torch.from_numpy(sampled).to(device), vectors)
        events, successors = (F.embedding(torch.from_numpy(index).to(device), vectors) for index in places)
        return cls(events, successors, of_candidates)


M = TypeVar("M", bound=Trainable)


class Trainer(Generic[M]):
    """The model, its optimizer and how many epochs are behind them."""

    def __init__(self, build: Callable[[], M], items: int, options: TrainerOptions, examples: TrainingColumns,
                 device: torch.device, group: ProcessGroup = SINGLE_PROCESS) -> None:  # fmt: skip
        """build: makes the model, from torch's randomness; items: rows of its item table."""
        self.options, self.columns, self.epochs_done = options, examples, 0
        self._group, self._device = group, device
        with _seeded(device, options.seed, 0):
            self.model = build().to(device)
        self._weighting = make_weighting(options.weighting, options.head_weights[: self.model.tasks]).to(device)
        groups = [{"params": list(part.parameters()), "rate": rate} for part, rate in self.model.lr_scales()]
        groups.append({"params": list(self._weighting.parameters()), "rate": 1.0, "weight_decay": 0.0})
        self._optimizer = torch.optim.AdamW(
            groups, options.learning_rate, betas=(0.9, 0.98), weight_decay=options.weight_decay,
            fused=device.type == "cuda",  # one launch instead of a dozen for every parameter
        )  # fmt: skip
        self._shares = examples.target_frequency(items)

    def train_epoch(self, on_batch: Callable[[float, int, int], None] = lambda loss, done, total: None) -> float:
        """Train through every sequence once, or through `epoch_events`; mean retrieval loss (nats).

        on_batch gets (loss, batches done, of).
        """
        random = np.random.default_rng([self.options.seed, self.epochs_done])
        parts, losses = self._parts(random), []
        self.model.train()
        with _seeded(self._device, self.options.seed, self.epochs_done + 1, self._group.rank):
            for done, part in enumerate(parts):
                batch = make_batch(self.columns, *part, self.options.unknown_item_rate, random)
                self._schedule(self.epochs_done + done / len(parts))
                losses.append(self._step(self._local_part(batch), random))
                on_batch(losses[-1][0].item(), done + 1, len(parts))
        means = torch.stack(losses).mean(dim=0)
        self._weighting.epoch_ended(means[1:])
        self.epochs_done += 1
        return means[0].item()

    def weights(self) -> dict[str, Tensor]:
        """A copy of the model's weights, as an artifact keeps them."""
        return {name: weight.detach().cpu().clone() for name, weight in self.model.state_dict().items()}

    def state(self) -> dict[str, Tensor]:
        """Everything `restore` needs: the weights, the losses' weighting, the optimizer's moments, the epochs done."""
        moments = self._optimizer.state_dict()["state"]
        state = {f"model.{name}": weight for name, weight in self.weights().items()}
        state |= {f"weighting.{name}": value for name, value in self._weighting.state_dict().items()}
        state |= {f"optimizer.{i}.{name}": value for i, slots in moments.items() for name, value in slots.items()}
        return state | {"epochs_done": torch.tensor(self.epochs_done)}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        self.model.load_state_dict(_below("model.", state))
        self._weighting.load_state_dict(_below("weighting.", state))
        moments: dict[int, dict[str, Tensor]] = {}
        for key, value in state.items():
            if key.startswith("optimizer."):
                _, number, name = key.split(".")
                moments.setdefault(int(number), {})[name] = value
        self._optimizer.load_state_dict({**self._optimizer.state_dict(), "state": moments})
        self.epochs_done = int(state["epochs_done"])

    def _parts(self, random: np.random.Generator) -> list[tuple[np.ndarray, np.ndarray]]:
        """Crops of the epoch's batches."""
        options, offsets = self.options, self.columns.inputs.offsets
        parts = batch_crops(*random_crops(offsets, options.crop_length, random), options.events_per_batch, random)
        return parts[: -(-options.events_per_epoch // options.events_per_batch)] if options.events_per_epoch else parts

    def _local_part(self, batch: TrainingBatch) -> TrainingBatch:
        processes = self._group
        return batch if processes.count == 1 else batch.shard(processes.rank, processes.count)

    def _step(self, batch: TrainingBatch, random: np.random.Generator) -> Tensor:
        """The losses before this step, [1 + tasks]: of the retrieval, then of the side tasks."""
        losses = self._losses(batch, random)
        total = losses[0] + self._weighting(losses[1:])
        self._optimizer.zero_grad(set_to_none=True)
        total.backward()
        parameters = [*self.model.parameters(), *self._weighting.parameters()]
        losses = self._group.average(parameters, losses.detach())
        nn.utils.clip_grad_norm_(self.model.parameters(), self.options.clip_norm)
        self._optimizer.step()
        return losses

    def _losses(self, batch: TrainingBatch, random: np.random.Generator) -> Tensor:
        """Means over the batch's rows. Of a part: so that their means over all processes are those of the whole."""
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self.options.precision == "bf16"):
            loss, of_tasks = self.model.losses(batch, self._shares, random)
        losses = torch.cat([loss[None], of_tasks])
        if batch.full_batch is None:
            return losses
        share = torch.from_numpy(batch.loss_fractions[: len(losses)]).to(losses.device)
        return losses * share * self._group.count

    def _schedule(self, epochs: float) -> None:
        done = epochs / self.options.epochs
        warm = min(1.0, (done + 1e-3) / max(self.options.warmup_fraction, 1e-3))
        cosine = MIN_LR_RATIO + (1 - MIN_LR_RATIO) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
        for group in self._optimizer.param_groups:
            group["lr"] = group["rate"] * self.options.learning_rate * warm * cosine


def _newest(packed: Tensor, offsets: np.ndarray, wanted: np.ndarray) -> Tensor:
    """The last rows of each packed run, as many as the runs of `wanted` have. offsets, wanted: int64 [n + 1]"""
    if offsets[-1] == wanted[-1]:
        return packed
    counts = np.diff(wanted)
    return packed[torch.from_numpy(ranges(offsets[1:] - counts, counts)[0]).to(packed.device)]


def _below(prefix: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


@contextmanager
def _seeded(device: torch.device, seed: int, epoch: int, rank: int = 0) -> Iterator[None]:
    """Torch's global generators, the CPU's and the device's, seeded from the numbers inside, and as before outside."""
    number = int(np.random.SeedSequence([seed, epoch, rank]).generate_state(1, np.uint64)[0] >> 1)
    with torch.random.fork_rng([torch.cuda.current_device()] if device.type == "cuda" else []):
        torch.manual_seed(number)
        yield
