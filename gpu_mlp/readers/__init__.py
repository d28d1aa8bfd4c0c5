"""Files and built-in sets -> `RawData`: the columns and targets exactly as stored, and every broken file refused.

A room for each family of formats; leans on `checks` and NumPy, and on pyarrow where a Parquet file is read.
"""

from __future__ import annotations

import importlib.resources
import os
from collections.abc import Callable
from pathlib import Path

from .. import checks
from .csv_files import read_csv
from .idx import IDX_NAME, TEST, TRAIN, find_idx, read_idx, read_idx_folder, read_idx_images
from .numpy_files import Npz, read_npy, read_npz
from .parquet_files import read_parquet
from .rawdata import BUILT_IN, Columns, PathLike, RawData, existing

__all__ = [
    "BUILT_IN", "Columns", "PathLike", "RawData", "load_digits", "load_fashion_mnist", "read", "read_idx",
]  # fmt: skip

MOST_SHOWN = 2000  # characters of an error about a file


def read(path: PathLike, target: str | os.PathLike[str] | None = None, *, require_target: bool = True) -> RawData:
    """Read a data set; what ``path`` is decides how.

    - ``digits``, ``fashion-mnist``: a built-in set (a folder of that name is ``./digits``);
    - ``.csv``, ``.tsv`` (and ``.csv.gz``, ``.tsv.gz``), ``.parquet``: a table; ``target`` names its target column, or
      several numeric ones as ``"a,b"``;
    - ``.npz``: keys x and y (also X, data, features; Y, labels, label, target, targets), or x_train, y_train, x_test,
      y_test; or any keys, with ``target`` naming the key of y;
    - ``.npy``: x, with y in the file ``target``, or both as ``"x.npy,y.npy"``;
    - an IDX images file (labels found by the naming convention, or in the file ``target``), or a folder with
      ``train-images-idx3-ubyte[.gz]`` and its companions.

    With ``require_target=False`` (prediction) a source without its target is read too, and then ``y`` is None.
    Raises FileNotFoundError where there is no such file, ValueError, in one line, for anything unreadable.
    """
    source, wanted = os.fspath(path), None if target is None else os.fspath(target)
    if source in BUILT_IN:
        if wanted is not None:
            raise ValueError(f"target: the built-in set {source!r} has its own labels; got target={wanted!r}")
        return load_digits() if source == "digits" else load_fashion_mnist()
    pair = source.split(",")
    if len(pair) == 2 and all(part.strip().lower().endswith(".npy") for part in pair) and not os.path.exists(source):
        if wanted is not None:
            raise ValueError(f"target: {source!r} already names the file of y; got target={wanted!r}")
        source, wanted = (part.strip() for part in pair)
    file = existing(source)
    try:
        return _reader_of(file)(file, wanted, require_target)
    except ValueError as error:  # names and values in it are the file's own: of any length, and perhaps not printable
        raise ValueError(checks.brief(error, MOST_SHOWN)) from None
    except MemoryError:
        raise ValueError(f"{file}: there is not enough memory for it") from None


def _reader_of(file: Path) -> Callable[[Path, str | None, bool], RawData]:
    if file.is_dir():
        return read_idx_folder
    if IDX_NAME.search(file.name):
        return read_idx_images
    for ending, reader in READERS.items():
        if file.name.lower().endswith(ending):
            return reader
    raise ValueError(
        f"{file}: unknown kind of file; accepted endings: {' '.join(READERS)} -idx3-ubyte[.gz], "
        f"a folder of IDX files, or a built-in set ({', '.join(BUILT_IN)})"
    )


# --- built-in sets ---------------------------------------------------------------------------------------------------


def load_digits() -> RawData:
    """The UCI optical digits that ship in the package: x (1797, 64) uint8 of 0..16, y (1797,) uint8 of 0..9."""
    resource = importlib.resources.files("gpu_mlp") / "datasets" / "digits.npz"
    with resource.open("rb") as stream:  # a stream and not a path: the package may lie inside a zip
        arrays = Npz(stream, "digits.npz")
        return RawData(arrays["x"], arrays["y"], name="digits")


def load_fashion_mnist(folder: PathLike | None = None) -> RawData:
    """Fashion-MNIST, x (60000, 784) uint8, y (60000,) uint8 of 0..9, with its 10000-row test part.

    Read from the four IDX files in ``folder``, else in $FASHION_MNIST_DIR, else where Debian's package
    dataset-fashion-mnist puts them. Raises FileNotFoundError, saying how to get them, where they are not.
    """
    place = Path(folder or os.environ.get("FASHION_MNIST_DIR") or "/usr/share/datasets/fashion-mnist")
    missing = [stem for stem in TRAIN + TEST if find_idx(place, stem) is None] if place.is_dir() else ["the folder"]
    if missing:
        raise FileNotFoundError(
            f"fashion-mnist: {place} lacks {', '.join(missing)}; apt-get install dataset-fashion-mnist, "
            "or name a folder with its four IDX files (folder=... or the variable FASHION_MNIST_DIR)"
        )
    data = read_idx_folder(place, None, True)
    data.name = "fashion-mnist"
    return data


READERS: dict[str, Callable[[Path, str | None, bool], RawData]] = {
    ".csv": read_csv,
    ".csv.gz": read_csv,
    ".tsv": read_csv,
    ".tsv.gz": read_csv,
    ".npz": read_npz,
    ".npy": read_npy,
    ".parquet": read_parquet,
}
