"""Replace the model while the worker runs, when a new artifact appears at the configured path and passes validation.

    check ─► complete? ─► another version? ─► load ─► its items get tokens ─► validate, compare slates ─► swap

The path is a symlink that is set to another folder, or a folder that is replaced. Loading and validation run in a
thread of their own. What touches the vocabulary runs in the pipeline's thread between two batches, in short chunks; the
swap itself takes microseconds. An artifact that is rejected is not tried again until the path changes, unless the
reason may pass by itself: too little memory, a file that cannot be read. Vocabulary and counters belong to the process
and stay: an artifact brings rows for items, not tokens, so no count is touched. Until the swap no token loses its item.
"""

import asyncio
import math
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np
import torch

from pipeline import artifact as artifacts
from pipeline.artifact import Artifact
from pipeline.items.catalogue import ItemFacts
from pipeline.manifest import Manifest, read_manifest
from pipeline.records import Histories
from pipeline.serving import model_validation
from pipeline.serving.generation import Generation
from pipeline.serving.model_validation import Thresholds
from pipeline.strategies.own_strategies import check_own_strategies
from pipeline.strategies.strategies import MODEL_STRATEGIES, strategies_of
from pipeline.strategies.strategy import Strategy, close_all
from pipeline.strategies.warm_up import synthetic_histories
from worker import logging, metrics
from worker.backoff import Backoff
from worker.config import Config
from worker.errors import MillraceError
from worker.executor import SingleThreadExecutor
from worker.inference.fingerprint import Fingerprint, fingerprint
from worker.inference.load import warn_about_short_rings
from worker.inference.ranker import PipelineRanker, ServedSample
from worker.interfaces import Clock
from worker.system import gc_tuning

log = logging.get("hotswap")
LOAD_CHUNK_ITEMS = 1 << 16  # items whose metadata are restored per call in the pipeline's thread
RETRY_BACKOFF = Backoff(first_s=10.0, cap_s=300.0)  # each attempt reads the artifact and warms a model up
ADMIT_CHUNK_ITEMS = 1024  # new items per call in the pipeline's thread: a call delays ranking by 4 ms


def _chunks(tokens: np.ndarray) -> Iterator[slice]:
    return (slice(start, start + LOAD_CHUNK_ITEMS) for start in range(0, len(tokens), LOAD_CHUNK_ITEMS))


class HotSwap:
    """Follows `pipeline.artifact`. For one task."""

    def __init__(self, config: Config, ranker: PipelineRanker, clock: Clock) -> None:
        assert config.pipeline.artifact is not None, "without an artifact there is nothing to follow"
        self._config = config
        self._ranker = ranker
        self._clock = clock
        self._folder = Path(config.pipeline.artifact)
        self._thresholds = Thresholds(config.pipeline.min_overlap, config.pipeline.max_hit_rate_drop)
        self._executor = SingleThreadExecutor("hotswap")
        self._last_seen: Fingerprint | None = None  # at the last check
        self._handled: Fingerprint | None = None  # accepted or rejected
        self._retry_delays_s = RETRY_BACKOFF.delays()
        self._retry_at_s = math.inf  # when the handled one is tried again; never, unless its fault may pass
        self._serving: Manifest | None = None  # None: not read since the start
        self._trusted = {ranker.pipeline.version}  # versions that have served in this process

    async def run(self) -> None:
        """Check every `pipeline.artifact_poll_interval_s` until cancelled."""
        while True:
            await self.check()
            await asyncio.sleep(self._config.pipeline.artifact_poll_interval_s)

    def close(self) -> None:
        """End the thread, once it has finished the call that it runs."""
        self._executor.close(wait=False)

    async def check(self) -> None:
        """Handle a new artifact once, when two checks in a row see the same files: until then a copy may be running."""
        seen = await self._executor.run(fingerprint, self._folder)
        is_settled = seen == self._last_seen
        self._last_seen = seen
        is_new = seen != self._handled
        if not is_settled or not (is_new or self._clock.monotonic() >= self._retry_at_s):
            return
        if is_new:
            self._retry_delays_s = RETRY_BACKOFF.delays()
        self._handled = seen
        self._retry_at_s = math.inf
        try:
            await self._swap(seen)
        except Exception as error:  # whatever is wrong with an artifact, the serving model continues
            self._handle_failure(seen, error)

    def _handle_failure(self, seen: Fingerprint, error: Exception) -> None:
        """Log and count the failure; try again later if it may pass by itself."""
        reason = str(error) if isinstance(error, MillraceError) else repr(error)
        if not _may_pass(error):
            metrics.SWAPS.labels("rejected").inc()
            log.warning("artifact rejected, serving model continues", artifact=seen[0], reason=reason)
            return
        delay_s = next(self._retry_delays_s)
        self._retry_at_s = self._clock.monotonic() + delay_s
        metrics.SWAPS.labels("postponed").inc()
        log.warning("artifact not loaded, serving model continues", artifact=seen[0], reason=reason, retry_in_s=delay_s)

    async def _swap(self, seen: Fingerprint) -> None:
        start_s = self._clock.monotonic()
        before = self._ranker.pipeline.version
        manifest = await self._executor.run(read_manifest, self._folder)
        if manifest.version != before:
            # A version that has served before always passes: an operator can roll back.
            thresholds = Thresholds() if manifest.version in self._trusted else self._thresholds
            model_validation.check_hit_rate(manifest, self._serving, thresholds)
            artifact = await self._executor.run(self._load)
            async with self._ranker.pin_items(artifact.item_ids):
                replaced, overlap = await self._replace(artifact, thresholds, seen)
            if not replaced:
                return
            for error in await self._executor.run(replaced[0].close):
                log.warning("a replaced strategy did not close", error=repr(error))
            await self._executor.run(replaced.clear)  # frees the old model's tables and graphs in this thread
            await self._executor.run(gc_tuning.settle)
            seconds = round(self._clock.monotonic() - start_s, 3)
            metrics.SWAPS.labels("accepted").inc()
            warn_about_short_rings(self._config, manifest)
            log.info("model swapped", before=before, version=manifest.version, overlap=overlap, seconds=seconds)
        self._serving = manifest
        self._trusted.add(manifest.version)

    async def _replace(
        self, artifact: Artifact, thresholds: Thresholds, seen: Fingerprint
    ) -> tuple[list[Generation], float | None]:
        """Swap the artifact's strategies in; return what served so far, and the overlap with its slates.

        Nothing is swapped when the files have changed since they were seen: the next check sees the new ones.
        ArtifactError or StrategyError when the strategies must not serve. The catalogue then is as before.
        """
        tokens = await self._admit_items(artifact)
        facts_before = await self._load_facts(artifact, tokens)
        replaced: list[Generation] = []
        try:
            strategies, overlap = await self._load_valid_strategies(artifact, thresholds, tokens)
            if await self._executor.run(fingerprint, self._folder) == seen:
                replaced.append(await self._ranker.swap(strategies, artifact.version))
            else:
                await self._executor.run(close_all, strategies)
            return replaced, overlap
        finally:
            if not replaced:
                await self._restore_facts(tokens, facts_before)

    async def _load_valid_strategies(
        self, artifact: Artifact, thresholds: Thresholds, tokens: np.ndarray
    ) -> tuple[list[Strategy], float | None]:
        """Return all strategies of the artifact, and the model's overlap with the slates just served.

        ArtifactError or StrategyError when they must not serve; then none of them stays open.
        """
        served = await self._ranker.served_samples()
        pipeline = self._ranker.pipeline
        strategies = await self._executor.run(strategies_of, pipeline.context(artifact))
        try:
            overlap = await self._executor.run(self._validate, artifact, strategies, tokens, served)
            model_validation.check_overlap(overlap, thresholds)
            check_own = partial(check_own_strategies, strategies, pipeline.vocabulary, pipeline.options.exclusion)
            await self._ranker.run_in_thread(check_own)
        except BaseException:
            await self._executor.run(close_all, strategies)
            raise
        return strategies, overlap

    def _load(self) -> Artifact:
        artifact = artifacts.load(self._folder)
        artifact.check_schema(self._config.schema)
        return artifact

    async def _admit_items(self, artifact: Artifact) -> np.ndarray:
        """Give the artifact's items tokens; return these, int64 [n]."""
        vocabulary = self._ranker.pipeline.vocabulary
        new = await self._executor.run(lambda: vocabulary.unknown(artifact.item_ids))
        for start in range(0, len(new), ADMIT_CHUNK_ITEMS):
            await self._ranker.run_in_thread(partial(vocabulary.admit, new[start : start + ADMIT_CHUNK_ITEMS]))
        return await self._executor.run(artifact.tokens, vocabulary)

    async def _load_facts(self, artifact: Artifact, tokens: np.ndarray) -> list[ItemFacts]:
        """Load the items' facts into the catalogue, and return those that they had, chunk by chunk."""
        exchange = partial(artifact.exchange_facts, self._ranker.pipeline.catalogue, tokens)
        return [await self._ranker.run_in_thread(partial(exchange, part)) for part in _chunks(tokens)]

    async def _restore_facts(self, tokens: np.ndarray, facts: list[ItemFacts]) -> None:
        """Give items without a record the facts back that they had before a rejected artifact's."""
        catalogue = self._ranker.pipeline.catalogue
        for part, before in zip(_chunks(tokens), facts, strict=True):
            await self._ranker.run_in_thread(partial(catalogue.restore_facts, tokens[part], asdict(before)))

    def _validate(
        self, artifact: Artifact, strategies: list[Strategy], tokens: np.ndarray, served: list[ServedSample]
    ) -> float | None:
        """Rank synthetic users of every shape, which also warms the model up, then the users just served.

        Returns the best model's overlap with the slates served. Only strategies of the artifact are ranked with here:
        the others read the counters, which belong to the pipeline's thread.
        """
        pipeline = self._ranker.pipeline
        config = self._config
        items = int((~pipeline.vocabulary.blocked[tokens]).sum())
        synthetic = synthetic_histories(artifact.item_ids, [1, *config.batcher.length_buckets])
        histories = Histories.from_rings([ring for ring, _ in served])
        slates = [slate for _, slate in served]
        longest = max(map(len, slates), default=1)
        overlaps = []
        for model in strategies:
            if model.name in MODEL_STRATEGIES:
                model_validation.check_output(model, synthetic, config.pipeline.slate_size, items)
                ranked = model_validation.check_output(model, histories, longest, items)
                overlaps.append(model_validation.slate_overlap(ranked, slates, pipeline.vocabulary.item_ids))
        return overlaps[0]


def _may_pass(error: BaseException | None) -> bool:
    """Whether the same files may load later: there was too little memory, or they could not be read."""
    while error is not None:
        is_missing = isinstance(error, FileNotFoundError | NotADirectoryError)  # until then the files change
        is_short_of_memory = isinstance(error, MemoryError | torch.OutOfMemoryError) or "out of memory" in str(error)
        if is_short_of_memory or (isinstance(error, OSError) and not is_missing):
            return True
        error = error.__cause__ or error.__context__
    return False
