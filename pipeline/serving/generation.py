"""The strategies that serve one version of the model, and what their failures on batches mean for the next ones."""

import threading
from collections.abc import Callable
from dataclasses import dataclass, field

from pipeline.strategies.strategy import FallbackChain, Request, Strategy, close_all


@dataclass(frozen=True, slots=True)
class Fallback:
    """A strategy's failure on a batch.

    users: how many of the batch's users the next strategy ranks; 0 when a second attempt answered all of them
    is_resting: the strategy is skipped for a while, because other users fail too; else these users alone are set aside
    """

    strategy: str
    error: Exception
    users: int
    is_resting: bool


@dataclass(slots=True)
class Generation:
    """The strategies that serve one version of the model.

    on_fallback: called whenever a strategy fails on a batch
    pending: batches that have begun and not ended
    answered: by strategy, the latest batch that it answered
    """

    strategies: FallbackChain
    version: str
    on_fallback: Callable[[Fallback], None]
    pending: int = 0
    answered: dict[str, Request] = field(default_factory=dict)
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

    def record_success(self, strategy: Strategy, request: Request) -> None:
        """The strategy has answered a batch, or these users of it."""
        self.strategies.record_success(strategy)
        self.answered[strategy.name] = request

    def record_failure(self, strategy: Strategy, error: Exception, users: int, is_resting: bool) -> None:
        """The strategy has failed for users of a batch, whom the next one ranks; it rests if others fail, too."""
        if is_resting:
            self.strategies.record_failure(strategy)
        self.on_fallback(Fallback(strategy.name, error, users, is_resting))

    def _check_done(self) -> None:
        if self.is_retired and not self.pending:
            self.done.set()
