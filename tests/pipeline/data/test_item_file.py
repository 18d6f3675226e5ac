"""Item records are read from JSON lines or delimited text; an invalid one is an error with its line."""

from pathlib import Path

import pytest

from pipeline.data.item_file import read_items
from pipeline.errors import LogFileError
from pipeline.records import Item


def write(folder: Path, text: str) -> Path:
    path = folder / "items"
    path.write_text(text)
    return path


def test_json_lines_are_read_as_item_records(tmp_path: Path) -> None:
    path = write(tmp_path, '{"item_id": "a", "price": 2.5, "category": ["x", "y"]}\n{"item_id": "b", "more": 1}\n')
    assert read_items(path) == [Item("a", price=2.5, category=["x", "y"]), Item("b")]


def test_delimited_text_is_read_by_header(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        "item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq\n"
        '7\tThe "Wood"\t1995\tDrama War\n8\t\t\t\n',
    )
    assert read_items(path) == [Item("7", title='The "Wood"', category=["Drama", "War"], tags=["1995"]), Item("8")]
    path = write(tmp_path, 'movieId,title,genres\n1,"Heat, the film",Action|Crime\n')
    assert read_items(path) == [Item("1", title="Heat, the film", category=["Action", "Crime"])]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"item_id": "a"}\n{"price": 1}\n', "line 2: not an item"),
        ('{"item_id": "a", "price": -1}\n', "line 1: not an item"),
        ("name\tprice\nx\t1\n", "no header that names item_id"),
        ("item_id\tprice\na\t1\t2\n", "line 2: 3 columns"),
        ("item_id\tprice\na\tdear\n", "line 2: not an item"),
        ("", "no header"),
        (
            '{"item_id": "a", "user_id": "u", "action": "view"}\n{"item_id": "b"}\n',
            "not one of its 2 records has a title",
        ),
        ("user\titem\nu\ti\n", "not one of its 1 records has a title"),
    ],
)
def test_invalid_item_is_an_error_with_its_line(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(LogFileError, match=message):
        read_items(write(tmp_path, text))


def test_missing_item_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(LogFileError, match="cannot be read"):
        read_items(tmp_path / "missing")
