"""A new artifact is swapped in, or rejected with its reason, while batches keep being ranked."""

import asyncio
import gc
import shutil
import weakref
from collections.abc import Awaitable, Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import REGISTRY

from pipeline.artifact import Artifact
from pipeline.records import encode_value
from pipeline.slates import Slate
from tests import artifacts as relatives
from tests.worker.inference.conftest import SLATE_SIZE, Logged, Serving
from worker.inference.fingerprint import fingerprint
from worker.interfaces import Batch


def item_ids(slates: list[Slate]) -> list[list[str]]:
    return [[item.item_id for item in slate.items] for slate in slates]


def swap_counts() -> dict[str, float]:
    read = REGISTRY.get_sample_value
    return {name: read("millrace_model_swaps_total", {"outcome": name}) or 0 for name in ("accepted", "rejected")}


async def test_turned_symlink_swaps_the_model_for_the_next_slates(
    serving: Serving, original: Artifact, batch: Batch, logged: Logged
) -> None:
    counts = swap_counts()
    first = serving.version
    slates = await serving.ranker.rank(batch)
    assert await serving.check() == first
    second = serving.publish("second", relatives.renumbered(original))
    assert await serving.check(1) == first, "one check cannot tell whether a copy is complete"
    assert await serving.check(1) == second
    slates_after = await serving.ranker.rank(batch)
    assert {slate.model_version for slate in slates} == {first}
    assert {slate.model_version for slate in slates_after} == {second}
    assert item_ids(slates_after) == item_ids(slates), "it is the same model in another order"
    assert swap_counts() == counts | {"accepted": counts["accepted"] + 1}
    assert REGISTRY.get_sample_value("millrace_model_info", {"version": first}) is None
    assert REGISTRY.get_sample_value("millrace_model_info", {"version": second}) == 1
    [line] = logged()
    assert (line["event"], line["before"], line["version"], line["overlap"]) == ("model swapped", first, second, 1)


async def test_folder_replaced_in_place_is_swapped_in(serving: Serving, original: Artifact) -> None:
    await serving.check()
    version = relatives.save(serving.folder / "first", relatives.nudged(original, 1))
    assert await serving.check() == version


async def test_same_content_under_another_name_is_not_swapped(serving: Serving, original: Artifact) -> None:
    strategies = serving.ranker.pipeline.strategies
    counts = swap_counts()
    serving.publish("copy", original)
    await serving.check(3)
    assert serving.ranker.pipeline.strategies is strategies
    assert swap_counts() == counts


async def test_added_export_neither_swaps_nor_rejects_nor_reads_the_model_again(
    serving: Serving, batch: Batch, logged: Logged, monkeypatch: pytest.MonkeyPatch
) -> None:
    await serving.check()
    strategies = serving.ranker.pipeline.strategies
    counts = swap_counts()
    version = serving.version
    loads: list[Path] = []
    monkeypatch.setattr("pipeline.artifact.load", loads.append)
    for backend in ("onnxruntime-cpu", "inductor"):  # the first also makes the folder of all exports
        before = fingerprint(serving.link)
        relatives.add_export(serving.folder / "first", backend)
        assert fingerprint(serving.link) != before, "the worker looks at the artifact again"
        assert await serving.check(3) == version
    assert serving.ranker.pipeline.strategies is strategies
    assert swap_counts() == counts
    assert (loads, logged()) == ([], [])
    assert {slate.model_version for slate in await serving.ranker.rank(batch)} == {version}


async def test_full_vocabulary_evicts_for_a_new_models_items_while_the_old_model_serves(
    serve: Callable[..., Serving], original: Artifact, batch: Batch
) -> None:
    serving = serve(max_items=len(original.item_ids) + 5)
    vocabulary = serving.ranker.pipeline.vocabulary
    others = [f"other{number}" for number in range(5)]
    await serving.ranker.run_in_thread(lambda: serving.ranker.pipeline.admit(others))
    new = [f"new{number}" for number in range(8)]
    version = serving.publish("second", relatives.with_new_items(original, new))
    slates = item_ids(await serving.ranker.rank(batch))
    assert await serving.check() == version
    slates_after = item_ids(await serving.ranker.rank(batch))
    assert vocabulary.evicted_count == 8
    assert not any(map(vocabulary.token, original.item_ids[-8:])), "items that the new model lacks are evicted first"
    assert all(map(vocabulary.token, [*original.item_ids[:-8], *new]))
    assert not vocabulary.pinned
    in_vocabulary = set(original.item_ids[:-8]) | set(new)
    assert all(len(slate) == SLATE_SIZE for slate in slates)
    assert all(len(slate) == SLATE_SIZE and set(slate) <= in_vocabulary for slate in slates_after)


async def test_delisted_items_do_not_count_as_missing_from_a_new_models_slates(
    serving: Serving, original: Artifact
) -> None:
    await serving.ranker.update_items([], original.item_ids[3:], live=True)
    second = serving.publish("second", relatives.nudged(original, 1))
    assert await serving.check() == second


BROKEN = {
    "weights are not finite": (relatives.not_a_number, "items.embedding.weight has numbers that are not finite"),
    "actions mean something else": (relatives.of_another_schema, "events.actions is"),
    "items have each other's ids": (relatives.mixed_up, "pipeline.min_overlap is 50.0%"),
}


@pytest.mark.parametrize(("damage", "reason"), BROKEN.values(), ids=BROKEN)
async def test_broken_artifact_is_rejected_once_and_the_old_model_continues(
    serve: Callable[..., Serving],
    original: Artifact,
    batch: Batch,
    logged: Logged,
    damage: Callable[[Artifact], Artifact],
    reason: str,
) -> None:
    serving = serve(min_overlap=0.5)
    counts = swap_counts()
    first = serving.version
    slates = await serving.ranker.rank(batch)
    await serving.check()
    serving.publish("broken", damage(original))
    assert await serving.check(5) == first
    assert item_ids(await serving.ranker.rank(batch)) == item_ids(slates)
    assert swap_counts() == counts | {"rejected": counts["rejected"] + 1}
    [line] = logged()
    assert reason in line["reason"]
    assert line["artifact"] == str((serving.folder / "broken").resolve())
    good = serving.publish("good", relatives.nudged(original, 1))
    assert await serving.check() == good, "the next artifact is validated by itself"


async def test_rejected_artifact_leaves_the_serving_models_facts_of_items(
    serve: Callable[..., Serving], original: Artifact, batch: Batch
) -> None:
    serving = serve(min_overlap=0.5)
    pipeline = serving.ranker.pipeline
    tokens = original.tokens(pipeline.vocabulary)
    before = pipeline.catalogue.facts(tokens)
    await serving.ranker.rank(batch)
    await serving.check()
    serving.publish("broken", relatives.priced(relatives.mixed_up(original), 7.0))
    await serving.check()
    assert serving.version == original.version
    for field in fields(before):
        assert (getattr(pipeline.catalogue.facts(tokens), field.name) == getattr(before, field.name)).all()
    serving.publish("good", relatives.priced(original, 7.0))
    await serving.check()
    assert (pipeline.catalogue.facts(tokens).price_codes == encode_value(7.0)).all()


async def test_damaged_file_is_rejected_until_it_is_copied_again(
    serving: Serving, original: Artifact, logged: Logged
) -> None:
    first = serving.version
    await serving.check()
    second = serving.publish("second", relatives.nudged(original, 1))
    intact = shutil.copytree(serving.folder / "second", serving.folder / "intact")
    relatives.damage(serving.folder / "second")
    assert await serving.check(4) == first
    [line] = logged()
    assert "hstu.safetensors: SHA-256 is" in line["reason"]
    shutil.copytree(intact, serving.folder / "second", dirs_exist_ok=True)
    assert await serving.check() == second


async def test_running_copy_is_ignored_until_it_is_complete(
    serving: Serving, original: Artifact, logged: Logged
) -> None:
    first = serving.version
    await serving.check()
    version = relatives.save(serving.folder / "complete", relatives.nudged(original, 1))
    (serving.folder / "slow").mkdir()
    serving.point_to("slow")
    for path in sorted((serving.folder / "complete").iterdir()):
        shutil.copy(path, serving.folder / "slow")
        assert await serving.check(1) == first
    assert await serving.check(1) == version
    [line] = logged()
    assert (line["event"], line["overlap"]) == ("model swapped", None), "nothing was served yet"


async def test_dangling_symlink_is_logged_once_and_repaired_without_a_swap(serving: Serving, logged: Logged) -> None:
    counts = swap_counts()
    first = serving.version
    serving.point_to("nowhere")
    assert await serving.check(4) == first
    [line] = logged()
    assert "manifest.json: No such file" in line["reason"]
    serving.point_to("first")
    assert await serving.check() == first
    assert swap_counts() == counts | {"rejected": counts["rejected"] + 1}


async def test_model_with_a_worse_validation_is_rejected_but_a_rollback_is_not(
    serve: Callable[..., Serving], original: Artifact
) -> None:
    serving = serve(max_hit_rate_drop=0.2)
    better = serving.publish("better", original, validation_hit_rate=0.4)
    await serving.check()
    best = serving.publish("best", relatives.nudged(original, 1), validation_hit_rate=0.6)
    assert await serving.check() == best
    serving.publish("worse", relatives.nudged(original, 2), validation_hit_rate=0.47)
    assert await serving.check() == best
    serving.point_to("better")
    assert await serving.check() == better, "it has served before: an operator can roll back"


async def test_only_slates_of_the_serving_model_are_compared(
    serving: Serving, original: Artifact, batch: Batch
) -> None:
    await serving.ranker.rank(Batch(batch.entries[:10], 512, "simple"))
    assert await serving.ranker.served_samples() == []
    slates = await serving.ranker.rank(batch)
    served = await serving.ranker.served_samples()
    assert [ring for ring, _ in served] == [entry.ring for entry in batch.entries]
    assert [items for _, items in served] == [slate.items for slate in slates]
    await serving.check()
    serving.publish("second", relatives.nudged(original, 1))
    await serving.check()
    assert await serving.ranker.served_samples() == []


async def test_replaced_model_is_freed(serving: Serving, original: Artifact, batch: Batch) -> None:
    await serving.ranker.rank(batch)
    await serving.check()
    strategies = serving.ranker.pipeline.strategies.candidates(None)
    old = [weakref.ref(strategy) for strategy, _ in strategies if strategy.name == "hstu"]
    del strategies
    serving.publish("second", relatives.nudged(original, 1))
    await serving.check()
    gc.collect()
    assert [strategy() for strategy in old] == [None]


async def test_artifact_published_while_another_is_loaded_is_the_one_that_serves(
    serving: Serving, original: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    await serving.check()
    serving.publish("second", relatives.nudged(original, 1))
    third = ""
    served_samples = serving.ranker.served_samples

    async def publish_third() -> list:
        nonlocal third
        third = serving.publish("third", relatives.nudged(original, 2))
        return await served_samples()

    monkeypatch.setattr(serving.ranker, "served_samples", publish_third)
    first = serving.version
    assert await serving.check() == first
    monkeypatch.undo()
    assert await serving.check() == third


async def test_checks_run_periodically_until_cancelled(
    serve: Callable[..., Serving], original: Artifact, eventually: Callable[..., Awaitable[Any]]
) -> None:
    serving = serve(artifact_poll_interval_s=0.01)
    following = asyncio.create_task(serving.swap.run())
    version = serving.publish("second", relatives.nudged(original, 1))
    await eventually(lambda: serving.version == version)
    following.cancel()
    await asyncio.gather(following, return_exceptions=True)
    assert following.cancelled()


def test_fingerprint_changes_with_every_change_of_the_path_and_with_nothing_else(tmp_path: Path) -> None:
    link = tmp_path / "link"
    one = tmp_path / "one"
    other = tmp_path / "other"
    seen = [fingerprint(link)]
    for folder in (one, other):
        folder.mkdir()
        (folder / "file").write_text("1")
    for change in (
        lambda: relatives.point(link, one),
        lambda: relatives.point(link, other),
        lambda: (other / "more").touch(),
        lambda: (other / "file").write_text("22"),
        lambda: (other / "file").unlink(),
    ):
        change()
        assert fingerprint(link) == fingerprint(link)
        seen.append(fingerprint(link))
    assert len(set(seen)) == len(seen)
    relatives.point(link, one)
    assert fingerprint(link) == seen[1]


@pytest.mark.parametrize(("max_events", "warnings"), [(200 + 254, 2), (200 + 255, 0)])
async def test_rings_shorter_than_the_receptive_field_are_warned_about_at_load_and_at_swap(
    serve: Callable[..., Serving],
    original: Artifact,
    logged: Logged,
    max_events: int,
    warnings: int,
) -> None:
    serving = serve(max_events=max_events)
    serving.publish("second", relatives.nudged(original, 1))
    assert await serving.check() != original.version
    assert sum("raise sequences.max_events" in line["event"] for line in logged()) == warnings
