"""Every result file in the tree is one that a benchmark wrote."""

import json
import re
from pathlib import Path

import msgspec
import pytest

from tests.benchmarks import results


def test_written_result_is_read_back(tmp_path: Path) -> None:
    path = results.write("probe", {"x": 1.5}, [{"a": 1, "b": None}], tmp_path)
    assert results.load(path).metrics == {"x": 1.5}


def test_result_without_stages_keeps_its_form(tmp_path: Path) -> None:
    path = results.write("probe", {"x": 1.5}, [], tmp_path)
    assert "stages" not in json.loads(path.read_text())


def test_stages_are_listed_once_each_and_end_with_the_one_that_wrote_the_file(tmp_path: Path) -> None:
    tuned = results.Stage("tune", "0123456789ab", "python -m x", "a card", "2026-01-01T00:00:00+00:00")
    later = msgspec.structs.replace(tuned, created="2026-01-01T01:00:00+00:00")
    tested = msgspec.structs.replace(tuned, stage="test", commit="ba9876543210", created="2026-01-02T00:00:00+00:00")
    path = results.write("probe", {"x": 1.5}, [], tmp_path, "a card", [tested, later, tuned])
    result = results.load(path)
    assert result.stages[:2] == [tuned, tested]
    [report] = result.stages[2:]
    assert (report.stage, report.commit, report.created) == ("report", result.commit, result.created)
    assert result.hardware == "a card"
    assert report.hardware == results.hardware()


def test_commit_can_be_named_where_the_tree_has_no_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MILLRACE_COMMIT", "0123456789ab")
    assert results.load(results.write("probe", {"x": 1.5}, [], tmp_path)).commit == "0123456789ab"


@pytest.mark.parametrize("change", [{"metrics": {"x": "fast"}}, {"name": "other"}, {"more": 1}, {"rows": {}}])
def test_file_of_another_shape_is_rejected(tmp_path: Path, change: dict[str, object]) -> None:
    path = results.write("probe", {"x": 1.5}, [], tmp_path)
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(msgspec.ValidationError):
        results.load(path)


@pytest.mark.parametrize("path", sorted(results.FOLDER.glob("*.json")), ids=lambda path: path.stem)
def test_committed_result_is_complete(path: Path) -> None:
    result = results.load(path)
    assert result.metrics
    assert result.hardware
    assert re.fullmatch(r"[0-9a-f]{12}(\+changes)?", result.commit)
    assert all(re.fullmatch(r"[0-9a-f]{7,12}(\+changes)?", stage.commit) for stage in result.stages)
