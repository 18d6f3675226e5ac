"""An artifact that cannot be loaded for now is tried again; one that is rejected for its content is not."""

import asyncio
import errno
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from prometheus_client import REGISTRY

from pipeline.artifact import Artifact
from pipeline.errors import ArtifactError
from tests import artifacts as relatives
from tests.worker.inference.conftest import Logged, Serving
from worker.clock import VirtualClock


def count(outcome: str) -> float:
    return REGISTRY.get_sample_value("millrace_model_swaps_total", {"outcome": outcome}) or 0


def unreadable() -> ArtifactError:
    """Return the error of an artifact whose file could not be read."""
    error = ArtifactError("artifact a/manifest.json: Stale file handle")
    error.__cause__ = OSError(errno.ESTALE, "Stale file handle")
    return error


PASSING = {
    "no memory on the GPU": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
    "no memory in a library": RuntimeError("CUDA error: out of memory"),
    "no memory on the host": MemoryError(),
    "an error of the file system": OSError(errno.EIO, "Input/output error"),
    "a file that cannot be read": unreadable(),
}


@pytest.mark.parametrize("error", PASSING.values(), ids=PASSING)
async def test_artifact_that_could_not_be_loaded_for_now_is_tried_again_with_backoff(
    serve: Callable[..., Serving],
    original: Artifact,
    logged: Logged,
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
) -> None:
    now_s = 0.0
    serving = serve(clock=VirtualClock(monotonic=lambda: now_s))
    postponed = count("postponed")
    rejected = count("rejected")
    first = await serving.check()
    second = serving.publish("second", relatives.nudged(original, 1))

    def fail(folder: Path) -> Artifact:
        raise error

    with monkeypatch.context() as patched:
        patched.setattr("pipeline.artifact.load", fail)
        assert await serving.check(5) == first
        now_s = 10.0
        assert await serving.check(5) == first
    assert [line["retry_in_s"] for line in logged()] == [10, 20]
    now_s = 29.9
    assert await serving.check(5) == first, "not before the delay is over"
    now_s = 30.0
    assert await serving.check(5) == second
    assert count("postponed") == postponed + 2
    assert count("rejected") == rejected


async def test_artifact_that_is_rejected_for_its_content_is_not_tried_again(
    serve: Callable[..., Serving], original: Artifact, logged: Logged
) -> None:
    now_s = 0.0
    serving = serve(clock=VirtualClock(monotonic=lambda: now_s))
    await serving.check()
    serving.publish("broken", relatives.not_a_number(original))
    await serving.check(3)
    now_s = 1e6
    await serving.check(3)
    assert [line["event"] for line in logged()] == ["artifact rejected, serving model continues"]


async def test_link_that_points_to_itself_ends_nothing(
    serve: Callable[..., Serving], original: Artifact, eventually: Callable[..., Awaitable[Any]], logged: Logged
) -> None:
    serving = serve(artifact_poll_interval_s=0.01)
    following = asyncio.create_task(serving.swap.run())
    serving.point_to("current")
    await eventually(logged)
    assert not following.done()
    version = serving.publish("second", relatives.nudged(original, 1))
    await eventually(lambda: serving.version == version)
    following.cancel()
    await asyncio.gather(following, return_exceptions=True)
