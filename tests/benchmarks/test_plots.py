"""The pictures show what the result files hold."""

from pathlib import Path

import matplotlib.pyplot as plt
import msgspec
import pytest

from tests.benchmarks import plots, results, roofline

CARDS = sorted(path for name in roofline.PANELS for path in results.FOLDER.glob(f"{name}_h?00.json"))


@pytest.mark.parametrize("path", CARDS, ids=lambda path: path.stem)
def test_roofline_shows_the_rows_of_its_file_below_the_roof(path: Path) -> None:
    result = results.load(path)
    peak = roofline.find_peak(result)
    panels = roofline.PANELS[result.name.rpartition("_")[0]]
    counted = [panel for panel in panels if roofline.points(result, panel)]
    assert counted
    for panel in counted:
        points = roofline.points(result, panel)
        figure, axis = plt.subplots()
        roofline.draw(axis, panel, points, peak)
        roof, *marks = axis.lines
        drawn = {(float(x), float(y)) for line in marks for x, y in line.get_xydata()}
        rows = [row for row in result.rows if row["implementation"] in panel.implementations]
        assert drawn <= {(1e3 * row["tflops"] / row["gb_per_s"], row["tflops"]) for row in rows if row["tflops"]}
        assert len(drawn) == len({(point.intensity, point.tflops) for point in points})
        assert all(y <= min(max(roof.get_ydata()), x * peak.gb_per_s / 1e3) for x, y in drawn)
        plt.close(figure)


def test_roofline_is_drawn_from_the_file_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plots, "IMAGES", tmp_path)
    row: dict[str, results.Cell] = {
        "workload": "8 users",
        "implementation": "fused",
        "tflops": 90.0,
        "gb_per_s": 1800.0,
    }
    result = results.Result("kernels_retrieval_h100", "0" * 12, "-", "an NVIDIA H100", "-", {}, [row])
    panel = roofline.PANELS["kernels_retrieval"][0]
    assert roofline.points(result, panel) == [roofline.Point("8 users", "fused", 50.0, 90.0)]
    assert plots.rooflines(result).read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="no datasheet of 'a toaster'"):
        roofline.find_peak(msgspec.structs.replace(result, hardware="a toaster"))
