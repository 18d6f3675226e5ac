"""Send dead letters back to where they came from, each record once, whatever number of copies the topic has.

Records and progress are written in one transaction per chunk. In memory are one chunk, one poll per partition, and 8
bytes of digest per record.
"""

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import aclosing

from aiokafka import AIOKafkaProducer, TopicPartition, errors

from worker.errors import SinkError, SinkUnavailable
from worker.kafka.client import client_options, retry_at_start, stop_client, with_admin
from worker.kafka.error_causes import explain, is_permanent
from worker.kafka.topic_reader import OffsetRange
from worker.operations.dead_letter_topic import DeadLetterRecord, DeadLetterTopic
from worker.operations.requeue_progress import ProgressWalk, RequeueProgress

# Per transaction: 8 MiB take a loaded broker a second or two, of the 30 s of `request_timeout_ms`.
CHUNK_LETTERS = 2000
CHUNK_BYTES = 8 << 20


class Requeue:
    """One run over the dead letters whose reason contains `reason`, oldest first, at most `limit` records.

    missing: number of matching letters by origin topic, where that topic does not exist: they stay for later
    """

    def __init__(self, topic: DeadLetterTopic, reason: str = "", limit: int | None = None) -> None:
        self.missing: Counter[str] = Counter()
        self._topic = topic
        self._config = topic.config
        self._reason = reason
        self._limit = limit
        self._stored: dict[int, RequeueProgress] = {}  # by partition, as the group has committed it
        self._walks: dict[int, ProgressWalk] = {}

    async def select(self) -> AsyncGenerator[DeadLetterRecord]:
        """Yield the letters that `run` would send. SourceUnavailable, SourceError."""
        self._stored = await self._topic.progress()
        topics = await with_admin(self._config, self._topic.clock, lambda admin: admin.list_topics())
        sent = await self._identities_of_requeued()
        count = 0
        async with aclosing(self._topic.letters(self._stored, self._after_progress)) as letters:
            async for letter in letters:
                is_selected = count != self._limit and self._is_next(letter, sent, topics)
                if is_selected:
                    sent.add(letter.identity())
                    count += 1
                walk = self._walks.setdefault(letter.partition, ProgressWalk(self._progress(letter.partition)))
                walk.add(letter.offset, letter.requeued or letter.not_requeueable or letter.identity() in sent)
                if is_selected:
                    yield letter
                if count == self._limit:
                    return

    async def run(self) -> AsyncIterator[list[DeadLetterRecord]]:
        """Send the selected letters, and yield them chunk by chunk when they are sent.

        Raises SinkUnavailable when a chunk is not sent (run it again), SinkError, and the errors of `select`.
        """
        producer = AIOKafkaProducer(**client_options(self._config), transactional_id=self._topic.group)
        try:
            # Before the progress is read: this ends the open transaction of another requeue, and fences that one.
            await retry_at_start(self._config, self._topic.clock, producer.start)
            chunk: list[DeadLetterRecord] = []
            size = 0
            async with aclosing(self.select()) as letters:
                async for letter in letters:
                    chunk.append(letter)
                    size += letter.size
                    if len(chunk) == CHUNK_LETTERS or size >= CHUNK_BYTES:
                        await self._send_chunk(producer, chunk)
                        yield chunk
                        chunk = []
                        size = 0
            await self._send_chunk(producer, chunk)  # progress moves over copies, too
            yield chunk
        finally:
            await stop_client(producer, self._topic.clock)

    def _progress(self, partition: int) -> RequeueProgress:
        return self._stored.get(partition, RequeueProgress())

    def _is_next(self, letter: DeadLetterRecord, sent: set[bytes], topics: Sequence[str]) -> bool:
        """Whether to send this letter; count those that cannot be because their topic is gone."""
        if letter.requeued or letter.not_requeueable or self._reason not in letter.reason:
            return False
        if letter.identity() in sent:
            return False
        if letter.origin[0] in topics:
            return True
        self.missing[letter.origin[0]] += 1
        return False

    async def _identities_of_requeued(self) -> set[bytes]:
        """Return the identities of the letters that earlier runs sent: a copy may have come since."""
        letters = self._topic.letters(self._stored, self._up_to_progress)
        return {letter.identity() async for letter in letters if letter.requeued and not letter.not_requeueable}

    def _up_to_progress(self, partition: int, offsets: OffsetRange) -> OffsetRange:
        return OffsetRange(offsets.begin, max(offsets.begin, min(offsets.end, self._progress(partition).end)))

    def _after_progress(self, partition: int, offsets: OffsetRange) -> OffsetRange:
        return OffsetRange(min(offsets.end, max(offsets.begin, self._progress(partition).offset)), offsets.end)

    async def _send_chunk(self, producer: AIOKafkaProducer, chunk: Sequence[DeadLetterRecord]) -> None:
        moved = {partition: walk.progress() for partition, walk in self._walks.items()}
        moved = {partition: each for partition, each in moved.items() if each != self._progress(partition)}
        offsets = {
            TopicPartition(self._config.dead_letter_topic, partition): each.to_offset(self._topic.group)
            for partition, each in moved.items()
        }
        if not offsets:
            return
        try:
            async with asyncio.timeout(self._config.request_timeout_ms / 1000), producer.transaction():
                await asyncio.gather(*await _send(producer, chunk))
                await producer.send_offsets_to_transaction(offsets, self._topic.group)
        except (errors.KafkaError, TimeoutError) as error:
            if is_permanent(error):
                raise SinkError(explain(self._config, error, self._config.dead_letter_topic)) from error
            raise SinkUnavailable(
                f"requeue to kafka {self._config.bootstrap_servers}: {error!r}; run it again"
            ) from error
        self._stored |= moved


async def _send(producer: AIOKafkaProducer, letters: Sequence[DeadLetterRecord]) -> list[asyncio.Future]:
    """Send each record to the partition it came from, where its user's other events are; by key if that is gone."""
    partitions: Mapping[str, set[int]] = {
        topic: await producer.partitions_for(topic) for topic in {letter.origin[0] for letter in letters}
    }
    acknowledgements = []
    for letter in letters:
        topic, origin_partition, _ = letter.origin
        partition = origin_partition if origin_partition in partitions[topic] else None
        value = letter.value if letter.key is not None else letter.value or b""  # a record has a key or a value
        acknowledgements.append(
            await producer.send(topic, value, letter.key, partition=partition, headers=letter.headers)
        )
    return acknowledgements
