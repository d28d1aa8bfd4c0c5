"""Shards of tables on the disk: Parquet by its row groups, CSV by pieces that one look through the file has found.

Leans on `shards`, and on `readers` for what columns and fields mean; pyarrow is imported only where a table is opened.
"""

from __future__ import annotations

import bisect
import csv
import functools
import io
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import checks
from .readers import Columns, csv_files, parquet_files, rawdata, tabular, untrusted
from .shards import CHUNK_BYTES, LEAST_CHUNKS, NOWHERE, File, Piece, Room, Shard

LINE_BYTES = 1 << 24  # a longer line is no table's


class _Table(Shard):
    """Named columns: the features, the target columns, and the column of the weights or None."""

    def _settle(self, names: Sequence[str], target: str | None, weight: str | None, require_target: bool) -> None:
        """Decide what each column is for."""
        tabular.check_names(self.path, names)
        if weight is not None and weight not in names:
            listed = rawdata.listed(names)
            raise ValueError(f"{self.path}: no column of weights is called {weight!r} (its columns: {listed})")
        self._target, self._weight = target, weight
        self._targets = tabular.target_columns(self.path, names, target, require_target)
        self.names = list(names)
        self.feature_names = [name for name in names if name not in self._targets and name != weight]
        if not self.feature_names:
            listed = rawdata.listed(names)
            raise ValueError(f"{self.path}: no column is left for the features (its columns: {listed})")

    def _piece(self, columns: Columns, first_row: int) -> Piece:
        for name, column in columns.items():
            if (row := tabular.infinite_row(column)) is not None:
                raise ValueError(f"{self.path}, row {first_row + row} (counting from 0), column {name!r}: inf")
        w = None if self._weight is None else columns.pop(self._weight)
        raw = tabular.table_of(self.path, columns, self._targets, self._target)
        return Piece(raw.x, raw.y, w)


# --- Parquet ---------------------------------------------------------------------------------------------------------


class ParquetShard(_Table):
    """A Parquet file; its row groups are what is read at once."""

    overhead = 3.0

    def __init__(self, path: Path, target: str | None, weight: str | None, require_target: bool) -> None:
        self.files = [File(path)]
        self._arrow = parquet_files.load_pyarrow(path)
        with self.files[0].open() as stream:
            self._metadata, groups, schema = parquet_files.footer_of(self._arrow, path, stream)
        lengths = [group.num_rows for group in groups if group.num_rows]
        self._groups = [g for g, group in enumerate(groups) if group.num_rows]
        names = [name for name in schema.names if not parquet_files.INDEX_NAME.fullmatch(name)]
        self._settle(names, target, weight, require_target)
        self._first = [0, *itertools.accumulate(lengths)]
        self.rows = self._first[-1]
        if not self.rows:
            raise ValueError(f"{path}: no rows; columns: {rawdata.listed(names)}")
        self.schema = {f"column {name!r}": str(schema.field(name).type) for name in names}
        size = sum(group.total_byte_size for group in groups)
        self.row_bytes = max(8.0 * len(names), size / self.rows)

    def bounds(self, chunk_rows: int) -> list[int]:
        return self._first

    def extents(self, start: int, stop: int) -> Iterator[tuple[File, int, int]]:
        at = bisect.bisect_right(self._first, start) - 1
        size, rows = self.files[0].size, self.rows  # by its share of the rows: where it lies, only its columns know
        first, last = (self._first[i] * size // rows for i in (at, at + 1))
        yield self.files[0], first, last - first

    def read(self, start: int, stop: int, into: Room = NOWHERE) -> Piece:
        at = bisect.bisect_right(self._first, start) - 1
        with self.files[0].open() as stream, untrusted.decoder(self.path, "Parquet"):
            parquet = self._arrow.parquet.ParquetFile(
                stream, metadata=self._metadata, **parquet_files.bounds_of(stream)
            )
            table = parquet.read_row_group(self._groups[at], columns=self.names, use_threads=False)
        first = self._first[at]
        if table.num_rows != self._first[at + 1] - first:
            raise ValueError(f"{self.path}: cut short or not a valid Parquet file (row group {self._groups[at]})")
        columns = {
            name: parquet_files.arrow_column(self._arrow, self.path, name, table.column(name)) for name in self.names
        }
        return self._piece(columns, first).rows(slice(start - first, stop - first))


# --- CSV -------------------------------------------------------------------------------------------------------------


class CsvShard(_Table):
    """A CSV or TSV file, cut into pieces of about 1 MiB at the ends of records.

    Making one looks through the whole file once: where the pieces begin, and which columns are numbers. Where pyarrow
    is installed it parses the pieces without quotes, to the same values.
    """

    overhead = 12.0  # fields as Python's strings
    as_it_lies = True

    def __init__(self, path: Path, target: str | None, weight: str | None, require_target: bool) -> None:
        self.files = [File(path)]
        with self.files[0].open() as raw:
            lines = _Lines(io.BufferedReader(raw), path)
            first = next((line for line in lines if line.strip()), "")
        self._delimiter = "\t" if path.suffix.lower() == ".tsv" else csv_files.delimiter_of(first.encode())
        names, start, line = self._header()
        self._settle(names, target, weight, require_target)
        self.levels = [0 if name in self._targets else 1 for name in names]
        self._places, self._first = [start], [0]
        self._look_through(line)
        if not self.rows:
            raise ValueError(f"{path}: only a header row; expected rows of data below it")

    def _header(self) -> tuple[list[str], int, int]:
        """The names of the columns, where the records begin, and at which line."""
        with self.files[0].open() as raw:
            lines = _Lines(io.BufferedReader(raw), self.path)
            record = next(self._records(lines), None)
            if record is None:
                raise ValueError(f"{self.path}: an empty file; expected a header row and rows of data")
            return [name.strip() for name in record], lines.bytes, lines.number

    def _records(self, lines: _Lines) -> Iterator[list[str]]:
        """The fields of every record that is not blank."""
        reader = csv.reader(lines, delimiter=self._delimiter, strict=True)
        try:
            yield from (fields for fields in reader if fields)
        except csv.Error as error:
            where = f"{self.path}, line {lines.number}"
            raise ValueError(f"{where}: {checks.brief(error)}; is a quote left open or not doubled?") from None

    def _look_through(self, line: int) -> None:
        """Find the pieces, the rows in each, and what the columns hold."""
        file = self.files[0]
        least = max(1, min(CHUNK_BYTES, file.size // LEAST_CHUNKS))
        at = self._places[0]
        while at < file.size:
            data = self._next_piece(at, least, line)
            columns = self._parse(data, line)
            at, line = at + len(data), line + data.count(b"\n")
            rows = len(columns[0])
            if rows:
                self._piece(dict(zip(self.names, columns)), self._first[-1])  # refuses what it cannot take
                if self._delimiter != "," and len(self._first) == 1:
                    csv_files.refuse_decimal_commas(self.path, dict(zip(self.names, columns)))
                self._places.append(at)
                self._first.append(self._first[-1] + rows)
            else:
                self._places[-1] = at  # blank lines alone
        self.rows = self._first[-1]
        self.settle_levels(self.levels)

    def settle_levels(self, levels: Sequence[int]) -> None:
        """Take the columns as the parsers of these levels do, for instance those that another shard needs too."""
        self.levels = list(levels)
        kinds = ("whole numbers", "numbers", "text")
        self.schema = {f"column {name!r}": kinds[level] for name, level in zip(self.names, self.levels)}
        self.row_bytes = max(8.0 * len(self.names), (self._places[-1] - self._places[0]) / max(1, self.rows))

    def _next_piece(self, at: int, least: int, line: int) -> bytes:
        """The bytes of whole records from ``at`` on: ``least`` of them and what the last record needs beyond."""
        file = self.files[0]
        with file.open() as raw:
            raw.seek(at)
            buffered = io.BufferedReader(raw)
            head = buffered.read(least)
            head += b"" if head.endswith(b"\n") else buffered.readline(LINE_BYTES + 1)
            if b'"' not in head:  # then every line end is the end of a record
                return head
            raw.seek(at)
            lines = _Lines(io.BufferedReader(raw), self.path, line)
            for _ in self._records(lines):
                if lines.bytes >= least:
                    break
        data = np.empty(lines.bytes, np.uint8)
        file.read_at(at, data)
        return data.tobytes()

    def bounds(self, chunk_rows: int) -> list[int]:
        return self._first

    def extents(self, start: int, stop: int) -> Iterator[tuple[File, int, int]]:
        at = bisect.bisect_right(self._first, start) - 1
        yield self.files[0], self._places[at], self._places[at + 1] - self._places[at]

    def read(self, start: int, stop: int, into: Room = NOWHERE) -> Piece:
        at = bisect.bisect_right(self._first, start) - 1
        data = np.empty(self._places[at + 1] - self._places[at], np.uint8)
        self.files[0].read_at(self._places[at], data)
        columns = self._parse(data.tobytes(), 0)
        first = self._first[at]
        return self._piece(dict(zip(self.names, columns)), first).rows(slice(start - first, stop - first))

    def _parse(self, data: bytes, line: int) -> list[NDArray[Any]]:
        """Every column of some records; a level that cannot take a field of its column is raised."""
        columns = self._parse_fast(data)
        return self._parse_exactly(data, line) if columns is None else columns

    def _parse_exactly(self, data: bytes, line: int) -> list[NDArray[Any]]:
        lines = _Lines(io.BytesIO(data), self.path, line)
        rows = []
        for fields in self._records(lines):
            if len(fields) != len(self.names):
                counted = f"{len(fields)} field{'s' * (len(fields) != 1)}"
                raise ValueError(f"{self.path}, line {lines.number}: {counted}, but the header has {len(self.names)}")
            rows.append(fields)
        columns = []
        for j, column in enumerate(zip(*rows) if rows else [()] * len(self.names)):
            while (parsed := csv_files.COLUMN_PARSERS[self.levels[j]](column)) is None:
                self.levels[j] += 1
            columns.append(parsed)
        return columns

    def _parse_fast(self, data: bytes) -> list[NDArray[Any]] | None:
        """The same through pyarrow; None where it is not there, or might see something else in these bytes."""
        arrow = _arrow_or_none()
        if arrow is None or any(mark in data for mark in (b'"', b"0x", b"0X", b"(", b"\0")):
            return None
        types = [(arrow.int64(), arrow.float64(), arrow.string())[level] for level in self.levels]
        try:
            table = arrow.csv.read_csv(
                arrow.BufferReader(data),
                arrow.csv.ReadOptions(use_threads=False, block_size=len(data) + 1, column_names=self.names),
                arrow.csv.ParseOptions(delimiter=self._delimiter, quote_char=False),
                arrow.csv.ConvertOptions(
                    column_types=dict(zip(self.names, types)),
                    null_values=sorted(csv_files.MISSING),
                    strings_can_be_null=False,
                ),
            )
        except (arrow.ArrowInvalid, arrow.ArrowException):
            return None
        columns = []
        for level, column in zip(self.levels, table.columns):
            if level == 0 and column.null_count:
                return None
            columns.append(csv_files.texts_of(column.to_pylist()) if level == 2 else np.array(column.to_numpy()))
        return columns


@functools.cache
def _arrow_or_none() -> Any:
    try:
        return parquet_files.load_pyarrow("")
    except ValueError:
        return None


class _Lines:
    """The lines of UTF-8 text one by one, and how many bytes and lines they were so far."""

    def __init__(self, stream: Any, path: Path, number: int = 0) -> None:
        self._stream, self._path = stream, path
        self.bytes, self.number = 0, number

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        line = self._stream.readline(LINE_BYTES + 1)
        if not line:
            raise StopIteration
        first = self.number == 0
        self.bytes += len(line)
        self.number += 1
        where = f"{self._path}, line {self.number}"
        if len(line) > LINE_BYTES:
            raise ValueError(f"{where}: more than {LINE_BYTES >> 20} MiB without an end; is this a table?")
        if b"\0" in line:
            raise ValueError(f"{where}: a NUL character; this is not a text file, or not in UTF-8")
        try:
            return line.decode("utf-8-sig" if first else "utf-8")
        except UnicodeDecodeError as error:
            byte = line[error.start]
            raise ValueError(f"{where}: byte 0x{byte:02x} is not UTF-8; save the file as UTF-8") from None
