"""The training loop: each epoch is a pure function of the options, the training columns and the epochs done.

Every epoch seeds its own randomness from (seed, epoch). So a trainer restored from `state` continues bit for bit as if
never interrupted.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Generic, Literal, TypeVar

import msgspec
import numpy as np
import torch
from torch import Tensor, nn

from pipeline.training.batches import TrainingBatch, TrainingColumns, batch_crops, make_batch, random_crops
from pipeline.training.distributed import SINGLE_PROCESS, ProcessGroup
from pipeline.training.loss_weighting import WeightingName, make_weighting
from pipeline.training.multi_task_model import Trainable
from pipeline.types import Fraction, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

Precision = Literal["fp32", "bf16"]
MIN_LR_RATIO = 0.05  # of the peak learning rate, at the end of the cosine


class TrainerOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Options of the training loop. Defaults were chosen on the first 80 % of a film-rating log of 100 k events."""

    epochs: PositiveInt = 40
    seed: int = 0
    crop_length: PositiveInt = 200  # events; at most as many as the model reads
    events_per_batch: PositiveInt = 2048
    learning_rate: PositiveFloat = 2e-3
    weight_decay: NonNegativeFloat = 0.01
    warmup_fraction: Fraction = 0.05  # of all steps
    clip_norm: PositiveFloat = 1.0
    # Items per batch that have content alone, as if new (DropoutNet): the content vector learns to replace their own.
    item_dropout: Fraction = 0.1
    # Input items made unknown: the model learns to handle items that are new when serving.
    unknown_item_rate: Fraction = 0.05
    # Weights of the heads' losses by labels.TASKS; retrieval has 1.
    head_weights: tuple[NonNegativeFloat, NonNegativeFloat, NonNegativeFloat] = (1.0, 1.0, 1.0)
    weighting: WeightingName = "fixed"  # how these weights change during training, see loss_weighting.py
    events_per_epoch: NonNegativeInt = 0  # a different random part in each epoch; 0: all
    precision: Precision = "fp32"  # bf16: matrix products; weights, sums and the retrieval loss stay float32


M = TypeVar("M", bound=Trainable)


class Trainer(Generic[M]):
    """A model, its optimizer and the number of epochs done."""

    def __init__(
        self,
        build: Callable[[], M],
        items: int,
        options: TrainerOptions,
        columns: TrainingColumns,
        device: torch.device,
        group: ProcessGroup = SINGLE_PROCESS,
    ) -> None:
        """build: creates the model, from torch's randomness; items: rows of its item table."""
        self.options = options
        self.columns = columns
        self.epochs_done = 0
        self._group = group
        self._device = device
        with _seeded(device, options.seed, 0):
            self.model = build().to(device)
        self._weighting = make_weighting(options.weighting, options.head_weights[: self.model.tasks]).to(device)
        groups = [{"params": list(part.parameters()), "lr_scale": scale} for part, scale in self.model.lr_scales()]
        groups.append({"params": list(self._weighting.parameters()), "lr_scale": 1.0, "weight_decay": 0.0})
        self._optimizer = torch.optim.AdamW(
            groups,
            options.learning_rate,
            betas=(0.9, 0.98),
            weight_decay=options.weight_decay,
            fused=device.type == "cuda",  # one launch instead of a dozen per parameter
        )
        self._frequency = columns.target_frequency(items)

    def train_epoch(self, on_batch: Callable[[float, int, int], None] = lambda loss, done, total: None) -> float:
        """Train on every sequence once, or on `events_per_epoch` events; return the mean retrieval loss (nats).

        on_batch is called with (loss, batches done, batches of the epoch).
        """
        rng = np.random.default_rng([self.options.seed, self.epochs_done])
        batches = self._draw_batches(rng)
        losses = []
        self.model.train()
        with _seeded(self._device, self.options.seed, self.epochs_done + 1, self._group.rank):
            for done, (starts, lengths) in enumerate(batches):
                batch = make_batch(self.columns, starts, lengths, self.options.unknown_item_rate, rng)
                self._schedule(self.epochs_done + done / len(batches))
                losses.append(self._step(self._own_shard(batch), rng))
                on_batch(losses[-1][0].item(), done + 1, len(batches))
        means = torch.stack(losses).mean(dim=0)
        self._weighting.epoch_ended(means[1:])
        self.epochs_done += 1
        return means[0].item()

    def weights(self) -> dict[str, Tensor]:
        """Return a copy of the model's weights, as an artifact keeps them."""
        return {name: weight.detach().cpu().clone() for name, weight in self.model.state_dict().items()}

    def state(self) -> dict[str, Tensor]:
        """Return everything that `restore` needs: weights, loss weighting, optimizer moments, epochs done."""
        moments = self._optimizer.state_dict()["state"]
        state = {f"model.{name}": weight for name, weight in self.weights().items()}
        state |= {f"weighting.{name}": value for name, value in self._weighting.state_dict().items()}
        state |= {f"optimizer.{i}.{name}": value for i, slots in moments.items() for name, value in slots.items()}
        return state | {"epochs_done": torch.tensor(self.epochs_done)}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Load the output of `state`."""
        self.model.load_state_dict(_below("model.", state))
        self._weighting.load_state_dict(_below("weighting.", state))
        moments: dict[int, dict[str, Tensor]] = {}
        for key, value in _below("optimizer.", state).items():
            index, name = key.split(".")
            moments.setdefault(int(index), {})[name] = value
        self._optimizer.load_state_dict({**self._optimizer.state_dict(), "state": moments})
        self.epochs_done = int(state["epochs_done"])

    def _draw_batches(self, rng: np.random.Generator) -> list[tuple[np.ndarray, np.ndarray]]:
        """Return the (starts, lengths) of the crops of each of the epoch's batches."""
        options = self.options
        starts, lengths = random_crops(self.columns.inputs.events.offsets, options.crop_length, rng)
        batches = batch_crops(starts, lengths, options.events_per_batch, rng)
        return (
            batches[: -(-options.events_per_epoch // options.events_per_batch)] if options.events_per_epoch else batches
        )

    def _own_shard(self, batch: TrainingBatch) -> TrainingBatch:
        group = self._group
        return batch if group.count == 1 else batch.shard(group.rank, group.count)

    def _step(self, batch: TrainingBatch, rng: np.random.Generator) -> Tensor:
        """Return the losses before this step, [1 + tasks]: retrieval, then the tasks."""
        losses = self._losses(batch, rng)
        total = losses[0] + self._weighting(losses[1:])
        self._optimizer.zero_grad(set_to_none=True)
        total.backward()
        parameters = [*self.model.parameters(), *self._weighting.parameters()]
        losses = self._group.average(parameters, losses.detach())
        nn.utils.clip_grad_norm_(self.model.parameters(), self.options.clip_norm)
        self._optimizer.step()
        return losses

    def _losses(self, batch: TrainingBatch, rng: np.random.Generator) -> Tensor:
        """Return means over the batch's rows. A shard's are scaled: their mean over processes is the full batch's."""
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self.options.precision == "bf16"):
            loss, task_losses = self.model.losses(batch, self._frequency, rng)
        losses = torch.cat([loss[None], task_losses])
        if batch.full_batch is None:
            return losses
        fractions = torch.from_numpy(batch.loss_fractions[: len(losses)]).to(losses.device)
        return losses * fractions * self._group.count

    def _schedule(self, epochs: float) -> None:
        progress = epochs / self.options.epochs
        warmup = min(1.0, (progress + 1e-3) / max(self.options.warmup_fraction, 1e-3))
        cosine = MIN_LR_RATIO + (1 - MIN_LR_RATIO) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
        for group in self._optimizer.param_groups:
            group["lr"] = group["lr_scale"] * self.options.learning_rate * warmup * cosine


def _below(prefix: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


@contextmanager
def _seeded(device: torch.device, seed: int, epoch: int, rank: int = 0) -> Iterator[None]:
    """Seed torch's global generators, the CPU's and the device's, and restore them afterwards."""
    number = int(np.random.SeedSequence([seed, epoch, rank]).generate_state(1, np.uint64)[0] >> 1)
    with torch.random.fork_rng([torch.cuda.current_device()] if device.type == "cuda" else []):
        torch.manual_seed(number)
        yield
