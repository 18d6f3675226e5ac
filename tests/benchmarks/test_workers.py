"""Jobs whose results are files: a failed or interrupted call loses only what was running."""

import json
from pathlib import Path

import pytest

from tests.benchmarks.workers import read_rows, run_saved


def double(number: int) -> dict[str, int]:
    if number < 0:
        raise ValueError(f"{number} cannot be doubled")
    return {"double": 2 * number}


def test_results_of_finished_jobs_survive_one_that_fails(tmp_path: Path) -> None:
    jobs = {tmp_path / f"{number}.json": (double, number) for number in (-1, 1, 2)}
    with pytest.raises(ValueError, match="-1 cannot be doubled"):
        run_saved(jobs, 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1.json", "2.json"]


def test_job_with_a_file_is_not_run_again(tmp_path: Path) -> None:
    jobs = {tmp_path / f"{number}.json": (double, number) for number in (1, 2)}
    (tmp_path / "1.json").write_text(json.dumps({"double": "kept"}))
    assert run_saved(jobs, 2) == 0
    assert list(read_rows(jobs)) == [{"double": "kept"}, {"double": 4}]


def test_no_job_starts_after_the_time_is_up(tmp_path: Path) -> None:
    jobs = {tmp_path / "1.json": (double, 1)}
    assert run_saved(jobs, 1, minutes=0) == 1
    assert not any(tmp_path.iterdir())
