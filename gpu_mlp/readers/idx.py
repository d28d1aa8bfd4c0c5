"""IDX files, the format of MNIST: checked against their length before anything is allocated."""

from __future__ import annotations

import math
import re
import struct
from pathlib import Path

import numpy as np

from .rawdata import PathLike, RawData, existing, inputs, targets_of, with_test
from .untrusted import DEFLATE_RATIO, array_of, check_unpacked, decoder, opened, read_exactly

IDX_DTYPES = {0x08: ">u1", 0x09: ">i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}
IDX_MAX_DIMENSIONS = 32  # what every supported NumPy can reshape to
IDX_NAME = re.compile(r"[-.]idx\d+-(ubyte|byte|short|int|float|double)(\.gz)?$|\.idx(\.gz)?$", re.IGNORECASE)
TRAIN = ("train-images", "train-labels")
TEST = ("t10k-images", "t10k-labels")


def read_idx(path: PathLike) -> np.ndarray:
    """The array of one IDX file (plain or gzip), in the shape and type its header declares, native byte order.

    The header is 00 00, a type code, the number of dimensions, then each dimension as a big-endian uint32. It is
    checked against the length of the file before anything is allocated. Raises ValueError for any disagreement.
    """
    file = Path(path)
    with opened(file) as (stream, size, packed):
        with decoder(file, "IDX"):
            head = stream.read(4)
        if len(head) < 4 or head[:2] != b"\0\0" or head[2] not in IDX_DTYPES or not 0 < head[3] <= IDX_MAX_DIMENSIONS:
            raise ValueError(
                f"{file}: not an IDX file: expected the bytes 00 00, a type code of 08 09 0b 0c 0d 0e and a number of "
                f"dimensions of 1 to {IDX_MAX_DIMENSIONS}, found {head.hex(' ') or 'an empty file'}"
            )
        dtype, n_dimensions = np.dtype(IDX_DTYPES[head[2]]), head[3]
        with decoder(file, "IDX"):
            shape = struct.unpack(f">{n_dimensions}I", stream.read(4 * n_dimensions))
        if 0 in shape:
            raise ValueError(f"{file}: the header declares {' x '.join(map(str, shape))} values, which is no data")
        header, count = 4 + 4 * n_dimensions, math.prod(shape) * dtype.itemsize
        if header + count > size * DEFLATE_RATIO if packed else header + count != size:
            raise ValueError(
                f"{file}: a header of {header} bytes and {' x '.join(map(str, shape))} {dtype.name} values make an "
                f"expected {header + count} bytes, found {size}{' of gzip' if packed else ''}"
            )
        if packed:
            check_unpacked(file, size, header + count, "unpack it first (gunzip)")
        return array_of(read_exactly(stream, count, file), dtype, shape)


def read_idx_images(file: Path, target: str | None, require_target: bool) -> RawData:
    """One images file, its labels in ``target`` or found beside it by name."""
    labels = existing(target) if target is not None else _labels_beside(file)
    if labels is None and require_target:
        raise ValueError(f"{file}: no labels file beside it; give target=PATH of the IDX file with its labels")
    x = inputs(read_idx(file), str(file))
    y = None if labels is None else targets_of(read_idx(labels), len(x), str(labels))
    return RawData(x, y, name=file.name)


def _labels_beside(images: Path) -> Path | None:
    """`train-labels-idx1-ubyte[.gz]` for `train-images-idx3-ubyte[.gz]`; None where the name or the file is not so."""
    stem = IDX_NAME.sub("", images.name)
    return find_idx(images.parent, stem.replace("images", "labels")) if "images" in stem else None


def find_idx(folder: Path, stem: str) -> Path | None:
    """The IDX file of ``folder`` whose name is ``stem`` and an IDX ending; the unpacked one where there are two."""
    found = [f for f in folder.iterdir() if IDX_NAME.search(f.name) and IDX_NAME.sub("", f.name) == stem]
    return min(found, key=lambda f: (f.suffix.lower() == ".gz", f.name), default=None)


def read_idx_folder(folder: Path, target: str | None, require_target: bool) -> RawData:
    """The training part of an MNIST-like folder, with its test part where there is one."""
    if target is not None:
        raise ValueError(f"target: a folder of IDX files has its own labels files; got target={target!r}")
    train, test = find_idx(folder, TRAIN[0]), find_idx(folder, TEST[0])
    if train is None:
        raise ValueError(f"{folder}: a folder must hold IDX files, and train-images-idx3-ubyte[.gz] is not there")
    data = read_idx_images(train, None, require_target)
    data.name = folder.name
    return data if test is None else with_test(data, read_idx_images(test, None, require_target), str(folder))
