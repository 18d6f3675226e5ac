import asyncio

from worker.interfaces import Partition, PolledRecords
from worker.stream.poll_queue import PollQueue


def share(partition: int) -> PolledRecords:
    return PolledRecords(Partition("events", partition), 1, 0, 0, 0.0, [])


def test_many_polls_are_taken_as_one_in_their_order() -> None:
    polled = PollQueue()
    for partition in (2, 0, 1):
        polled.put([share(partition)])
    assert [each.partition.partition for [each] in asyncio.run(polled.take())] == [2, 0, 1]


def test_a_taker_waits_for_a_poll_and_ends_only_when_all_is_taken() -> None:
    async def scenario() -> None:
        polled = PollQueue()
        taker = asyncio.create_task(polled.take())
        await asyncio.sleep(0)
        assert not taker.done()
        polled.put([share(0)])
        assert len(await taker) == 1
        polled.put([share(1)])
        polled.close()
        assert len(await polled.take()) == 1
        assert await polled.take() == []

    asyncio.run(scenario())
