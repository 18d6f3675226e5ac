"""Parallel processes for jobs that each need one core or a part of a GPU, and whose results survive an interruption."""

import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from pathlib import Path

import msgspec
import torch

Job = tuple[Callable[..., object], *tuple[object, ...]]  # a function of a module, and its arguments


def pool(workers: int) -> ProcessPoolExecutor:
    """Return a pool whose processes are spawned, because CUDA does not survive a fork."""
    return ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _use_one_device)


def run_saved(jobs: Mapping[Path, Job], workers: int, minutes: float | None = None) -> int:
    """Write each job's result to its file as JSON as soon as it is there; return how many jobs have no file yet.

    A job whose file exists is not run again, so that a later call continues where an earlier one was stopped. After
    `minutes` no job is started: those that run are waited for. The first error of a job is raised when the others are
    done.
    """
    waiting = iter([(path, job) for path, job in jobs.items() if not path.exists()])
    end_s = time.monotonic() + 60 * minutes if minutes is not None else float("inf")
    running: dict[Future[object], Path] = {}
    errors: list[BaseException] = []
    with pool(workers) as processes:
        while True:
            while len(running) < workers and time.monotonic() < end_s and (following := next(waiting, None)):
                path, job = following
                running[processes.submit(*job)] = path
            if not running:
                break
            for done in wait(running, return_when=FIRST_COMPLETED).done:
                path = running.pop(done)
                if error := done.exception():
                    errors.append(error)
                    continue
                save(path, done.result())
                print(f"{path.stem}: {sum(each.exists() for each in jobs)} of {len(jobs)}", flush=True)
    if errors:
        raise errors[0]
    return sum(not path.exists() for path in jobs)


def save(path: Path, result: object) -> None:
    """Write a result as JSON; a file that exists is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(".draft")
    draft.write_bytes(msgspec.json.encode(result))
    draft.rename(path)


def read_rows(jobs: Mapping[Path, Job]) -> Iterator[dict[str, str | int | float | bool | None]]:
    """Yield the saved results of jobs that return rows of a result file."""
    for path in jobs:
        yield msgspec.json.decode(path.read_bytes(), type=dict[str, str | int | float | bool | None])


def _use_one_device() -> None:
    """Limit the process to one thread and, of several GPUs, to one."""
    torch.set_num_threads(1)
    if torch.cuda.device_count() > 1:
        torch.cuda.set_device(os.getpid() % torch.cuda.device_count())
