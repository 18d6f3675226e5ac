"""Checks what a fleet needs, then runs it with its endpoint until a signal."""

import os
import signal
from collections.abc import Mapping, Sequence
from pathlib import Path

from prometheus_client import CollectorRegistry, Gauge

from worker import logging
from worker.clock import WallClock
from worker.config import Config
from worker.errors import ConfigError
from worker.fleet.endpoint import FleetCollector, FleetProbes, is_ready
from worker.fleet.fleet import Fleet
from worker.interfaces import Clock
from worker.kafka.client import ensure_topics, list_partitions
from worker.stream.health import HealthServer
from worker.stream.signals import handle_signals

log = logging.get("fleet")
NUMBER_VARIABLE = "MILLRACE_WORKER"  # a member's number, which its log lines show
CORES_PER_WORKER = 2  # a worker's event loop and its pipeline's thread share one interpreter; Kafka and Redis need some


async def run_fleet(config: Config, size: int | None, arguments: Sequence[str]) -> None:
    """Run so many workers, None: as many as the cores and the topic's partitions suggest, until a signal.

    arguments: of `millrace run` for each. Raises ConfigError, SourceError, SourceUnavailable, and Fleet.run's errors.
    """
    clock = WallClock()
    size = await _checked_size(config, size, clock)
    gpus = visible_gpus()
    fleet = Fleet(config, size, arguments, lambda number: member_environment(config, number, gpus), is_ready, clock)
    registry = CollectorRegistry()
    registry.register(FleetCollector(fleet.members))
    Gauge("millrace_fleet_workers", "Worker processes of this fleet", registry=registry).set(size)
    restarts = Gauge("millrace_fleet_restarts", "Members that ended and were started again", registry=registry)
    restarts.set_function(lambda: fleet.restarts)
    server = HealthServer(config.health, FleetProbes(fleet.members, size), registry)
    log.info("starting workers", workers=size, health_port=server.port, gpus=gpus)

    def stop(number: signal.Signals) -> None:
        log.info("draining", signal=number.name)
        fleet.stop()

    handle_signals(stop)
    try:
        await fleet.run()
    finally:
        server.close()
    log.info("all workers drained and committed")


async def _checked_size(config: Config, size: int | None, clock: Clock) -> int:
    kafka = config.kafka
    await ensure_topics(kafka, clock, kafka.worker_topics)
    partitions = len(await list_partitions(kafka, clock, kafka.events_topic))
    if size is None:
        return max(1, min(partitions, len(os.sched_getaffinity(0)) // CORES_PER_WORKER))
    if size > partitions:
        raise ConfigError(
            f"--workers {size}: topic {kafka.events_topic} has {partitions} partitions, and a worker without one has "
            "nothing to do; start fewer workers, or add partitions"
        )
    return size


def member_environment(config: Config, number: int, gpus: Sequence[str]) -> dict[str, str]:
    """Return the variables in which a member's configuration differs from its fleet's."""
    variables = {NUMBER_VARIABLE: str(number), "MILLRACE__HEALTH__HOST": "127.0.0.1", "MILLRACE__HEALTH__PORT": "0"}
    if config.kafka.group_instance_id is not None:
        variables["MILLRACE__KAFKA__GROUP_INSTANCE_ID"] = f"{config.kafka.group_instance_id}-{number}"
    if config.pipeline.state_dir is not None:
        variables["MILLRACE__PIPELINE__STATE_DIR"] = str(Path(config.pipeline.state_dir) / f"worker-{number}")
    if not config.pipeline.threads:  # torch would start a thread per core in each process
        variables["MILLRACE__PIPELINE__THREADS"] = "1"
    if len(gpus) > 1:
        variables["CUDA_VISIBLE_DEVICES"] = gpus[number % len(gpus)]
    return variables


def visible_gpus(environment: Mapping[str, str] = os.environ, devices: Path = Path("/dev")) -> list[str]:
    """Return the names of the GPUs that this process may use, without starting CUDA."""
    if (named := environment.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [name.strip() for name in named.split(",") if name.strip()]
    numbers = sorted(int(path.name[6:]) for path in devices.glob("nvidia[0-9]*"))
    return [str(index) for index, _ in enumerate(numbers)]
