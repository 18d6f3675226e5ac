"""Options of `millrace train`, before any log is read."""

from argparse import ArgumentParser

import pytest
from msgspec.structs import replace

from pipeline.errors import TrainingError
from pipeline.model.config import PRESETS, HstuConfig
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


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("--preset huge", r"--preset huge: no such shape; want one of tiny, 1m, 10m, 100m"),
        ("--norm-in batch", r"Invalid enum value 'batch' - at `\$\.model\.norm_in`; see `millrace train --help`"),
        ("--layers 0", r"`int` >= 1 - at `\$\.model\.layers`"),
    ],
)
def test_invalid_shape_is_one_sentence(line: str, sentence: str) -> None:
    with pytest.raises(TrainingError, match=sentence):
        model_config(line)
