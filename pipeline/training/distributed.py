"""Data-parallel training under `torchrun`: each process computes a shard of every batch, and all take the same steps.

Every process reads the log and draws the same batches from the same seed; of a batch's crops, sorted by length, process
r of n takes every n-th from index r on. One all-reduce per step averages the gradients. So the weights are those of one
process, up to the order of float additions; only dropout is drawn by each process for its own shard.
The main process validates, writes and displays; the others wait for its broadcasts.
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn


@dataclass(slots=True, frozen=True)
class ProcessGroup:
    """This process's rank, from 0, among `count`. device: torch's name of the device that holds exchanged tensors."""

    rank: int = 0
    count: int = 1
    device: str = "cpu"

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def average(self, parameters: Iterable[nn.Parameter], losses: Tensor) -> Tensor:
        """Replace the gradients by their means over the processes. losses: float [n], returned as means, too."""
        if self.count == 1:
            return losses
        # NOTE: every process must have gradients of the same parameters, or the messages would not fit.
        trained = [parameter for parameter in parameters if parameter.grad is not None]
        flat = torch.cat([losses, *(parameter.grad.flatten() for parameter in trained if parameter.grad is not None)])
        dist.all_reduce(flat)
        means = (flat / self.count).split([len(losses), *(parameter.numel() for parameter in trained)])
        for parameter, mean in zip(trained, means[1:], strict=True):
            parameter.grad = mean.view_as(parameter)
        return means[0]

    def broadcast(self, numbers: Sequence[float]) -> list[float]:
        """Return the main process's numbers in every process; all must pass the same count."""
        if self.count == 1:
            return list(numbers)
        message = torch.tensor(numbers, dtype=torch.float64, device=self.device)
        dist.broadcast(message, src=0)
        return message.tolist()


SINGLE_PROCESS = ProcessGroup()


@contextmanager
def process_group(device: torch.device) -> Iterator[ProcessGroup]:
    """Join the group that torchrun's variables describe, over NCCL on CUDA, else gloo.

    Without these variables: a single process.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield SINGLE_PROCESS
        return
    if device.type == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield ProcessGroup(dist.get_rank(), dist.get_world_size(), device.type)
    finally:
        dist.destroy_process_group()
