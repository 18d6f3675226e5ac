"""The signals that end a process."""

import asyncio
import os
import signal
from collections.abc import Callable


def handle_signals(stop: Callable[[signal.Signals], None]) -> None:
    """Let the first SIGTERM or SIGINT call `stop`, and the second exit at once, with 128 + its number."""

    def exit_now(number: int) -> Callable[[], None]:
        return lambda: os._exit(128 + number)

    def stop_once(number: signal.Signals) -> None:
        stop(number)
        for each in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(each, exit_now(each))

    loop = asyncio.get_running_loop()
    for each in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(each, stop_once, each)
