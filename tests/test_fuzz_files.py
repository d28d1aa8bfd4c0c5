"""A thousand damaged files, and files built to take memory or time: each is refused in one line, soon and cheaply.

`python tests/fuzz_files.py --mutations 20000` is the long form of the first.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
import struct
import subprocess
import sys
import time
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
from fuzz_files import Fuzzer, mutation, peak, samples
from helpers import PROPERTY
from hypothesis import given
from hypothesis import strategies as st

from gpu_mlp import MLP, readers, tensorfile
from gpu_mlp.readers import read

linux = pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="memory is measured through Linux's /proc"
)


# --- damage ----------------------------------------------------------------------------------------------------------


@linux
def test_a_thousand_damaged_files_are_read_or_refused(tmp_path):
    with Fuzzer(tmp_path, seed=7) as fuzzer:
        tallies = fuzzer.run(range(1000))
    assert [finding for tally in tallies.values() for finding in tally.findings] == []
    assert sum(tally.files for tally in tallies.values()) == 1000
    assert all(tally.read for tally in tallies.values()), "some damage leaves a valid file of every kind"
    assert all(tally.refused for tally in tallies.values())


def test_damage_is_the_same_in_every_run():
    files = samples()
    assert [s.content for s in samples()] == [s.content for s in files]
    assert [mutation(n, 3, files)[1] for n in range(60)] == [mutation(n, 3, files)[1] for n in range(60)]
    assert mutation(5, 3, files)[1] != mutation(5, 4, files)[1]


BAD_READERS = [
    ("os.abort()", "the process died of SIGABRT"),
    ("raise KeyError('x')", "KeyError: 'x'"),
    ("raise ValueError('no')", "a message that does not name the file: 'no'"),
    ("bytearray(b'x') * 2**26", "took 6[0-9] MiB for a file of"),
    ("sum(range(10**8))", r"took [0-9.]+ s"),
    ("bytearray(2**33)", "MemoryError"),
]
PROGRAM = """
import os, sys
from pathlib import Path
from fuzz_files import Fuzzer
from gpu_mlp import readers

def read(file, target):
    if str(file).startswith("damaged"):
        exec(Path("fault").read_text())
    return readers.load_digits()

readers.read = read
if __name__ == "__main__":
    folder, *faults = sys.argv[1:]
    with Fuzzer(Path(folder)) as fuzzer:
        number = next(n for n, sample in enumerate(fuzzer.files) if sample.kind == "csv")
        for fault in faults:
            (Path(folder) / "fault").write_text(fault)
            fuzzer.run(range(number, number + 1))
        print(*fuzzer.tallies["csv"].findings, sep="\\n")
"""


@linux
def test_the_fuzzer_finds_every_kind_of_fault(tmp_path):
    """Readers that do each of these, one after the other."""
    script, folder = tmp_path / "bad_readers.py", tmp_path / "files"
    script.write_text(PROGRAM)
    folder.mkdir()
    environment = {"PYTHONPATH": f"{Path(__file__).parent}:{Path(readers.__file__).parents[1]}"}
    command = [sys.executable, str(script), str(folder), *(code for code, _ in BAD_READERS)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    findings = done.stdout.splitlines()
    assert len(findings) == len(BAD_READERS)
    for finding, (_, expected) in zip(findings, BAD_READERS):
        assert re.search(expected, finding)


# --- bombs -----------------------------------------------------------------------------------------------------------


def refused(path, content, match, target=None, most=None):
    """``content`` at ``path`` is refused within a second, and within memory of twice the file and 64 MiB."""
    path.write_bytes(content)
    began = time.process_time()
    with pytest.raises(ValueError, match=match) as caught:
        read(path, target)
    assert time.process_time() - began < 1
    message = str(caught.value)
    assert str(path) in message
    assert message.isprintable()
    assert len(message) <= readers.MOST_SHOWN + 1
    tracemalloc.start()
    try:
        with pytest.raises(ValueError):
            read(path, target)
        assert tracemalloc.get_traced_memory()[1] < (2 * len(content) + (64 << 20) if most is None else most)
    finally:
        tracemalloc.stop()


def idx_header(*shape):
    return bytes([0, 0, 8, len(shape)]) + struct.pack(f">{len(shape)}I", *shape)


def archive(members, compression=zipfile.ZIP_DEFLATED):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as packed, pytest.MonkeyPatch.context() as patch:
        patch.setattr("warnings.warn", lambda *_, **__: None)  # of two members of one name
        for name, content in members:
            packed.writestr(name, content)
    return buffer.getvalue()


def npy(array):
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def test_a_gzip_bomb_is_not_unpacked(tmp_path):
    size = 1 << 28
    bomb = gzip.compress(idx_header(size) + bytes(size), 9, mtime=0)
    path = tmp_path / "a.idx.gz"
    refused(path, bomb, "would unpack into 268435464, [0-9]+ times as many.*gunzip", str(path), most=1 << 20)
    bomb = gzip.compress(b"a,b\n" + b"1,2\n" * (size // 4), 9, mtime=0)
    assert len(bomb) < 1 << 20
    path = tmp_path / "a.csv.gz"
    path.write_bytes(bomb)
    with pytest.raises(ValueError, match=r"would unpack into .*gunzip"):
        read(path, "b")


@linux
def test_a_gzip_header_that_claims_more_than_there_is_takes_no_memory(tmp_path):
    content = gzip.compress(idx_header(100_000_000) + np.random.default_rng(0).bytes(1_000_000), mtime=0)
    path = tmp_path / "a.idx.gz"
    path.write_bytes(content)
    before = peak(reset=True)
    with pytest.raises(ValueError, match="expected 100000000 bytes after the header, found 1000000"):
        read(path, path)
    assert peak() - before < 8 << 20


BIG = np.random.default_rng(0).integers(0, 256, (4000, 2000)).astype(np.uint8)
BIG_FILES = {
    "npy": npy(BIG),
    "npy of the other byte order": npy(BIG[:, :500].astype(">f4")),
    "npz": archive([("x.npy", npy(BIG))], zipfile.ZIP_STORED),
    "npz, packed": archive([("x.npy", npy(BIG))]),
    "idx": idx_header(*BIG.shape) + BIG.tobytes(),
    "idx.gz": gzip.compress(idx_header(*BIG.shape) + BIG.tobytes(), 1, mtime=0),
}


@linux
@pytest.mark.parametrize("kind", BIG_FILES)
def test_arrays_are_read_with_no_more_memory_than_twice_the_file(tmp_path, kind):
    path = tmp_path / f"x.{kind.split(maxsplit=1)[0].strip(',')}"
    path.write_bytes(BIG_FILES[kind])
    read(path, require_target=False)  # what is allocated once
    before = peak(reset=True)
    data = read(path, require_target=False)
    assert peak() - before < 2 * len(BIG_FILES[kind]) + (2 << 20)
    assert data.x.nbytes == BIG.nbytes


X, Y = npy(np.arange(6.0).reshape(3, 2)), npy(np.arange(3))


def test_an_archive_that_hides_something(tmp_path):
    path = tmp_path / "a.npz"
    zeros = npy(np.zeros((1 << 28,), np.uint8))
    refused(path, archive([("x.npy", zeros), ("y.npy", Y)]), "would unpack into 268435584.*numpy.savez", most=1 << 20)
    for packing in (zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA):
        refused(path, archive([("x.npy", X), ("y.npy", Y)], packing), "packed in a way", most=1 << 20)
    refused(path, archive([("x.npy", X), ("x.npy", Y), ("y.npy", Y)]), "two members are called 'x.npy'", most=1 << 20)
    many = archive([(f"{n}.npy", b"") for n in range(30_000)])
    refused(path, many, "a directory of [0-9]+ bytes", most=4 << 20)
    inner = archive([("x.npy", X), ("y.npy", Y)])
    refused(path, archive([("x.npy", inner), ("y.npy", Y)]), "array 'x': cut short or not a valid NPY", most=1 << 20)
    refused(path, archive([("../../x.npy", X), ("/etc/y.npy", Y)]), "no array to be y .*its keys: ../../x, /etc/y")


def test_names_of_members_are_never_paths(tmp_path):
    path = tmp_path / "a.npz"
    path.write_bytes(archive([("../x.npy", X), ("/y.npy", Y)]))
    data = read(path, "/y")
    assert data.x.shape == (3, 2)
    assert [file.name for file in tmp_path.iterdir()] == ["a.npz"]
    assert not Path("/y.npy").exists()


@pytest.mark.parametrize(
    ("description", "message"),
    [
        ("{'descr': '|O', 'fortran_order': False, 'shape': (3,)}", "pickled"),
        ("{'descr': [('a', '|O')], 'fortran_order': False, 'shape': (3,)}", "pickled"),
        ("{'descr': '<f8', 'fortran_order': False, 'shape': (3, 2" + ", 1" * 90 + ")}", "dimensions"),
        ("{'descr': '<U1000000000', 'fortran_order': False, 'shape': (3,)}", "cut short or not"),
        ("{'descr': ('<f8', (1000000000,)), 'fortran_order': False, 'shape': (3,)}", "cut short or not"),
        ("{'descr': '<f8', 'fortran_order': False, 'shape': (10000000000000000000000,)}", "needs"),
        ("[" * 4000, "cut short or not"),
        ("-" * 9000 + "1", "cut short or not"),
        ("{'descr': __import__('os').abort(), 'fortran_order': False, 'shape': (3,)}", "cut short or not"),
    ],
    ids=["objects", "objects inside", "dimensions", "text", "subarray", "shape", "nested", "signs", "code"],
)
def test_an_npy_header_that_is_a_trap(tmp_path, description, message):
    text = description.encode() + b"\n"
    content = b"\x93NUMPY\x02\x00" + struct.pack("<I", len(text)) + text + bytes(48)
    (tmp_path / "y.npy").write_bytes(Y)
    refused(tmp_path / "x.npy", content, message, str(tmp_path / "y.npy"), most=20 << 20)


def test_an_npy_header_without_an_end_is_not_read(tmp_path):
    content = b"\x93NUMPY\x02\x00" + struct.pack("<I", 50_000_000) + b" " * 50_000_000
    (tmp_path / "y.npy").write_bytes(Y)
    refused(tmp_path / "x.npy", content, "a header of 50000000 bytes", str(tmp_path / "y.npy"), most=1 << 20)


@pytest.mark.parametrize(
    ("array", "bits", "message"),
    [
        (np.array([True, False, True]), b"\2", "a boolean that is neither 0 nor 1"),
        (np.array(["a", "b", "c"]), b"\0\0\x11\0", "text that is not Unicode"),
        (np.array(["a", "b", "c"]), b"\0\xd8\0\0", "text that is not Unicode"),
        (np.array(["a", "b", "c"], ">U1"), b"\0\0\xdf\xff", "text that is not Unicode"),
        (np.array([b"a", b"b", b"c"]), b"\xff", "UTF-8"),
    ],
)
def test_bytes_that_are_no_value(tmp_path, array, bits, message):
    (tmp_path / "x.npy").write_bytes(X)
    content = npy(array)
    path = tmp_path / "y.npy"
    path.write_bytes(content[: -len(bits)] + bits)
    with pytest.raises(ValueError, match=message):
        read(tmp_path / "x.npy", path)


CSV_BOMBS = {
    "a long line": (b"a,target\n1," + b"2" * (40 << 20), "a line of more than"),
    "a long line of astral characters": (b"a,b\n1," + "𝄞".encode() * (10 << 20), "a line of more than"),
    "a header without an end": (b"," * (40 << 20), "a line of more than"),
    "many columns": (b"," * (8 << 20) + b"\n", "a record of more than 1048576 fields"),
    "many fields in a row": (b"a,target\n" + b"1," * (7 << 20) + b"\n", "a record of more than 1048576 fields"),
    "a record over many lines": (b"a,target\n" + b'"\n",' * (2 << 20), "a record of more than 1048576 fields"),
    "rows that are too long": (
        b"a,target\n" + (b"," * 1000 + b"\n") * 20_000,
        "line 2: 1001 fields, but",
    ),
    "long names": (b"x" * 131_000 + b"," + b"y" * 131_000 + b"\n1,2\n", "no column 'target'"),
    "long labels": (b"a,target\n" + b"1," + b"z" * 131_000 + b"," + b"\n", "3 fields, but the header has 2"),
    "many names": (b",".join(b"n%d" % n for n in range(200_000)) + b"\n1,2\n", "no column 'target'"),
    "a quote left open": (b'a,target\n1,"' + b"2\n" * (1 << 20), "field larger than field limit"),
    "digits": (b"a,target\n" + b"9" * 131_000 + b",1\n", "inf, or too large"),
}


@pytest.mark.parametrize("bomb", CSV_BOMBS)
def test_a_table_that_takes_memory_or_time(tmp_path, bomb):
    content, message = CSV_BOMBS[bomb]
    refused(tmp_path / "a.csv", content, message, "target", most=2 * len(content) + (128 << 20))


def test_equal_texts_are_one_object(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("colour,y\n" + "red,1\nblue,2\n" * 500)
    colours = read(path, "y").x["colour"]
    assert len({id(colour) for colour in colours}) == 2


# --- Parquet ---------------------------------------------------------------------------------------------------------


def parquet_bytes(table, **options):
    parquet = pytest.importorskip("pyarrow.parquet")
    buffer = io.BytesIO()
    parquet.write_table(table, buffer, **options)
    return buffer.getvalue()


def test_a_parquet_file_of_one_value_over_and_over(tmp_path):
    pa = pytest.importorskip("pyarrow")
    table = pa.table({"a": np.zeros(1 << 25), "y": np.zeros(1 << 25, np.int8)})
    content = parquet_bytes(table)
    assert len(content) < 1 << 20
    refused(tmp_path / "a.parquet", content, "would unpack into .*without compression and dictionaries", "y")


def test_equal_texts_of_a_parquet_file_are_one_object(tmp_path):
    pa = pytest.importorskip("pyarrow")
    text = ["x" * 100_000, None, "y"] * 500  # 50 MB were they many
    (tmp_path / "a.parquet").write_bytes(parquet_bytes(pa.table({"a": text, "y": [0, 1, 0] * 500})))
    tracemalloc.start()
    try:
        data = read(tmp_path / "a.parquet", "y")
        assert tracemalloc.get_traced_memory()[1] < 5e6
    finally:
        tracemalloc.stop()
    assert data.x["a"].tolist() == text


def test_an_encoding_without_dictionaries_is_read_too(tmp_path):
    pa = pytest.importorskip("pyarrow")
    table = pa.table({"a": ["one", None, "two"], "y": [0, 1, 0]})
    options = {"use_dictionary": False, "column_encoding": {"a": "DELTA_BYTE_ARRAY"}}
    (tmp_path / "a.parquet").write_bytes(parquet_bytes(table, **options))
    assert read(tmp_path / "a.parquet", "y").x["a"].tolist() == ["one", None, "two"]


def test_a_nested_column_is_refused_before_it_is_read(tmp_path, monkeypatch):
    pa = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "a.parquet"
    path.write_bytes(parquet_bytes(pa.table({"a": [[1], [2]], "y": [0, 1]})))
    monkeypatch.setattr(parquet.ParquetFile, "read", lambda *_, **__: pytest.fail("went on to read"))
    with pytest.raises(ValueError, match="column 'a' holds list"):
        read(path, "y")


def test_damaged_statistics_of_a_column_do_not_end_the_process(tmp_path):
    """pyarrow parses them when a column's metadata are asked for, and lets the C++ exception through."""
    pytest.importorskip("pyarrow")
    files = samples()
    for number in (7265, 9613):  # found by the fuzzer with seed 0
        sample, content = mutation(number, 0, files)
        path = tmp_path / sample.name
        path.write_bytes(content)
        code = "import sys; from gpu_mlp import readers; readers.read(sys.argv[1], 'y')"
        done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, timeout=60)
        assert done.returncode >= 0, done.stderr


# --- any structure ---------------------------------------------------------------------------------------------------

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=9), inner, max_size=4),
    max_leaves=9,
)
ENTRY = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from([*tensorfile.DTYPES, "BF16", ""]) | JSON,
        "shape": st.lists(st.integers(-1, 9), max_size=4) | JSON,
        "data_offsets": st.lists(st.integers(-1, 64), min_size=2, max_size=2) | JSON,
    },
)
HEADER = st.dictionaries(st.sampled_from(["0.weight", "0.bias", "2.weight", "__metadata__"]), ENTRY | JSON, max_size=4)


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    return tmp_path_factory.mktemp("structures")


@PROPERTY
@given(header=HEADER, size=st.integers(0, 80))
def test_any_header_of_tensors_is_refused(scratch, header, size):
    """Whatever it says: without the metadata of a model none is one."""
    text = json.dumps(header).encode()
    path = scratch / "m.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(size))
    with pytest.raises(ValueError, match="model: "):
        MLP.load(path, "cpu")


@PROPERTY
@given(st.fixed_dictionaries({"network": JSON, "metadata": JSON}, optional={"more": JSON}))
def test_any_description_of_a_network_is_refused(scratch, header):
    path = scratch / "n.safetensors"
    try:
        tensorfile.write(path, {"0.bias": np.zeros(3, np.float32)}, header, tensorfile.Format("model", "a network", 1))
    except (ValueError, UnicodeEncodeError):
        return  # a number that is none: it is not written either
    with pytest.raises(ValueError, match=r"model: .*does not describe a network"):
        MLP.load(path, "cpu")


@PROPERTY
@given(st.lists(st.lists(st.text(max_size=6), min_size=1, max_size=4), min_size=1, max_size=6), st.sampled_from(",;\t"))
def test_any_table_of_text_is_read_or_refused(scratch, rows, delimiter):
    buffer = io.StringIO()
    csv.writer(buffer, delimiter=delimiter).writerows(rows)
    path = scratch / "t.csv"
    path.write_bytes(buffer.getvalue().encode("utf-8", "surrogatepass"))
    message, data = f"{path} ", None
    try:
        data = read(path, require_target=False)
    except ValueError as error:
        message = str(error)
    assert str(path) in message
    assert message.isprintable()
    assert data is None or len(data.x) == len(rows[0])
