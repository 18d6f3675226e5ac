"""The batcher's invariants: one unfinished batch per user, earliest deadline first, budgets, nothing left over."""

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.records import EVENT_BYTES, Event
from worker.config import BatcherConfig
from worker.interfaces import Batch, ConsumedEvent, Partition, RecordOffset
from worker.stream.batcher import LARGE_SLATE, Batcher

PARTITION = Partition("events", 0)


class StillClock:
    def now_ms(self) -> int:
        return 1_000_000

    def monotonic(self) -> float:
        return 1000.0


def consumed(
    user: str, offset: int, *, events: int = 1, ts_ms: int = 1_000_000, partition: int = 0, **request
) -> ConsumedEvent:
    event = Event(user, "item", "view", ts_ms)
    record_offset = RecordOffset(Partition("events", partition), 1, offset)
    ring = b"\1" * (EVENT_BYTES * events)
    return ConsumedEvent(
        event, b"", record_offset, offset + 1, polled_ms=1_000_000, polled_s=1000.0, ring=ring, **request
    )


async def take(batcher: Batcher) -> Batch:
    batch = await asyncio.wait_for(batcher.next(), 10)
    assert batch is not None
    return batch


def users(batch: Batch) -> list[str]:
    return [entry.user_id for entry in batch.entries]


async def test_events_of_one_user_coalesce_into_one_entry_with_the_latest_ring():
    batcher = Batcher(BatcherConfig(), StillClock())
    batcher.add([consumed("a", 1, events=1), consumed("b", 2), consumed("a", 3, events=2)])
    batch = await take(batcher)
    assert users(batch) == ["a", "b"]
    assert [len(batch.entries[0].events), len(batch.entries[0].ring)] == [2, 2 * EVENT_BYTES]
    assert {record_offset.offset for record_offset in batch.record_offsets} == {1, 2, 3}


async def test_dropped_partition_leaves_the_entries_of_others_and_of_unfinished_batches():
    batcher = Batcher(BatcherConfig(max_users=1), StillClock())
    batcher.add([consumed("a", 1), consumed("b", 2), consumed("c", 3, partition=1), consumed("c", 4)])
    first = await take(batcher)
    batcher.add([consumed("a", 5), consumed("a", 6, partition=1)])
    batcher.drop(PARTITION)
    assert batcher.pending == 3
    assert batcher.ring_bytes == 3 * EVENT_BYTES
    assert users(await take(batcher)) == ["c"]
    batcher.finish(first)
    second = await take(batcher)
    assert [record_offset.offset for record_offset in second.record_offsets] == [6]


async def test_user_of_an_unfinished_batch_waits_until_it_finishes():
    batcher = Batcher(BatcherConfig(), StillClock())
    batcher.add([consumed("a", 1)])
    first = await take(batcher)
    batcher.add([consumed("a", 2), consumed("a", 3)])
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(batcher.next(), 0.01)
    batcher.finish(first)
    assert [len(entry.events) for entry in (await take(batcher)).entries] == [2]


async def test_without_coalescing_each_event_has_its_own_entry_in_order():
    batcher = Batcher(BatcherConfig(coalesce=False), StillClock())
    batcher.add([consumed("a", offset) for offset in range(3)])
    seen = []
    while batcher.pending:
        batch = await take(batcher)
        seen += [record_offset.offset for record_offset in batch.record_offsets]
        batcher.finish(batch)
    assert seen == [0, 1, 2]


@pytest.mark.parametrize("other", [{"strategy": "simple"}, {"k": 3}, {"partition": 1}])
async def test_events_with_different_requests_never_share_a_slate(other: dict):
    batcher = Batcher(BatcherConfig(), StillClock())
    batcher.add([consumed("a", 1), consumed("a", 2, **other)])
    first = await take(batcher)
    assert len(list(first.record_offsets)) == 1
    batcher.finish(first)
    assert len(list((await take(batcher)).record_offsets)) == 1


async def test_earliest_deadline_first_and_client_clocks_gain_at_most_half_the_slo():
    batcher = Batcher(BatcherConfig(max_users=1, slo_ms=100), StillClock())
    batcher.add([consumed("late", 1), consumed("future", 2, ts_ms=9_999_999), consumed("early", 3, ts_ms=999_970)])
    batcher.add([consumed("ancient", 4, ts_ms=5)])
    order = [(await take(batcher)).entries[0] for _ in range(4)]
    assert [entry.user_id for entry in order] == ["ancient", "early", "late", "future"]
    assert [entry.deadline_ms for entry in order] == [1_000_050, 1_000_070, 1_000_100, 1_000_100]


async def test_batch_keeps_its_bucket_and_shorter_rings_fill_it():
    batcher = Batcher(BatcherConfig(length_buckets=(4, 16)), StillClock())
    batcher.add([consumed("short", 1, events=4), consumed("long", 2, events=5), consumed("short2", 3, events=1)])
    first = await take(batcher)
    assert (first.bucket, users(first)) == (4, ["short", "short2"])
    assert (second := await take(batcher)).bucket == 16
    assert users(second) == ["long"]


async def test_entry_that_outgrows_its_bucket_moves_to_the_next():
    batcher = Batcher(BatcherConfig(length_buckets=(4, 16)), StillClock())
    batcher.add([consumed("grows", 1, events=4), consumed("grows", 2, events=5), consumed("short", 3)])
    batch = await take(batcher)
    assert batch.bucket == 16
    assert users(batch) == ["grows", "short"]


async def test_token_budget_closes_a_batch_but_one_ring_always_fits():
    batcher = Batcher(BatcherConfig(max_tokens=10), StillClock())
    batcher.add([consumed("huge", 1, events=30), consumed("a", 2, events=6), consumed("b", 3, events=6)])
    assert [users(await take(batcher)) for _ in range(3)] == [["huge"], ["a"], ["b"]]


async def test_closed_batcher_returns_waiting_entries_then_none():
    batcher = Batcher(BatcherConfig(), StillClock())
    batcher.add([consumed("a", 1)])
    batch = await take(batcher)
    batcher.add([consumed("a", 2)])
    batcher.close()
    batcher.finish(batch)
    batcher.finish(await take(batcher))
    assert await asyncio.wait_for(batcher.next(), 10) is None


moves = st.lists(st.tuples(st.sampled_from("abcde"), st.integers(1, 40), st.booleans()), max_size=60)


@given(moves, st.integers(1, 3), st.integers(1, 64), st.booleans())
async def test_every_event_is_batched_once_in_order_and_users_never_overlap(
    plan: list, max_users: int, max_tokens: int, coalesce: bool
):
    batcher = Batcher(BatcherConfig(max_users, max_tokens, length_buckets=(8, 32), coalesce=coalesce), StillClock())
    unfinished: list[Batch] = []
    answered: dict[str, list[int]] = {}

    async def take_or_finish() -> None:
        if batcher._lanes:
            batch = await take(batcher)
            busy = {user for other in unfinished for user in users(other)}
            assert not busy & set(users(batch))
            assert len(batch.entries) <= max_users
            assert all(len(entry.ring) <= 32 * EVENT_BYTES or batch.bucket == 32 for entry in batch.entries)
            unfinished.append(batch)
        elif unfinished:
            batch = unfinished.pop(0)
            for entry in batch.entries:
                answered.setdefault(entry.user_id, []).extend(event.record_offset.offset for event in entry.events)
            batcher.finish(batch)

    expected: dict[str, list[int]] = {}
    for offset, (user, events, step) in enumerate(plan):
        batcher.add([consumed(user, offset, events=events)])
        expected.setdefault(user, []).append(offset)
        if step:
            await take_or_finish()
    while batcher.pending:
        await take_or_finish()
    assert answered == expected


async def test_waiting_entry_keeps_its_latest_ring_only_and_bytes_are_counted_until_it_is_finished():
    batcher = Batcher(BatcherConfig(), StillClock())
    events = [consumed("a", offset, events=offset) for offset in range(1, 50)]
    batcher.add([*events, consumed("b", 50, events=7)])
    assert [len(event.ring) for event in events] == [0] * 48 + [49 * EVENT_BYTES]
    assert batcher.ring_bytes == (49 + 7) * EVENT_BYTES
    batcher.finish(await take(batcher))
    assert batcher.ring_bytes == 0


async def test_user_who_requests_a_large_slate_is_ranked_apart_from_the_others():
    batcher = Batcher(BatcherConfig(), StillClock())
    batcher.add([consumed("a", 1), consumed("b", 2, k=512), consumed("c", 3, k=LARGE_SLATE), consumed("d", 4, k=300)])
    assert users(await take(batcher)) == ["a", "c"]
    assert users(await take(batcher)) == ["b", "d"]
