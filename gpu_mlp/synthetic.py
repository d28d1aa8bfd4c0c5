"""Synthetic data sets of any size, with a rule that is known and can be learned: what `gpu-mlp make-data` writes.

Leans on NumPy, on `folders` for the list of shards, and on pyarrow for Parquet alone. Takes the memory of one block.

The rule, for x of d standard normal features and two orthonormal directions a and b that are drawn from the seed, with
u = ⟨a, x⟩, v = ⟨b, x⟩, which are independent and standard normal:

    regression       y = (u + (v² − 1)/√2) / √2 + ε,  ε normal with variance 1/9
    classification   y = ⌊k · frac((φ + r) / 2π)⌋,  the polar coordinates (r, φ) of (u, v): a spiral of k arms,
                     but with probability 0.1 a class that is drawn from all k alike

The first has variance 1 without ε, so that no predictor has a larger R² than 1 / (1 + 1/9) = 0.9 on average; in the
second, where φ is uniform and independent of r, all classes are equally frequent and none has a larger accuracy than
1 − 0.1 · (k − 1)/k.
"""

from __future__ import annotations

import contextlib
import csv
import json
import math
import os
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from . import checks
from .folders import MANIFEST, MANIFEST_FORMAT
from .readers.parquet_files import load_pyarrow

BLOCK_ROWS = 8192  # each block has a generator of its own, whatever shards and chunks there are
NOISE_VARIANCE, WRONG = 1 / 9, 0.1
RULE_STREAM, BLOCK_STREAM = 0, 1
CSV_BYTES = 21  # of a value and its comma: 17 digits, a sign, a point, an exponent in some
SPARE_BYTES = 64 << 20

Block = tuple[NDArray[np.float32], NDArray[Any]]
Sink = Callable[[Block], None]


@dataclass(frozen=True)
class Synthetic:
    """A set of ``rows`` rows, a function of these fields: x (features,) float32, y an int64 class or a float32."""

    rows: int
    features: int
    task: str = "classification"
    classes: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        checks.integer("rows", self.rows, 1)
        checks.integer("features", self.features, 2)
        checks.choice("task", self.task, ("classification", "regression"))
        checks.integer("classes", self.classes, 2)
        checks.integer("seed", self.seed, 0)

    @property
    def best(self) -> dict[str, float]:
        """What the best of all predictors reaches on average."""
        if self.task == "regression":
            return {"r2": 1 / (1 + NOISE_VARIANCE)}
        return {"accuracy": 1 - WRONG * (self.classes - 1) / self.classes}

    def directions(self) -> NDArray[np.float64]:
        """a and b, (2, features)."""
        drawn = np.random.default_rng([self.seed, RULE_STREAM]).normal(size=(self.features, 2))
        return np.ascontiguousarray(np.linalg.qr(drawn)[0].T)

    def block(self, number: int) -> Block:
        """The rows from ``number`` · BLOCK_ROWS on, as many as there are up to the next block."""
        rng = np.random.default_rng([self.seed, BLOCK_STREAM, number])
        x = rng.standard_normal((BLOCK_ROWS, self.features), np.float32)
        u, v = self.directions() @ x.T.astype(np.float64)
        y: NDArray[Any]
        if self.task == "regression":
            noise = math.sqrt(NOISE_VARIANCE) * rng.standard_normal(BLOCK_ROWS)
            y = ((u + (v**2 - 1) / math.sqrt(2)) / math.sqrt(2) + noise).astype(np.float32)
        else:
            turn = (np.arctan2(v, u) + np.hypot(u, v)) / (2 * np.pi) % 1.0
            y = np.minimum(self.classes - 1, (self.classes * turn).astype(np.int64))
            wrong = rng.random(BLOCK_ROWS) < WRONG
            y[wrong] = rng.integers(0, self.classes, int(wrong.sum()))
        rows = min(BLOCK_ROWS, self.rows - number * BLOCK_ROWS)
        return x[:rows], y[:rows]

    def blocks(self, start: int, stop: int) -> Iterator[Block]:
        """The rows from ``start`` to ``stop``, block by block."""
        for number in range(start // BLOCK_ROWS, -(-stop // BLOCK_ROWS)):
            first = number * BLOCK_ROWS
            x, y = self.block(number)
            chosen = slice(max(0, start - first), stop - first)
            yield x[chosen], y[chosen]

    @property
    def y_dtype(self) -> np.dtype[Any]:
        """The type of y."""
        return np.dtype(np.float32 if self.task == "regression" else np.int64)


# --- on the disk -----------------------------------------------------------------------------------------------------


def write(
    data: Synthetic,
    out: str | os.PathLike[str],
    kind: str = "npy",
    shards: int = 1,
    tell: Callable[[int], None] = lambda done: None,
) -> Path:
    """Write a set as a folder of shards with a list of them; ``tell`` is called with the rows written so far.

    kind: npy (x-00000.npy and y-00000.npy, …), npz (not compressed), parquet or csv (columns x0, x1, …, y).
    The folder has its name when all of it is on the disk, and not before. Raises ValueError for an ``out`` that exists,
    for a disk without room, and where another run is writing there.
    """
    checks.choice("format", kind, SHARD_WRITERS)
    checks.integer("shards", shards, 1, data.rows)
    folder = Path(out)
    if folder.exists() or folder.is_symlink():
        raise ValueError(f"out: {folder} exists; choose another name, or remove it first")
    if not folder.parent.is_dir():
        raise ValueError(f"out: there is no folder {folder.parent}")
    if kind == "parquet":
        load_pyarrow("format")
    _check_room(data, folder, kind)
    with _unfinished(folder) as partial:
        done, entries = 0, []
        for shard in range(shards):
            start, stop = shard * data.rows // shards, (shard + 1) * data.rows // shards
            name = f"{'x' if kind == 'npy' else 'part'}-{shard:05}.{kind}"
            with SHARD_WRITERS[kind](partial, name, stop - start, data) as sink:
                for block in data.blocks(start, stop):
                    sink(block)
                    done += len(block[0])
                    tell(done)
            entries.append({"file": name, "rows": stop - start})
        _write_manifest(partial / MANIFEST, data, entries)
        for path in [*partial.iterdir(), partial]:
            _sync(path)
        os.rename(partial, folder)
    return folder


def _check_room(data: Synthetic, folder: Path, kind: str) -> None:
    values = data.rows * (data.features + 1)
    needed = values * CSV_BYTES if kind == "csv" else data.rows * (4 * data.features + data.y_dtype.itemsize)
    free = shutil.disk_usage(folder.parent).free
    if needed + SPARE_BYTES > free:
        raise ValueError(
            f"out: the set takes about {checks.shown_size(needed)}, and {folder.parent.resolve()} has "
            f"{checks.shown_size(free)} left; make room, or write fewer rows"
        )


@contextmanager
def _unfinished(folder: Path) -> Iterator[Path]:
    """A folder beside the one to be, which is taken away again if anything fails."""
    partial = folder.with_name(f".{folder.name}.partial")
    try:
        partial.mkdir()
    except FileExistsError:
        raise ValueError(
            f"out: {partial} is there: another run is writing it, or one was killed; in that case remove it"
        ) from None
    try:
        yield partial
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _write_manifest(path: Path, data: Synthetic, entries: list[dict[str, Any]]) -> None:
    made = {"task": data.task, "rows": data.rows, "features": data.features, "seed": data.seed, "best": data.best}
    if data.task == "classification":
        made["classes"] = data.classes
    record = {"format": MANIFEST_FORMAT, "version": 1, "target": "y", "shards": entries, "made": made}
    path.write_text(json.dumps(record, indent=1) + "\n")


def _sync(path: Path) -> None:
    """Bring a file, or the names in a folder, onto the disk; not every system can do it for a folder."""
    with contextlib.suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _npy_head(file: IO[bytes], shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
    descr = np.lib.format.dtype_to_descr(dtype)
    np.lib.format.write_array_header_1_0(file, {"descr": descr, "fortran_order": False, "shape": shape})


@contextmanager
def _npy(folder: Path, name: str, rows: int, data: Synthetic) -> Iterator[Sink]:
    with open(folder / name, "wb") as x_file, open(folder / f"y{name[1:]}", "wb") as y_file:
        _npy_head(x_file, (rows, data.features), np.dtype(np.float32))
        _npy_head(y_file, (rows,), data.y_dtype)

        def sink(block: Block) -> None:
            x_file.write(block[0].data)
            y_file.write(block[1].data)

        yield sink


@contextmanager
def _npz(folder: Path, name: str, rows: int, data: Synthetic) -> Iterator[Sink]:
    with ExitStack() as stack:
        aside = stack.enter_context(tempfile.TemporaryFile(dir=folder))  # y, until x is whole
        archive = stack.enter_context(zipfile.ZipFile(folder / name, "w"))
        with archive.open(_member("x.npy"), "w", force_zip64=True) as x_file:
            _npy_head(x_file, (rows, data.features), np.dtype(np.float32))

            def sink(block: Block) -> None:
                x_file.write(block[0].data)
                aside.write(block[1].data)

            yield sink
        with archive.open(_member("y.npy"), "w", force_zip64=True) as y_file:
            _npy_head(y_file, (rows,), data.y_dtype)
            aside.seek(0)
            shutil.copyfileobj(aside, y_file, 1 << 20)


def _member(name: str) -> zipfile.ZipInfo:
    """A member with the same date in every archive: equal sets are equal files."""
    return zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0))


def _columns(data: Synthetic) -> list[str]:
    return [*(f"x{j}" for j in range(data.features)), "y"]


@contextmanager
def _parquet(folder: Path, name: str, rows: int, data: Synthetic) -> Iterator[Sink]:
    arrow = load_pyarrow("format")
    types = [arrow.float32()] * data.features + [arrow.from_numpy_dtype(data.y_dtype)]
    schema = arrow.schema(list(zip(_columns(data), types)))
    options = {"use_dictionary": False, "compression": "none"}  # noise does not pack
    with arrow.parquet.ParquetWriter(folder / name, schema, **options) as writer:

        def sink(block: Block) -> None:
            columns = [np.ascontiguousarray(column) for column in block[0].T]
            writer.write_table(arrow.table([*columns, block[1]], schema=schema))  # a row group

        yield sink


@contextmanager
def _csv(folder: Path, name: str, rows: int, data: Synthetic) -> Iterator[Sink]:
    with open(folder / name, "w", encoding="ascii", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(_columns(data))

        def sink(block: Block) -> None:
            x, y = block
            writer.writerows([*row, target] for row, target in zip(x.astype(np.float64).tolist(), y.tolist()))

        yield sink


SHARD_WRITERS: dict[str, Callable[[Path, str, int, Synthetic], AbstractContextManager[Sink]]] = {
    "npy": _npy,
    "npz": _npz,
    "parquet": _parquet,
    "csv": _csv,
}
