"""CSV and TSV files: every column as integers, real numbers or text, in bounded pieces."""

from __future__ import annotations

import codecs
import contextlib
import csv
import io
import itertools
import math
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from .rawdata import Columns, RawData
from .tabular import check_names, infinite_row, table_of, target_columns
from .untrusted import check_unpacked, decoder, most_unpacked, opened

MISSING = frozenset({"", "NA", "N/A", "NaN", "nan", "null", "NULL", "None", "?"})
LONGEST_LINE = 16 << 20  # bytes
MOST_FIELDS = 1 << 20  # of a record
CHUNK_FIELDS = 1 << 16  # text takes ten times the memory of the numbers it spells, so a table is read in pieces
DECIMAL_COMMA = re.compile(r"[-+]?\d+,\d+")


def read_csv(file: Path, target: str | None, require_target: bool) -> RawData:
    """A delimited text file with a header row: UTF-8, quotes doubled inside quotes, fields stripped of blanks."""
    data = _utf8(file)
    delimiter = "\t" if file.name.lower().endswith((".tsv", ".tsv.gz")) else delimiter_of(data)
    header = _header(file, data, delimiter)
    targets = target_columns(file, header, target, require_target)
    columns = _csv_columns(file, data, delimiter, header, targets)
    if delimiter != ",":
        refuse_decimal_commas(file, columns)
    return table_of(file, columns, targets, target)


def _utf8(file: Path) -> bytes:
    """The bytes of a plain or gzip file of UTF-8 text; ValueError naming the line that is something else."""
    with opened(file) as (stream, size, packed), decoder(file, "gzip") if packed else contextlib.nullcontext():
        data = stream.read(most_unpacked(size) + 1 if packed else -1)
    if packed:
        check_unpacked(file, size, len(data), "unpack it first (gunzip)")
    _check_utf8(file, data)
    if b"\0" in data:
        line = data.count(b"\n", 0, data.index(b"\0")) + 1
        raise ValueError(f"{file}, line {line}: a NUL character; this is not a text file, or not in UTF-8")
    return data


def _check_utf8(file: Path, data: bytes) -> None:
    """Refuse what is not UTF-8, or has a line beyond any table's; piece by piece, for text takes up to four times as
    much decoded."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    for start in range(0, len(data), LONGEST_LINE):
        piece, last = data[start : start + LONGEST_LINE], start + LONGEST_LINE >= len(data)
        try:
            decoder.decode(piece, last)
        except UnicodeDecodeError as error:
            place = start + len(piece) - len(error.object) + error.start
            line = data.count(b"\n", 0, place) + 1
            raise ValueError(
                f"{file}, line {line}: byte 0x{data[place]:02x} is not UTF-8; save the file as UTF-8"
            ) from None
        if not last and b"\n" not in piece and b"\r" not in piece:
            line = data.count(b"\n", 0, start) + 1
            raise ValueError(f"{file}, line {line}: a line of more than {LONGEST_LINE} bytes; this is no table")


def _lines(data: bytes) -> Iterator[str]:
    """The lines of UTF-8 text, without its byte order mark; decoded as they go, for all of a table's text is a lot."""
    return io.TextIOWrapper(io.BytesIO(data), encoding="utf-8-sig", newline="")


def _bounded(lines: Iterator[str], delimiter: str) -> Iterator[str]:
    """The lines, up to a record of more than MOST_FIELDS fields: one of many short lines in open quotes too."""
    fields, quoted = 0, False
    for line in lines:
        if quoted or '"' in line or len(line) > MOST_FIELDS:
            fields += line.count(delimiter)
            if fields > MOST_FIELDS:
                raise csv.Error(f"a record of more than {MOST_FIELDS} fields")
            quoted ^= line.count('"') % 2 == 1
            fields *= quoted
        yield line


def _records(file: Path, data: bytes, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """(line number, fields) of every record; blank lines are passed over, bad quoting is refused."""
    reader = csv.reader(_bounded(_lines(data), delimiter), delimiter=delimiter, strict=True)
    try:
        for fields in reader:
            if fields:
                yield reader.line_num, fields
    except csv.Error as error:
        raise ValueError(f"{file}, line {reader.line_num}: {error}; is a quote left open or not doubled?") from None


def delimiter_of(data: bytes) -> str:
    """Of comma, semicolon and tab the one that cuts the header line into most fields."""
    first = next((line for line in _lines(data) if line.strip()), "")
    beginning = first[: 1 << 16]
    return max(",;\t", key=lambda delimiter: len(next(csv.reader([beginning], delimiter=delimiter), [])))


def _header(file: Path, data: bytes, delimiter: str) -> list[str]:
    """The column names of the first record, checked."""
    first = next(_records(file, data, delimiter), None)
    if first is None:
        raise ValueError(f"{file}: an empty file; expected a header row with the column names and rows of data")
    names = [name.strip() for name in first[1]]
    numeric = _floats(names) is not None
    check_names(file, names, "; the first line holds only numbers: is the header row missing?" if numeric else "")
    return names


def _csv_columns(file: Path, data: bytes, delimiter: str, header: list[str], targets: list[str]) -> Columns:
    """Every column as integers (targets only), else float64, else text: the first that can read all its fields."""
    level = [0 if name in targets else 1 for name in header]
    while True:
        parts: list[list[np.ndarray]] = [[] for _ in header]
        for rows in _row_chunks(file, data, delimiter, len(header)):
            for j, fields in enumerate(zip(*rows, strict=True)):
                while (part := COLUMN_PARSERS[level[j]](fields)) is None:
                    level[j] += 1
                parts[j].append(part)
        if not parts[0]:
            raise ValueError(f"{file}: only a header row; expected rows of data below it")
        if all(part.dtype == column[-1].dtype for column in parts for part in column):
            break  # otherwise a late row showed that a column is text: now that it is known, read once more
    columns: Columns = {}
    for name, pieces in zip(header, parts, strict=True):
        columns[name] = np.concatenate(pieces)
        pieces.clear()  # so that there are never two of the whole table
    for name, column in columns.items():
        if (row := infinite_row(column)) is not None:
            line, _ = next(itertools.islice(_records(file, data, delimiter), row + 1, None))
            raise ValueError(f"{file}, line {line}, column {name!r}: inf, or too large for a float64")
    return columns


def _row_chunks(file: Path, data: bytes, delimiter: str, width: int) -> Iterator[list[list[str]]]:
    """The records below the header, some at a time, each of ``width`` fields."""
    rows: list[list[str]] = []
    for line, fields in itertools.islice(_records(file, data, delimiter), 1, None):
        if len(fields) != width:
            count = len(fields)
            raise ValueError(f"{file}, line {line}: {count} field{'s' * (count != 1)}, but the header has {width}")
        rows.append(fields)
        if len(rows) * width >= CHUNK_FIELDS and len(rows) > 1:
            yield rows
            rows = []
    if rows:
        yield rows


def _integers(fields: Sequence[str]) -> np.ndarray | None:
    """(n,) int64, or None where a field is not an integer literal that fits."""
    try:
        return None if "_" in "".join(fields) else np.array(list(map(int, fields)), np.int64)
    except (ValueError, OverflowError):
        return None


def _floats(fields: Sequence[str]) -> np.ndarray | None:
    """(n,) float64 with NaN for a missing field, or None where a field is neither missing nor a number."""
    if "_" in "".join(fields):
        return None  # Python alone reads 1_000 as a number
    try:
        return np.array(list(map(float, fields)), np.float64)  # most columns miss nothing: the fast way first
    except ValueError:
        stripped = map(str.strip, fields)
    try:
        return np.array([math.nan if field in MISSING else float(field) for field in stripped], np.float64)
    except ValueError:
        return None


def texts_of(fields: Sequence[str]) -> np.ndarray:
    """(n,) object array of str, None for a missing field."""
    column = np.empty(len(fields), object)
    known: dict[str, str] = {}  # equal texts are one object: a category takes the room of a pointer
    stripped = map(str.strip, fields)
    column[:] = [None if field in MISSING else known.setdefault(field, field) for field in stripped]
    return column


COLUMN_PARSERS: tuple[Callable[[Sequence[str]], np.ndarray | None], ...] = (_integers, _floats, texts_of)


def refuse_decimal_commas(file: Path, columns: Columns) -> None:
    """`1,5` between semicolons is a number to its writer: refuse it rather than make it a category."""
    for name, column in columns.items():
        present = [value for value in column if value is not None] if column.dtype.kind == "O" else []
        if present and all(DECIMAL_COMMA.fullmatch(value) for value in present):
            raise ValueError(f"{file}, column {name!r}: decimal commas ({present[0]!r}); write decimal points")
