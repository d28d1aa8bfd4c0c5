"""Which files a data set on the disk is made of: one file, or the shards of a folder and nothing outside of it.

Leans on `shards` and `tables`, which open them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import readers
from .shards import Shard, check_alike, npy_shard, npz_shard
from .tables import CsvShard, ParquetShard

MANIFEST = "manifest.json"
MANIFEST_FORMAT = "gpu_mlp.shards"
MANIFEST_BYTES = 1 << 24  # enough for a hundred thousand shards
ENDINGS = (".npy", ".npz", ".parquet", ".csv", ".tsv")


@dataclass
class Wanted:
    """What of the files is wanted: the target (column, key, file or prefix), the weights, and whether it has to be."""

    target: str | None
    weight: str | None
    require_target: bool


def is_sharded(path: str | os.PathLike[str]) -> bool:
    """Whether ``path`` is a folder of shards, rather than one of IDX files."""
    folder = Path(path)
    return folder.is_dir() and ((folder / MANIFEST).exists() or bool(_candidates(folder)))


def find(source: str, wanted: Wanted) -> list[Shard]:
    """The shards of a data set, opened and seen to agree with each other.

    source: a folder of shards, or a file: .npz, .parquet, .csv, .tsv, or .npy with y in the file ``target``, or both as
    ``"x.npy,y.npy"``. In a folder ``manifest.json`` lists the shards, else all files of the one kind that is there are
    taken in the order of their names. In a folder of .npy files x is in ``x.npy`` or ``x-NAME.npy``, and y in ``y.npy``
    or ``y-NAME.npy``, or with the prefix ``target``.
    """
    pair = source.split(",")
    if len(pair) == 2 and all(part.strip().lower().endswith(".npy") for part in pair) and not os.path.exists(source):
        if wanted.target is not None:
            raise ValueError(f"target: {source!r} already names the file of y; got target={wanted.target!r}")
        source, target = (part.strip() for part in pair)
        wanted = Wanted(target, wanted.weight, wanted.require_target)
    path = readers._existing(source)
    if path.is_dir():
        return _in_folder(path, wanted)
    return [_opened(path, wanted)] if path.suffix.lower() != ".npy" else [_npy_file(path, wanted)]


def _opened(path: Path, wanted: Wanted) -> Shard:
    ending = path.suffix.lower()
    kinds: dict[str, Callable[[Path, str | None, str | None, bool], Shard]] = {
        ".npz": npz_shard,
        ".parquet": ParquetShard,
        ".csv": CsvShard,
        ".tsv": CsvShard,
    }
    if ending not in kinds:
        hint = "; unpack it first (gunzip)" if ending == ".gz" else ""
        raise ValueError(f"{path}: cannot be read in pieces; accepted endings: {' '.join(ENDINGS)}{hint}")
    return kinds[ending](path, wanted.target, wanted.weight, wanted.require_target)


def _npy_file(path: Path, wanted: Wanted) -> Shard:
    """x from ``path``, y and the weights from the files that the user named."""
    if wanted.target is None and wanted.require_target:
        raise ValueError(f"{path}: holds x only; give target=PATH of the .npy file with y, or 'x.npy,y.npy'")
    others = [None if name is None else readers._existing(name) for name in (wanted.target, wanted.weight)]
    for argument, other in zip(("target", "sample_weight"), others):
        if other is not None and other.suffix.lower() != ".npy":
            raise ValueError(f"{argument}: for an .npy file of x it is the path of an .npy file, got {str(other)!r}")
    return npy_shard([path, *others])


# --- folders ---------------------------------------------------------------------------------------------------------


def _in_folder(folder: Path, wanted: Wanted) -> list[Shard]:
    manifest = _manifest(folder)
    if manifest is not None and wanted.target is None:
        wanted = Wanted(manifest.get("target"), wanted.weight, wanted.require_target)
    names = _names(folder) if manifest is None else [entry["file"] for entry in manifest["shards"]]
    shards = [_shard_in(folder, name, wanted) for name in names]
    tables = [shard for shard in shards if isinstance(shard, CsvShard)]
    if tables and all(table.names == tables[0].names for table in tables):
        levels = [max(levels) for levels in zip(*(table.levels for table in tables))]
        for table in tables:  # a column that is text in one shard is text in all
            table.settle_levels(levels)
    check_alike(shards)
    for shard, entry in zip(shards, [] if manifest is None else manifest["shards"]):
        if entry.get("rows", shard.rows) != shard.rows:
            raise ValueError(f"{shard.path}: has {shard.rows} rows, but {MANIFEST} says {entry['rows']}; copy it anew")
    return shards


def _shard_in(folder: Path, name: str, wanted: Wanted) -> Shard:
    path = _inside(folder, name)
    if path.suffix.lower() != ".npy":
        return _opened(path, wanted)
    prefix, rest = name[:1], name[1:]
    if prefix != "x" or (rest[0] not in ".-_"):
        raise ValueError(f"{path}: in a folder of .npy files x is called x.npy or x-NAME.npy, and y y-NAME.npy")
    others: list[Path | None] = []
    for argument, other in (("target", wanted.target or "y"), ("sample_weight", wanted.weight)):
        there = other is not None and (folder / (other + rest)).exists()
        if other is not None and not there and (wanted.require_target or argument != "target"):
            raise ValueError(f"{path}: {argument}: there is no {other + rest} beside it")
        others.append(_inside(folder, other + rest) if other is not None and there else None)
    return npy_shard([path, *others])


def _inside(folder: Path, name: str) -> Path:
    """A file of the folder by its bare name; ValueError for whatever leads outside, by its name or by a link."""
    path = folder / name
    if name in ("", ".", "..") or os.path.basename(name) != name or "\\" in name or "\0" in name:
        raise ValueError(f"{folder}: the shard {name!r} is not a bare file name; shards lie in the folder itself")
    if not path.exists():
        raise ValueError(f"{path}: is listed as a shard and not there; copy it into the folder, or make the set anew")
    if os.path.dirname(os.path.realpath(path)) != os.path.realpath(folder):
        raise ValueError(f"{path}: is a link that leads outside of its folder, which is not followed; copy the file")
    return path


def _candidates(folder: Path) -> list[str]:
    return sorted(f.name for f in folder.iterdir() if f.suffix.lower() in ENDINGS and not f.name.startswith("."))


def _names(folder: Path) -> list[str]:
    """The shards of a folder that has no manifest."""
    names = _candidates(folder)
    if not names:
        raise ValueError(f"{folder}: no shards in it; accepted endings: {' '.join(ENDINGS)}")
    kinds = sorted({Path(name).suffix.lower() for name in names})
    if len(kinds) > 1:
        raise ValueError(f"{folder}: holds shards of several kinds, {', '.join(kinds)}; keep one kind in a folder")
    if kinds == [".npy"]:
        names = [name for name in names if name[0] == "x" and name[1] in ".-_"]
        if not names:
            raise ValueError(f"{folder}: in a folder of .npy files x is called x.npy or x-NAME.npy, and there is none")
    return names


def _manifest(folder: Path) -> dict[str, Any] | None:
    """The list of shards that a folder may have, checked; None where it has none."""
    if not (folder / MANIFEST).exists():
        return None
    path = _inside(folder, MANIFEST)
    if not path.is_file() or path.stat().st_size > MANIFEST_BYTES:
        raise ValueError(f"{path}: not a list of shards (no file of at most {MANIFEST_BYTES >> 20} MiB)")
    try:
        found = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        raise ValueError(f"{path}: not valid JSON; make the set anew, or delete the list to take every file") from None
    if not isinstance(found, dict) or found.get("format") != MANIFEST_FORMAT or found.get("version") != 1:
        raise ValueError(f"{path}: not a list of shards (format {MANIFEST_FORMAT!r}, version 1)")
    entries = found.get("shards")
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"{path}: lists no shards")
    for entry in entries:
        if not isinstance(entry, dict) or not isinstance(entry.get("file"), str):
            raise ValueError(f"{path}: expected an object with a file name for each shard, got {str(entry)[:80]}")
    files = [entry["file"] for entry in entries]
    if len(set(files)) != len(files):
        raise ValueError(f"{path}: lists a shard twice")
    if not isinstance(found.get("target", ""), str):
        raise ValueError(f"{path}: target must be a name")
    return found
