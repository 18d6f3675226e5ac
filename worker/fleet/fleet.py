"""`millrace run --workers N`: N members of the consumer group, each a process of its own.

A member that ends is started again after a delay that doubles. An exit status that a new start cannot mend (a wrong
configuration, a topic that was created again, too many dead letters) ends the fleet, as does a member that keeps
failing. The first signal drains all members.
"""

import asyncio
import signal
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from worker import logging
from worker.backoff import Backoff
from worker.clock import WallClock
from worker.config import Config
from worker.errors import (
    ArtifactError,
    ConfigError,
    CrashLoop,
    DeadLetterLimit,
    MemberFailed,
    NotDrained,
    TopicRecreated,
)
from worker.fleet.member import Member
from worker.interfaces import Clock

log = logging.get("fleet")
RESTART_BACKOFF = Backoff(first_s=1.0, cap_s=30.0)
SILENT_S = 60.0  # without a heartbeat: its interpreter hangs, where its own exit guard cannot run
CRASHES = 5  # of one member within CRASH_WINDOW_S: a new start does not help
CRASH_WINDOW_S = 300.0
STAGGER_S = 10.0  # between two starts, unless the earlier member is ready sooner: loading a model takes all of a core
CHECK_S = 0.2
STOP_GRACE_S = 3.0  # beyond a member's own `drain_timeout_s` + 2 s
FINAL = {each.exit_code for each in (ConfigError, ArtifactError, DeadLetterLimit, TopicRecreated)}


@dataclass
class Fleet:
    """Runs the members.

    arguments: of `millrace run` for each; environment: returns the variables of a member by its number
    is_ready: whether a member's health port says that it serves
    """

    config: Config
    size: int
    arguments: Sequence[str]
    environment: Callable[[int], Mapping[str, str]]
    is_ready: Callable[[Member], bool]
    clock: Clock = field(default_factory=WallClock)
    silent_s: float = SILENT_S
    backoff: Backoff = RESTART_BACKOFF

    def __post_init__(self) -> None:
        self.members: dict[int, Member] = {}
        self.restarts = 0
        self._stopping = asyncio.Event()
        self._statuses: list[int] = []

    def stop(self) -> None:
        """Drain all members; `run` returns when they have ended."""
        self._stopping.set()

    async def run(self) -> None:
        """Return when all members have drained. Raises MemberFailed, CrashLoop, NotDrained."""
        keeping: list[asyncio.Task] = []
        stopping = asyncio.create_task(self._stopping.wait(), name="stop")
        try:
            for number in range(self.size):
                keeping.append(asyncio.create_task(self._keep_running(number), name=f"worker {number}"))
                await self._stagger(number, [*keeping, stopping])
                if any(task.done() for task in (*keeping, stopping)):
                    break
            await asyncio.wait({*keeping, stopping}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            stopping.cancel()
            self._stopping.set()
            await self._drain()
            outcomes = await asyncio.gather(*keeping, return_exceptions=True)
        for outcome in outcomes:
            if isinstance(outcome, BaseException):
                raise outcome
        if any(self._statuses):
            raise NotDrained(f"members ended with exit codes {self._statuses}; the next owner reads the rest again")

    async def _stagger(self, number: int, ending: Sequence[asyncio.Task]) -> None:
        """Wait until a member serves, at most STAGGER_S, and no longer than any of these tasks runs."""
        until_s = self.clock.monotonic() + STAGGER_S
        while self.clock.monotonic() < until_s and not any(task.done() for task in ending):
            member = self.members.get(number)
            if member is not None and await asyncio.to_thread(self.is_ready, member):
                return
            await asyncio.sleep(CHECK_S)

    async def _keep_running(self, number: int) -> None:
        """Run one member, again and again, until the fleet stops. Raises MemberFailed, CrashLoop."""
        delays_s = self.backoff.delays()
        crashes_s: deque[float] = deque(maxlen=CRASHES)
        while not self._stopping.is_set():
            member = await Member.start(number, self.arguments, self.environment(number), self.clock)
            self.members[number] = member
            if self._stopping.is_set():  # it was set while the process was started
                member.signal(signal.SIGTERM)
            status = await member.ended(self.silent_s)
            if self._stopping.is_set():
                was_starting = status == -signal.SIGTERM and not member.port  # it could not handle signals yet
                self._statuses.append(0 if was_starting else status)
                return
            self._check(number, status, crashes_s)
            if self.clock.monotonic() - member.started_s > CRASH_WINDOW_S:
                delays_s = self.backoff.delays()
            delay_s = next(delays_s)
            self.restarts += 1
            log.error("worker ended, starting it again", worker=number, exit_code=status, delay_s=delay_s)
            await self._sleep(delay_s)

    def _check(self, number: int, status: int, crashes_s: deque[float]) -> None:
        """Raise an error unless the member may be started again."""
        if status in FINAL:
            raise MemberFailed(f"worker {number} ended with exit code {status}; its last log line says why", status)
        crashes_s.append(self.clock.monotonic())
        if len(crashes_s) == CRASHES and crashes_s[-1] - crashes_s[0] < CRASH_WINDOW_S:
            raise CrashLoop(
                f"worker {number} ended {CRASHES} times within {CRASH_WINDOW_S:g} s, with exit code {status} at last; "
                "its last log line says why"
            )

    async def _sleep(self, delay_s: float) -> None:
        """Sleep, but no longer than until the fleet stops."""
        try:
            async with asyncio.timeout(delay_s):
                await self._stopping.wait()
        except TimeoutError:
            pass

    async def _drain(self) -> None:
        """Let all members drain, and kill those that do not end in time."""
        for member in self.members.values():
            member.signal(signal.SIGTERM)
        running = [asyncio.ensure_future(member.process.wait()) for member in self.members.values()]
        if not running:
            return
        limit_s = self.config.health.drain_timeout_s + 2.0 + STOP_GRACE_S
        await asyncio.wait(running, timeout=limit_s)
        for member in self.members.values():
            member.signal(signal.SIGKILL)
