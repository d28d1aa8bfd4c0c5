"""Tables: what CSV and Parquet files have in common."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from .. import checks
from .rawdata import Columns, RawData, listed


def target_columns(where: Path, columns: Sequence[str], target: str | None, require_target: bool) -> list[str]:
    """The columns that ``target`` names (one, or several as ``"a,b"``), present or refused.

    Where none is required the list may be empty, and names of columns that are not there are passed over.
    """
    names = [] if target is None else [target] if target in columns else [name.strip() for name in target.split(",")]
    if len(set(names)) != len(names):
        raise ValueError(f"{where}: target={target!r} names a column twice")
    if require_target:
        if target is None:
            raise ValueError(f"{where}: which column is the target? Give target=NAME (its columns: {listed(columns)})")
        for name in set(names).difference(columns):
            hint = checks.nearest(name, columns)
            raise ValueError(f"{where}: no column {name!r}{hint} (its columns: {listed(columns)})")
    return names


def table_of(where: Path, columns: Columns, targets: list[str], target: str | None) -> RawData:
    """Named columns -> RawData: the features as float64 or text, the target columns as y."""
    x = {name: _feature(column) for name, column in columns.items() if name not in targets}
    if not x:
        raise ValueError(f"{where}: no column is left for the features (its columns: {listed(list(columns))})")
    y = None
    if targets and all(name in columns for name in targets):
        y = columns[targets[0]] if len(targets) == 1 else _stacked(where, columns, targets)
    return RawData(x, y, feature_names=list(x), target_name=None if y is None else target, name=where.name)


def _feature(column: np.ndarray) -> np.ndarray:
    return column if column.dtype.kind == "O" else column.astype(np.float64, copy=False)


def _stacked(where: Path, columns: Columns, targets: list[str]) -> np.ndarray:
    """Several target columns as one (n, k) float64 array; text is refused."""
    for name in targets:
        if columns[name].dtype.kind == "O":
            raise ValueError(f"{where}: column {name!r} holds text; several targets must all be numeric")
    return np.column_stack([columns[name].astype(np.float64) for name in targets])


def check_names(where: Path, names: Sequence[str], hint: str = "") -> None:
    """Refuse a nameless column and a name that comes twice."""
    for position, name in enumerate(names, start=1):
        if not name:
            raise ValueError(
                f"{where}: column {position} has no name; name it, or if it is the index of a pandas table "
                "write the file with index=False"
            )
    repeated = [name for name, count in Counter(names).items() if count > 1]
    if repeated:
        raise ValueError(f"{where}: two columns are called {repeated[0]!r}; every name must be there once{hint}")


def infinite_row(column: np.ndarray) -> int | None:
    """The first row of a numeric column with inf; None where all is well."""
    if column.dtype.kind != "f" or not np.isinf(column).any():
        return None
    return int(np.isinf(column).argmax())
