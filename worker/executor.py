"""A thread that runs functions for coroutines, one at a time."""

import asyncio
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


class SingleThreadExecutor:
    """Runs functions in one thread of its own, in the order in which they were submitted."""

    def __init__(self, name: str) -> None:
        self._pool = ThreadPoolExecutor(1, name)

    def submit(self, function: Callable[..., T], *arguments: object) -> Future[T]:
        """Queue the call without waiting for it."""
        return self._pool.submit(function, *arguments)

    async def run(self, function: Callable[..., T], *arguments: object) -> T:
        """Queue the call and return its result."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, function, *arguments)

    async def finishes_within(self, timeout_s: float) -> bool:
        """Wait for the queued calls; return whether all have ended."""
        last = asyncio.wrap_future(self._pool.submit(lambda: None))
        _, late = await asyncio.wait({last}, timeout=timeout_s)
        return not late

    def close(self, wait: bool = True) -> None:
        """Accept no more calls. wait: for the queued ones; False: cancel those that have not started."""
        self._pool.shutdown(wait=wait, cancel_futures=not wait)
