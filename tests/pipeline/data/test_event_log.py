"""Log columns equal the events: sorted by time alone, same ring bytes, and everything left out is counted."""

from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from pipeline.data.log_io import read_event_log, read_log_by_time, write_log
from pipeline.records import EVENT_DTYPE, MAX_TS_MS, Event, EventPacker, EventSchema

SCHEMA = EventSchema(actions=("view", "buy"), devices=("mobile", "tv"))
ids = st.sampled_from(["1", "10", "2", "é", "a b"])
counts = st.none() | st.integers(0, (1 << 63) - 1)
events = st.builds(
    Event,
    user_id=ids,
    item_id=ids,
    action=st.sampled_from(["view", "buy", "steal"]),
    ts_ms=st.integers(0, 5) | st.integers(0, MAX_TS_MS),
    value=st.none() | st.floats(0, 1e300),
    dwell_ms=counts,
    device=st.sampled_from([None, "mobile", "tv", "fridge"]),
    position=counts,
    context=st.none() | st.dictionaries(ids, st.integers(0, 3), max_size=2),
)


@given(st.lists(events, max_size=30))
def test_columns_equal_the_logs_events_in_event_time_order(log: list[Event]) -> None:
    ordered = sorted(log, key=lambda event: event.ts_ms)  # stable: ties keep their place in the log
    with TemporaryDirectory() as folder:
        path = Path(folder) / "log.jsonl"
        write_log(path, log)
        columns = read_event_log(path, schema=SCHEMA)
        assert list(read_log_by_time(path)) == ordered
    expected = [event for event in ordered if event.action in SCHEMA.actions]
    assert columns.unreadable == len(log) - len(expected)
    assert [columns.user_ids[user] for user in columns.users] == [event.user_id for event in expected]
    assert [columns.item_ids[item] for item in columns.items] == [event.item_id for event in expected]
    assert columns.events.tobytes() == b"".join(map(EventPacker(SCHEMA).pack, expected))
    assert columns.ts_ms.tolist() == [event.ts_ms for event in expected]


def test_bad_lines_are_counted_and_their_ids_left_out(tmp_path: Path) -> None:
    write_log(tmp_path / "log.jsonl", [Event("u1", "i1", "view", 1), Event("u2", "i2", "steal", 2)])
    with (tmp_path / "log.jsonl").open("ab") as file:
        file.write(b"not an event\n\n")
    log = read_event_log(tmp_path / "log.jsonl")
    assert (len(log), log.unreadable, log.user_ids, log.item_ids) == (1, 2, ["u1"], ["i1"])


def test_foreign_names_of_actions_are_mapped_and_unknown_ones_counted(tmp_path: Path) -> None:
    actions = ["view", "addtocart", "transaction", "addtocart", "fly"]
    write_log(tmp_path / "log.jsonl", [Event("u", "i", action, n) for n, action in enumerate(actions)])
    log = read_event_log(tmp_path / "log.jsonl")
    assert (len(log), log.unreadable, log.unknown_actions) == (1, 4, {"addtocart": 2, "transaction": 1, "fly": 1})
    log = read_event_log(tmp_path / "log.jsonl", action_aliases={"addtocart": "cart", "transaction": "purchase"})
    expected = [Event("u", "i", action, n) for n, action in enumerate(["view", "cart", "purchase", "cart"])]
    assert log.events.tobytes() == b"".join(map(EventPacker(EventSchema()).pack, expected))
    assert log.unknown_actions == {"fly": 1}


def test_empty_log_has_empty_typed_columns(tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").touch()
    log = read_event_log(tmp_path / "log.jsonl")
    assert (log.users.dtype, log.items.dtype, log.events.dtype) == (np.int32, np.int32, EVENT_DTYPE)
    assert (len(log), log.user_ids, log.unreadable) == (0, [], 0)


def test_order_of_simultaneous_events_does_not_tell_which_item_comes_next(tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    pages = rng.permuted(np.tile(np.arange(100, 300), (200, 1)), axis=1)[:, :8]  # eight of 200 items per second
    rows = [f"u\ti{item}\t{second}\n" for second, page in enumerate(pages) for item in page]
    (tmp_path / "log.tsv").write_text("user\titem\tts\n" + "".join(rows))
    log = read_event_log(tmp_path / "log.tsv")
    numbers = np.array([int(log.item_ids[item][1:]) for item in log.items]).reshape(pages.shape)
    assert (numbers == pages).all()
    assert 0.45 < (np.diff(numbers, axis=1) > 0).mean() < 0.55
