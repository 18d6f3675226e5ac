"""Cells are split as RFC 4180 says, and what is not quoted properly is text."""

import csv
import io

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.data.cells import SEPARATORS, CellSplitter, OpenQuoteError, detect_separator, quoted
from pipeline.errors import LogFileError

texts = st.text("ab\",;\t \n'|", max_size=6)


@given(st.lists(texts, min_size=1, max_size=5), st.sampled_from([",", ";", "\t", "|", " "]))
def test_written_cells_are_split_back(cells: list[str], separator: str) -> None:
    file = io.StringIO()
    csv.writer(file, delimiter=separator, quoting=csv.QUOTE_ALL, lineterminator="").writerow(cells)
    blanks = " \t".replace(separator, "")
    assert CellSplitter(separator).split(file.getvalue()) == [cell.strip(blanks) for cell in cells]


@given(st.lists(texts.map(lambda text: text.replace(",", "")), min_size=1, max_size=5))
def test_cells_are_quoted_where_they_need_it(cells: list[str]) -> None:
    cells = [cell.replace("\n", "").strip() for cell in cells]
    assert CellSplitter(",").split(",".join(map(quoted, cells))) == cells


@pytest.mark.parametrize(
    ("separator", "record", "cells"),
    [
        (",", "u1, i1 ,\t5", ["u1", "i1", "5"]),
        (",", ' "a ""b"", c" ,d', ['a "b", c', "d"]),
        (",", '" u ",x', ["u", "x"]),
        (";", '"276725";"03,45";5', ["276725", "03,45", "5"]),
        ("\t", '"u 1"\t"i1"\t5', ["u 1", "i1", "5"]),
        ("\t", '7" single\tThe "Wood"\t"A" and "B"', ['7" single', 'The "Wood"', 'A and "B"']),
        ("\t", " a b \t\tc", ["a b", "", "c"]),
        ("|", '"a|b"|', ["a|b", ""]),
        ("::", '"a::b"::c', ['"a', 'b"', "c"]),
        ('"', 'a"b', ["a", "b"]),
        (" ", "a\tb  c", ["a\tb", "", "c"]),
        (",", "", [""]),
    ],
)
def test_blanks_and_quotes_belong_to_a_cell_or_not(separator: str, record: str, cells: list[str]) -> None:
    assert CellSplitter(separator).split(record) == cells


@pytest.mark.parametrize("record", ['"a', 'x,"', '"a"",b', 'x, "a\nb'])
def test_cell_that_is_not_closed_is_an_error(record: str) -> None:
    with pytest.raises(OpenQuoteError, match="not closed"):
        CellSplitter(",").split(record)


@pytest.mark.parametrize("separator", SEPARATORS)
def test_separator_is_detected_outside_of_quotes(separator: str) -> None:
    assert detect_separator(f'"a,b;\t"{separator}c', "log") == separator
    with pytest.raises(LogFileError, match="no tab, '::', comma or semicolon"):
        detect_separator('"a,b" c', "log")
