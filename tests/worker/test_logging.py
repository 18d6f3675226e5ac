"""All logs go through one renderer to stderr."""

import logging

import pytest

from worker import logging as worker_logging
from worker.config import LogConfig


def test_console_logs_to_a_pipe_have_no_colours(capsys: pytest.CaptureFixture[str]) -> None:
    worker_logging.configure(LogConfig(format="console"))
    worker_logging.get("here").warning("careful", left=3)
    err = capsys.readouterr().err
    assert "careful" in err
    assert "\x1b" not in err


def test_silenced_logger_is_quiet_but_its_children_are_not(capsys: pytest.CaptureFixture[str]) -> None:
    worker_logging.configure(LogConfig())
    client = logging.getLogger("aiokafka")
    with worker_logging.silenced("aiokafka"):
        client.error("no connection")
        client.getChild("cluster").error("no topic")
    client.error("gone again")
    err = capsys.readouterr().err
    assert "no connection" not in err
    assert "no topic" in err
    assert "gone again" in err
