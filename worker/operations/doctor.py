"""The checks of `millrace doctor`: try every part for real, and name the next step for each gap."""

from collections.abc import Awaitable, Callable
from importlib.util import find_spec
from typing import Any

import msgspec

from worker import logging
from worker.config import Config
from worker.errors import MillraceError, SourceError, StoreError

OK = "✓"
GAP = "✗"
OPTIONAL = "–"


class Finding(msgspec.Struct, frozen=True):
    """The result of one check. exit_code: 0 unless a required part is missing."""

    part: str
    mark: str
    text: str
    exit_code: int = 0


async def run_checks(config: Config) -> list[Finding]:
    """Check Kafka, Redis and the artifact, which are required, then the GPU and the optional dependencies."""
    required: dict[str, Callable[[Config], Awaitable[str]]] = {"kafka": _kafka, "redis": _redis, "artifact": _artifact}
    findings = [await _try(part, check, config) for part, check in required.items()]
    return [*findings, _gpu(), *map(_optional, OPTIONAL_MODULES)]


async def _try(part: str, check: Callable[[Config], Awaitable[str]], config: Config) -> Finding:
    try:
        return Finding(part, OK, await check(config))
    except MillraceError as error:
        return Finding(part, GAP, str(error), error.exit_code)


async def _kafka(config: Config) -> str:
    import asyncio

    from aiokafka import AIOKafkaConsumer
    from aiokafka.codec import has_zstd
    from aiokafka.errors import KafkaError

    from worker.clock import WallClock
    from worker.kafka.client import client_options, stop_client
    from worker.kafka.diagnosis import diagnose
    from worker.kafka.error_causes import CODEC_MISSING, describe

    kafka = config.kafka
    options: dict[str, Any] = client_options(kafka) | {"request_timeout_ms": 5000}
    consumer = AIOKafkaConsumer(**options)
    try:
        with logging.silenced("aiokafka"):  # the finding reports the error
            await asyncio.wait_for(consumer.start(), 8)
        topics = await asyncio.wait_for(consumer.topics(), 8)
    except (TimeoutError, KafkaError, OSError) as error:
        with logging.silenced("aiokafka"):
            raise SourceError(describe(kafka, *await diagnose(options, error))) from error
    finally:
        await stop_client(consumer, WallClock())
    if not has_zstd():
        raise SourceError(describe(kafka, CODEC_MISSING, "zstd, lz4 and snappy cannot be read"))
    missing = ", ".join(sorted({kafka.events_topic, kafka.recommendations_topic, kafka.dead_letter_topic} - topics))
    if missing and not kafka.create_topics:
        raise SourceError(
            f"{kafka.bootstrap_servers} has no topic {missing}; create it, or set kafka.create_topics = true"
        )
    required = f"to be created: {missing}" if missing else "the required ones among them"
    return f"{kafka.bootstrap_servers}: {len(topics)} topics, {required}"


async def _redis(config: Config) -> str:
    from worker.redis.client import connect

    client = await connect(config.redis, config.key_prefix)
    try:
        server = await client.info("server")
        memory = await client.info("memory")
    finally:
        await client.aclose()
    version = server.get("valkey_version") or server.get("redis_version")
    if memory.get("maxmemory_policy") != "noeviction" and memory.get("maxmemory"):
        raise StoreError(f"maxmemory-policy is {memory['maxmemory_policy']}: Redis would drop rings; set noeviction")
    return f"version {version}, {memory['used_memory_human']} used, functions loaded"


async def _artifact(config: Config) -> str:
    from worker.inference.load import load_pipeline

    pipeline = load_pipeline(config)
    strategies = f"strategies {', '.join(strategy.name for strategy in pipeline.strategies)}"
    if config.pipeline.artifact is None:
        return f"none configured, {strategies}; `millrace train LOG --out DIR` creates one"
    items = len(pipeline.vocabulary) - 1
    return f"{config.pipeline.artifact}: version {pipeline.version}, {items} items, {strategies}"


def _gpu() -> Finding:
    import torch

    if torch.cuda.is_available():
        return Finding("gpu", OK, f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}")
    return Finding("gpu", OPTIONAL, "torch finds none: the encoder runs on the CPU; `nvidia-smi` checks the driver")


OPTIONAL_MODULES = {  # module: (purpose, how to install it)
    "starlette": ("lookup over HTTP", "pip install 'millrace[serve]'"),
    "uvicorn": ("lookup over HTTP", "pip install 'millrace[serve]'"),
    "matplotlib": ("plots of benchmarks and learning curves", "pip install 'millrace[plots]'"),
    "vllm": ("generation (no strategy of this version uses it)", "pip install 'millrace[vllm]'"),
    "onnxruntime": ("ONNX Runtime (no strategy of this version uses it)", "pip install 'millrace[gpu]'"),
    "tensorrt": ("TensorRT (no strategy of this version uses it)", "pip install 'millrace[gpu]'"),
}


def _optional(module: str) -> Finding:
    purpose, remedy = OPTIONAL_MODULES[module]
    if find_spec(module):
        return Finding(module, OK, f"{purpose}: installed")
    return Finding(module, OPTIONAL, f"{purpose}: not installed; {remedy}")
