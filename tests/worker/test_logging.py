"""All logs go through one renderer to stderr."""

import json
import logging

import pytest

from worker import logging as worker_logging
from worker.config import Config, KafkaConfig, LogConfig, RedisConfig


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


@pytest.mark.parametrize("library", [False, True])
def test_json_lines_carry_a_readable_traceback(library: bool, capsys: pytest.CaptureFixture[str]) -> None:
    worker_logging.configure(LogConfig())
    fail_and_log(library)
    (line,) = capsys.readouterr().err.splitlines()
    logged = json.loads(line)
    assert logged["event"] == "it failed"
    assert "exc_info" not in logged
    assert logged["exception"].startswith("Traceback (most recent call last):\n")
    assert ", in fail\n" in logged["exception"]
    assert logged["exception"].endswith("RuntimeError: broken")


@pytest.mark.parametrize("library", [False, True])
def test_tracebacks_on_the_console_show_no_variables(library: bool, capsys: pytest.CaptureFixture[str]) -> None:
    worker_logging.configure(LogConfig(format="console"))
    fail_and_log(library)
    err = capsys.readouterr().err
    assert "RuntimeError: broken" in err
    assert ", in fail" in err
    assert "hunter" not in err


def fail_and_log(library: bool) -> None:
    try:
        fail("hunt" + "er2")
    except RuntimeError:
        log = logging.getLogger("library") if library else worker_logging.get("here")
        log.exception("it failed")


def fail(password: str) -> None:
    raise RuntimeError("broken")


def test_secrets_are_masked_where_a_configuration_is_shown_by_its_repr() -> None:
    config = Config(
        kafka=KafkaConfig(sasl_username="shop", sasl_password="hunter2"),
        redis=RedisConfig(url="redis://shop:hunter2@h:1/0?password=hunter2"),
    )
    for shown in (repr(config), str(config.kafka), repr([config.redis]), repr(config.__rich_repr__())):
        assert "hunter2" not in shown
        assert "***" in shown
    assert "sasl_username='shop'" in repr(config)
