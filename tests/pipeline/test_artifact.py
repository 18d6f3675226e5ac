from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from msgspec.structs import replace

from pipeline import artifact as artifacts
from pipeline.artifact import COUNTERS, MANIFEST, VOCABULARY, WEIGHTS, Artifact
from pipeline.backends.torch import TorchEncoder
from pipeline.errors import ArtifactError
from pipeline.model.config import HstuConfig
from pipeline.records import EventSchema
from pipeline.training.trainer import MultiTaskModel

ITEMS = ["a", "b", "ü"]
CONFIG = HstuConfig(items=len(ITEMS) + 1, width=8, heads=1, d_qk=4, d_v=4, max_events=16)


def draft(seed: int = 0, item_ids: list[str] = ITEMS) -> Artifact:
    torch.manual_seed(seed)
    counters = {"items": np.arange(3, dtype=np.uint64), "popularity": np.array([3.0, 2.0, 1.0])}
    return artifacts.draft(CONFIG, EventSchema(), MultiTaskModel(CONFIG).state_dict(), item_ids, counters)


def saved(folder: Path, seed: int = 0) -> Path:
    artifacts.save(folder, draft(seed), {"validation_hit_rate": 0.25}, "2026-01-01T00:00:00+00:00")
    return folder


def test_what_is_loaded_is_what_was_saved(tmp_path: Path) -> None:
    model = draft()
    loaded = artifacts.load(saved(tmp_path / "model"))
    assert loaded.item_ids == ITEMS
    assert loaded.config == CONFIG
    assert loaded.manifest.metrics == {"validation_hit_rate": 0.25}
    assert loaded.weights.keys() == model.weights.keys()
    assert all(torch.equal(loaded.weights[name], weight) for name, weight in model.weights.items())
    assert all((loaded.counters[name] == array).all() for name, array in model.counters.items())
    MultiTaskModel(CONFIG).hstu.load_state_dict(loaded.module_weights("hstu"))


def test_the_version_is_the_content(tmp_path: Path) -> None:
    versions = [artifacts.load(saved(tmp_path / name, seed)).version for name, seed in [("a", 0), ("b", 0), ("c", 1)]]
    assert versions[0] == versions[1] != versions[2]


@pytest.mark.parametrize("name", [WEIGHTS, VOCABULARY, COUNTERS])
def test_a_changed_file_is_refused_by_name_with_what_to_do(tmp_path: Path, name: str) -> None:
    folder = saved(tmp_path / "model")
    content = bytearray((folder / name).read_bytes())
    content[-1] ^= 1
    (folder / name).write_bytes(content)
    with pytest.raises(ArtifactError, match=rf"{name}: SHA-256 is \w+…, the manifest says \w+….*millrace train"):
        artifacts.load(folder)


@pytest.mark.parametrize("name", [WEIGHTS, VOCABULARY, COUNTERS, MANIFEST])
def test_a_missing_file_is_named(tmp_path: Path, name: str) -> None:
    folder = saved(tmp_path / "model")
    (folder / name).unlink()
    with pytest.raises(ArtifactError, match=f"{name}: No such file.*millrace train"):
        artifacts.load(folder)


def test_a_manifest_that_was_edited_is_refused(tmp_path: Path) -> None:
    folder = saved(tmp_path / "model")
    text = (folder / MANIFEST).read_text()
    (folder / MANIFEST).write_text(text.replace('"max_events": 16', '"max_events": 17'))
    with pytest.raises(ArtifactError, match="content hash"):
        artifacts.load(folder)


@pytest.mark.parametrize(("text", "reason"), [("{", "not a manifest"), ('{"format": 4}', "not a manifest")])
def test_a_broken_manifest_is_one_sentence(tmp_path: Path, text: str, reason: str) -> None:
    folder = saved(tmp_path / "model")
    (folder / MANIFEST).write_text(text)
    with pytest.raises(ArtifactError, match=reason):
        artifacts.load(folder)


def test_an_artifact_of_another_format_asks_for_training(tmp_path: Path) -> None:
    folder = saved(tmp_path / "model")
    manifest = msgspec.json.decode((folder / MANIFEST).read_bytes())
    (folder / MANIFEST).write_bytes(msgspec.json.encode(manifest | {"format": 99}))
    with pytest.raises(ArtifactError, match="format 99, this millrace reads 4; train again"):
        artifacts.load(folder)


@pytest.mark.parametrize("options", [{"norm_in": "rms"}, {"attention_scale": "length"}, {"dropout": 0.3}], ids=str)
def test_every_model_option_is_part_of_the_version(tmp_path: Path, options: dict[str, Any]) -> None:
    changed = draft()
    changed.manifest = replace(changed.manifest, config=replace(CONFIG, **options))
    manifest = artifacts.save(tmp_path / "changed", changed, {}, "2026-01-01T00:00:00+00:00")
    assert manifest.version != artifacts.load(saved(tmp_path / "model")).version


def test_an_artifact_trained_on_other_features_asks_for_training(tmp_path: Path) -> None:
    folder = saved(tmp_path / "model")
    manifest = msgspec.json.decode((folder / MANIFEST).read_bytes())
    (folder / MANIFEST).write_bytes(msgspec.json.encode(manifest | {"features": "0:cafe"}))
    with pytest.raises(ArtifactError, match=r"trained on features 0:cafe, this millrace makes .*; train again"):
        artifacts.load(folder)


def test_weights_that_are_not_of_the_config_are_one_error(tmp_path: Path) -> None:
    model = draft()
    weights = {name: weight for name, weight in model.weights.items() if "rotation" not in name}
    lacking = artifacts.draft(CONFIG, EventSchema(), weights, ITEMS, model.counters)
    with pytest.raises(ArtifactError, match=r"its weights do not fit its config: .*rotation"):
        TorchEncoder(lacking, "cpu")


def test_saving_again_replaces_the_old_artifact_and_leaves_nothing_else(tmp_path: Path) -> None:
    first = artifacts.load(saved(tmp_path / "model")).version
    second = artifacts.load(saved(tmp_path / "model", seed=1)).version
    assert first != second
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_folder_of_other_files_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letter").write_text("dear")
    with pytest.raises(ArtifactError, match="other files"):
        saved(tmp_path / "home")
    assert (tmp_path / "home" / "letter").read_text() == "dear"
    assert [path.name for path in tmp_path.iterdir()] == ["home"]


def test_weights_that_are_no_numbers_are_refused_by_name(tmp_path: Path) -> None:
    broken = draft()
    broken.weights["hstu.rotation.weight"][2, 3] = float("nan")
    artifacts.save(tmp_path / "model", broken, {}, "2026-01-01T00:00:00+00:00")
    with pytest.raises(ArtifactError, match=r"hstu\.safetensors: hstu\.rotation\.weight .*not finite; train again"):
        artifacts.load(tmp_path / "model")


def test_what_is_loaded_does_not_change_when_the_file_is_overwritten_in_place(tmp_path: Path) -> None:
    loaded, wanted = artifacts.load(saved(tmp_path / "model")), draft().weights
    path = tmp_path / "model" / WEIGHTS
    path.write_bytes(bytes(path.stat().st_size))
    assert all(torch.equal(loaded.weights[name], weight) for name, weight in wanted.items())


def test_all_files_are_those_of_the_folder_that_a_symlink_names(tmp_path: Path) -> None:
    (tmp_path / "current").symlink_to(saved(tmp_path / "model"))
    assert artifacts.load(tmp_path / "current").version == artifacts.load(tmp_path / "model").version


def test_an_item_that_is_there_twice_is_named_with_its_places(tmp_path: Path) -> None:
    artifacts.save(tmp_path / "model", draft(item_ids=["a", "b", "a"]), {}, "2026-01-01T00:00:00+00:00")
    with pytest.raises(ArtifactError, match=r"vocabulary\.msgpack: item 'a' is in rows 1 and 3; .*train"):
        artifacts.load(tmp_path / "model")


def test_action_lists_may_only_grow_at_their_end(tmp_path: Path) -> None:
    loaded = artifacts.load(saved(tmp_path / "model"))
    names = EventSchema().actions
    loaded.check_schema(EventSchema((*names, "gift")))
    with pytest.raises(ArtifactError, match=r"events\.actions.*train again"):
        loaded.check_schema(EventSchema(names[::-1]))
    with pytest.raises(ArtifactError, match=r"events\.devices"):
        loaded.check_schema(EventSchema(devices=("tv",)))
