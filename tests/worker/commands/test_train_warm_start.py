"""`millrace train --warm-start` and `--learning-curves`, as a user runs them."""

from pathlib import Path

import msgspec
import pytest

from pipeline import artifact as artifacts
from worker.cli import main
from worker.output.learning_curves import EpochPoint


def words(*line: object) -> list[str]:
    return [str(word) for word in line]


def test_warm_start_keeps_shape_and_items_and_plots_learning_curves(shop, tmp_path: Path) -> None:
    options = ["--train-fraction", 1, "--epochs", 2, "--learning-curves", tmp_path / "curves.png"]
    assert main(words("train", shop.log, "--warm-start", shop.artifact, "--out", tmp_path / "new", *options)) == 0
    old = artifacts.load(shop.artifact)
    new = artifacts.load(tmp_path / "new")
    assert new.config.width == old.config.width == 16
    assert new.item_ids[: len(old.item_ids)] == old.item_ids
    assert new.manifest.metrics["training_events"] > old.manifest.metrics["training_events"]
    points = msgspec.json.decode((tmp_path / "curves.json").read_bytes(), type=list[EpochPoint])
    assert [point.epoch for point in points] == [1, 2]
    assert max(point.ndcg for point in points) == new.manifest.metrics["validation_ndcg"]
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--warm-start", "ARTIFACT", "--layers", "5"], "has layers 2, requested: layers 5"),
        (["--warm-start", "ARTIFACT"], "split later (--train-fraction 1)"),
        (["--learning-curves", "curves.gif"], "want a name that ends in .png, .svg, .pdf or .json"),
    ],
)
def test_impossible_options_are_one_sentence(
    more: list[str], said: str, shop, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [word.replace("ARTIFACT", str(shop.artifact)) for word in more]
    assert main(words("train", shop.log, "--out", tmp_path / "new", *options)) == 2
    err = capsys.readouterr().err.strip()
    assert said in err
    assert "\n" not in err
    assert not (tmp_path / "new").exists()
