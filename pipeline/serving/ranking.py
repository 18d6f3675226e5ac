"""A batch on its way through a strategy's steps, and through the next strategy's when one fails."""

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from pipeline.slates import Why
from pipeline.strategies.strategy import FallbackChain, RankedItems, Request, Strategy, close_all

T = TypeVar("T")
Step = Literal["prepare", "launch", "finish"]
STEPS: tuple[Step, ...] = ("prepare", "launch", "finish")


@dataclass(slots=True)
class Generation:
    """The strategies that serve one version of the model.

    on_fallback: called with a strategy's name and its error whenever the next strategy takes over
    pending: batches that have begun and not ended
    """

    strategies: FallbackChain
    version: str
    on_fallback: Callable[[str, Exception], None]
    pending: int = 0
    is_retired: bool = False
    done: threading.Event = field(default_factory=threading.Event)

    def begin(self) -> None:
        self.pending += 1

    def end(self) -> None:
        self.pending -= 1
        self._check_done()

    def retire(self) -> None:
        """Begin no other batch."""
        self.is_retired = True
        self._check_done()

    def close(self) -> list[Exception]:
        """Wait until the last batch has ended, close the strategies, return the errors of those that raise.

        For another thread than the one that ranks, and after `retire`.
        """
        self.done.wait()
        return close_all(self.strategies)

    def _check_done(self) -> None:
        if self.is_retired and not self.pending:
            self.done.set()


class Ranking:
    """One batch. It ends with `finish`, or when the last strategy raises."""

    def __init__(self, request: Request, generation: Generation, start: str | None) -> None:
        """start: where in the fallback order to begin, None: at its best. ValueError: no strategy from there on."""
        self.request = request
        self._generation = generation
        self._candidates = generation.strategies.candidates(start, request.deadline_s)
        first = next(self._candidates, None)
        if first is None:
            raise ValueError(f"no strategy at or after '{start}' in this process")
        self.strategy: Strategy
        self.why: Why
        self.strategy, self.why = first
        self._steps_done = 0
        self._state: Any = request  # what the last step returned
        generation.begin()

    @property
    def version(self) -> str:
        """The model that was serving when the batch began."""
        return self._generation.version

    def advance(self, step: Step) -> None:
        """Bring the batch through a step; when one raises, the next strategy takes it there from the beginning."""
        while self._steps_done <= STEPS.index(step):
            try:
                self._state = getattr(self.strategy, STEPS[self._steps_done])(self._state)
                self._steps_done += 1
            except Exception as error:  # any failure of any step: the chain must answer
                self._fall_back(error)

    def finish(self, use: Callable[[RankedItems], T]) -> T:
        """Bring the batch to its end and return what `use` makes of the answer.

        An answer that `use` raises an error for is a failure of its strategy.
        """
        while True:
            self.advance("finish")
            try:
                used = use(self._state)
            except Exception as error:  # an answer of one's own strategy may be anything
                self._fall_back(error)
                continue
            self._generation.strategies.record_success(self.strategy)
            self._generation.end()
            return used

    def _fall_back(self, error: Exception) -> None:
        """Give the batch to the next strategy; raise the error if there is none."""
        self._generation.strategies.record_failure(self.strategy)
        self._generation.on_fallback(self.strategy.name, error)
        following = next(self._candidates, None)
        if following is None:
            self._generation.end()
            raise error
        self.strategy, self.why = following
        self._state = self.request
        self._steps_done = 0
