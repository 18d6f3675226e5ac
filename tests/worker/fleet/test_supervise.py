"""What a member's configuration differs in, which GPUs there are, and the page of all members' metrics."""

from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest

from worker.config import Config, HealthConfig, KafkaConfig, PipelineConfig
from worker.fleet import endpoint
from worker.fleet.endpoint import FleetCollector, FleetProbes
from worker.fleet.supervise import member_environment, visible_gpus
from worker.stream.health import HealthServer


class Page:
    """A member of which only the health port is known."""

    def __init__(self, port: int) -> None:
        self.port = port


class Serving:
    """Probes of a member that serves, or says why it does not."""

    def __init__(self, problem: str = "") -> None:
        self.problem = problem

    def alive(self) -> tuple[bool, str]:
        return True, "alive"

    def serving(self) -> tuple[bool, str]:
        return not self.problem, self.problem or "serving"


def registry(events: int, seconds: float) -> CollectorRegistry:
    made = CollectorRegistry()
    Counter("millrace_events", "Events", registry=made).inc(events)
    Histogram("millrace_slate_seconds", "Time", ["stage"], buckets=(0.1, 1.0), registry=made).labels("x").observe(
        seconds
    )
    return made


def test_members_differ_in_what_two_processes_cannot_share(monkeypatch: pytest.MonkeyPatch):
    config = Config(
        kafka=KafkaConfig(group_instance_id="pod-3"), pipeline=PipelineConfig(state_dir="/state"), health=HealthConfig()
    )
    first, second = (member_environment(config, number, ["0", "1"]) for number in (0, 3))
    assert first["MILLRACE__KAFKA__GROUP_INSTANCE_ID"] == "pod-3-0"
    assert second["MILLRACE__PIPELINE__STATE_DIR"] == "/state/worker-3"
    assert (first["CUDA_VISIBLE_DEVICES"], second["CUDA_VISIBLE_DEVICES"]) == ("0", "1")
    assert first["MILLRACE__HEALTH__PORT"] == "0"
    assert first["MILLRACE__PIPELINE__THREADS"] == "1"


def test_settings_that_processes_may_share_are_left_alone():
    variables = member_environment(Config(pipeline=PipelineConfig(threads=4)), 1, ["0"])
    assert set(variables) == {"MILLRACE_WORKER", "MILLRACE__HEALTH__HOST", "MILLRACE__HEALTH__PORT"}


def test_gpus_are_those_that_the_process_may_use(tmp_path: Path):
    for name in ("nvidia0", "nvidia1", "nvidia10", "nvidiactl", "nvidia-uvm"):
        (tmp_path / name).touch()
    assert visible_gpus({}, tmp_path) == ["0", "1", "2"]
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": "3, GPU-a"}, tmp_path) == ["3", "GPU-a"]
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": ""}, tmp_path) == []


def test_metrics_of_all_members_are_on_one_page_each_with_its_worker():
    servers = [
        HealthServer(HealthConfig(port=0), Serving(), registry(events=2 + number, seconds=0.5)) for number in range(2)
    ]
    members = {number: Page(server.port) for number, server in enumerate(servers)} | {2: Page(0)}
    together = CollectorRegistry()
    together.register(FleetCollector(members))  # pyright: ignore[reportArgumentType]: of a member only its port is read
    page = generate_latest(together).decode()
    for line in (
        "# TYPE millrace_events_total counter",
        'millrace_events_total{worker="0"} 2.0',
        'millrace_events_total{worker="1"} 3.0',
        'millrace_slate_seconds_bucket{le="1.0",stage="x",worker="1"} 1.0',
    ):
        assert line in page.splitlines()
    assert 'worker="2"' not in page
    assert page.count("# TYPE millrace_events_total counter") == 1
    for server in servers:
        server.close()


def test_fleet_serves_when_all_members_do_and_names_those_that_do_not(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(endpoint, "TIMEOUT_S", 5.0)
    good, bad = (HealthServer(HealthConfig(port=0), Serving(problem)) for problem in ("", "redis: it is away"))
    members = {0: Page(good.port), 1: Page(bad.port)}
    probes = FleetProbes(members, 3)  # pyright: ignore[reportArgumentType]: as above
    assert probes.serving() == (False, "worker 2: not started; worker 1: redis: it is away")
    assert FleetProbes({0: members[0]}, 1).serving() == (True, "serving, workers: 1")  # pyright: ignore[reportArgumentType]
    bad.close()
    assert probes.serving()[1].startswith("worker 2: not started; worker 1: does not answer")
    good.close()
