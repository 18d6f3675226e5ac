"""Parallel processes for trainings that each need one core or a part of a GPU."""

import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor

import torch


def pool(workers: int) -> ProcessPoolExecutor:
    """Return a pool whose processes are spawned, because CUDA does not survive a fork."""
    return ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _use_one_device)


def _use_one_device() -> None:
    """Limit the process to one thread and, of several GPUs, to one."""
    torch.set_num_threads(1)
    if torch.cuda.device_count() > 1:
        torch.cuda.set_device(os.getpid() % torch.cuda.device_count())
