"""A batch on its way through a strategy's steps; the next strategy ranks the users for whom one fails."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Generic, Literal, TypeVar

import numpy as np

from pipeline.serving.generation import Generation
from pipeline.serving.isolation import isolate
from pipeline.slates import Why
from pipeline.strategies.strategy import RankedItems, Request, Strategy

T = TypeVar("T")
Use = Callable[[Strategy, Request, RankedItems], T]
Step = Literal["prepare", "launch", "finish"]
STEPS: tuple[Step, ...] = ("prepare", "launch", "finish")


@dataclass(frozen=True, slots=True)
class Part(Generic[T]):
    """Users of a batch, int64 [n], that one strategy ranked together, and what was made of its answer."""

    users: np.ndarray
    strategy: Strategy
    why: Why
    answer: T


class Ranking:
    """One batch. It ends with `finish`."""

    def __init__(self, request: Request, generation: Generation, start: str | None) -> None:
        """start: where in the fallback order to begin, None: at its best. ValueError: no strategy from there on."""
        self._request = request
        self._generation = generation
        self._candidates = generation.strategies.candidates(start, request.deadline_s)
        first = next(self._candidates, None)
        if first is None:
            raise ValueError(f"no strategy at or after '{start}' in this process")
        self._strategy: Strategy
        self._why: Why
        self._strategy, self._why = first
        self._steps_done = 0
        self._state: Any = request  # what the last step returned
        self._error: Exception | None = None  # what the last step raised: `finish` deals with it
        generation.begin()

    @property
    def version(self) -> str:
        """The model that was serving when the batch began."""
        return self._generation.version

    def advance(self, step: Step) -> None:
        """Bring the batch through a step, unless an earlier one has failed."""
        try:
            while self._error is None and self._steps_done <= STEPS.index(step):
                self._state = getattr(self._strategy, STEPS[self._steps_done])(self._state)
                self._steps_done += 1
        except Exception as error:  # any failure of any step: the chain must answer
            self._error = error

    def finish(self, use: Use[T]) -> list[Part[T]]:
        """Bring the batch to its end and return what `use` makes of the strategies' answers, the largest part first.

        Users for whom a strategy fails are ranked by the next one; raises the last one's error. An answer that `use`
        raises an error for is a failure, too.
        """
        try:
            self.advance("finish")
            return sorted(self._parts(use), key=lambda part: -len(part.users))
        finally:
            self._generation.end()

    def _parts(self, use: Use[T]) -> list[Part[T]]:
        users = np.arange(len(self._request.histories))
        parts: list[Part[T]] = []
        attempt = partial(self._use_state, use)
        while True:
            try:
                parts.append(Part(users, self._strategy, self._why, attempt(users)))
            except Exception as error:  # as above; and an answer of one's own strategy may be anything
                users = self._isolate(users, error, use, parts)
                attempt = partial(self._rank_users, use)
            else:
                self._generation.record_success(self._strategy, self._request_of(users))
                return parts
            if users is None:
                return parts

    def _isolate(self, users: np.ndarray, error: Exception, use: Use[T], parts: list[Part[T]]) -> np.ndarray | None:
        """Let the strategy that failed for these users answer those it can, and take the next one for the others.

        Returns the others, int64 [n]; None: it has answered all. Raises its error when there is no next strategy.
        """
        strategies = self._generation.strategies
        is_late = partial(strategies.is_late, self._request.deadline_s)
        isolation = isolate(partial(self._rank_users, use), users, error, is_late)
        parts += [Part(some, self._strategy, self._why, answer) for some, answer in isolation.answers]
        for some, _ in isolation.answers:
            self._generation.record_success(self._strategy, self._request_of(some))
        rest = isolation.rest
        is_resting = isolation.others_failed or not (isolation.answers or self._can_rank_another(use))
        self._generation.record_failure(self._strategy, isolation.error, 0 if rest is None else len(rest), is_resting)
        if rest is not None:
            following = next(self._candidates, None)
            if following is None:
                raise isolation.error
            self._strategy, self._why = following
        return rest

    def _use_state(self, use: Use[T], users: np.ndarray) -> T:
        """Return what `use` makes of the answer to the whole batch, after its last step."""
        if self._error is not None:
            raise self._error
        return use(self._strategy, self._request, self._state)

    def _can_rank_another(self, use: Use[T]) -> bool:
        """Whether the strategy ranks the user with the longest history of the latest batch that it answered."""
        answered = self._generation.answered.get(self._strategy.name)
        if answered is None or not len(answered.histories):
            return False
        longest = np.array([answered.histories.lengths.argmax()])
        try:
            self._rank(use, replace(answered, histories=answered.histories.select(longest)))
        except Exception:  # as above: it fails for two users
            return False
        return True

    def _rank_users(self, use: Use[T], users: np.ndarray) -> T:
        return self._rank(use, self._request_of(users))

    def _rank(self, use: Use[T], request: Request) -> T:
        """Bring the request through all steps of the strategy."""
        strategy = self._strategy
        return use(strategy, request, strategy.finish(strategy.launch(strategy.prepare(request))))

    def _request_of(self, users: np.ndarray) -> Request:
        if len(users) == len(self._request.histories):
            return self._request
        return replace(self._request, histories=self._request.histories.select(users))
