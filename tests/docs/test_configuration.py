"""docs/configuration.md cannot go stale: its tables are those that worker/config.py gives."""

from pathlib import Path
from typing import Annotated

import msgspec
import pytest

from tests.docs.configuration import PAGE, default_of, reasons, rewritten, table, toml_literal
from worker import config_file
from worker.config import Config


class Example(msgspec.Struct):
    """A section as worker/config.py has them."""

    plain: int = 1
    short: int = 2  # at the end of the line
    # above the field,
    # on two lines
    long: Annotated[str, "x"] = "text"
    wrapped: tuple[str, ...] | None = None  # inside the parentheses


def test_page_shows_every_key_with_its_default_and_reason() -> None:
    page = PAGE.read_text()
    assert page == rewritten(page), "rewrite it: python -m tests.docs.configuration"
    for section in msgspec.structs.fields(Config):
        for key in msgspec.structs.fields(section.type):
            default = "unset" if default_of(key) is None else f"`{toml_literal(default_of(key))}`"
            reason = reasons(section.type)[key.name]
            assert f"| `{section.name}.{key.name}` | {default} | {reason} |\n" in page


def test_reason_is_the_comment_next_to_or_above_a_field() -> None:
    assert reasons(Example) == {
        "plain": "",
        "short": "at the end of the line",
        "long": "above the field, on two lines",
        "wrapped": "inside the parentheses",
    }


def test_table_writes_defaults_as_toml_does() -> None:
    assert '| `example.long` | `"text"` |' in table("example", Example)
    assert "| `example.wrapped` | unset |" in table("example", Example)
    assert toml_literal(False) == "false"
    assert toml_literal(("view", "click")) == '["view", "click"]'
    assert toml_literal(86400.0) == "86400.0"


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("| `redis.cluster` | `false` |", "| `redis.cluster` | `true` |"),
        (
            "| `sequences.ttl_days` | `90.0` | since the user's last event |",
            "| `sequences.ttl_days` | `90.0` | a quarter |",
        ),
        ("| `serve.port` | `8080` | 0: a free port |\n", ""),
    ],
)
def test_stale_row_is_rewritten(old: str, new: str) -> None:
    page = PAGE.read_text()
    assert old in page
    assert rewritten(page.replace(old, new)) == page


def test_missing_section_is_an_error() -> None:
    with pytest.raises(KeyError, match="0 headings '## redis', want 1"):
        rewritten(PAGE.read_text().replace("## redis\n", ""))


def test_every_default_of_the_page_can_be_read_back(tmp_path: Path) -> None:
    """The literals are valid TOML: a file of all defaults gives the default configuration."""
    lines: list[str] = []
    for section in msgspec.structs.fields(Config):
        lines.append(f"[{section.name}]")
        fields = msgspec.structs.fields(section.type)
        lines += [f"{key.name} = {toml_literal(default_of(key))}" for key in fields if default_of(key) is not None]
    file = tmp_path / "defaults.toml"
    file.write_text("\n".join(lines))
    assert config_file.load(file, env={}) == Config()
