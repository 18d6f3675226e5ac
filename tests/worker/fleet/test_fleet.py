"""A fleet keeps its members running, ends with an exit code that is true, and leaves no process behind."""

import asyncio
import os
import signal
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from worker.backoff import Backoff
from worker.config import Config, HealthConfig
from worker.errors import CrashLoop, MemberFailed, MillraceError, NotDrained
from worker.fleet import fleet as fleets
from worker.fleet import member as members
from worker.fleet.fleet import Fleet
from worker.fleet.heartbeat import VARIABLE, beat

Eventually = Callable[..., Awaitable[Any]]
# A member without Kafka: it says its health port, and then does what BEHAVIOUR says.
SCRIPT = f"""
import os, signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(int(os.environ["DRAINED"])))
behaviour = os.environ["BEHAVIOUR"]
if behaviour == "deaf":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
while True:
    if behaviour != "hang":
        os.write(int(os.environ["{VARIABLE}"]), b"7\\n")
    if behaviour.isdigit():
        sys.exit(int(behaviour))
    time.sleep(0.05)
"""


@pytest.fixture
def make_fleet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Fleet]:
    """Return a function that makes a fleet of members with these behaviours."""
    script = tmp_path / "member.py"
    script.write_text(SCRIPT)
    monkeypatch.setattr(members, "COMMAND", (sys.executable, str(script)))

    def make(*behaviours: str, drained: int = 0, silent_s: float = 30.0) -> Fleet:
        def environment(number: int) -> dict[str, str]:
            return {"BEHAVIOUR": behaviours[number], "DRAINED": str(drained)}

        config = Config(health=HealthConfig(drain_timeout_s=0.1))
        backoff = Backoff(first_s=0.01, cap_s=0.02)
        return Fleet(config, len(behaviours), (), environment, lambda member: True, silent_s=silent_s, backoff=backoff)

    return make


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


async def test_stop_drains_every_member(make_fleet: Callable[..., Fleet], eventually: Eventually):
    fleet = make_fleet("serve", "serve", "serve")
    running = asyncio.create_task(fleet.run())
    await eventually(lambda: [member.port for member in fleet.members.values()] == [7, 7, 7])
    pids = [member.process.pid for member in fleet.members.values()]
    assert all(map(is_running, pids))
    fleet.stop()
    await running
    assert not any(map(is_running, pids))
    assert fleet.restarts == 0


async def test_member_that_is_killed_is_started_again_and_the_others_go_on(
    make_fleet: Callable[..., Fleet], eventually: Eventually
):
    fleet = make_fleet("serve", "serve")
    running = asyncio.create_task(fleet.run())
    await eventually(lambda: len(fleet.members) == 2)
    killed, other = (fleet.members[number].process.pid for number in range(2))
    os.kill(killed, signal.SIGKILL)
    await eventually(lambda: fleet.members[0].process.pid != killed)
    assert fleet.members[1].process.pid == other
    assert fleet.restarts == 1
    fleet.stop()
    await running


async def test_member_whose_interpreter_hangs_is_killed_and_started_again(
    make_fleet: Callable[..., Fleet], eventually: Eventually, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(members, "START_S", 0.3)
    fleet = make_fleet("hang", silent_s=0.3)
    running = asyncio.create_task(fleet.run())
    await eventually(lambda: fleet.members)
    hung = fleet.members[0].process
    await eventually(lambda: fleet.restarts >= 1)
    assert hung.returncode == -signal.SIGKILL
    fleet.stop()
    await running


async def test_member_that_is_slow_to_start_is_given_time(
    make_fleet: Callable[..., Fleet], eventually: Eventually, monkeypatch: pytest.MonkeyPatch
):
    fleet = make_fleet("hang", silent_s=0.1)
    running = asyncio.create_task(fleet.run())
    await eventually(lambda: fleet.members)
    await asyncio.sleep(1.0)
    assert fleet.restarts == 0
    fleet.stop()
    await running


async def test_heartbeats_end_with_a_call_when_the_fleet_is_gone():
    read_fd, write_fd = os.pipe()
    gone = asyncio.Event()
    beating = asyncio.create_task(beat(write_fd, 7, gone.set))
    await asyncio.sleep(0)
    assert os.read(read_fd, 100) == b"7\n"
    os.close(read_fd)
    async with asyncio.timeout(10):
        await gone.wait()
        await beating
    os.close(write_fd)


async def test_member_that_does_not_drain_is_killed_and_said_to_be_late(
    make_fleet: Callable[..., Fleet], eventually: Eventually, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(fleets, "STOP_GRACE_S", -1.5)
    fleet = make_fleet("deaf")
    running = asyncio.create_task(fleet.run())
    await eventually(lambda: fleet.members and fleet.members[0].port == 7)
    start_s = time.monotonic()
    fleet.stop()
    with pytest.raises(NotDrained, match=r"exit codes \[-9\]"):
        await running
    assert time.monotonic() - start_s < 5


async def test_member_that_leaves_events_open_gives_the_fleet_its_exit_code(
    make_fleet: Callable[..., Fleet], eventually: Eventually
):
    fleet = make_fleet("serve", "serve", drained=9)
    running = asyncio.create_task(fleet.run())
    await eventually(lambda: len(fleet.members) == 2)
    fleet.stop()
    with pytest.raises(NotDrained, match=r"\[9, 9\]") as caught:
        await running
    assert caught.value.exit_code == 9


@pytest.mark.parametrize(
    ("status", "error", "exit_code"), [("2", MemberFailed, 2), ("8", MemberFailed, 8), ("1", CrashLoop, 10)]
)
async def test_failure_that_a_new_start_does_not_mend_ends_the_fleet(
    make_fleet: Callable[..., Fleet], status: str, error: type[MillraceError], exit_code: int
):
    fleet = make_fleet("serve", status)
    async with asyncio.timeout(20):
        with pytest.raises(error, match=rf"worker 1 ended .*exit code {status}") as caught:
            await fleet.run()
    assert caught.value.exit_code == exit_code
    assert not is_running(fleet.members[0].process.pid)
