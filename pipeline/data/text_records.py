"""Records of delimited text: lines, and joined lines where a quoted cell has line breaks; the first of them by itself.

An unclosed quote costs no more than its line: lines are joined only up to a limit, and only into a record that is valid
as RFC 4180 has it and has as many cells as the first one.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, islice

from pipeline.data.cells import SEPARATORS, CellSplitter, detect_separator
from pipeline.data.layout import BadRecord
from pipeline.data.recorded_file import LineBlock

MAX_QUOTED_LINES = 500  # of one record
MAX_QUOTED_BYTES = 1 << 17  # of one record, as much as a cell may have by the csv module
SAMPLE_LINES = 1000
SAMPLE_BLOCKS = 16  # and bad records between them; of a gzipped file 8 KiB each

Blocks = Iterator[LineBlock | BadRecord]


@dataclass(slots=True)
class TextRecords:
    """The records of delimited text, of which the first has been looked at.

    first:     the first record that is not blank, empty when there is none
    following: the records after it in the first lines of the file that have as many cells
    """

    splitter: CellSplitter
    first: str
    following: list[str]
    _blocks: Blocks
    _first_lines: tuple[LineBlock, slice]

    def blocks(self, width: int, skip_first: bool) -> Blocks:
        """Return all records in blocks. width: the number of cells of one. A record may contain line breaks."""
        if skip_first:
            block, lines = self._first_lines
            block.lines[lines] = [b""] * (lines.stop - lines.start)  # blank lines keep the numbers of the others
        return _joined(self._blocks, self.splitter, width)


def text_records(blocks: Blocks, separator: str | None, name: str) -> TextRecords:
    """Look at the first record. LogFileError when no separator is found in it."""
    head = []
    for block in blocks:
        if isinstance(block, LineBlock) and any(line.strip() for line in block.lines):
            return _from_first_lines(block, blocks, head, separator, name)
        head.append(block)
    return TextRecords(CellSplitter(separator or SEPARATORS[0]), "", [], iter(head), (LineBlock(1, []), slice(0, 0)))


def _from_first_lines(
    block: LineBlock, following: Blocks, head: list[LineBlock | BadRecord], separator: str | None, name: str
) -> TextRecords:
    sample = _sample(block, following)
    lines = block.lines
    start = next(index for index, line in enumerate(lines) if line.strip())
    splitter = CellSplitter(
        separator or detect_separator(_decode(b"\n".join(lines[start : start + SAMPLE_LINES])), name)
    )
    end = _record_end(lines, start, splitter) or start + 1
    first = b"\n".join(lines[start:end])
    parts = [lines[end:], *(block.lines for block in sample[1:] if isinstance(block, LineBlock))]
    records = chain.from_iterable(_sampled(part, splitter, splitter.count(first)) for part in parts)
    return TextRecords(
        splitter,
        _decode(first),
        [_decode(record) for record in islice(records, SAMPLE_LINES)],
        chain(head, sample, following),
        (block, slice(start, end)),
    )


def _sample(block: LineBlock, following: Blocks) -> list[LineBlock | BadRecord]:
    """Return the block and what follows it up to SAMPLE_LINES, with the lines between two bad records in one block."""
    sample: list[LineBlock | BadRecord] = [block]
    missing = SAMPLE_LINES - len(block.lines)
    for more in islice(following, SAMPLE_BLOCKS) if missing > 0 else ():
        if isinstance(more, LineBlock):
            missing -= len(more.lines)
        if isinstance(more, LineBlock) and isinstance(sample[-1], LineBlock):
            sample[-1].lines += more.lines
        else:
            sample.append(more)
        if missing <= 0:
            break
    return sample


def _sampled(lines: list[bytes], splitter: CellSplitter, width: int | None) -> Iterator[bytes]:
    """Yield the records of these lines that have this number of cells.

    Where a record may go on after the last line, its own first line alone is left out: that is all an open quote costs.
    """
    start = 0
    while start < len(lines):
        end = _record_end(lines, start, splitter, width) or start + 1
        record = b"\n".join(lines[start:end])
        if record.strip() and splitter.count(record.rstrip(b"\r")) == width:
            yield record
        start = end


def _decode(line: bytes) -> str:
    return line.rstrip(b"\r").decode("utf-8", "replace")


def _joined(blocks: Blocks, splitter: CellSplitter, width: int) -> Blocks:
    for block in blocks:
        if isinstance(block, BadRecord) or not splitter.has_quotes or not any(b'"' in line for line in block.lines):
            yield block
        else:
            yield from _join(block, blocks, splitter, width)


def _join(block: LineBlock, following: Blocks, splitter: CellSplitter, width: int) -> Blocks:
    """Join the lines of a block, and of those that follow as long as its last record goes on."""
    first = block.first
    lines = block.lines
    records = []
    after = None
    start = 0
    while start < len(lines):
        end = _record_end(lines, start, splitter, width)
        while end is None:
            after = after or next(following, None)
            if not isinstance(after, LineBlock):  # the file's end, or a line that cannot be read
                end = start + 1
                break
            yield LineBlock(first, records)  # where every block ends within a record, memory stays bounded
            records = []
            first += start
            lines = lines[start:] + after.lines
            start = 0
            after = None
            end = _record_end(lines, start, splitter, width)
        records.append(b"\n".join(lines[start:end]))
        start = end
    yield LineBlock(first, records)
    if after is not None:
        yield after


def _record_end(lines: list[bytes], start: int, splitter: CellSplitter, width: int | None = None) -> int | None:
    """Return the index after the last line of the record that starts here; None when more lines are needed to say.

    width: number of cells that a record of several lines must have; None: any
    """
    if not splitter.has_quotes or b'"' not in lines[start] or splitter.count(lines[start].rstrip(b"\r")) is not None:
        return start + 1
    size = len(lines[start])
    for end in range(start + 2, len(lines) + 1):
        line = lines[end - 1]
        size += len(line) + 1
        if end - start > MAX_QUOTED_LINES or size > MAX_QUOTED_BYTES:
            return start + 1
        if b'"' in line:
            cells = splitter.count(b"\n".join(lines[start:end]).rstrip(b"\r"))
            if cells is not None:
                return end if cells and width in (None, cells) else start + 1
    return None
