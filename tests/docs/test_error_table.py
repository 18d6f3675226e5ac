"""docs/operations.md explains every cause that an error of Kafka may name."""

import re
from pathlib import Path

from worker.config import KafkaConfig
from worker.kafka.error_causes import CAUSES, cause_of, describe

PAGE = Path(__file__).parents[2] / "docs" / "operations.md"


def test_page_has_the_table_of_causes() -> None:
    _, section = PAGE.read_text().split("| it says: Kafka at HOST:PORT … | it means | what to do |\n|---|---|---|\n")
    rows = re.findall(r"\| (.*?) \| (.*?) \| (.*?) \|\n", section.split("\n\n")[0] + "\n")
    assert rows == [(cause.says, cause.means, cause.action) for cause in CAUSES]


def test_every_cause_is_one_sentence_with_its_values_and_no_secret() -> None:
    config = KafkaConfig(sasl_username="shop", sasl_password="hunter2", group_instance_id="pod-0", ssl_cafile="ca.pem")
    for cause in CAUSES:
        text = describe(config, cause, "detail")
        assert text.startswith("Kafka at localhost:9092 ")
        assert "detail); " in text
        assert "hunter2" not in text


def test_errors_of_the_table_are_found_by_their_class_and_by_their_name_in_text() -> None:
    for cause in CAUSES:
        for kind in cause.errors:
            assert cause_of(kind("text")) is cause
