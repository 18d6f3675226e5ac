"""Item records are read from JSON lines or delimited text as tolerantly as logs; an invalid one costs itself alone."""

import gzip
from pathlib import Path

import pytest

from pipeline.data.item_file import ItemFile, read_items
from pipeline.errors import LogFileError
from pipeline.records import Item

JSON_LINES = b'{"item_id":"a","title":"Lamp"}\n{"item_id":"b","title":"Desk"}\n'
TEXT = b"item_id,title\na,Lamp\nb,Desk\n"
LAMP_AND_DESK = [Item("a", title="Lamp"), Item("b", title="Desk")]


def read(folder: Path, content: str | bytes, name: str = "items") -> ItemFile:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return read_items(path)


def test_json_lines_are_read_as_item_records(tmp_path: Path) -> None:
    text = '{"item_id": "a", "price": 2.5, "category": ["x", "y"]}\n{"item_id": "b", "more": 1}\n'
    assert read(tmp_path, text).items == [Item("a", price=2.5, category=["x", "y"]), Item("b")]


def test_delimited_text_is_read_by_header(tmp_path: Path) -> None:
    text = (
        "item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq\n"
        '7\tThe "Wood"\t1995\tDrama War\n8\t\t\t\n9\t7" single\t1996\tSci-Fi\n'
    )
    assert read(tmp_path, text).items == [
        Item("7", title='The "Wood"', category=["Drama", "War"], tags=["1995"]),
        Item("8"),
        Item("9", title='7" single', category=["Sci-Fi"], tags=["1996"]),
    ]
    text = 'movieId,title,genres\n1,"Heat, the film",Action|Crime\n'
    assert read(tmp_path, text).items == [Item("1", title="Heat, the film", category=["Action", "Crime"])]


@pytest.mark.parametrize("content", [JSON_LINES, TEXT], ids=["json", "text"])
def test_bytes_of_an_item_file_are_read_as_those_of_a_log(content: bytes, tmp_path: Path) -> None:
    for changed in (
        b"\xef\xbb\xbf" + content,
        content.replace(b"\n", b"\r\n"),
        content.replace(b"\n", b"\n\n  \n"),
        gzip.compress(content),
        gzip.compress(content[:20]) + gzip.compress(content[20:]),
        content.rstrip(),
        content + b"\xef\xbb\xbf" + content.partition(b"\n")[0] * content.startswith(b"item_id"),
    ):
        assert read(tmp_path, changed).items == LAMP_AND_DESK


@pytest.mark.parametrize("mark", ["\u2028", "\u2029", "\u0085", "\f", "\x1c"])
def test_no_character_but_a_line_feed_ends_a_line(mark: str, tmp_path: Path) -> None:
    assert read(tmp_path, f"item_id;text\na;one{mark}two\nb;x\n", "items.csv").items[0] == Item(
        "a", text=f"one{mark}two"
    )
    if mark > " ":  # JSON escapes control characters
        text = f'{{"item_id":"a","text":"one{mark}two"}}\n{{"item_id":"b"}}\n'
        assert read(tmp_path, text).items == [Item("a", text=f"one{mark}two"), Item("b")]


def test_quoted_cells_may_have_separators_and_line_breaks(tmp_path: Path) -> None:
    text = 'item_id,text,price\n"a","one\ntwo, ""three""",5\nb,x,6\n'
    assert read(tmp_path, text).items == [Item("a", text='one\ntwo, "three"', price=5), Item("b", text="x", price=6)]


@pytest.mark.parametrize(
    ("cell", "category"),
    [
        ("Sci-Fi|Horror", ["Sci-Fi", "Horror"]),
        ("Home & Kitchen|Small Appliances", ["Home & Kitchen", "Small Appliances"]),
        ("Home & Kitchen", ["Home & Kitchen"]),
        ("Toys, Games|Books", ["Toys, Games", "Books"]),
        ("a; b ;c", ["a", "b", "c"]),
        ('"a, b"', ["a", "b"]),
        ("(no genres listed)", []),
        ("N/A", []),
        (r"\N|Drama|-", ["Drama"]),
        ("||", []),
        ("", []),
    ],
)
def test_lists_are_split_at_their_separator_and_words_for_none_are_left_out(
    cell: str, category: list[str], tmp_path: Path
) -> None:
    assert read(tmp_path, f"movieId\ttitle\tgenres\n1\tHeat\t{cell}\n".replace("\t", "::")).items[0].title == "Heat"
    content = f"item_id\ttitle\tgenres\n1\tHeat\t{cell}\n"
    assert read(tmp_path, content).items == [Item("1", title="Heat", category=category)]


def test_words_for_none_are_no_values_of_optional_fields(tmp_path: Path) -> None:
    text = "item_id,title,brand,price,created_ms\nnull,NULL,-,nan,None\nb,x,\\N,n/a,5\n"
    assert read(tmp_path, text) == ItemFile([Item("null"), Item("b", title="x", created_ms=5)], 0, "")


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ('{"item_id": "a", "title": "x"}\n{"price": 1}\n{"item_id": "b"}\n', "line 2: not an item: "),
        ('{"item_id": "a", "title": "x"}\n{"item_id": 5}\n{"item_id": "b"}\n', "Expected `str`, got `int`"),
        ('{"item_id": "a", "title": "x"}\n\n{"item_id": "c", "price": 1e999}\n{"item_id": "b"}\n', "line 3: "),
        ("item_id\ttitle\na\tx\na\t1\t2\nb\t\n", "line 3: 3 columns; the first line has 2"),
        ("item_id\tprice\ttitle\na\t\tx\nc\tdear\ty\nb\t\t\n", "line 3: not an item: "),
        ("item_id,price,title\na,,x\nc,inf,y\nb,,\n", "line 3: not an item: "),
        ('item_id,title\na,x\n"c,y\nb,\n', "line 3: a quoted cell is not closed"),
    ],
)
def test_invalid_item_is_left_out_counted_and_explained(text: str, error: str, tmp_path: Path) -> None:
    file = read(tmp_path, text)
    assert file.items == [Item("a", title="x"), Item("b")]
    assert file.unreadable == 1
    assert error in file.first_error


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"item_id": "a", "price": -1}\n', "no item in it could be read: line 1: not an item"),
        ("name\tprice\nx\t1\n", "no header that names item_id"),
        ("", "no item in it could be read: it is empty"),
        ("\n\n", "no item in it could be read: it is empty"),
        ("item_id,title\n", "no item in it could be read: it is empty"),
        ("[1, 2]", "JSON array"),
        (b"\x81\xa1a\x01", "holds MessagePack"),
        (
            '{"item_id": "a", "user_id": "u", "action": "view"}\n{"item_id": "b"}\n',
            "not one of its 2 records has a title",
        ),
        ("user\titem\nu\ti\n", "its one record has no title, text"),
    ],
)
def test_file_without_any_readable_item_is_an_error(content: str | bytes, message: str, tmp_path: Path) -> None:
    with pytest.raises(LogFileError, match=message):
        read(tmp_path, content)


def test_missing_item_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(LogFileError, match="cannot be read"):
        read_items(tmp_path / "missing")


def test_stray_quotes_of_two_items_cost_these_two(tmp_path: Path) -> None:
    path = tmp_path / "items.tsv"
    path.write_text('item_id\ttitle\tbrand\n1\t"Foo\tx\n2\t"Bar\ty\n3\tQux\tz\n')
    file = read_items(path)
    assert file.items == [Item("3", title="Qux", brand="z")]
    assert (file.unreadable, file.first_error[:40]) == (2, "line 2: a quoted cell is not closed in '")
