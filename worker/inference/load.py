"""Load the pipeline that a configuration describes, and report its fallbacks."""

from pathlib import Path

import msgspec

from pipeline.backends.encoder import GraphOptions
from pipeline.manifest import Manifest, read_manifest
from pipeline.serving.generation import Fallback
from pipeline.serving.pipeline import Pipeline
from pipeline.strategies.exclusion import Exclusion
from pipeline.strategies.options import PipelineOptions
from worker import logging, metrics
from worker.config import Config
from worker.errors import ConfigError

log = logging.get("pipeline")


def load_pipeline(config: Config) -> Pipeline:
    """Load the configured pipeline. Raises ArtifactError, DeviceError, StrategyError, ConfigError."""
    batcher = config.batcher
    served = config.pipeline
    graphs = GraphOptions(batcher.max_users, batcher.max_tokens, served.cuda_graph_mib, served.slate_size)
    options = msgspec.structs.replace(pipeline_options(config), graphs=graphs if served.custom_kernels else None)
    pipeline = Pipeline.load(served.artifact, options, _log_fallback)
    _check_strategy(config, pipeline)
    if served.artifact is not None:
        warn_about_short_rings(config, read_manifest(Path(served.artifact)))
    return pipeline


def _check_strategy(config: Config, pipeline: Pipeline) -> None:
    """Raise ConfigError when `pipeline.strategy` names no strategy."""
    if config.pipeline.strategy is not None:
        try:
            pipeline.strategies.check(config.pipeline.strategy)
        except ValueError as error:
            raise ConfigError(f"pipeline.strategy: {error}") from error


def warn_about_short_rings(config: Config, manifest: Manifest) -> None:
    """Warn if rings are shorter than the model's receptive field: its oldest events then lack features of training."""
    max_events = config.sequences.max_events
    receptive_field = manifest.config.receptive_field
    if max_events < receptive_field:
        log.warning(
            "rings shorter than the model's receptive field: states of users with longer histories differ from "
            "training; raise sequences.max_events, or train with fewer --max-events (with sessions: --history-events)",
            version=manifest.version,
            max_events=max_events,
            receptive_field=receptive_field,
        )


def pipeline_options(config: Config) -> PipelineOptions:
    """Return the options that serving, training and evaluation share.

    Raises ConfigError for an action in `pipeline.exclude_actions` that is not in `events.actions`.
    """
    try:
        exclusion = Exclusion.from_names(
            config.pipeline.exclude_actions, config.pipeline.exclude_window_days, config.schema
        )
    except KeyError as error:
        raise ConfigError(f"pipeline.exclude_actions: {error} is not in events.actions") from error
    return PipelineOptions(
        schema=config.schema,
        exclusion=exclusion,
        ring_events=config.sequences.max_events,
        rerank=config.rerank,
        half_life_days=config.counters.half_life_days,
        neighbours=config.counters.neighbours,
        window_events=config.counters.window_events,
        max_items=config.counters.max_items,
        device=config.pipeline.device,
        threads=config.pipeline.threads,
        strategies=config.pipeline.strategies,
    )


def _log_fallback(fallback: Fallback) -> None:
    labels = fallback.strategy, type(fallback.error).__name__
    fields = {"strategy": fallback.strategy, "error": repr(fallback.error), "users": fallback.users}
    if fallback.is_resting:
        metrics.FALLBACKS.labels(*labels).inc()
        log.warning("strategy failed, the next one answers", **fields)
    elif fallback.users:
        metrics.SET_ASIDE_USERS.labels(*labels).inc(fallback.users)
        log.warning("strategy failed for some users of a batch, whom the next one answers", **fields)
    else:
        log.warning("strategy failed, and answered the batch at its second attempt", **fields)
