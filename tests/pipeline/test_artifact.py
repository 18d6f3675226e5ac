import hashlib
import json
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from msgspec.structs import replace
from torch import Tensor

from pipeline import artifact as artifacts
from pipeline import weights
from pipeline.artifact import Artifact
from pipeline.backends.item_table import ItemTable
from pipeline.backends.torch import TorchModel
from pipeline.errors import ArtifactError
from pipeline.features.labels import LabelOptions, LabelRules
from pipeline.items.catalogue import Catalogue
from pipeline.items.vocabulary import Vocabulary
from pipeline.manifest import COUNTERS, FORMAT, MANIFEST, VOCABULARY, WEIGHTS, Manifest, read_manifest
from pipeline.model.config import HstuConfig
from pipeline.records import EventSchema
from pipeline.training.multi_task_model import MultiTaskModel
from pipeline.weights import ITEM_TABLE, WeightsFile, item_table_parts

CREATED = "2026-01-01T00:00:00+00:00"
ITEM_IDS = ["a", "b", "ü"]
CONFIG = HstuConfig(items=len(ITEM_IDS) + 1, width=8, heads=1, d_qk=4, d_v=4, max_events=16)


def make_draft(seed: int = 0, item_ids: list[str] = ITEM_IDS) -> Artifact:
    torch.manual_seed(seed)
    counters = {"items": np.arange(3, dtype=np.uint64), "popularity": np.array([3.0, 2.0, 1.0])}
    return artifacts.draft(CONFIG, EventSchema(), MultiTaskModel(CONFIG).state_dict(), item_ids, counters)


def save_draft(folder: Path, seed: int = 0) -> Path:
    artifacts.save(folder, make_draft(seed), {"validation_hit_rate": 0.25}, CREATED)
    return folder


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """Folder of the artifact with seed 0."""
    return save_draft(tmp_path / "model")


def update_manifest(folder: Path, **fields: Any) -> None:
    manifest = msgspec.json.decode((folder / MANIFEST).read_bytes())
    (folder / MANIFEST).write_bytes(msgspec.json.encode(manifest | fields))


def test_loaded_artifact_equals_the_saved_one(saved: Path) -> None:
    draft = make_draft()
    loaded = artifacts.load(saved)
    assert loaded.item_ids == ITEM_IDS
    assert loaded.config == CONFIG
    assert loaded.manifest.metrics == {"validation_hit_rate": 0.25}
    assert loaded.weights.keys() == draft.weights.keys()
    assert all(torch.equal(loaded.weights[name], weight) for name, weight in draft.weights.items())
    assert all((loaded.counters[name] == array).all() for name, array in draft.counters.items())
    MultiTaskModel(CONFIG).load_state_dict(dict(loaded.weights))


def test_version_depends_on_content_alone(tmp_path: Path) -> None:
    seeds = {"a": 0, "b": 0, "c": 1}
    versions = [artifacts.load(save_draft(tmp_path / name, seed)).version for name, seed in seeds.items()]
    assert versions[0] == versions[1] != versions[2]


@pytest.mark.parametrize("name", [WEIGHTS, VOCABULARY, COUNTERS])
def test_changed_file_is_rejected_by_name_with_the_next_step(saved: Path, name: str) -> None:
    content = bytearray((saved / name).read_bytes())
    content[-1] ^= 1
    (saved / name).write_bytes(content)
    with pytest.raises(ArtifactError, match=rf"{name}: SHA-256 is \w+…, the manifest says \w+….*millrace train"):
        artifacts.load(saved)


@pytest.mark.parametrize("name", [WEIGHTS, VOCABULARY, COUNTERS, MANIFEST])
def test_missing_file_is_named(saved: Path, name: str) -> None:
    (saved / name).unlink()
    with pytest.raises(ArtifactError, match=f"{name}: No such file.*millrace train"):
        artifacts.load(saved)


def test_edited_manifest_is_rejected(saved: Path) -> None:
    text = (saved / MANIFEST).read_text()
    (saved / MANIFEST).write_text(text.replace('"max_events": 16', '"max_events": 17'))
    with pytest.raises(ArtifactError, match="content hash"):
        artifacts.load(saved)


@pytest.mark.parametrize(("text", "reason"), [("{", "not a manifest"), (f'{{"format": {FORMAT}}}', "not a manifest")])
def test_broken_manifest_is_an_artifact_error(saved: Path, text: str, reason: str) -> None:
    (saved / MANIFEST).write_text(text)
    with pytest.raises(ArtifactError, match=reason):
        artifacts.load(saved)


def test_artifact_of_another_format_must_be_trained_again(saved: Path) -> None:
    update_manifest(saved, format=99)
    with pytest.raises(ArtifactError, match=f"format 99, this millrace reads {FORMAT}; train again"):
        artifacts.load(saved)


def test_artifact_keeps_the_labels_that_it_was_trained_on_and_their_change_is_another_version(
    tmp_path: Path, saved: Path
) -> None:
    labels = LabelOptions(engaged_actions=("share",), retention_days=1.0)
    changed = make_draft()
    changed.manifest = msgspec.structs.replace(changed.manifest, labels=labels)
    artifacts.save(tmp_path / "changed", changed, {}, CREATED)
    loaded = artifacts.load(tmp_path / "changed")
    assert loaded.label_rules == LabelRules.from_options(EventSchema(), labels)
    assert loaded.version != artifacts.load(saved).version
    update_manifest(tmp_path / "changed", labels={})
    with pytest.raises(ArtifactError, match="content hash"):
        artifacts.load(tmp_path / "changed")


@pytest.mark.parametrize("options", [{"norm_in": "rms"}, {"attention_scale": "length"}, {"dropout": 0.3}], ids=str)
def test_every_model_option_changes_the_version(tmp_path: Path, saved: Path, options: dict[str, Any]) -> None:
    changed = make_draft()
    changed.manifest = replace(changed.manifest, config=replace(CONFIG, **options))
    manifest = artifacts.save(tmp_path / "changed", changed, {}, CREATED)
    assert manifest.version != artifacts.load(saved).version


def test_artifact_of_other_features_must_be_trained_again(saved: Path) -> None:
    update_manifest(saved, features="0:cafe")
    with pytest.raises(ArtifactError, match=r"trained on features 0:cafe, this millrace makes .*; train again"):
        artifacts.load(saved)


def test_weights_that_do_not_fit_the_config_are_an_artifact_error() -> None:
    draft = make_draft()
    weights = {name: weight for name, weight in draft.weights.items() if "rotation" not in name}
    incomplete = artifacts.draft(CONFIG, EventSchema(), weights, ITEM_IDS, draft.counters)
    with pytest.raises(ArtifactError, match=r"its weights do not fit its config: .*rotation"):
        TorchModel.from_artifact(incomplete, "cpu")


def test_saving_again_replaces_the_old_artifact_and_leaves_nothing_else(tmp_path: Path) -> None:
    first = artifacts.load(save_draft(tmp_path / "model")).version
    second = artifacts.load(save_draft(tmp_path / "model", seed=1)).version
    assert first != second
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_artifact_is_never_absent_while_it_is_replaced(tmp_path: Path) -> None:
    folder = save_draft(tmp_path / "model")
    versions = {artifacts.load(folder).version, artifacts.load(save_draft(tmp_path / "other", seed=1)).version}
    found: set[str] = set()
    errors: list[ArtifactError] = []
    replacing = threading.Event()

    def read() -> None:
        while not replacing.is_set():
            try:
                found.add(artifacts.load(folder).version)
            except ArtifactError as error:
                errors.append(error)

    reader = threading.Thread(target=read)
    reader.start()
    for seed in range(20):
        save_draft(folder, seed % 2)
    replacing.set()
    reader.join()
    assert errors == []
    assert found <= versions


def test_artifact_that_is_replaced_while_it_is_read_is_read_again(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = artifacts.load(save_draft(saved.parent / "other", seed=1))

    def replace_after_reading(folder: Path) -> Manifest:
        manifest = read_manifest(folder)
        if manifest.version != other.version:
            save_draft(saved, seed=1)
        return manifest

    monkeypatch.setattr(artifacts, "read_manifest", replace_after_reading)
    loaded = artifacts.load(saved)
    assert loaded.version == other.version
    assert all(torch.equal(loaded.weights[name], weight) for name, weight in other.weights.items())


def test_folder_of_other_files_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letter").write_text("dear")
    with pytest.raises(ArtifactError, match="other files"):
        save_draft(tmp_path / "home")
    assert (tmp_path / "home" / "letter").read_text() == "dear"
    assert [path.name for path in tmp_path.iterdir()] == ["home"]


def test_weights_that_are_not_finite_are_rejected_by_name(tmp_path: Path) -> None:
    broken = make_draft()
    broken.weights["hstu.rotation.weight"][2, 3] = float("nan")
    artifacts.save(tmp_path / "model", broken, {}, CREATED)
    with pytest.raises(ArtifactError, match=r"hstu\.safetensors: hstu\.rotation\.weight .*not finite; train again"):
        artifacts.load(tmp_path / "model")


def test_loaded_weights_survive_replacing_the_file_and_its_folder(saved: Path) -> None:
    loaded = artifacts.load(saved)
    (saved / WEIGHTS).unlink()
    save_draft(saved, seed=1)
    assert all(torch.equal(loaded.weights[name], weight) for name, weight in make_draft().weights.items())


def test_overwriting_the_file_in_place_is_detected_before_its_item_table_is_used(saved: Path) -> None:
    loaded = artifacts.load(saved)
    path = saved / WEIGHTS
    path.write_bytes(bytes(path.stat().st_size))
    for name, weight in make_draft().weights.items():
        if name != ITEM_TABLE:
            assert torch.equal(loaded.weights[name], weight), name
    with pytest.raises(ArtifactError, match=r"hstu\.safetensors: was overwritten while it was read; copy"):
        list(item_table_parts(loaded.weights))


@pytest.mark.parametrize("rows", [1, 3, 1000])
def test_item_table_is_read_in_parts_of_complete_rows(saved: Path, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "PART_BYTES", rows * 4 * CONFIG.width)
    draft = make_draft()
    for each in (artifacts.load(saved).weights, draft.weights):
        parts = list(item_table_parts(each))
        assert [first for first, _ in parts] == list(range(0, len(draft.weights[ITEM_TABLE]), rows))
        assert torch.equal(torch.cat([part for _, part in parts]), draft.weights[ITEM_TABLE])


def test_weights_file_is_closed_with_its_artifact(saved: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    loaded = artifacts.load(saved)
    assert len(os.listdir("/proc/self/fd")) == before + 1
    del loaded
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize(
    "content", [b"", b"\0" * 8, (9).to_bytes(8, "little") + b"{", (1 << 62).to_bytes(8, "little") + b"{}"], ids=repr
)
def test_file_that_holds_no_weights_is_an_artifact_error(saved: Path, content: bytes) -> None:
    (saved / WEIGHTS).write_bytes(content)
    with pytest.raises(ArtifactError, match=r"hstu\.safetensors: .*millrace train"):
        artifacts.load(saved)


def rewrite_weights(path: Path, change: Callable[[dict[str, Any]], Any]) -> str:
    """Change the header of a weights file; return its hash as it then is."""
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + size :])
    return hashlib.sha256(path.read_bytes()).hexdigest()


BROKEN_HEADERS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "no item table": lambda header: header.pop(ITEM_TABLE),
    "an item table of one dimension": lambda header: header[ITEM_TABLE].update(shape=[32]),
    "an item table of width 0": lambda header: header[ITEM_TABLE].update(shape=[4, 0]),
    "an item table of three dimensions": lambda header: header[ITEM_TABLE].update(shape=[4, 4, 2]),
    "a negative dimension": lambda header: header[ITEM_TABLE].update(shape=[-4, -8]),
    "too many rows": lambda header: header[ITEM_TABLE].update(shape=[10**17, 8]),
    "another type": lambda header: header[ITEM_TABLE].update(dtype="BF16"),
    "reversed offsets": lambda header: header[ITEM_TABLE]["data_offsets"].reverse(),
    "offsets past the end": lambda header: header[ITEM_TABLE].update(data_offsets=[0, 1 << 63]),
    "a tensor on another": lambda header: header["hstu.rotation.weight"].update(data_offsets=[0, 256]),
    "an entry that is none": lambda header: header.update({ITEM_TABLE: []}),
}


@pytest.mark.parametrize("change", BROKEN_HEADERS.values(), ids=BROKEN_HEADERS.keys())
def test_wrongly_written_weights_are_an_artifact_error(saved: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    before = artifacts.load(saved).manifest.files[WEIGHTS]
    sha256 = rewrite_weights(saved / WEIGHTS, change)
    with pytest.raises(ArtifactError, match=r"hstu\.safetensors: .*train"):
        WeightsFile(saved / WEIGHTS, sha256)
    with pytest.raises(ArtifactError, match=r"hstu\.safetensors: SHA-256 is"):
        WeightsFile(saved / WEIGHTS, before)


def test_header_that_is_only_written_anew_loads(saved: Path) -> None:
    sha256 = rewrite_weights(saved / WEIGHTS, lambda header: None)
    assert WeightsFile(saved / WEIGHTS, sha256).keys() == make_draft().weights.keys()


@pytest.mark.parametrize("change", [lambda table: table[:-1], lambda table: table[:, :-1]], ids=["rows", "columns"])
def test_item_table_of_another_shape_is_an_artifact_error(change: Callable[[Tensor], Tensor]) -> None:
    draft = make_draft()
    other = dict(draft.weights) | {ITEM_TABLE: change(draft.weights[ITEM_TABLE]).contiguous()}
    artifact = artifacts.draft(CONFIG, EventSchema(), other, ITEM_IDS, draft.counters)
    model = TorchModel.from_artifact(artifact, "cpu")
    with pytest.raises(ArtifactError, match="its item table does not fit its config, which has 4 rows of 8"):
        ItemTable(artifact, Catalogue(Vocabulary(ITEM_IDS)), model.hstu.items, model.device)


def test_symlinked_artifact_is_loaded(tmp_path: Path, saved: Path) -> None:
    (tmp_path / "current").symlink_to(saved)
    assert artifacts.load(tmp_path / "current").version == artifacts.load(saved).version


def test_duplicate_item_is_named_with_its_rows(tmp_path: Path) -> None:
    artifacts.save(tmp_path / "model", make_draft(item_ids=["a", "b", "a"]), {}, CREATED)
    with pytest.raises(ArtifactError, match=r"vocabulary\.msgpack: item 'a' is in rows 1 and 3; .*train"):
        artifacts.load(tmp_path / "model")


def test_action_lists_may_only_grow_at_their_end(saved: Path) -> None:
    loaded = artifacts.load(saved)
    names = EventSchema().actions
    loaded.check_schema(EventSchema((*names, "gift")))
    with pytest.raises(ArtifactError, match=r"events\.actions.*train again"):
        loaded.check_schema(EventSchema(names[::-1]))
    with pytest.raises(ArtifactError, match=r"events\.devices"):
        loaded.check_schema(EventSchema(devices=("tv",)))
