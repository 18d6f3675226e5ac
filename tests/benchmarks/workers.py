"""Processes side by side, for trainings that each need one core or a part of a GPU."""

import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor

import torch


def pool(workers: int) -> ProcessPoolExecutor:
    """Its processes begin anew: CUDA does not survive a fork."""
    return ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _alone)


def _alone() -> None:
    """A worker process: one thread, and of several GPUs one."""
    torch.set_num_threads(1)
    if torch.cuda.device_count() > 1:
        torch.cuda.set_device(os.getpid() % torch.cuda.device_count())
