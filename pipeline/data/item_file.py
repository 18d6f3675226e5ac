"""Item records from a file: JSON lines as in the items topic, or delimited text with a header line."""

import csv
from collections.abc import Iterator
from pathlib import Path

import msgspec

from pipeline.data.layout import column_title, find_columns
from pipeline.errors import LogFileError
from pipeline.records import Item

ITEM_ALIASES = {
    "item_id": ("item_id", "item", "itemid", "movieid", "movie_id", "product_id", "asin"),
    "title": ("title", "name", "movie_title", "product_name"),
    "text": ("text", "description"),
    "category": ("category", "categories", "class", "genre", "genres"),
    "brand": ("brand", "artist", "studio"),
    "price": ("price",),
    "created_ms": ("created_ms",),
    "tags": ("tags", "release_year", "year"),
}
LIST_FIELDS = ("category", "tags")


def read_items(path: Path) -> list[Item]:
    """Read every record. LogFileError names the line of an invalid one, or says that none has any metadata."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise LogFileError(f"{path}: cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise LogFileError(f"{path}: cannot be read: {error}") from error
    read = _read_json if lines and lines[0].lstrip().startswith("{") else _read_text
    items = list(read(path, lines))
    if items and all(item == Item(item.item_id) for item in items):
        raise LogFileError(
            f"{path}: not one of its {len(items):,} records has a {', '.join(list(ITEM_ALIASES)[1:-1])} or tags: want"
            " item records, not events"
        )
    return items


def _read_json(path: Path, lines: list[str]) -> Iterator[Item]:
    decode = msgspec.json.Decoder(Item).decode
    for number, line in enumerate(lines, 1):
        try:
            yield decode(line)
        except msgspec.DecodeError as error:
            raise LogFileError(f"{path}, line {number}: not an item: {error}") from error


def _read_text(path: Path, lines: list[str]) -> Iterator[Item]:
    separator = "\t" if lines and "\t" in lines[0] else ","
    rows = csv.reader(lines, delimiter=separator, quoting=csv.QUOTE_NONE if separator == "\t" else csv.QUOTE_MINIMAL)
    titles = [column_title(cell).lower() for cell in next(rows, [])]
    columns = find_columns(titles, ITEM_ALIASES)
    if "item_id" not in columns:
        raise LogFileError(f"{path}: no header that names item_id in its first line '{', '.join(titles)[:120]}'")
    for number, row in enumerate(rows, 2):
        if len(row) != len(titles):
            raise LogFileError(f"{path}, line {number}: {len(row)} columns; the first line has {len(titles)}")
        cells = {field: row[index] for field, index in columns.items() if row[index]}
        try:
            yield msgspec.convert({**cells, **_split_lists(cells)}, Item, strict=False)
        except msgspec.ValidationError as error:
            raise LogFileError(f"{path}, line {number}: not an item: {error}") from error


def _split_lists(cells: dict[str, str]) -> dict[str, list[str]]:
    return {field: cells[field].replace("|", " ").split() for field in LIST_FIELDS if field in cells}
