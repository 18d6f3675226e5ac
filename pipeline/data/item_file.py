"""Items' records from a file: JSON lines as the items topic holds them, or delimited text with a header line."""

import csv
from collections.abc import Iterator
from pathlib import Path

import msgspec

from pipeline.errors import LogFileError
from pipeline.records import Item

# Header names, lower case, without RecBole's `:type`: the first found is read.
ALIASES = {
    "item_id": ("item_id", "item", "itemid", "movieid", "movie_id", "product_id", "asin"),
    "title": ("title", "name", "movie_title", "product_name"),
    "text": ("text", "description"),
    "category": ("category", "categories", "class", "genre", "genres"),
    "brand": ("brand", "artist", "studio"),
    "price": ("price",),
    "created_ms": ("created_ms",),
    "tags": ("tags", "release_year", "year"),
}
LISTS = ("category", "tags")


def read_items(path: Path) -> list[Item]:
    """Every record. LogFileError names the line that is none, or says that no record tells anything of its item."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise LogFileError(f"{path}: cannot be read: {error}") from error
    read = _json if lines and lines[0].lstrip().startswith("{") else _text
    items = list(read(path, lines))
    if items and all(item == Item(item.item_id) for item in items):
        raise LogFileError(
            f"{path}: not one of its {len(items):,} records has a {', '.join(list(ALIASES)[1:-1])} or tags: want items'"
            " records, not events"
        )
    return items


def _json(path: Path, lines: list[str]) -> Iterator[Item]:
    decode = msgspec.json.Decoder(Item).decode
    for number, line in enumerate(lines, 1):
        try:
            yield decode(line)
        except msgspec.DecodeError as error:
            raise LogFileError(f"{path}, line {number}: not an item: {error}") from error


def _text(path: Path, lines: list[str]) -> Iterator[Item]:
    separator = "\t" if lines and "\t" in lines[0] else ","
    rows = csv.reader(lines, delimiter=separator, quoting=csv.QUOTE_NONE if separator == "\t" else csv.QUOTE_MINIMAL)
    titles = [title.partition(":")[0].strip().lower() for title in next(rows, [])]
    places = {
        field: titles.index(name)
        for field, names in ALIASES.items()
        if (name := next((name for name in names if name in titles), None))
    }
    if "item_id" not in places:
        raise LogFileError(f"{path}: no header that names item_id in its first line '{', '.join(titles)[:120]}'")
    for number, row in enumerate(rows, 2):
        if len(row) != len(titles):
            raise LogFileError(f"{path}, line {number}: {len(row)} columns; the first line has {len(titles)}")
        cells = {field: row[place] for field, place in places.items() if row[place]}
        try:
            yield msgspec.convert({**cells, **_lists(cells)}, Item, strict=False)
        except msgspec.ValidationError as error:
            raise LogFileError(f"{path}, line {number}: not an item: {error}") from error


def _lists(cells: dict[str, str]) -> dict[str, list[str]]:
    return {field: cells[field].replace("|", " ").split() for field in LISTS if field in cells}
