"""Item records from a file: JSON lines as in the items topic, or delimited text with a header line.

An invalid record is left out and counted, as in logs.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import msgspec

from pipeline.data.cells import NONE_WORDS, CellSplitter
from pipeline.data.layout import BadRecord, InvalidLine, RepeatedHeader, column_title, detect_format, find_columns
from pipeline.data.parser import parsed
from pipeline.data.recorded_file import open_recorded
from pipeline.data.text_records import TextRecords, text_records
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
LIST_SEPARATORS = ("|", ";", ",")  # the first one in a cell splits it
BLANK_SEPARATED = ":token_seq"  # RecBole's type, in the header, of cells whose values are separated by blanks

_item_from_json = msgspec.json.Decoder(Item).decode


@dataclass(slots=True, frozen=True)
class ItemFile:
    """The records of a file. unreadable: number of invalid ones; first_error: what is wrong with the first of them."""

    items: list[Item]
    unreadable: int
    first_error: str


@dataclass(slots=True, frozen=True)
class ItemReader:
    """Reads item records from delimited text. header: its cells; columns: {field: column index}"""

    splitter: CellSplitter
    header: list[str]
    columns: dict[str, int]

    @classmethod
    def from_records(cls, records: TextRecords, path: Path) -> "ItemReader":
        """Find the columns in the header. LogFileError when none holds item ids."""
        header = next(records.splitter.split_valid([records.first]), None) or [records.first]
        columns = find_columns([column_title(cell).lower() for cell in header], ITEM_ALIASES)
        if "item_id" not in columns:
            titles = ", ".join(map(column_title, header))
            raise LogFileError(f"{path}: no header that names item_id in its first line '{titles[:120]}'")
        return cls(records.splitter, header, columns)

    def item(self, record: bytes) -> Item:
        """Return the record's item. InvalidLine says in one sentence what is wrong with it."""
        cells = self.splitter.split(record.rstrip(b"\r\n").decode())
        if cells == self.header:
            raise RepeatedHeader
        if len(cells) != len(self.header):
            raise InvalidLine(f"{len(cells)} columns; the first line has {len(self.header)}")
        row = {field: self._value(field, index, cells[index]) for field, index in self.columns.items()}
        return msgspec.convert({field: value for field, value in row.items() if value}, Item, strict=False)

    def _value(self, field: str, index: int, cell: str) -> str | list[str]:
        """Return a field's value, empty where the cell has none."""
        if field in LIST_FIELDS:
            return [value for value in self._values(index, cell) if value and value.lower() not in NONE_WORDS]
        return "" if field != "item_id" and cell.lower() in NONE_WORDS else cell

    def _values(self, index: int, cell: str) -> Sequence[str]:
        if self.header[index].endswith(BLANK_SEPARATED):
            return cell.split()
        separator = next((separator for separator in LIST_SEPARATORS if separator in cell), None)
        return [value.strip() for value in cell.split(separator)] if separator else [cell]


def read_items(path: Path) -> ItemFile:
    """Read every record. LogFileError when no item can be read, or none has any metadata."""
    items: list[Item] = []
    bad: list[BadRecord] = []
    for entry in chain.from_iterable(_open_blocks(path)):
        if isinstance(entry, BadRecord):
            bad.append(entry)
        else:
            items.append(entry)
    first_error = f"line {bad[0].line}: {bad[0].reason}" if bad else ""
    if not items:
        raise LogFileError(f"{path}: no item in it could be read: {first_error or 'it is empty'}")
    if all(item == Item(item.item_id) for item in items):
        those = "its one record has no" if len(items) == 1 else f"not one of its {len(items):,} records has a"
        raise LogFileError(
            f"{path}: {those} {', '.join(list(ITEM_ALIASES)[1:-1])} or tags: want item records, not events"
        )
    return ItemFile(items, len(bad), first_error)


def _open_blocks(path: Path) -> Iterator[list[Item | BadRecord]]:
    file = open_recorded(path)
    format = detect_format(path.name, file.start)
    if format == "msgpack":
        raise LogFileError(f"{path}: holds MessagePack; want item records as JSON lines or delimited text")
    if format == "json":
        return parsed(file.lines(), _item_from_json, "an item")
    records = text_records(file.lines(), None, path.name)
    if not records.first:  # only blank lines, or the file ended early
        return parsed(records.blocks(0, skip_first=False), _item_from_json, "an item")
    reader = ItemReader.from_records(records, path)
    return parsed(records.blocks(len(reader.header), skip_first=True), reader.item, "an item")
