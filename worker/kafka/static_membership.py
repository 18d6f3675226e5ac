"""Static membership: whether another process has taken this one's `kafka.group_instance_id`.

The broker gives an instance id to whoever joined with it last, and forgets the member before. aiokafka joins again
then, which takes the id back: two processes with one id would take it from each other for ever.
"""

import asyncio
import re

from aiokafka import errors
from aiokafka.admin import AIOKafkaAdminClient

from worker.config import KafkaConfig
from worker.kafka.client import client_options

DESCRIBE_S = 5.0


async def is_instance_taken(config: KafkaConfig) -> bool:
    """Whether the group has a member with this instance id, asked by a process that is no member any more.

    A session that timed out leaves none, and the process may join again. So it may when the broker does not answer.
    """
    if config.group_instance_id is None:
        return False
    # The broker makes a static member's id from its instance id and a UUID.
    member_id = re.compile(rf"{re.escape(config.group_instance_id)}-[0-9a-f-]{{36}}")
    return any(member_id.fullmatch(member) for member in await _members(config))


async def _members(config: KafkaConfig) -> list[str]:
    admin = AIOKafkaAdminClient(**client_options(config))
    try:
        async with asyncio.timeout(DESCRIBE_S):
            await admin.start()
            responses = await admin.describe_consumer_groups([config.group_id])
    except (errors.KafkaError, OSError, TimeoutError):
        return []
    finally:
        await admin.close()
    groups = [group for response in responses for group in response.to_object()["groups"]]
    return [member["member_id"] for group in groups for member in group["members"]]
