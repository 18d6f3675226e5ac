"""Fixtures of the worker's tests."""

import logging
from collections.abc import Callable
from typing import Any

import pytest

from worker.config import LogConfig
from worker.logging import configure


@pytest.fixture
def logged(caplog: pytest.LogCaptureFixture) -> Callable[[], list[dict[str, Any]]]:
    """Return `logged()`: the lines logged since the last call, as dicts. For logs of the test's body."""
    configure(LogConfig())
    logging.getLogger().handlers.clear()  # its stderr is closed after the set-up; pytest adds its own handler

    def take() -> list[dict[str, Any]]:
        lines = [record.msg for record in caplog.records]
        caplog.clear()
        return lines  # pyright: ignore[reportReturnType] - structlog passes its dict as the message

    return take
