"""The user for whom a strategy fails, found by halving the batch: the others need not do without the strategy."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Isolation(Generic[T]):
    """The answers to the users of a failed batch, and the users without one.

    answers: users, int64 [n], and what was answered for them together
    rest: int64 [m], the users without an answer; None: all have one
    error: the last one raised; others_failed: the strategy failed for more than one part of the users
    """

    answers: list[tuple[np.ndarray, T]]
    rest: np.ndarray | None
    error: Exception
    others_failed: bool


def isolate(
    attempt: Callable[[np.ndarray], T], users: np.ndarray, error: Exception, is_late: Callable[[], bool]
) -> Isolation[T]:
    """Answer all users but the one for whom `attempt` raises; stop when both halves of the users fail, or late.

    users: int64 [n], for whom together it raised `error`. A batch of 256 users takes 16 attempts with as many users as
    two batches have; 2 attempts when the strategy fails for everybody.
    """
    answers: list[tuple[np.ndarray, T]] = []
    while len(users) > 1 and not is_late():
        failed: list[np.ndarray] = []
        for half in np.array_split(users, 2):
            try:
                answers.append((half, attempt(half)))
            except Exception as raised:  # whatever a strategy raises
                error = raised
                failed.append(half)
        if len(failed) == 2:
            return Isolation(answers, users, error, others_failed=True)
        if not failed:
            return Isolation(answers, None, error, others_failed=False)
        users = failed[0]
    return Isolation(answers, users, error, others_failed=False)
