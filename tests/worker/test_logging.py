"""One renderer for all logs, on stderr."""

import logging

from worker import logging as ours
from worker.config import LogConfig


def test_a_pipe_gets_no_colours(capsys):
    ours.configure(LogConfig(format="console"))
    ours.get("here").warning("careful", left=3)
    said = capsys.readouterr().err
    assert "careful" in said
    assert "\x1b" not in said


def test_a_logger_is_quiet_meanwhile_and_those_below_it_are_not(capsys):
    ours.configure(LogConfig())
    client = logging.getLogger("aiokafka")
    with ours.silenced("aiokafka"):
        client.error("no connection")
        client.getChild("cluster").error("no topic")
    client.error("gone again")
    said = capsys.readouterr().err
    assert "no connection" not in said
    assert "no topic" in said
    assert "gone again" in said
