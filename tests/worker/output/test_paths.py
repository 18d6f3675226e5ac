"""An output path that cannot be written is one sentence and exit 2, before the log is opened."""

from pathlib import Path

import pytest

from worker.cli import main

Capture = pytest.CaptureFixture[str]
COMMANDS = {
    "evaluate --report": ["evaluate", "no-artifact", "no-log", "--report"],
    "replay --report": ["replay", "no-log", "--slates", "{good}", "--report"],
    "replay --slates": ["replay", "no-log", "--report", "{good}", "--slates"],
    "simulate --out": ["simulate", "--events", "10", "--out"],
    "train --out": ["train", "no-log", "--out"],
}


@pytest.mark.parametrize("words", COMMANDS.values(), ids=COMMANDS)
def test_path_below_a_file_is_rejected_before_any_work(tmp_path: Path, capsys: Capture, words: list[str]) -> None:
    (tmp_path / "file").write_text("kept")
    path = tmp_path / "file" / "new"
    assert main([word.format(good=tmp_path / "good") for word in words] + [str(path)]) == 2
    err = capsys.readouterr().err
    assert f"{words[-1]}: {tmp_path / 'file'}" in err
    assert err.count("\n") == 1
    assert (tmp_path / "file").read_text() == "kept"


def test_folder_that_accepts_no_files_is_rejected_even_for_root(capsys: Capture) -> None:
    assert main(["train", "no-log", "--out", "/proc/model"]) == 2
    assert "--out: /proc cannot be written" in capsys.readouterr().err


def test_report_path_of_a_folder_is_rejected(tmp_path: Path, capsys: Capture) -> None:
    assert main(["replay", "no-log", "--report", str(tmp_path), "--slates", str(tmp_path / "s")]) == 2
    assert f"--report: {tmp_path} cannot be written: it is a folder" in capsys.readouterr().err


def test_training_into_a_folder_with_other_files_is_rejected_before_reading(tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "other").write_text("")
    assert main(["train", "no-log", "--out", str(tmp_path)]) == 3
    assert "a folder with other files in it" in capsys.readouterr().err
