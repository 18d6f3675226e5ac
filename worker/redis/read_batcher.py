"""Single reads, joined into pipelines: any number of GETs at a time need one connection per node.

The GETs of one turn of the event loop go out together, those that come meanwhile go with the next pipeline. A key that
is requested twice is read once. In a cluster each node has its own pipelines, so one that is down fails its own keys.
"""

import asyncio
from collections import defaultdict
from collections.abc import Collection
from dataclasses import dataclass, field
from itertools import islice

from worker.errors import StoreError, StoreUnavailable
from worker.redis.client import RedisClient

MAX_GETS = 256  # per pipeline: 400 KB of slates, which Redis sends in a millisecond
ATTEMPTS = 2  # a node of a cluster that fails closes the client's connections to all: the others' keys are read again

Read = asyncio.Future[bytes | None]


@dataclass(slots=True)
class Lane:
    """The reads of one node that are not yet sent, oldest first, and the task that sends them."""

    waiting: dict[str, Read] = field(default_factory=dict)
    task: asyncio.Task[None] | None = None


class ReadBatcher:
    """Reads keys of one server or cluster, with at most one pipeline per node at a time."""

    def __init__(self, client: RedisClient) -> None:
        self._client = client
        self._lanes: defaultdict[str, Lane] = defaultdict(Lane)

    async def get(self, key: str) -> bytes | None:
        """Return the key's value. Raises StoreUnavailable, StoreError. The caller sets the deadline."""
        key.encode()  # raises here for text that is not Unicode, and not for those whose pipeline it would share
        lane = self._lanes[self._client.node_of(key)]
        read = lane.waiting.get(key)
        if read is None:
            read = asyncio.get_running_loop().create_future()
            lane.waiting[key] = read
        if lane.task is None or lane.task.done():
            lane.task = asyncio.create_task(self._send(lane), name="read slates")
        return await asyncio.shield(read)  # another caller may wait for the same key

    async def aclose(self) -> None:
        """Cancel what is still being read."""
        tasks = [lane.task for lane in self._lanes.values() if lane.task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _send(self, lane: Lane) -> None:
        """Read until nothing waits. A failed pipeline fails all that wait for its node, so their number is bounded."""
        reads: dict[str, Read] = {}
        try:
            while lane.waiting:
                reads = {key: lane.waiting.pop(key) for key in list(islice(lane.waiting, MAX_GETS))}
                for read, reply in zip(reads.values(), await self._replies(reads), strict=True):
                    _settle(read, reply)
        except asyncio.CancelledError:
            self._fail(lane, reads, StoreUnavailable(f"the client of Redis at {self._client.address} was closed"))
            raise
        except Exception as error:
            self._fail(lane, reads, error)

    async def _replies(self, keys: Collection[str]) -> list[bytes | StoreError | None]:
        attempts = ATTEMPTS if self._client.is_cluster else 1
        for attempt in range(1, attempts + 1):
            try:
                return await self._client.replies([("GET", key) for key in keys])
            except StoreUnavailable:
                if attempt == attempts:
                    raise
        raise AssertionError("the last attempt returns or raises")

    def _fail(self, lane: Lane, reads: dict[str, Read], error: Exception) -> None:
        for read in (*reads.values(), *lane.waiting.values()):
            _settle(read, error)
        lane.waiting.clear()


def _settle(read: Read, reply: bytes | Exception | None) -> None:
    if read.done():
        return
    if isinstance(reply, Exception):
        read.set_exception(reply)
        read.exception()  # or asyncio would log it where the caller's deadline has passed
    else:
        read.set_result(reply)
