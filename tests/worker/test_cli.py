"""The command line: quick help, exit codes, one sentence per error."""

import resource
import subprocess
import sys
from argparse import ArgumentTypeError
from pathlib import Path

import pytest

from worker.cli import COMMANDS, main
from worker.commands.arguments import speed

Capture = pytest.CaptureFixture[str]
MAX_HELP_S = 0.3
SHOW_HELP = """
import contextlib, sys
from worker.cli import main
with contextlib.suppress(SystemExit):
    main([*sys.argv[1].split(), "--help"])
print("loaded:", sorted({"torch", "numpy", "aiokafka", "redis", "rich"} & set(sys.modules)))
"""


def child_cpu_s() -> float:
    """Return the CPU time of all finished child processes, which other load on the machine hardly changes."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def show_help(command: str) -> tuple[float, str]:
    """Return CPU seconds and stdout of the first run that is quick enough, else of the last of three.

    After the help, stdout lists the heavy modules that were imported.
    """
    seconds = 0.0
    text = ""
    for _ in range(3):
        start_s = child_cpu_s()
        text = subprocess.run([sys.executable, "-c", SHOW_HELP, command], capture_output=True, text=True).stdout
        seconds = child_cpu_s() - start_s
        if seconds < MAX_HELP_S:
            break
    return seconds, text


@pytest.mark.parametrize("command", ["", *COMMANDS, "dlq ls", "dlq requeue"])
def test_help_is_quick_and_shows_an_example(command: str) -> None:
    seconds, text = show_help(command)
    assert seconds < MAX_HELP_S
    assert f"millrace {command}" in text.partition("example")[2]
    assert text.endswith("loaded: []\n")


def test_millrace_without_a_command_lists_commands_and_exit_codes(capsys: Capture) -> None:
    with pytest.raises(SystemExit) as caught:
        main([])
    assert caught.value.code == 0
    shown = capsys.readouterr().out
    assert all(f"\n  {name} " in shown for name in COMMANDS)
    assert "exit codes:" in shown


@pytest.mark.parametrize(
    "line",
    [
        "nosuch",
        "run --nosuch",
        "replay",
        "simulate --out x --events 0",
        "simulate --out x --seed -1",
        "demo --events 0",
        "demo --rate 0",
        "demo --seed -1",
        "dlq ls --limit 0",
        "dlq ls --limit -1",
        "dlq requeue --limit -1",
        "dlq requeue --limit some",
        "replay log --limit 0",
        "replay log --rate -1",
        "replay log --rate inf",
        "replay log --speed 0x",
        "replay log --train-fraction 1.1",
        "evaluate artifact log --train-fraction -0.1",
        "evaluate artifact log --train-fraction nan",
        "evaluate artifact log --leave-last-out 0",
        "evaluate artifact log --cutoffs 5,0",
        "evaluate artifact log --cutoffs some",
        "evaluate artifact log --negatives 0",
        "evaluate artifact log --protocol newest",
        "train log --out x --leave-last-out 0",
        "train log --out x --leave-last-out 5 --train-fraction 0.5",
        "train log --out x --seed -1",
        "train log --out x --learning-rate inf",
        "serve --port 65536",
    ],
)
def test_bad_usage_exits_2(line: str, capsys: Capture) -> None:
    with pytest.raises(SystemExit) as caught:
        main(line.split())
    assert caught.value.code == 2
    assert "usage: millrace" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        (["replay", "nowhere.jsonl"], 2, "nowhere.jsonl"),
        (["train", "nowhere.jsonl", "--out", "a"], 2, "nowhere.jsonl"),
        (["evaluate", "nowhere", "nowhere.jsonl"], 3, "manifest.json"),
        (
            ["evaluate", "nowhere", "nowhere.jsonl", "--leave-last-out", "3"],
            2,
            "--leave-last-out cannot be used with --protocol temporal",
        ),
        (
            ["evaluate", "a", "b", "--protocol", "leave-last-out", "--train-fraction", "0.5"],
            2,
            "cannot be used with --protocol leave-last-out",
        ),
        (["config", "show", "--config", "nowhere.toml"], 2, "nowhere.toml"),
        (["replay", "log.jsonl", "--rate", "9"], 2, "needs --kafka"),
        (["replay", "log.jsonl", "--kafka", "broker"], 2, "--kafka 'broker': want start, HOST:PORT"),
        (["replay", "log.jsonl", "--kafka", "start", "--speed", "9x"], 2, "with --kafka use --rate"),
    ],
)
def test_missing_files_and_conflicting_options_are_one_sentence(
    arguments: list[str],
    code: int,
    sentence: str,
    capsys: Capture,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == code
    err = capsys.readouterr().err.strip()
    assert err.startswith(f"millrace {arguments[0]}: ")
    assert sentence in err
    assert "\n" not in err


def test_config_show_prints_sources_and_masks_secrets(
    capsys: Capture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "m.toml"
    file.write_text("[kafka]\nbootstrap_servers = 'broker:9092'\n")
    monkeypatch.setenv("MILLRACE__KAFKA__SASL_PASSWORD", "hunter2")
    assert main(["config", "show", "--config", str(file)]) == 0
    rows = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line.strip()}
    assert rows["kafka.bootstrap_servers"].split()[1:] == ["broker:9092", str(file)]
    assert rows["kafka.sasl_password"].split()[1:] == ["***", "MILLRACE__KAFKA__SASL_PASSWORD"]
    assert rows["redis.timeout_s"].split()[1:] == ["2.0", "default"]


@pytest.mark.parametrize(("text", "factor"), [("10x", 10.0), ("0.5", 0.5), ("max", None)])
def test_speed_is_a_factor_or_max(text: str, factor: float | None) -> None:
    assert speed(text) == factor


@pytest.mark.parametrize("text", ["fast", "0x", "-2x", "nan", "infx", ""])
def test_invalid_speed_is_one_sentence(text: str) -> None:
    with pytest.raises(ArgumentTypeError, match="want a factor, 10x, or max"):
        speed(text)
