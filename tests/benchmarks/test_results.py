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
