"""Every results file in the tree is one that a benchmark wrote."""

import json
import re

import msgspec
import pytest
from benchmarks import results


def test_what_is_written_is_read_back(tmp_path):
    path = results.write("probe", {"x": 1.5}, [{"a": 1, "b": None}], tmp_path)
    assert results.load(path).metrics == {"x": 1.5}


@pytest.mark.parametrize("change", [{"metrics": {"x": "fast"}}, {"name": "other"}, {"more": 1}, {"rows": {}}])
def test_a_file_of_another_shape_is_refused(tmp_path, change):
    path = results.write("probe", {"x": 1.5}, [], tmp_path)
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(msgspec.ValidationError):
        results.load(path)


@pytest.mark.parametrize("path", sorted(results.FOLDER.glob("*.json")), ids=lambda path: path.stem)
def test_a_committed_result_is_whole(path):
    result = results.load(path)
    assert result.metrics
    assert result.hardware
    assert re.fullmatch(r"[0-9a-f]{12}(\+changes)?", result.commit)
