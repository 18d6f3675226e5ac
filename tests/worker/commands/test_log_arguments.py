"""Options that describe a log: what is recognised, left out or renamed is said on stderr."""

from argparse import ArgumentParser, Namespace
from pathlib import Path

import pytest

from pipeline.errors import LogFileError
from worker.commands.log_arguments import (
    add_items,
    add_log_layout,
    log_layout,
    read_events,
    read_records,
    say_recognised,
    with_action_aliases,
)
from worker.config import Config, EventsConfig
from worker.errors import ConfigError

Capture = pytest.CaptureFixture[str]


def parsed(log: Path, *options: str) -> Namespace:
    parser = ArgumentParser()
    parser.add_argument("log", type=Path)
    add_items(parser)
    add_log_layout(parser)
    return parser.parse_args([str(log), *options])


def test_what_is_recognised_is_said_once(tmp_path: Path, capsys: Capture) -> None:
    log = tmp_path / "log.csv"
    log.write_text("who,what,when\nu1,i1,1700000000\n")
    args = parsed(log, "--columns", "user,item,ts")
    assert len(read_events(args, Config())) == 1
    assert capsys.readouterr().err.splitlines() == [
        f"{log}: the first line, 'who what when', is taken for a header; --no-header reads it as an event",
        f"{log}: timestamps are read as seconds since 1970 (UTC)",
    ]
    args = parsed(log, "--columns", "user,item,ts", "--header", "--unit", "s")
    assert len(read_events(args, Config())) == 1
    say_recognised(args, log_layout(args))
    assert capsys.readouterr().err == ""


def test_unit_and_header_options_reach_the_reader(tmp_path: Path) -> None:
    log = tmp_path / "log.csv"
    log.write_text("7,8,9000\n")
    assert read_events(parsed(log, "--columns", "user,item,ts", "--unit", "us"), Config()).ts_ms.tolist() == [9]
    with pytest.raises(LogFileError, match="it is empty"):
        read_events(parsed(log, "--columns", "user,item,ts", "--header"), Config())


def test_actions_are_mapped_by_option_and_configuration_and_the_others_told_by_name(
    tmp_path: Path, capsys: Capture
) -> None:
    log = tmp_path / "log.csv"
    rows = ["view", "addtocart", "transaction", "fly", "fly"]
    log.write_text("visitorid,itemid,event,ts_ms\n" + "".join(f"u,i,{action},5\n" for action in rows))
    events = read_events(parsed(log), Config())
    assert len(events) == 1
    assert "unknown actions: fly 2, addtocart 1, transaction 1 (see --map-actions)" in capsys.readouterr().err
    config = Config(events=EventsConfig(action_aliases={"addtocart": "cart"}))
    args = parsed(log, "--map-actions", "transaction=purchase, fly=view")
    config = with_action_aliases(config, args)
    assert config.events.action_aliases == {"addtocart": "cart", "transaction": "purchase", "fly": "view"}
    assert len(read_events(args, config)) == 5
    assert capsys.readouterr().err == ""


def test_mistake_in_the_mapped_actions_is_one_sentence(tmp_path: Path, capsys: Capture) -> None:
    args = parsed(tmp_path, "--map-actions", "addtocart=basket")
    with pytest.raises(ConfigError, match=r"--map-actions: basket not in events\.actions \(view, "):
        with_action_aliases(Config(), args)
    with pytest.raises(SystemExit, match="2"):
        parsed(tmp_path, "--map-actions", "addtocart")
    assert "'addtocart': want NAME=ACTION,…" in capsys.readouterr().err
    for twice in ("a=cart,a=view", "a=cart, a=cart"):
        with pytest.raises(SystemExit, match="2"):
            parsed(tmp_path, "--map-actions", twice)
        assert f"'{twice}': names an action of the log twice" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "content", "options", "message"),
    [
        ("log.csv", "u,i\n", ("--columns", "user,item", "--unit", "s"), "--unit s: --columns user,item names no ts"),
        ("log.csv", "a,b\nu,i\n", ("--columns", "user=a,item=b", "--unit", "ms"), "names no ts, so it has no effect"),
        ("log.jsonl", "{}\n", ("--action", "view"), "holds json, .* --action is for delimited text"),
        ("log.msgpack", "\x01", ("--action", "rate"), "holds msgpack, .* --action is for delimited text"),
    ],
)
def test_option_that_would_have_no_effect_is_refused(
    name: str, content: str, options: tuple[str, ...], message: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(LogFileError, match=message):
        read_events(parsed(tmp_path / name, *options), Config())


def test_invalid_items_are_reported_and_skipped(tmp_path: Path, capsys: Capture) -> None:
    items = tmp_path / "items.csv"
    items.write_text("item_id,title\na,Lamp\nb\nc,Desk\n")
    assert [item.item_id for item in read_records(parsed(tmp_path, "--items", str(items)))] == ["a", "c"]
    assert capsys.readouterr().err == (
        f"{items}: 1 record cannot be read: line 3: 1 columns; the first line has 2; it is skipped, 2 items are read\n"
    )
    items.write_text("item_id,title\na,Lamp\nb\nc\n")
    assert len(read_records(parsed(tmp_path, "--items", str(items)))) == 1
    assert "2 records cannot be read, the first: line 3: 1" in (said := capsys.readouterr().err)
    assert said.endswith("; they are skipped, 1 item is read\n")
    assert read_records(parsed(tmp_path)) == []
