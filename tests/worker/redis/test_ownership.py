"""Deployments that share a server: each has keys of its own, and two with the same prefix never mix."""

import msgspec
import pytest

from pipeline.records import Event
from tests.worker.redis.counting import Process
from tests.worker.redis.test_slates import slate
from worker import config_file
from worker.config import Config, KafkaConfig, RedisConfig, SequencesConfig, SlatesConfig
from worker.errors import ConfigError, TopicRecreated
from worker.interfaces import ConsumedEvent, Partition, RecordOffset
from worker.lookup.lookup import Lookup
from worker.redis.client import RedisClient, connect
from worker.redis.functions import LIBRARIES, PUSH
from worker.redis.ownership import Claims, claim_keys
from worker.redis.rings.sequences import SequenceStore
from worker.redis.slates import SlateStore
from worker.replay.local_servers import LocalValkey


def deployment(server: LocalValkey, group: str, **redis: str) -> Config:
    return Config(kafka=KafkaConfig(group_id=group), redis=RedisConfig(url=server.url, **redis))


async def open_client(config: Config) -> RedisClient:
    return await connect(config.redis, config.key_prefix)


def consumed(item: str) -> ConsumedEvent:
    record_offset = RecordOffset(Partition("events", 0), 1, 0)
    return ConsumedEvent(Event("u", item, "view", 1), item.encode() * 24, record_offset, 1, 0, 0.0)


async def test_two_groups_with_one_user_and_one_item_keep_their_rings_counts_and_slates_apart(
    server: LocalValkey,
) -> None:
    keys = []
    for number, group in enumerate(("production", "staging")):
        config = deployment(server, group)
        client = await open_client(config)
        event = consumed(str(number))
        await SequenceStore(client, SequencesConfig()).push([event])
        assert event.ring == str(number).encode() * 24
        process = Process(client)
        process.observe([("a", 1 + number)])
        assert await process.store.merge()
        keys.append({key.decode() for key in await client.call("KEYS", f"{group}:*")})
        await client.aclose()
    everything = await open_client(deployment(server, "production"))
    assert len(await everything.call("KEYS", "*")) == len(keys[0]) + len(keys[1])
    await everything.aclose()
    assert {key.removeprefix("production:") for key in keys[0]} == {key.removeprefix("staging:") for key in keys[1]}
    assert {"seq:{u:u}", "cnt:{i:a}", "rec:popular"} <= {key.removeprefix("staging:") for key in keys[1]}


async def test_lookup_reads_the_slates_of_its_own_deployment(server: LocalValkey) -> None:
    for group in ("production", "staging"):
        config = deployment(server, group)
        client = await open_client(config)
        await SlateStore(client, SlatesConfig()).put([slate("u", 1, item=f"of-{group}")])
        await client.aclose()
    for group in ("production", "staging"):
        async with Lookup(deployment(server, group)) as lookup:
            assert [item.item_id for item in (await lookup.slate("u")).items] == [f"of-{group}"]


async def test_another_group_or_topic_with_the_same_prefix_does_not_start(server: LocalValkey) -> None:
    ours = deployment(server, "shop", prefix="shared/")
    client = await open_client(ours)
    await claim_keys(Claims(client), client, ours)
    await claim_keys(Claims(client), client, ours)  # a restart, or another worker of the group
    other_topic = msgspec.structs.replace(ours, kafka=KafkaConfig(group_id="shop", events_topic="other"))
    for theirs in (deployment(server, "copy", prefix="shared/"), other_topic):
        with pytest.raises(ConfigError, match=r"'shared/' belong to group shop, topic events, .*shared/owner"):
            await claim_keys(Claims(client), client, theirs)
    await client.aclose()


@pytest.mark.parametrize("prefix", ["{all}", "a b", "x" * 257])
def test_prefix_with_a_brace_white_space_or_too_many_characters_is_refused(prefix: str) -> None:
    with pytest.raises(ConfigError, match=r"MILLRACE__REDIS__PREFIX: .*256 characters"):
        config_file.load(None, {"MILLRACE__REDIS__PREFIX": prefix})


def test_prefix_is_the_groups_id_without_what_a_cluster_would_read_as_a_hash_tag() -> None:
    assert Config(kafka=KafkaConfig(group_id="shop")).key_prefix == "shop:"
    assert Config(kafka=KafkaConfig(group_id="a {b} c")).key_prefix == "abc:"
    assert Config(redis=RedisConfig(prefix="")).key_prefix == ""


async def test_functions_of_another_release_stay_beside_ours(server: LocalValkey) -> None:
    client = await connect(RedisConfig(url=server.url))
    version = PUSH.function.rpartition("_")[2]
    older = PUSH.code.replace(version, "00000000").replace("local FORMAT, EVENT_BYTES", "local FORMAT, EVENT_BYTES ")
    await client.call("FUNCTION", "LOAD", older)
    await client.load_functions()
    loaded = {library[library.index(b"library_name") + 1].decode() for library in await client.call("FUNCTION", "LIST")}
    assert len(loaded) == len(LIBRARIES) + 1
    assert {"millrace_sequences_00000000", f"millrace_sequences_{version}"} <= loaded
    await client.aclose()


async def test_deployment_keeps_its_keys_when_redis_loses_its_data(server: LocalValkey) -> None:
    ours = deployment(server, "shop", prefix="shared/")
    client = await open_client(ours)
    store = SequenceStore(client, SequencesConfig())
    await claim_keys(store.claims, client, ours)
    await store.claim_topic("events", "old-id")
    await client.call("FLUSHALL")
    await store.push([consumed("1")])
    with pytest.raises(ConfigError, match=r"belong to group shop"):
        await claim_keys(Claims(client), client, deployment(server, "copy", prefix="shared/"))
    with pytest.raises(TopicRecreated, match=r"topic events has id new-id, .* have offsets of id old-id"):
        await SequenceStore(client, SequencesConfig()).claim_topic("events", "new-id")
    await client.aclose()


async def test_push_ends_when_another_deployment_has_taken_the_keys(server: LocalValkey) -> None:
    ours = deployment(server, "shop", prefix="shared/")
    client = await open_client(ours)
    store = SequenceStore(client, SequencesConfig())
    await claim_keys(store.claims, client, ours)
    await client.call("FLUSHALL")
    await claim_keys(Claims(client), client, deployment(server, "copy", prefix="shared/"))
    with pytest.raises(ConfigError, match=r"belong to group copy"):
        await store.push([consumed("1")])
    await client.aclose()
