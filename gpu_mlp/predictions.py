"""Predictions as files: CSV for people and spreadsheets, npy for arrays, Parquet for tables that go on.

Leans on `model` for what an output means. They come batch by batch and go so: a file is whole or not there at all, and
what is in memory is one batch.
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from . import tensorfile
from .model import Model
from .preprocessing import Labels
from .readers.parquet_files import load_pyarrow

Batches = Iterable[NDArray[Any]]  # of ŷ, (rows, n_L) each


def write(path: Path | None, model: Model, batches: Batches, rows: int, shares: bool) -> None:
    """Write what batches of ŷ, ``rows`` rows in all, mean; the ending of ``path`` says how, None is CSV to the screen.

    With ``shares`` the probability of every class goes with it. Raises ValueError for an ending that is not known, and
    where the model has no probabilities.
    """
    if path is None:
        _csv_rows(csv.writer(sys.stdout, lineterminator="\n"), model, batches, shares)
        return
    check_path(path)
    with tensorfile.replacing(path) as file:
        WRITERS[path.suffix](file, model, batches, rows, shares)


def check_path(path: Path) -> None:
    """A ValueError, before any work, for a file that cannot be written."""
    if path.suffix not in WRITERS:
        raise ValueError(f"out: expected a file ending in .csv, .npy or .parquet, got {path}")
    if not path.parent.is_dir():
        raise ValueError(f"out: there is no folder {path.parent}")
    if path.suffix == ".parquet":
        load_pyarrow("out")


def _columns(model: Model, y_hat: NDArray[Any], shares: bool) -> dict[str, NDArray[Any]]:
    """``prediction`` (``prediction_0``, … with several outputs), then ``p_<class>`` where asked for; a value a row."""
    read = model.read(y_hat)
    columns = {"prediction": read} if read.ndim == 1 else {f"prediction_{j}": c for j, c in enumerate(read.T)}
    if shares:
        probabilities = model.probabilities(y_hat)
        if isinstance(model.target, Labels):
            labels = model.target.decode(np.arange(len(model.target)))
            columns |= {f"p_{label}": column for label, column in zip(labels, probabilities.T)}
    return columns


def _csv_rows(writer: Any, model: Model, batches: Batches, shares: bool) -> None:
    for number, y_hat in enumerate(batches):
        columns = _columns(model, y_hat, shares)
        if number == 0:
            writer.writerow(columns)
        texts = [
            [f"{share:.6g}" for share in column.tolist()] if name.startswith("p_") else column.tolist()
            for name, column in columns.items()
        ]
        writer.writerows(zip(*texts))


class _Encoded:
    """A text file on top of a file of bytes, for the csv module."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file

    def write(self, text: str) -> None:
        self._file.write(text.encode())


def _to_csv(file: IO[bytes], model: Model, batches: Batches, rows: int, shares: bool) -> None:
    _csv_rows(csv.writer(_Encoded(file), lineterminator="\n"), model, batches, shares)


def _to_npy(file: IO[bytes], model: Model, batches: Batches, rows: int, shares: bool) -> None:
    """The predictions as one array, or with ``shares`` the class probabilities, (n, classes)."""
    for number, array in enumerate(_arrays(model, batches, shares)):
        if number == 0:
            header = {"descr": np.lib.format.dtype_to_descr(array.dtype), "fortran_order": False}
            np.lib.format.write_array_header_1_0(file, {**header, "shape": (rows, *array.shape[1:])})
        file.write(np.ascontiguousarray(array).tobytes())


def _arrays(model: Model, batches: Batches, shares: bool) -> Iterator[NDArray[Any]]:
    text = isinstance(model.target, Labels) and model.target.classes.dtype.kind == "O"
    width = np.array(model.target.classes.tolist()).dtype if text and isinstance(model.target, Labels) else None
    for y_hat in batches:
        array = model.probabilities(y_hat) if shares else model.read(y_hat)
        yield array if width is None or shares else array.astype(width)


def _to_parquet(file: IO[bytes], model: Model, batches: Batches, rows: int, shares: bool) -> None:
    arrow = load_pyarrow("out")
    writer = None
    try:
        for y_hat in batches:
            columns = _columns(model, y_hat, shares)
            table = arrow.table({name: arrow.array(np.ascontiguousarray(c)) for name, c in columns.items()})
            writer = writer or arrow.parquet.ParquetWriter(file, table.schema)
            writer.write_table(table)
    finally:
        if writer is not None:
            writer.close()


WRITERS: dict[str, Callable[[IO[bytes], Model, Batches, int, bool], None]] = {
    ".csv": _to_csv,
    ".npy": _to_npy,
    ".parquet": _to_parquet,
}
