"""Predictions as files: CSV for people and spreadsheets, npy for arrays.

Leans on `model` for what an output means.
"""

from __future__ import annotations

import csv
import io
import sys
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import tensorfile
from .model import Model
from .preprocessing import Labels


def to_csv(path: Path | None, model: Model, y_hat: NDArray[Any], shares: NDArray[Any] | None) -> None:
    """One row a sample: ``prediction`` (``prediction_0``, … with several outputs), then ``p_<class>`` where asked for.

    ``path`` None writes to standard output.
    """
    if path is None:
        _rows(csv.writer(sys.stdout, lineterminator="\n"), model, y_hat, shares)
        return
    text = io.StringIO()
    _rows(csv.writer(text, lineterminator="\n"), model, y_hat, shares)
    tensorfile.write_bytes(path, text.getvalue().encode())


def _rows(writer: Any, model: Model, y_hat: NDArray[Any], shares: NDArray[Any] | None) -> None:
    read = model.read(y_hat)
    columns = read.reshape(len(read), -1).tolist()
    width = 1 if read.ndim == 1 else read.shape[1]
    header = ["prediction"] if read.ndim == 1 else [f"prediction_{j}" for j in range(width)]
    if shares is not None and isinstance(model.target, Labels):
        header += [f"p_{label}" for label in model.target.decode(np.arange(len(model.target)))]
    writer.writerow(header)
    for i, row in enumerate(columns):
        writer.writerow(row if shares is None else [*row, *(f"{share:.6g}" for share in shares[i].tolist())])


def to_npy(path: Path, model: Model, y_hat: NDArray[Any], shares: NDArray[Any] | None) -> None:
    """The predictions as one array, or with ``shares`` the class probabilities, (n, classes)."""
    array = shares if shares is not None else model.read(y_hat)
    if array.dtype.kind == "O":
        array = array.astype(str)
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    tensorfile.write_bytes(path, buffer.getvalue())
