"""Options of `millrace train`, before any log is read."""

from argparse import ArgumentParser
from collections.abc import Sequence
from typing import get_args, get_type_hints

import pytest
from msgspec.structs import replace

from pipeline.errors import TrainingError
from pipeline.model.config import PRESETS, HstuConfig, Norm
from pipeline.training.loss_weighting import WeightingName
from pipeline.training.trainer import Precision
from worker.commands import train


def model_config(line: str) -> HstuConfig:
    parser = ArgumentParser()
    train.configure(parser)
    return train.training_options(parser.parse_args(["log", "--out", "x", *line.split()])).model


def test_model_without_options_is_the_default() -> None:
    assert model_config("") == HstuConfig()


@pytest.mark.parametrize("name", PRESETS)
def test_preset_sets_the_shape_and_single_options_override_it(name: str) -> None:
    assert model_config(f"--preset {name}") == PRESETS[name]
    changed = model_config(f"--preset {name} --layers 5 --norm-in rms --norm-out none --attention-scale length")
    assert changed == replace(PRESETS[name], layers=5, norm_in="rms", norm_out="none", attention_scale="length")


def test_invalid_shape_is_one_sentence() -> None:
    with pytest.raises(TrainingError, match=r"`int` >= 1 - at `\$\.model\.layers`"):
        model_config("--layers 0")


CHOICES = {
    "--preset": list(PRESETS),
    "--norm-in": get_args(Norm),
    "--norm-out": get_args(Norm),
    "--attention-scale": get_args(get_type_hints(HstuConfig)["attention_scale"]),
    "--precision": get_args(Precision),
    "--weighting": get_args(WeightingName),
}


@pytest.mark.parametrize(("option", "choices"), CHOICES.items(), ids=CHOICES)
def test_option_of_a_fixed_set_lists_its_values(
    option: str, choices: Sequence[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        model_config(f"{option} other")
    assert f"(choose from {', '.join(map(repr, choices))})" in capsys.readouterr().err
