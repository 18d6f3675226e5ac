from aiokafka import partitioner
from hypothesis import given
from hypothesis import strategies as st

from worker.kafka.producer import murmur2


@given(st.binary(max_size=40))
def test_murmur2_equals_the_hash_of_other_kafka_clients(key: bytes):
    assert murmur2(key) == partitioner.murmur2(key)
