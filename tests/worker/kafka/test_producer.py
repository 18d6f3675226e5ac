from aiokafka import partitioner
from hypothesis import given
from hypothesis import strategies as st

from worker.kafka.producer import murmur2


@given(st.binary(max_size=40))
def test_keys_hash_as_in_every_other_kafka_client(key: bytes):
    assert murmur2(key) == partitioner.murmur2(key)
