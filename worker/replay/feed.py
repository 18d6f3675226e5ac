"""Produce events to a topic, at once or at a rate: the load of replays, the demo and the benchmarks."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterable

import msgspec

from pipeline.records import Event
from worker.config import KafkaConfig
from worker.kafka.producer import BatchProducer, Message

STEP_EVENTS = 2000
STEP_S = 0.005  # events that fall due within it share a request
HEADERS = [("content-type", b"application/json"), ("schema", b"event/1")]

Wait = Callable[[Event], float]  # real seconds until this event may be sent; called once per event


def at_once(_: Event) -> float:
    return 0.0


def at_rate(events_per_s: float) -> Wait:
    """Return a Wait that spaces events evenly, counted from now."""
    start_s = time.monotonic()
    count = 0

    def wait(_: Event) -> float:
        nonlocal count
        count += 1
        return start_s + count / events_per_s - time.monotonic()

    return wait


async def produce(config: KafkaConfig, events: Iterable[Event], wait: Wait = at_once) -> int:
    """Append the events, keyed by user, in order per user; return their number when all are acknowledged."""
    encode = msgspec.json.Encoder().encode
    total = 0
    async with BatchProducer(config) as producer:
        async for step in _steps(events, wait):
            messages = [Message(event.user_id.encode(), encode(event), HEADERS) for event in step]
            await producer.send(config.events_topic, messages)
            total += len(step)
    return total


async def _steps(events: Iterable[Event], wait: Wait) -> AsyncIterator[list[Event]]:
    step: list[Event] = []
    for event in events:
        wait_s = wait(event)
        if step and (wait_s > 0 or len(step) == STEP_EVENTS):
            yield step
            step = []
        if wait_s > 0:
            await asyncio.sleep(max(wait_s, STEP_S))
        step.append(event)
    if step:
        yield step
