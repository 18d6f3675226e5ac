"""The pipeline that a configuration describes: options, artifact, fallback reports."""

from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from pipeline.backends import GraphOptions
from pipeline.serving.exclusion import Exclusion
from pipeline.serving.pipeline import Pipeline, PipelineOptions
from worker import logging, metrics
from worker.config import Config
from worker.errors import ConfigError

if TYPE_CHECKING:
    from pipeline.artifact import Manifest

log = logging.get("pipeline")


def load_pipeline(config: Config) -> Pipeline:
    """The pipeline of the configuration. Raises ArtifactError, or ConfigError for an action that is not in the list."""
    batcher, served = config.batcher, config.pipeline
    graphs = GraphOptions(batcher.max_users, batcher.max_tokens, served.cuda_graph_mib, served.slate_size)
    options = msgspec.structs.replace(pipeline_options(config), graphs=graphs if served.custom_kernels else None)
    pipeline = Pipeline.load(config.pipeline.artifact, options, _log_fallback)
    if config.pipeline.artifact is not None:
        from pipeline.artifact import read_manifest  # torch, which only who has a model pays

        warn_of_short_rings(config, read_manifest(Path(config.pipeline.artifact)))
    return pipeline


def warn_of_short_rings(config: Config, manifest: "Manifest") -> None:
    """Where rings are trimmed within the model's reach, its oldest events have other features than in training."""
    cap, reach = config.sequences.max_events, manifest.config.receptive_field
    if cap < reach:
        log.warning(
            "rings are shorter than the model's reach: states of users with longer histories are not as in training; "
            "raise sequences.max_events, or train with fewer --max-events (with sessions: --history-events)",
            version=manifest.version,
            max_events=cap,
            wanted=reach,
        )


def pipeline_options(config: Config) -> PipelineOptions:
    """What serving, training and evaluation share. Raises ConfigError for an action that is not in the list."""
    try:
        exclusion = Exclusion.from_names(
            config.pipeline.exclude_actions, config.pipeline.exclude_window_days, config.schema
        )
    except KeyError as error:
        raise ConfigError(f"pipeline.exclude_actions: {error} is not in events.actions") from error
    return PipelineOptions(
        config.schema,
        exclusion,
        config.rerank,
        config.counters.half_life_days,
        config.counters.neighbours,
        config.counters.window_events,
        config.counters.max_items,
        config.pipeline.device,
        config.pipeline.threads,
    )


def _log_fallback(rung: str, error: Exception) -> None:
    metrics.FALLBACKS.labels(rung, type(error).__name__).inc()
    log.warning("a rung failed, the next one answers", rung=rung, error=repr(error))
