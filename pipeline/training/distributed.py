"""Training in several processes, as `torchrun` starts them: each computes a part of every batch, and all step alike.

Every process reads the log and draws the same batches from the same seed; of a batch's crops, in order of length,
process r of n takes each n-th, from the r-th on. One message a step adds up the gradients. So the weights are those of
one process, up to the order in which floats are added; dropout alone is drawn by each process for its own part.
The first process judges, writes and displays, the others wait for what it tells.
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
    """This process among `count`, its number `rank` from 0; device: torch's name of where travelling tensors lie."""

    rank: int = 0
    count: int = 1
    device: str = "cpu"

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def average(self, parameters: Iterable[nn.Parameter], losses: Tensor) -> Tensor:
        """The gradients become their means over the processes. losses: float [n], returned as means, too."""
        if self.count == 1:
            return losses
        # NOTE: every process has met the same parameters, or their messages would not fit.
        met = [parameter for parameter in parameters if parameter.grad is not None]
        flat = torch.cat([losses, *(parameter.grad.flatten() for parameter in met if parameter.grad is not None)])
        dist.all_reduce(flat)
        means = (flat / self.count).split([len(losses), *(parameter.numel() for parameter in met)])
        for parameter, mean in zip(met, means[1:], strict=True):
            parameter.grad = mean.view_as(parameter)
        return means[0]

    def broadcast(self, numbers: Sequence[float]) -> list[float]:
        """The first process' numbers, in all of them; what the others give says how many."""
        if self.count == 1:
            return list(numbers)
        message = torch.tensor(numbers, dtype=torch.float64, device=self.device)
        dist.broadcast(message, src=0)
        return message.tolist()


SINGLE_PROCESS = ProcessGroup()


@contextmanager
def process_group(device: torch.device) -> Iterator[ProcessGroup]:
    """Those that torchrun started (by its variables), over NCCL on CUDA, else gloo; without torchrun one alone."""
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
