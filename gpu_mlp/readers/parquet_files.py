"""Parquet files, through pyarrow, which is imported only here and only when one is read."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import IO, Any

import numpy as np

from .rawdata import RawData, listed
from .tabular import check_names, infinite_row, table_of, target_columns
from .untrusted import check_unpacked, decoder

INDEX_NAME = re.compile(r"__index_level_\d+__")  # what pandas calls an index that has no name


def load_pyarrow(what: object) -> Any:
    """pyarrow with its readers of Parquet and CSV; a ValueError that says how to get it."""
    try:
        import pyarrow  # type: ignore[import-untyped, unused-ignore]
        import pyarrow.csv
        import pyarrow.parquet
    except ImportError:
        raise ValueError(f"{what}: Parquet needs pyarrow; pip install 'gpu-mlp[data]'") from None
    return pyarrow


def read_parquet(file: Path, target: str | None, require_target: bool) -> RawData:
    pyarrow = load_pyarrow(file)
    with file.open("rb") as stream:
        table = _arrow_table(pyarrow, file, stream)
    # A pandas table keeps its unnamed index as a column: a row number, not a feature.
    names = [name for name in table.column_names if not INDEX_NAME.fullmatch(name)]
    check_names(file, names)
    if table.num_rows == 0:
        raise ValueError(f"{file}: no rows; columns: {listed(names)}")
    targets = target_columns(file, names, target, require_target)
    columns = {name: arrow_column(pyarrow, file, name, table.column(name)) for name in names}
    for name, column in columns.items():
        if (row := infinite_row(column)) is not None:
            raise ValueError(
                f"{file}, row {row} (counting from 0), column {name!r}: inf; only finite numbers are accepted"
            )
    return table_of(file, columns, targets, target)


def bounds_of(stream: IO[bytes]) -> dict[str, Any]:
    """The options of pyarrow's ParquetFile that keep what a footer claims within the size of its file."""
    size = os.fstat(stream.fileno()).st_size
    return {
        "thrift_string_size_limit": size,
        "thrift_container_size_limit": size,
        "page_checksum_verification": True,
    }


def footer_of(pyarrow: Any, file: Path, stream: IO[bytes]) -> tuple[Any, list[Any], Any]:
    """(footer, its row groups, schema) of a Parquet stream, once they are seen to be of its size and of known types.

    Nothing is asked by column, whose statistics can end the process: pyarrow lets their C++ exceptions through.
    """
    with decoder(file, "Parquet"):
        described = pyarrow.parquet.ParquetFile(stream, **bounds_of(stream))
        schema, footer = described.schema_arrow, described.metadata
        groups = [footer.row_group(i) for i in range(footer.num_row_groups)]
        rows = max(footer.num_rows, sum(group.num_rows for group in groups))
        unpacked = max(rows * len(schema.names) * 8, sum(group.total_byte_size for group in groups))
    if any(group.num_rows < 0 for group in groups) or rows != footer.num_rows:
        raise ValueError(f"{file}: cut short or not a valid Parquet file (its row groups have other rows than it says)")
    size = os.fstat(stream.fileno()).st_size
    check_unpacked(file, size, unpacked, "write it without compression and dictionaries")
    for name, kind in zip(schema.names, schema.types):
        if not INDEX_NAME.fullmatch(name):
            _check_kind(pyarrow, file, name, kind)
    return footer, groups, schema


def _arrow_table(pyarrow: Any, file: Path, stream: IO[bytes]) -> Any:
    """The whole table of a Parquet stream, its text as dictionaries."""
    _, _, schema = footer_of(pyarrow, file, stream)
    text = [name for name, kind in zip(schema.names, schema.types) if _is_text(pyarrow, kind)]
    bounds = bounds_of(stream)
    with decoder(file, "Parquet"):
        try:
            return pyarrow.parquet.ParquetFile(stream, read_dictionary=text, **bounds).read()
        except (NotImplementedError, OSError):  # broken, or of an encoding that pyarrow makes no dictionary of
            return pyarrow.parquet.ParquetFile(stream, **bounds).read()


def _check_kind(pyarrow: Any, file: Path, name: str, kind: Any) -> Any:
    """The type of a column's values; ValueError unless they are numbers, booleans or text."""
    types = pyarrow.types
    if types.is_dictionary(kind):
        kind = kind.value_type
    number = types.is_boolean(kind) or types.is_integer(kind) or types.is_floating(kind) or types.is_decimal(kind)
    if not (number or _is_text(pyarrow, kind) or types.is_null(kind)):
        raise ValueError(
            f"{file}: column {name!r} holds {kind}; accepted: numbers, booleans, strings and dictionaries of them "
            "(spread a nested column over several, turn a time into a number)"
        )
    return kind


def _is_text(pyarrow: Any, kind: Any) -> bool:
    types = pyarrow.types
    return types.is_string(kind) or types.is_large_string(kind) or str(kind) == "string_view"


def _arrow_texts(pyarrow: Any, column: Any) -> np.ndarray:
    """An Arrow column of text -> (n,) objects, str and None; equal texts of a dictionary are one object."""
    texts, start = np.empty(len(column), object), 0
    for chunk in column.chunks:
        if pyarrow.types.is_dictionary(chunk.type):
            words = np.array([*chunk.dictionary.to_pylist(), None], object)
            found = words[chunk.indices.cast(pyarrow.int64()).fill_null(len(words) - 1).to_numpy(zero_copy_only=False)]
        else:
            found = chunk.to_pylist()
        texts[start : start + len(chunk)] = found
        start += len(chunk)
    return texts


def arrow_column(pyarrow: Any, file: Path, name: str, column: Any) -> np.ndarray:
    """An Arrow column -> (n,) numbers, in their own dtype or with NaN for null in float64, or objects, str and None."""
    kind = _check_kind(pyarrow, file, name, column.type)
    with decoder(f"{file}, column {name!r}", "Parquet"):
        if _is_text(pyarrow, kind):
            return _arrow_texts(pyarrow, column)
        whole = column.null_count == 0 and not pyarrow.types.is_decimal(kind)
        numbers: np.ndarray = column.cast(kind if whole else pyarrow.float64()).to_numpy()
        return numbers
