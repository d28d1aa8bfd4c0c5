"""Damage small valid files of every kind that the package reads, and see what reading them does.

    python tests/fuzz_files.py --mutations 20000 --seed 0

A reader passes when every damaged file is refused by a ValueError or a FileNotFoundError of one line that names the
file, or gives valid data; within a second; with a peak of resident memory that grows by at most twice the file and a
constant for the libraries; and in a process that is alive afterwards. Reading happens in worker processes, so that a
crash inside a library is seen. Every finding is printed with what made it; ``--keep FOLDER`` keeps its file.

`test_fuzz_files.py` runs a thousand of these in the test command.
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import io
import json
import multiprocessing
import os
import resource
import signal
import struct
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from gpu_mlp import MLP, BrokenData, Stream, readers
from gpu_mlp.model import Model
from gpu_mlp.preprocessing import Labels, Preprocessor, TargetScaler
from gpu_mlp.streams import as_stored

SECONDS = 1.0  # of the processor, for one file
CONSTANT = 24 << 20  # bytes of resident memory that libraries may take once, whatever the file
ADDRESS_SPACE = 1 << 30  # bytes beyond what the worker has at its start: an allocation above it fails
PATIENCE = 60.0  # seconds of the clock after which a worker counts as hung


# --- the valid files -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sample:
    """A valid file: its name, its bytes, and the labels that are read beside it, where there are any."""

    name: str
    content: bytes
    target: str | None = None

    @property
    def kind(self) -> str:
        """Which reader it is for."""
        return self.name.partition(".")[2]


def samples() -> list[Sample]:
    """Small valid files of every kind and layout; their bytes are the same in every run of one version."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        found = [*_models(folder), *_idx(), *_numpy(), *_tables()]
        with contextlib.suppress(ImportError):
            found += _parquet()
        return [*found, *_streams(found)]


def _models(folder: Path) -> Iterator[Sample]:
    rng = np.random.default_rng(0)
    table = {"age": rng.normal(size=6), "colour": np.array(["red", "blue", "red"] * 2, object)}
    preprocessor = Preprocessor.fit(table, feature_names=list(table), impute="mean")
    source = {"data": "t.csv", "target": "kind", "folder": None, "test": 0.2, "validation": 0.1, "seed": 0}
    labels = Labels.fit(np.array(["cat", "dog"], object))
    classifier = Model(MLP([3, 4, 2], output="softmax", dropout=0.1), preprocessor, labels, "cross_entropy", source)
    scaler = TargetScaler.fit(rng.normal(size=(6, 2)))
    regressor = Model(MLP([3, 2], precision="float64"), preprocessor, scaler, "mse")
    for number, model in enumerate((classifier, regressor)):
        yield Sample(f"{number}.safetensors", model.save(folder / "m").read_bytes())


def _idx() -> Iterator[Sample]:
    rng = np.random.default_rng(1)
    for code, dtype in ((0x08, ">u1"), (0x0D, ">f4")):
        values = rng.integers(0, 9, (5, 3, 2)).astype(dtype)
        content = bytes([0, 0, code, 3]) + struct.pack(">3I", 5, 3, 2) + values.tobytes()
        yield Sample(f"{code}.idx", content, "labels.idx")
        yield Sample(f"{code}.idx.gz", gzip.compress(content, mtime=0), "labels.idx")


def _npz(save: Callable[..., None], **arrays: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    save(buffer, **arrays)
    return buffer.getvalue()


def _numpy() -> Iterator[Sample]:
    rng = np.random.default_rng(2)
    x, y = rng.normal(size=(5, 3)), np.array(["a", "b", "a", "ü", "b"])
    yield Sample("0.npz", _npz(np.savez, x=x, y=y))
    yield Sample("1.npz", _npz(np.savez_compressed, x=x, y=y))
    yield Sample("2.npz", _npz(np.savez, x_train=x, y_train=y, x_test=x[:2], y_test=y[:2]))
    yield Sample("3.npz", _npz(np.savez, x=x > 0, y=y.astype("S2") if y.dtype.kind == "S" else np.arange(5)))
    buffer = io.BytesIO()
    np.save(buffer, np.asfortranarray(x.astype(">f4")))
    yield Sample("0.npy", buffer.getvalue(), "labels.npy")
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, x, version=(2, 0))
    yield Sample("1.npy", buffer.getvalue(), "labels.npy")


TABLE = 'age,"colour, main",height,y\n1.5,red,1,a\n-2e3,"dark ""blue""",NA,b\n,"two\nlines",3,a\n4,ü,5,b\n'


def _tables() -> Iterator[Sample]:
    yield Sample("0.csv", TABLE.encode(), "y")
    yield Sample("1.csv", b"\xef\xbb\xbf" + TABLE.replace(",", ";").replace("\n", "\r\n").encode(), "y")
    yield Sample("0.csv.gz", gzip.compress(TABLE.encode(), mtime=0), "y")
    yield Sample("0.tsv", TABLE.replace(",", "\t").encode(), "y")


def _parquet() -> Iterator[Sample]:
    import pyarrow as pa
    from pyarrow import parquet

    rng = np.random.default_rng(3)
    table = pa.table(
        {
            "age": rng.normal(size=40),
            "count": pa.array([None, *range(39)], pa.int32()),
            "flag": [True, False] * 20,
            "colour": ["red", "blue", None, "ü"] * 10,
            "kind": pa.array(["cat", "dog"] * 20).dictionary_encode(),
            "half": pa.array(rng.normal(size=40).astype(np.float16)),
            "y": ["a", "b"] * 20,
        }
    )
    options = (
        {"compression": "snappy"},
        {"compression": "gzip", "use_dictionary": False, "data_page_version": "2.0"},
        {"compression": "zstd", "row_group_size": 7, "write_page_checksum": True},
        {"compression": "none", "use_dictionary": False, "data_page_size": 64},
        {"compression": "lz4", "column_encoding": {"age": "BYTE_STREAM_SPLIT", "count": "DELTA_BINARY_PACKED",
                                                   "y": "DELTA_BYTE_ARRAY"}, "use_dictionary": ["colour"]},
    )  # fmt: skip
    for number, chosen in enumerate(options):
        buffer = io.BytesIO()
        parquet.write_table(table, buffer, **chosen)
        yield Sample(f"{number}.parquet", buffer.getvalue(), "y")


def _streams(whole: list[Sample]) -> Iterator[Sample]:
    """The same files for the readers that take them piece by piece, but for those that have no runs of rows."""
    for sample in whole:
        number, kind = sample.name.split(".", 1)
        whole_only = b"x_train" in sample.content or b"'fortran_order': True" in sample.content
        if kind in ("npy", "npz", "csv", "tsv", "parquet") and not whole_only:
            yield Sample(f"{number}.stream.{kind}", sample.content, sample.target)


# --- damage ----------------------------------------------------------------------------------------------------------

INTERESTING = [0, 1, 2, 7, *(2**n - k for n in (7, 8, 15, 16, 31, 32, 63, 64) for k in (0, 1))]
TOKENS = (
    b"NaN", b"-1", b"0", b"1e999", b"null", b"[", b"{", b'"', b"]", b"}", b",", b";", b"\n", b"\r", b"\0", b"\xff",
    b"99999999999999999999", b"4294967296", b"True", b"inf", b"\\ud800", b"\xed\xa0\x80", b"'|O'", b"PK\x03\x04",
    b"PK\x01\x02", b"PAR1",
)  # fmt: skip


def damaged(content: bytes, others: list[bytes], rng: np.random.Generator) -> bytes:
    """``content`` after one to four changes of random kinds and places."""
    changed = bytearray(content)
    for _ in range(rng.integers(1, 5)):
        if changed:
            CHANGES[rng.integers(len(CHANGES))](changed, others, rng)
    return bytes(changed)


def _at(changed: bytearray, rng: np.random.Generator) -> int:
    """A place in the file; often near an end, where headers and footers are."""
    near = int(rng.integers(0, min(len(changed), 64)))
    return (near, len(changed) - 1 - near, *(int(rng.integers(len(changed))) for _ in range(2)))[rng.integers(4)]


def _flip(changed: bytearray, others: list[bytes], rng: np.random.Generator) -> None:
    changed[_at(changed, rng)] ^= 1 << int(rng.integers(8))


def _byte(changed: bytearray, others: list[bytes], rng: np.random.Generator) -> None:
    changed[_at(changed, rng)] = int(rng.integers(256))


def _number(changed: bytearray, others: list[bytes], rng: np.random.Generator) -> None:
    """An integer field of 1, 2, 4 or 8 bytes, in either order, set to a value that programs trip over."""
    size, order = 1 << int(rng.integers(4)), ("little", "big")[rng.integers(2)]
    place = _at(changed, rng)
    value = INTERESTING[rng.integers(len(INTERESTING))] % (1 << 8 * size)
    changed[place : place + size] = value.to_bytes(size, order)


def _digits(changed: bytearray, others: list[bytes], rng: np.random.Generator) -> None:
    """A number in text, set to one that programs trip over."""
    places = [i for i, byte in enumerate(changed) if 48 <= byte <= 57]
    if places:
        place = places[rng.integers(len(places))]
        changed[place : place + 1] = str(INTERESTING[rng.integers(len(INTERESTING))]).encode()


def _token(changed: bytearray, others: list[bytes], rng: np.random.Generator) -> None:
    place, token = _at(changed, rng), TOKENS[rng.integers(len(TOKENS))]
    changed[place : place + int(rng.integers(2)) * len(token)] = token * (1 if rng.integers(8) else 300)


def _cut(changed: bytearray, others: list[bytes], rng: np.random.Generator) -> None:
    del changed[_at(changed, rng) :]


def _remove(changed: bytearray, others: list[bytes], rng: np.random.Generator) -> None:
    place = _at(changed, rng)
    del changed[place : place + int(rng.integers(1, 64))]


def _repeat(changed: bytearray, others: list[bytes], rng: np.random.Generator) -> None:
    place, size = _at(changed, rng), int(rng.integers(1, 200))
    changed[place:place] = changed[place : place + size] * int(rng.integers(1, 9))


def _splice(changed: bytearray, others: list[bytes], rng: np.random.Generator) -> None:
    other = others[rng.integers(len(others))]
    start = int(rng.integers(len(other)))
    place, size = _at(changed, rng), int(rng.integers(1, 300))
    changed[place : place + size * int(rng.integers(2))] = other[start : start + size]


def _noise(changed: bytearray, others: list[bytes], rng: np.random.Generator) -> None:
    place = _at(changed, rng)
    changed[place : place + 16] = rng.bytes(16)


CHANGES = (_flip, _flip, _byte, _number, _number, _digits, _token, _cut, _remove, _repeat, _splice, _noise)


def check_samples(files: list[Sample], folder: Path) -> None:
    """See that every sample is read: of a file that is refused as it is, damage would prove nothing."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        for sample in files:
            path = Path(f"whole.{sample.kind}")
            path.write_bytes(sample.content)
            if (found := outcome(path, sample.target)) != "read":
                raise AssertionError(f"{sample.name} is {found}")
    finally:
        os.chdir(before)


def mutation(number: int, seed: int, files: list[Sample]) -> tuple[Sample, bytes]:
    """The ``number``-th damaged file of a seed and the sample that it was: the same in every run.

    Every other packed file is damaged inside and packed again, so that its checksum does not hide the damage, and of
    every other model file some values of the description are others, in JSON that is sound.
    """
    rng = np.random.default_rng([seed, number])
    sample = files[number % len(files)]
    others = [other.content for other in files if other.kind == sample.kind]
    inside = bool(rng.integers(2))
    if inside and sample.name.endswith(".gz"):
        plain = damaged(gzip.decompress(sample.content), [TABLE.encode()], rng)
        return sample, gzip.compress(plain, mtime=0)
    if inside and sample.name.endswith(".npz"):
        return sample, _damaged_member(sample.content, rng)
    if inside and sample.name.endswith(".safetensors"):
        return sample, _damaged_description(sample.content, rng)
    return sample, damaged(sample.content, others, rng)


def _damaged_member(content: bytes, rng: np.random.Generator) -> bytes:
    """An archive in which one member is damaged and the checksums are right; now and then a member comes twice."""
    packed = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(packed, "w") as new:
        infos = old.infolist()
        chosen = infos[rng.integers(len(infos))]
        others = [old.read(info) for info in infos]
        for info in infos:
            data = old.read(info)
            new.writestr(info, damaged(data, others, rng) if info is chosen else data)
            if info is chosen and not rng.integers(6):
                with _silenced():
                    new.writestr(info, data)
    return packed.getvalue()


VALUES = json.dumps([None, True, *INTERESTING, -1, 0.5, 1e308, 10**30, "", "relu", "nll", "é" * 999, [], {}, [[]]])


def _damaged_description(content: bytes, rng: np.random.Generator) -> bytes:
    """A model file in whose description, or in whose layout, one to three values are others, gone or there twice."""
    size = int.from_bytes(content[:8], "little")
    layout = json.loads(content[8 : 8 + size])
    description = json.loads(layout["__metadata__"]["header"])
    for _ in range(rng.integers(1, 4)):
        _change_value(layout if not rng.integers(4) else description, rng)
    if isinstance(layout.get("__metadata__"), dict):
        layout["__metadata__"]["header"] = json.dumps(description)
    text = json.dumps(layout).encode()
    return len(text).to_bytes(8, "little") + text + content[8 + size :]


def _change_value(node: Any, rng: np.random.Generator) -> None:
    """Go down from ``node`` to some value, and put another in its place."""
    while node:
        keys = list(node) if isinstance(node, dict) else list(range(len(node)))
        key = keys[rng.integers(len(keys))]
        if isinstance(node[key], (dict, list)) and rng.integers(5):
            node = node[key]
            continue
        change = rng.integers(5)
        if change == 0:
            del node[key]
        elif change == 1:
            other = node[keys[rng.integers(len(keys))]]
            if isinstance(node, dict):
                node[f"{key}x"] = other
            else:
                node.insert(key, other)
        else:
            values = json.loads(VALUES)  # new ones, since they may be changed in turn
            node[key] = values[rng.integers(len(values))]
        return


@contextlib.contextmanager
def _silenced() -> Iterator[None]:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


# --- reading, in a process of its own --------------------------------------------------------------------------------


def outcome(file: Path, target: str | None) -> str:
    """ "read", "refused", or what is wrong with how the file at hand was taken."""
    try:
        if file.suffix == ".safetensors":
            return _model_fault(Model.load(file, "cpu")) or "read"
        if ".stream." in file.name:
            pieces = Stream(file, target, memory="64MiB", chunk_rows=3).prepared(as_stored).pieces()
            return next(filter(None, (_fault(readers.RawData(piece.x, piece.y)) for piece in pieces)), "read")
        return _fault(readers.read(file, target)) or "read"
    except (ValueError, FileNotFoundError, BrokenData) as error:
        message = str(error)
    except Exception as error:
        return f"{type(error).__name__}: {error}"[:200]
    named = file.name in message or "labels." in message or message.startswith(("target:", "y:"))
    readable = message.isprintable() and len(message) < 3000
    return "refused" if named and readable else f"a message that does not name the file: {message[:200]!r}"


def _model_fault(model: Model) -> str:
    """What is wrong with a model that was read; an empty string where it predicts."""
    if not np.isfinite(model.net.theta).all():
        return "a model that is not finite"
    names = model.preprocessor.feature_names
    texts = {category.column: category.categories[0] for category in model.preprocessor.categorical}
    columns = [np.array([texts.get(j, 0.5)] * 2, object if j in texts else None)
               for j in range(model.preprocessor.n_features_in)]  # fmt: skip
    predicted = model.predict(np.column_stack(columns) if names is None else dict(zip(names, columns)))
    return "" if len(predicted) == 2 else f"{len(predicted)} predictions of 2 rows"


def _fault(raw: readers.RawData) -> str:
    """What is wrong with data that were read; an empty string where they are valid."""
    columns = list(raw.x.values()) if isinstance(raw.x, dict) else [raw.x]
    for column in (*columns, *(() if raw.y is None else (raw.y,))):
        if len(column) != len(raw):
            return f"{len(column)} rows beside {len(raw)}"
        if column.dtype.kind == "O":
            if not all(value is None or isinstance(value, str) for value in column.tolist()):
                return "objects that are no text"
        elif column.dtype.kind not in "biufU":
            return f"dtype {column.dtype}"
        else:
            str(column.tolist()).encode("utf-8", "strict")
    return ""


def work(connection: Connection, folder: str) -> None:
    """Read what is asked for, and answer (outcome, seconds of the processor, growth of the peak of memory)."""
    os.chdir(folder)
    for warm in sorted(Path().glob("warm-*")):  # what libraries allocate once
        outcome(warm, "y" if warm.suffix in (".csv", ".parquet") else None)
    in_use = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (in_use + ADDRESS_SPACE,) * 2)
    connection.send("ready")
    while (asked := connection.recv()) is not None:
        name, target = asked
        before, began = peak(reset=True), time.process_time()
        found = outcome(Path(name), target)
        connection.send((found, time.process_time() - began, peak() - before))


def peak(reset: bool = False) -> int:
    """The largest resident memory since the last reset, in bytes."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024


# --- the run ---------------------------------------------------------------------------------------------------------


@dataclass
class Tally:
    """What became of the files of one kind."""

    files: int = 0
    read: int = 0
    refused: int = 0
    seconds: float = 0.0
    memory: int = 0
    findings: list[str] = field(default_factory=list)


class Fuzzer:
    """Damaged files, each read by a worker; ``tallies`` counts by kind. Works on Linux, whose /proc it reads."""

    def __init__(self, folder: Path, seed: int = 0, keep: Path | None = None) -> None:
        self.folder, self.seed, self.keep = folder, seed, keep
        self.files = samples()
        self.tallies = {sample.kind: Tally() for sample in self.files}
        for number, sample in enumerate(self.files):
            (folder / f"warm-{number}.{sample.kind}").write_bytes(sample.content)
        labels = np.array([0, 1, 0, 1, 1], np.uint8)
        np.save(folder / "labels.npy", labels)
        (folder / "labels.idx").write_bytes(bytes([0, 0, 8, 1]) + struct.pack(">I", 5) + labels.tobytes())
        check_samples(self.files, folder)
        self._start()

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._worker = context.Process(target=work, args=(theirs, str(self.folder)), daemon=True)
        self._worker.start()
        theirs.close()
        assert self._connection.recv() == "ready"

    def run(self, numbers: range) -> dict[str, Tally]:
        """Read the damaged files of these numbers; the tallies so far."""
        for number in numbers:
            self._one(number)
        return self.tallies

    def close(self) -> None:
        """End the worker."""
        with contextlib.suppress(OSError):
            self._connection.send(None)
        self._worker.join(10)

    def __enter__(self) -> Fuzzer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _one(self, number: int) -> None:
        sample, content = mutation(number, self.seed, self.files)
        path = self.folder / f"damaged.{sample.kind}"
        path.write_bytes(content)
        found, seconds, memory = self._asked(path.name, sample.target)
        tally = self.tallies[sample.kind]
        tally.files += 1
        tally.read += found == "read"
        tally.refused += found == "refused"
        tally.seconds, tally.memory = max(tally.seconds, seconds), max(tally.memory, memory)
        if found in ("read", "refused"):
            if seconds > SECONDS:
                found = f"took {seconds:.1f} s"
            elif memory > 2 * len(content) + CONSTANT:
                found = f"took {memory / 2**20:.0f} MiB for a file of {len(content)} bytes"
            else:
                return
        tally.findings.append(f"--seed {self.seed} --only {number} ({sample.name}): {found}")
        if self.keep is not None:
            self.keep.mkdir(parents=True, exist_ok=True)
            (self.keep / f"{self.seed}-{number}-{sample.name}").write_bytes(content)

    def _asked(self, name: str, target: str | None) -> tuple[str, float, int]:
        """The worker's answer; where it gives none, how it died."""
        self._connection.send((name, target))
        try:
            if self._connection.poll(PATIENCE):
                answer: tuple[str, float, int] = self._connection.recv()
                return answer
            self._worker.kill()
            self._worker.join()
            died = f"no answer within {PATIENCE:.0f} s"
        except EOFError:
            self._worker.join()
            code = self._worker.exitcode or 0
            died = f"the process died of {signal.Signals(-code).name if code < 0 else f'exit status {code}'}"
        self._start()
        return died, 0.0, 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mutations", type=int, default=20000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="one damaged file, by the number in a finding")
    parser.add_argument("--keep", type=Path, help="a folder for the files of the findings")
    chosen = parser.parse_args()
    numbers = range(chosen.mutations) if chosen.only is None else range(chosen.only, chosen.only + 1)
    with tempfile.TemporaryDirectory() as folder, Fuzzer(Path(folder), chosen.seed, chosen.keep) as fuzzer:
        tallies = fuzzer.run(numbers)
    print(f"{'kind':<12} {'files':>6} {'read':>6} {'refused':>8} {'slowest':>9} {'memory':>9}  findings")
    for kind, tally in tallies.items():
        row = f"{kind:<12} {tally.files:>6} {tally.read:>6} {tally.refused:>8} {tally.seconds:>7.3f} s"
        print(f"{row} {tally.memory / 2**20:>5.1f} MiB  {len(tally.findings)}")
    for tally in tallies.values():
        print(*tally.findings, sep="\n", end="\n" if tally.findings else "")
    return int(any(tally.findings for tally in tallies.values()))


if __name__ == "__main__":
    sys.exit(main())
