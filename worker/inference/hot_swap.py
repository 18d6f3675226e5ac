"""A new artifact behind the configured path is taken up while the worker runs; one that is not fit is refused.

    look ─► complete? ─► another version? ─► load, check ─► its items get tokens ─► answer, compare ─► adopt

The path is a symlink that is turned to another folder, or a folder that is replaced. All of it happens in a thread of
its own, but for two things that the pipeline's thread does between two batches: new items get tokens, and at the end
the model is exchanged, which takes microseconds. Vocabulary and counters are the process's and stay: an artifact brings
rows for items, not tokens, so nothing that was counted is touched. Until the exchange no token loses its item.
"""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TypeVar

from pipeline import artifact as artifacts
from pipeline.artifact import Artifact, Manifest
from pipeline.records import Histories
from pipeline.serving import model_validation
from pipeline.serving.pipeline import load_strategy
from pipeline.serving.strategy import Strategy
from worker import logging, metrics
from worker.config import Config
from worker.errors import MillraceError
from worker.inference.fingerprint import Fingerprint, fingerprint
from worker.inference.load import warn_of_short_rings
from worker.inference.ranker import PipelineRanker, ServedSample
from worker.interfaces import Clock

log = logging.get("hotswap")
ADMITTED_IDS = 1024  # new items at once: so long the pipeline's thread is kept from ranking, 4 ms
T = TypeVar("T")


class HotSwap:
    """Follows `pipeline.artifact`. One task looks."""

    def __init__(self, config: Config, ranker: PipelineRanker, clock: Clock) -> None:
        assert config.pipeline.artifact is not None, "without an artifact there is nothing to follow"
        self._config, self._ranker, self._clock = config, ranker, clock
        self._folder = Path(config.pipeline.artifact)
        self._thresholds = model_validation.Thresholds(config.pipeline.min_overlap, config.pipeline.max_hit_rate_drop)
        self._thread = ThreadPoolExecutor(1, "hotswap")
        self._seen: Fingerprint | None = None  # by the last look
        self._handled: Fingerprint | None = None  # what was taken up or refused
        self._serving: Manifest | None = None  # None: not seen since the start
        self._trusted = {ranker.pipeline.version}  # versions that have served in this process

    async def run(self) -> None:
        """Looks every `pipeline.artifact_poll_interval_s` until it is cancelled."""
        try:
            while True:
                await self.check()
                await asyncio.sleep(self._config.pipeline.artifact_poll_interval_s)
        finally:
            self._thread.shutdown(wait=False, cancel_futures=True)

    async def check(self) -> None:
        """Judge what is there, once, when two looks in a row have seen the same: a copy under way is not complete."""
        seen = await self._in_thread(fingerprint, self._folder)
        settled, self._seen = seen == self._seen, seen
        if not settled or seen == self._handled:
            return
        self._handled = seen
        try:
            await self._swap(seen)
        except Exception as error:  # whatever is wrong with an artifact, the serving model goes on
            reason = str(error) if isinstance(error, MillraceError) else repr(error)
            metrics.SWAPS.labels("rejected").inc()
            log.warning("artifact refused, the serving model goes on", artifact=seen[0], reason=reason)

    async def _swap(self, seen: Fingerprint) -> None:
        start_s, before = self._clock.monotonic(), self._ranker.pipeline.version
        manifest = await self._in_thread(artifacts.read_manifest, self._folder)
        if manifest.version != before:
            bar = (
                model_validation.Thresholds() if manifest.version in self._trusted else self._thresholds
            )  # a way back is always open
            model_validation.check_hit_rate(manifest, self._serving, bar)
            artifact = await self._in_thread(self._load)
            async with self._ranker.pin_items(artifact.item_ids):
                model, overlap = await self._load_valid_model(artifact, bar)
                if await self._in_thread(fingerprint, self._folder) != seen:
                    return  # replaced meanwhile: the next look sees it
                retired = [self._ranker.pipeline.strategies]
                await self._ranker.swap_model(model, manifest.version)
                await self._in_thread(retired.clear)  # the old model's tables and graphs are freed in this thread
            seconds = round(self._clock.monotonic() - start_s, 3)
            metrics.SWAPS.labels("accepted").inc()
            warn_of_short_rings(self._config, manifest)
            log.info("model swapped", before=before, version=manifest.version, overlap=overlap, seconds=seconds)
        self._serving = manifest
        self._trusted.add(manifest.version)

    async def _load_valid_model(
        self, artifact: Artifact, bar: model_validation.Thresholds
    ) -> tuple[Strategy, float | None]:
        """The model, and its overlap with the slates just served. Raises ArtifactError when it is not fit to serve."""
        await self._admit(artifact)
        model, overlap = await self._in_thread(self._validate, artifact, await self._ranker.served_samples())
        model_validation.check_overlap(overlap, bar)
        return model, overlap

    def _load(self) -> Artifact:
        artifact = artifacts.load(self._folder)
        artifact.check_schema(self._config.schema)
        return artifact

    async def _admit(self, artifact: Artifact) -> None:
        vocabulary = self._ranker.pipeline.vocabulary
        new = await self._in_thread(lambda: [item_id for item_id in artifact.item_ids if not vocabulary.token(item_id)])
        for start in range(0, len(new), ADMITTED_IDS):
            await self._ranker.run_in_thread(partial(vocabulary.admit, new[start : start + ADMITTED_IDS]))
        await self._ranker.run_in_thread(partial(artifact.load_into, self._ranker.pipeline.catalogue))

    def _validate(self, artifact: Artifact, served: list[ServedSample]) -> tuple[Strategy, float | None]:
        """Answers of all shapes first, which also warm the model, then those to the users just served."""
        pipeline, config = self._ranker.pipeline, self._config
        tokens = [pipeline.vocabulary.token(item_id) for item_id in artifact.item_ids]
        items = int((~pipeline.vocabulary.blocked[tokens]).sum())
        model = load_strategy(artifact, pipeline.catalogue, pipeline.options)
        shapes = model_validation.synthetic_histories(artifact.item_ids, [1, *config.batcher.length_buckets])
        model_validation.check_output(model, shapes, config.pipeline.slate_size, items)
        rings, slates = [ring for ring, _ in served], [slate for _, slate in served]
        longest = max(map(len, slates), default=1)
        ranked = model_validation.check_output(model, Histories.from_rings(rings), longest, items)
        return model, model_validation.slate_overlap(ranked, slates, pipeline.vocabulary.item_ids)

    async def _in_thread(self, act: Callable[..., T], *arguments: object) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, act, *arguments)
