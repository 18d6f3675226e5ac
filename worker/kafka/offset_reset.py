"""Seeks partitions whose next offset is missing: from the group, or from the partition itself."""

from aiokafka import TopicPartition

from worker import logging, metrics
from worker.clock import date_ms
from worker.config import KafkaConfig
from worker.errors import SourceError
from worker.kafka.consumer_group import GroupMember

log = logging.get("source")


async def seek_to_start(member: GroupMember, partition: TopicPartition, config: KafkaConfig) -> None:
    """Read a partition of which nothing is committed from `start_at` on, or from its beginning. Raises KafkaError."""
    consumer = member.consumer
    if config.start_at is None:
        await consumer.seek_to_beginning(partition)
        return
    end = (await consumer.end_offsets([partition]))[partition]  # asked for first: what comes meanwhile is read
    found = (await consumer.offsets_for_times({partition: date_ms(config.start_at)}))[partition]
    consumer.seek(partition, end if found is None else min(found.offset, end))


async def seek_into_range(member: GroupMember, tp: TopicPartition, offset: int, config: KafkaConfig) -> None:
    """Continue a partition whose next offset it does not have, as `on_offset_out_of_range` says.

    Raises SourceError when the policy is to halt, KafkaError.
    """
    consumer = member.consumer
    begin = (await consumer.beginning_offsets([tp]))[tp]
    end = (await consumer.end_offsets([tp]))[tp]
    if config.on_offset_out_of_range == "halt":
        raise _halted(tp, offset, begin, end, config)
    target = begin if config.on_offset_out_of_range == "earliest" else end
    skipped = max(0, target - offset)
    metrics.SKIPPED_RECORDS.labels(tp.topic, tp.partition).inc(skipped)
    log.error(
        "next offset not in the topic: retention deleted records before they were read, or the partition was cut",
        topic=tp.topic,
        partition=tp.partition,
        offset=offset,
        first_offset=begin,
        end_offset=end,
        continues_at=target,
        records_skipped=skipped,
    )
    consumer.seek(tp, target)


def _halted(tp: TopicPartition, offset: int, begin: int, end: int, config: KafkaConfig) -> SourceError:
    return SourceError(
        f"topic {tp.topic}, partition {tp.partition}: the next offset is {offset}, but the partition has offsets "
        f"{begin} to {end - 1}, and kafka.on_offset_out_of_range is halt; set it to earliest or latest, or stop "
        f"the group's workers, kafka-consumer-groups.sh --bootstrap-server {config.bootstrap_servers} --group "
        f"{config.group_id} --topic {tp.topic}:{tp.partition} --reset-offsets --to-offset {begin} --execute, start"
    )
