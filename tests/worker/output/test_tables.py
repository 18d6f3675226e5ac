"""Texts of records reach a terminal without their control characters."""

import asyncio
from pathlib import Path

import msgspec
import pytest

from tests.kafka.broker import Broker
from tests.worker.lookup.test_lookup import make_slate
from worker import logging
from worker.cli import main
from worker.config import LogConfig, RedisConfig, SlatesConfig
from worker.interfaces import DeadLetter, Partition, RecordOffset
from worker.kafka.producer import BatchProducer
from worker.kafka.sink import dead_letter_message
from worker.output.tables import print_tables, table
from worker.redis.client import connect
from worker.redis.slates import SlateStore

HOSTILE = "\x1b]0;owned\x07\x1b[31mred\r\x9b2J\u202e"


def is_harmless(text: str) -> bool:
    return all(character.isprintable() or character == "\n" for character in text)


def test_cells_and_titles_are_escaped_and_rows_stay_on_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    rows = table("a", title=HOSTILE)
    rows.add_row(HOSTILE)
    rows.add_row("two\nlines")
    print_tables(rows)
    printed = capsys.readouterr().out
    assert is_harmless(printed)
    assert "\\x1b[31mred\\r\\x9b2J\\u202e" in printed
    assert "two\\nlines" in printed


async def test_lookup_and_dead_letters_of_hostile_records_print_harmlessly(
    kafka: str, valkey: str, topics, monkeypatch, capsys
) -> None:
    topic = topics("dead")
    monkeypatch.setenv("MILLRACE__KAFKA__BOOTSTRAP_SERVERS", kafka)
    monkeypatch.setenv("MILLRACE__KAFKA__DEAD_LETTER_TOPIC", topic)
    monkeypatch.setenv("MILLRACE__KAFKA__CREATE_TOPICS", "true")
    monkeypatch.setenv("MILLRACE__REDIS__URL", valkey)
    monkeypatch.setenv("MILLRACE__REDIS__PREFIX", "")
    hostile = HOSTILE.encode()
    offset = RecordOffset(Partition("events", 0), 1, 0)
    letter = DeadLetter(offset, hostile, hostile, [], 0, f"unknown action {HOSTILE}")
    await asyncio.to_thread(main, ["dlq", "ls"])  # creates the topic
    async with BatchProducer(Broker(kafka, topics).config()) as producer:
        await producer.send(topic, [dead_letter_message(letter)])
    client = await connect(RedisConfig(url=valkey))
    await SlateStore(client, SlatesConfig()).put([make_slate(HOSTILE)])
    await client.aclose()
    assert await asyncio.to_thread(main, ["dlq", "ls"]) == 0
    assert await asyncio.to_thread(main, ["lookup", HOSTILE]) == 0
    await asyncio.to_thread(main, ["lookup", f"nobody {HOSTILE}"])
    printed = capsys.readouterr()
    assert is_harmless(printed.out)
    assert is_harmless(printed.err)
    assert printed.out.count("\\x1b[31mred") >= 4


def test_console_logs_escape_the_texts_of_records(capsys: pytest.CaptureFixture[str]) -> None:
    logging.configure(LogConfig(format="console"))
    logging.get("here").warning("a record", user_id=HOSTILE)
    assert is_harmless(capsys.readouterr().err)


def test_names_of_a_log_are_escaped_where_they_are_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = tmp_path / "log.jsonl"
    events = [{"user_id": "u", "item_id": "i", "action": action, "ts_ms": 1} for action in ("view", HOSTILE)]
    log.write_bytes(b"\n".join(map(msgspec.json.encode, events)))
    assert main(["train", str(log), "--out", str(tmp_path / "artifact")]) == 2
    printed = capsys.readouterr().err
    assert "\\x1b[31mred" in printed
    assert is_harmless(printed)
