"""A place that cannot be written is one sentence and exit 2, before the log is even looked at."""

from pathlib import Path

import pytest

from worker.cli import main

COMMANDS = {
    "evaluate --report": ["evaluate", "no-artifact", "no-log", "--report"],
    "replay --report": ["replay", "no-log", "--slates", "{good}", "--report"],
    "replay --slates": ["replay", "no-log", "--report", "{good}", "--slates"],
    "simulate --out": ["simulate", "--events", "10", "--out"],
    "train --out": ["train", "no-log", "--out"],
}


@pytest.mark.parametrize("words", COMMANDS.values(), ids=COMMANDS)
def test_a_place_below_a_file_is_refused_before_any_work(tmp_path: Path, capsys, words: list[str]):
    (tmp_path / "file").write_text("kept")
    place = tmp_path / "file" / "new"
    assert main([word.format(good=tmp_path / "good") for word in words] + [str(place)]) == 2
    said = capsys.readouterr().err
    assert f"{words[-1]}: {tmp_path / 'file'}" in said
    assert said.count("\n") == 1
    assert (tmp_path / "file").read_text() == "kept"


def test_a_folder_that_takes_no_files_is_refused_even_to_root(capsys):
    assert main(["train", "no-log", "--out", "/proc/model"]) == 2
    assert "--out: /proc cannot be written" in capsys.readouterr().err


def test_a_report_that_is_a_folder_is_refused(tmp_path: Path, capsys):
    assert main(["replay", "no-log", "--report", str(tmp_path), "--slates", str(tmp_path / "s")]) == 2
    assert f"--report: {tmp_path} cannot be written: it is a folder" in capsys.readouterr().err


def test_training_into_a_folder_of_other_files_is_refused_before_the_log_is_read(tmp_path: Path, capsys):
    (tmp_path / "other").write_text("")
    assert main(["train", "no-log", "--out", str(tmp_path)]) == 3
    assert "a folder with other files in it" in capsys.readouterr().err
