"""Files of tensors, model files first: the same bits back, the old file or the new one, and nothing believed."""

from __future__ import annotations

import errno
import json
import os
import pickle
import stat
import struct
import subprocess
import sys
import tempfile
import textwrap
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from helpers import PROPERTY, same_bits
from hypothesis import given
from hypothesis import strategies as st

from gpu_mlp import MLP, Trainer, tensorfile
from gpu_mlp.network import FILE

safetensors = pytest.importorskip("safetensors.numpy")


def network(**options):
    defaults = {"activation": ["relu", "gelu"], "output": "softmax", "dropout": [0.0, 0.25], "seed": 2**63 + 1}
    net = MLP([4, 7, 5, 3], **{**defaults, **options})
    rng = np.random.default_rng(0)
    for b in net.biases:
        b[...] = rng.normal(size=b.shape)
    return net


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.safetensors"


# --- there and back ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["float64", "float32", "tf32", "float16", "bfloat16"])
def test_a_file_gives_back_the_network_to_the_bit(path, precision):
    if precision == "bfloat16":
        pytest.importorskip("ml_dtypes")
    net = network(precision=precision)
    net.metadata = {"classes": ["a", "ü", 3], "scale": 0.1, "nested": {"none": None}}
    assert net.save(path) == path
    twin = MLP.load(path)
    assert same_bits(twin.theta, net.theta)
    assert repr(twin) == repr(net)
    assert (twin.dropout, twin.seed, twin.metadata) == (net.dropout, net.seed, net.metadata)
    x = np.random.default_rng(1).normal(size=(9, 4))
    assert same_bits(twin.forward(x), net.forward(x))
    y = np.arange(9) % 3
    for one in (net, twin):
        Trainer(one, optimizer="sgd").fit((x, y), epochs=2, batch_size=4, progress=False)
    assert same_bits(twin.theta, net.theta), "and it trains on alike, with the same masks and shuffles"


def test_a_path_may_be_a_string_and_the_same_bytes_come_out_twice(tmp_path):
    net = network()
    files = [net.save(str(tmp_path / "0")), *(net.save(tmp_path / f"{i}") for i in range(1, 6))]
    assert len({file.read_bytes() for file in files}) == 1
    assert same_bits(MLP.load(str(files[0])).theta, net.theta)


@pytest.mark.parametrize("saved", ["float64", "float32", "bfloat16"])
@pytest.mark.parametrize("wanted", ["float64", "float32", "float16", "bfloat16"])
def test_a_file_can_be_loaded_at_another_precision(path, saved, wanted):
    if "bfloat16" in (saved, wanted):
        pytest.importorskip("ml_dtypes")
    net = network(precision=saved)
    net.save(path)
    twin = MLP.load(path, precision=wanted)
    assert twin.precision == wanted
    for mine, theirs in zip((*twin.weights, *twin.biases), (*net.weights, *net.biases)):
        assert same_bits(mine, theirs.astype(mine.dtype))
    x = np.ones((2, 4))
    np.testing.assert_allclose(twin.forward(x), net.forward(x), atol=0.02)


def test_the_tensors_have_the_names_of_a_torch_sequential(path):
    net = network()
    net.save(path)
    tensors = safetensors.load_file(path)
    assert set(tensors) == {f"{2 * l}.{kind}" for l in range(3) for kind in ("weight", "bias")}
    for l in range(3):
        assert same_bits(tensors[f"{2 * l}.weight"], net.weights[l])
        assert same_bits(tensors[f"{2 * l}.bias"], net.biases[l])


def test_arguments_of_load_are_blamed_on_the_caller_and_not_on_the_file(path):
    network().save(path)
    for arguments, match in (
        ({"precision": "flot32"}, "^precision: unknown name 'flot32'; did you mean 'float32'"),
        ({"device": "gpu"}, "^device: unknown name 'gpu'"),
    ):
        with pytest.raises(ValueError, match=match):
            MLP.load(path, **arguments)


# --- writing -----------------------------------------------------------------------------------------------------


def full_disk(*arguments, **options):
    raise OSError(errno.ENOSPC, "No space left on device")


class HalfWritten:
    """A file that takes half of what is written and then has no room."""

    def __init__(self, file):
        self._file = file

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._file.close()

    def write(self, content):
        self._file.write(content[: len(content) // 2])
        self._file.flush()
        full_disk()


@pytest.mark.parametrize("failing", ["os.fsync", "os.replace", "os.chmod", "write", "interrupt"])
def test_a_write_that_fails_leaves_the_old_file_and_no_other(path, monkeypatch, failing):
    old = network(seed=1)
    old.save(path)
    content = path.read_bytes()
    if failing == "write":
        honest = os.fdopen
        monkeypatch.setattr(os, "fdopen", lambda *arguments: HalfWritten(honest(*arguments)))
    elif failing == "interrupt":

        def interrupt(*_):
            raise KeyboardInterrupt

        monkeypatch.setattr(os, "replace", interrupt)
    else:
        monkeypatch.setattr(failing, full_disk)
    with pytest.raises((OSError, KeyboardInterrupt)):
        network(seed=2).save(path)
    monkeypatch.undo()
    assert path.read_bytes() == content
    assert os.listdir(path.parent) == [path.name], "no temporary file is left behind"
    network(seed=2).save(path)
    assert same_bits(MLP.load(path).theta, network(seed=2).theta)


def test_a_failed_first_write_leaves_nothing(path, monkeypatch):
    monkeypatch.setattr(os, "replace", full_disk)
    with pytest.raises(OSError, match="No space left"):
        network().save(path)
    assert os.listdir(path.parent) == []


def test_what_cannot_be_written_as_json_is_refused_before_the_file_is_touched(path):
    net = network()
    net.save(path)
    content = path.read_bytes()
    for metadata in ({"a": float("nan")}, {"a": {1, 2}}, {"a": np.float32(1)}):
        net.metadata = metadata
        with pytest.raises((TypeError, ValueError)):
            net.save(path)
        assert path.read_bytes() == content
        assert os.listdir(path.parent) == [path.name]


def test_the_file_is_on_the_disk_before_it_gets_its_name(path, monkeypatch):
    """Synced, then renamed: a power cut cannot leave an empty file under the name."""
    calls = []
    for name in ("fsync", "replace"):
        honest = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, honest=honest, name=name: (calls.append(name), honest(*a))[1])
    network().save(path)
    assert calls[:2] == ["fsync", "replace"]


def test_a_process_that_dies_while_it_writes_leaves_the_old_file(path):
    network(seed=1).save(path)
    content = path.read_bytes()
    code = """
        import os, sys
        from gpu_mlp import MLP
        os.fsync = lambda descriptor: os._exit(9)
        MLP([4, 7, 5, 3]).save(sys.argv[1])
    """
    assert subprocess.run([sys.executable, "-c", textwrap.dedent(code), str(path)], timeout=60).returncode == 9
    assert path.read_bytes() == content


@pytest.mark.skipif(os.name != "posix", reason="permissions of files are POSIX's")
@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600), (0o002, 0o664)])
def test_the_umask_is_respected(path, umask, mode):
    before = os.umask(umask)
    try:
        network().save(path)
        assert os.umask(umask) == umask, "and left as it was"
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == mode


def test_a_folder_that_is_not_there_is_named(tmp_path):
    folder = tmp_path / "no" / "such"
    with pytest.raises(FileNotFoundError) as caught:
        network().save(folder / "model.safetensors")
    assert str(folder) in str(caught.value)
    assert ".tmp" not in str(caught.value), "a name that nobody gave explains nothing"


def test_a_folder_cannot_be_overwritten(tmp_path):
    (tmp_path / "model").mkdir()
    with pytest.raises(OSError):
        network().save(tmp_path / "model")
    assert os.listdir(tmp_path) == ["model"]


def test_a_relative_path_without_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    network().save("m")
    assert same_bits(MLP.load("m").theta, network().theta)


# --- reading: not such a file ------------------------------------------------------------------------------------


def test_a_missing_file_is_named(path):
    with pytest.raises(FileNotFoundError, match=f"model: no file at {path}"):
        MLP.load(path)
    with pytest.raises(FileNotFoundError, match="model: no file at"):
        MLP.load(path.parent)


@pytest.mark.parametrize(
    "content",
    [b"", b"\x00", b"not a model", b"PK\x03\x04" + bytes(99), b"\x80\x04\x95" + bytes(50), b"\xff" * 64, bytes(999)],
)
def test_what_is_no_safetensors_file_is_refused(path, content):
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"model: {path}"):
        MLP.load(path)


def test_another_program_s_file_is_refused(path):
    for metadata in (None, {"format": "pt"}, {"format": "gpu_mlp"}):
        safetensors.save_file({"0.weight": np.zeros((3, 4), np.float32)}, path, metadata)
        with pytest.raises(ValueError, match="is a safetensors file, but not one that gpu_mlp wrote"):
            MLP.load(path)


# --- reading: a file that lies -----------------------------------------------------------------------------------


def parts():
    """The header of a good file, as a dict, and the bytes behind it."""
    with tempfile.TemporaryDirectory() as folder:
        content = network().save(Path(folder) / "m").read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def assemble(header, body):
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def our_header(header):
    return json.loads(header["__metadata__"]["header"])


def with_network(**changes):
    """A file whose description of the network is changed and whose tensors are not."""
    header, body = parts()
    ours = our_header(header)
    for key, value in changes.items():
        if value is ...:
            del ours["network"][key]
        else:
            ours["network"][key] = value
    header["__metadata__"]["header"] = json.dumps(ours)
    return assemble(header, body)


def refused(path, content, match="model: "):
    path.write_bytes(content)
    with pytest.raises(ValueError, match=match):
        MLP.load(path)


@pytest.mark.parametrize("version", ["0", "2", "", "one", None])
def test_another_version_is_refused(path, version):
    header, body = parts()
    if version is None:
        del header["__metadata__"]["format_version"]
    else:
        header["__metadata__"]["format_version"] = version
    wanted = FILE.version
    refused(path, assemble(header, body), f"has format version {version}; this release reads {wanted}")


@pytest.mark.parametrize("key", ["sizes", "activation", "output", "dropout", "precision", "seed"])
@pytest.mark.parametrize(
    "value", [None, "x", -1, 1.5, [], {}, [None], True, float("nan"), [[4, 7, 5, 3]], "\ud800", 10**30, [[]] * 3]
)
def test_a_description_of_no_network_is_refused(path, key, value):
    refused(path, with_network(**{key: value}), f"model: {path} (does not describe a network|has no readable header)")


@pytest.mark.parametrize(
    "changes",
    [
        {"sizes": ...},
        {"unknown": 1},
        {"init": "orthogonal"},
        {"device": "cpu"},
        {"activation": ["relu"]},
        {"activation": []},
        {"dropout": []},
        {"dropout": [0.0, 1.0]},
        {"output": "relux"},
        {"precision": "float128"},
        {"activation": ["relu", "softmax"]},  # with dropout on it
        {"sizes": [4, 7, 5]},
        {"sizes": [4, 7, 5, 3, 2]},
        {"sizes": [7, 4, 5, 3]},
        {"sizes": [4, 7, 5, 0]},
    ],
    ids=str,
)
def test_a_description_that_does_not_fit_is_refused(path, changes):
    refused(path, with_network(**changes), f"model: {path} does not describe a network")


@pytest.mark.parametrize("sizes", [[4, 10**9, 10**9, 3], [10**15, 7, 5, 3], [4, 7, 2**62, 3], [1] * 20_000])
def test_sizes_are_not_believed_before_the_tensors_are_seen(path, sizes):
    content = with_network(sizes=sizes, activation="relu", dropout=0.0)
    path.write_bytes(content)
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match="does not describe a network") as caught:
            MLP.load(path)
        assert tracemalloc.get_traced_memory()[1] < 20e6
    finally:
        tracemalloc.stop()
    assert len(str(caught.value)) < 1000, "and the message is one that can be read"


@pytest.mark.parametrize(
    "text",
    ["", "[]", "3", "null", '"a"', "{}", "{", "[" * 100_000, '{"network": {}}', '{"network": 5, "metadata": {}}',
     '{"network": null, "metadata": {}}', '{"network": [], "metadata": {}}'],
)  # fmt: skip
def test_a_header_that_is_no_description_is_refused(path, text):
    header, body = parts()
    header["__metadata__"]["header"] = text
    refused(path, assemble(header, body))


@pytest.mark.parametrize("metadata", [None, [], 3, "ab", ["ab"], [1]])
def test_metadata_is_a_mapping(path, metadata):
    header, body = parts()
    ours = our_header(header)
    ours["metadata"] = metadata
    header["__metadata__"]["header"] = json.dumps(ours)
    refused(path, assemble(header, body))


def test_missing_and_unknown_tensors_are_refused(path):
    header, body = parts()
    for old, new in (("0.bias", "0.bais"), ("2.weight", "3.weight")):
        changed = {(new if name == old else name): entry for name, entry in header.items()}
        refused(path, assemble(changed, body), f"tensors .*{old}.* are missing or unknown")
    path.write_bytes(CONTENT)
    tensors = safetensors.load_file(path)
    metadata = header["__metadata__"]
    for change in (lambda t: t.pop("4.bias"), lambda t: t.update({"6.weight": np.zeros((2, 3), np.float32)})):
        altered = dict(tensors)
        change(altered)
        safetensors.save_file(altered, path, metadata)
        with pytest.raises(ValueError, match="are missing or unknown"):
            MLP.load(path)


@pytest.mark.parametrize(
    ("dtype", "shape"),
    [("F32", [1, 7]), ("F32", [7, 1]), ("I32", [7]), ("U32", [7]), ("BF16", [14]), ("F16", [14]), ("F8_E4M3", [28]),
     ("F8_E5M2", [28]), ("U8", [28]), ("I16", [14]), ("BOOL", [28]), ("F32", []), ("F32", [8]), ("XX", [7]),
     ("C64", [7])],
)  # fmt: skip
def test_tensors_of_another_type_or_shape_are_refused(path, dtype, shape):
    header, body = parts()
    header["0.bias"]["dtype"], header["0.bias"]["shape"] = dtype, shape
    refused(path, assemble(header, body), f"model: {path}")


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["0.weight", "4.bias"])
def test_weights_that_are_not_finite_are_refused(path, bad, name):
    net = network()
    net.save(path)
    header, _ = parts()
    tensors = {key: value.copy() for key, value in safetensors.load_file(path).items()}
    tensors[name].flat[-1] = bad
    safetensors.save_file(tensors, path, header["__metadata__"])
    with pytest.raises(ValueError, match=f"tensor {name}: row .* is {bad}"):
        MLP.load(path)


@pytest.mark.parametrize(("wanted", "value"), [("float32", 1e300), ("float16", 1e6), ("float16", 1e300)])
def test_weights_too_large_for_the_wanted_precision_are_refused(path, wanted, value):
    net = network(precision="float64")
    net.weights[1][2, 3] = value
    net.save(path)
    assert MLP.load(path).weights[1][2, 3] == value
    with pytest.raises(ValueError, match=r"2\.weight"):
        MLP.load(path, precision=wanted)


# --- reading: a layout that lies ---------------------------------------------------------------------------------


def layout(entries, size, metadata=None):
    """A file with these tensor entries over ``size`` zero bytes."""
    header = {"__metadata__": metadata or parts()[0]["__metadata__"]} | entries
    return assemble(header, bytes(size))


def entry(begin, end, shape, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


LIES = {
    "an overlap": ({"a": entry(0, 8, [2]), "b": entry(4, 12, [2])}, 12),
    "the same bytes twice": ({"a": entry(0, 8, [2]), "b": entry(0, 8, [2])}, 8),
    "a hole": ({"a": entry(0, 8, [2]), "b": entry(12, 20, [2])}, 20),
    "a hole at the beginning": ({"a": entry(4, 12, [2])}, 12),
    "bytes behind the last": ({"a": entry(0, 8, [2])}, 9),
    "bytes and no tensor": ({}, 1),
    "more than the file has": ({"a": entry(0, 800, [200])}, 8),
    "an end before its begin": ({"a": entry(8, 0, [2])}, 8),
    "a shape that does not fit": ({"a": entry(0, 8, [3])}, 8),
    "a huge shape": ({"a": entry(0, 8, [2**62, 2**62, 2**62])}, 8),
    "a huge shape with a 0": ({"a": entry(0, 8, [2**62, 0])}, 8),
    "a negative shape": ({"a": entry(0, 8, [-2])}, 8),
    "two negative shapes": ({"a": entry(0, 8, [-2, -1])}, 8),
    "a truth as a shape": ({"a": entry(0, 4, [True])}, 4),
    "a float as a shape": ({"a": entry(0, 8, [2.0])}, 8),
    "a shape that is no list": ({"a": entry(0, 8, "2")}, 8),
    "too many dimensions": ({"a": entry(0, 8, [2] + [1] * 64)}, 8),
    "negative offsets": ({"a": entry(-8, 0, [2])}, 0),
    "one offset": ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0]}}, 8),
    "no offsets": ({"a": {"dtype": "F32", "shape": [2]}}, 8),
    "a field too many": ({"a": {**entry(0, 8, [2]), "more": 1}}, 8),
    "an entry that is no object": ({"a": [0, 8]}, 8),
    "a type that is no text": ({"a": entry(0, 8, [2], 3)}, 8),
    "a type that is a list": ({"a": entry(0, 8, [2], ["F32"])}, 8),
    "a name that cannot be printed": ({"\ud800\n": entry(0, 8, [3])}, 8),
    "a long name": ({"n" * 10**6: entry(0, 8, [3])}, 8),
}  # fmt: skip


@pytest.mark.parametrize("lie", LIES)
def test_a_layout_that_lies_is_refused_without_memory_for_it(path, lie):
    content = layout(*LIES[lie])
    path.write_bytes(content)
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=f"model: {path} is not a readable safetensors file") as caught:
            MLP.load(path)
        assert tracemalloc.get_traced_memory()[1] < 200_000 + 4 * len(content)
    finally:
        tracemalloc.stop()
    message = str(caught.value)
    assert len(message) < 1000
    assert message.isprintable()
    message.encode()


@pytest.mark.parametrize("where", ["a tensor", "a field of it", "the metadata", "in our header"])
def test_a_name_that_stands_twice_is_refused(path, where):
    """Readers differ in which of the two they take: the file would be another one to each."""
    header, body = parts()
    text = json.dumps(header)
    twice = {
        "a tensor": ('"0.bias": {', '"0.bias": ' + json.dumps(header["0.bias"]) + ', "0.bias": {'),
        "a field of it": ('"dtype": "F32"', '"dtype": "F32", "dtype": "F32"'),
        "the metadata": ('{"__metadata__": {', '{"__metadata__": {}, "__metadata__": {'),
        "in our header": ('\\"sizes\\": ', '\\"sizes\\": [4, 3], \\"sizes\\": '),
    }  # fmt: skip
    old, new = twice[where]
    assert old in text
    text = text.replace(old, new, 1)
    refused(path, struct.pack("<Q", len(text)) + text.encode() + body, f"model: {path} .* twice")


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999", "-1e999", "9" * 5000, "1" + "0" * 41])
def test_numbers_that_are_none_are_refused(path, number):
    header, body = parts()
    for text in (
        json.dumps(header).replace('"shape": [7]', f'"shape": [{number}]', 1),
        json.dumps(header).replace('\\"metadata\\": {', f'\\"metadata\\": {{\\"n\\": {number}', 1),
    ):
        assert number in text
        refused(path, struct.pack("<Q", len(text)) + text.encode() + body, f"model: {path} ")


BOMBS = {
    "deep": b"[" * 1_000_000,
    "deep objects": b'{"":' * 300_000,
    "empty lists": b"[" + b"[]," * 2_000_000 + b"[]]",
    "empty objects": b"[" + b"{}," * 2_000_000 + b"{}]",
    "small objects": b"[" + b'{"":0},' * 1_000_000 + b"{}]",
    "names": b"{" + b",".join(b'"%d":0' % n for n in range(400_000)) + b"}",
    "one name, often": b"{" + b",".join([b'"a":0'] * 300_000) + b"}",
    "a name twice at the end": b"{" + b",".join(b'"%d":0' % (n % 299_999) for n in range(300_000)) + b"}",
    "digits": b"[" + b"9" * 5_000_000 + b"]",
    "blanks": b" " * 30_000_000,
    "no UTF-8": b"\xff" * 5_000_000,
    "above the limit": b" " * (tensorfile.MAX_HEADER_BYTES + 1),
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_a_header_that_is_a_bomb_is_refused_soon_and_without_memory_for_it(path, bomb):
    path.write_bytes(struct.pack("<Q", len(BOMBS[bomb])) + BOMBS[bomb])
    began = time.process_time()
    with pytest.raises(ValueError, match=f"model: {path} is not a readable safetensors file") as caught:
        MLP.load(path)
    assert time.process_time() - began < 1
    assert len(str(caught.value)) < 1000
    tracemalloc.start()
    try:
        with pytest.raises(ValueError):
            MLP.load(path)
        assert tracemalloc.get_traced_memory()[1] < 2 * path.stat().st_size + 100e6
    finally:
        tracemalloc.stop()


def test_other_metadata_is_refused(path):
    header, body = parts()
    header["__metadata__"]["note"] = "mine"
    refused(path, assemble(header, body), "unknown metadata note")
    header["__metadata__"]["note"] = 3
    refused(path, assemble(header, body), "not text by name")


def test_kinds_of_files_are_told_apart(path):
    other = tensorfile.Format("checkpoint", "a training run", 3)
    tensorfile.write(path, {}, {}, other)
    with pytest.raises(ValueError, match=f"model: {path} is a checkpoint, not a model"):
        MLP.load(path)
    network().save(path)
    with (
        pytest.raises(ValueError, match=f"checkpoint: {path} is a model, not a checkpoint"),
        tensorfile.opened(path, other),
    ):
        pass


# --- tensors of any kind -----------------------------------------------------------------------------------------

ANY = tensorfile.Format("checkpoint", "a training run", 3)
TENSORS = {
    "flags": np.array([True, False, True]),
    "bytes": np.arange(5, dtype=np.uint8),
    "state": np.array([2**64 - 1, 0], np.uint64),
    "order": np.array([[3, -1], [2**62, 0]]),
    "half": np.array([0.5, -2], np.float16),
    "theta": np.random.default_rng(0).normal(size=(3, 4)),
    "moment": np.random.default_rng(1).normal(size=7).astype(np.float32),
    "best": np.array([np.inf, np.nan]),
    "nothing": np.zeros((0, 3)),
    "single": np.array(2.5),
}
EXPECTED = {
    name: tensorfile.Expected(tensor.shape, (tensorfile.NAMES[tensor.dtype],), finite=name != "best")
    for name, tensor in TENSORS.items()
}


def arrays(path, expected):
    with tensorfile.opened(path, ANY) as file:
        file.expect(expected)
        return dict(file.arrays())


def test_tensors_of_every_type_and_layout_come_back_to_the_bit(path):
    given = {**TENSORS, "order": np.asfortranarray(TENSORS["order"]), "moment": TENSORS["moment"].astype(">f4")}
    tensorfile.write(path, given, {"n": 1}, ANY)
    found = arrays(path, EXPECTED)
    assert set(found) == set(TENSORS)
    for name, tensor in TENSORS.items():
        assert same_bits(found[name], tensor), name
        assert found[name].flags.writeable
    theirs = safetensors.load_file(path)  # and the format's own library reads the same
    for name, tensor in TENSORS.items():
        assert same_bits(theirs[name], tensor), name


@pytest.mark.parametrize(
    ("name", "expected", "match"),
    [
        ("theta", tensorfile.Expected((4, 3), ("F64",)), r"theta has shape \(3, 4\), not \(4, 3\)"),
        ("theta", tensorfile.Expected((3,), ("F64",)), "theta has shape"),
        ("theta", tensorfile.Expected((None, None), ("F32",)), "theta is of type F64, not F32"),
        ("best", tensorfile.Expected((2,), ("F64",)), "best: row 0 is inf"),
    ],
)
def test_what_the_reader_does_not_expect_is_refused(path, name, expected, match):
    tensorfile.write(path, TENSORS, {}, ANY)
    with pytest.raises(ValueError, match=match):
        arrays(path, {**EXPECTED, name: expected})


def test_any_length_can_be_expected(path):
    tensorfile.write(path, TENSORS, {}, ANY)
    assert arrays(path, {**EXPECTED, "theta": tensorfile.Expected((3, None), ("F64",))})["theta"].shape == (3, 4)


def test_a_truth_is_one_of_two_bytes(path):
    tensorfile.write(path, {"flags": TENSORS["flags"]}, {}, ANY)
    path.write_bytes(path.read_bytes()[:-1] + b"\2")
    with pytest.raises(ValueError, match="flags holds more than true and false"):
        arrays(path, {"flags": EXPECTED["flags"]})


@pytest.mark.parametrize(
    "header",
    [{"a": float("inf")}, {"a": 10**50}, {1: 0, "1": 0}, {"a": [0] * (tensorfile.MAX_VALUES + 1)},
     {"a": "x" * (tensorfile.MAX_HEADER_BYTES + 1)}, {"a": '"' * (tensorfile.MAX_HEADER_BYTES // 3)}],
    ids=["inf", "digits", "a name twice", "values", "bytes", "bytes once more"],
)  # fmt: skip
def test_what_could_not_be_read_back_is_not_written(path, header):
    with pytest.raises(ValueError, match=r"^checkpoint: its description"):
        tensorfile.write(path, TENSORS, header, ANY)
    assert not os.listdir(path.parent)


def test_writing_and_reading_take_no_copy_of_the_whole(path):
    """Tensors go straight from memory to the file; on the way in there is one more tensor than what is read."""
    given = {str(n): np.ones(1 << 18) for n in range(8)}
    whole, one = 8 << 21, 1 << 21
    tracemalloc.start()
    try:
        tensorfile.write(path, given, {}, ANY)
        assert tracemalloc.get_traced_memory()[1] < one
        net = MLP([2048, 1024, 8])
        net.save(path)
        del net
        tracemalloc.reset_peak()
        before = tracemalloc.get_traced_memory()[0]
        MLP.load(path)
        assert tracemalloc.get_traced_memory()[1] - before < 2 * path.stat().st_size + one
    finally:
        tracemalloc.stop()
    assert path.stat().st_size < whole


def test_truncated_anywhere_is_refused(path):
    content = assemble(*parts())
    (length,) = struct.unpack("<Q", content[:8])
    lengths = {*range(0, 40), *range(40, len(content), 13), *range(length - 5, length + 20), len(content) - 1}
    for n in sorted(n for n in lengths if 0 <= n < len(content)):
        refused(path, content[:n], f"model: {path}")
    refused(path, content + b"\0", f"model: {path}")


@pytest.mark.parametrize("length", [0, 1, 2**31, 2**40, 2**63, 2**64 - 1])
def test_a_length_of_the_header_that_lies_is_refused_without_memory_for_it(path, length):
    content = assemble(*parts())
    path.write_bytes(struct.pack("<Q", length) + content[8:])
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=f"model: {path}"):
            MLP.load(path)
        assert tracemalloc.get_traced_memory()[1] < 10e6
    finally:
        tracemalloc.stop()


CONTENT = assemble(*parts())


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz") / "model.safetensors"


@PROPERTY
@given(st.lists(st.tuples(st.integers(0, len(CONTENT) - 1), st.integers(0, 255)), min_size=1, max_size=4))
def test_changed_bytes_give_a_finite_network_or_a_refusal(scratch, changes):
    content = bytearray(CONTENT)
    for position, value in changes:
        content[position] = value
    scratch.write_bytes(content)
    refusal, net = "model: ", None
    try:
        net = MLP.load(scratch)
    except ValueError as error:
        refusal = str(error)
    assert refusal.startswith("model: ")
    if net is not None:
        assert np.isfinite(net.theta).all()
        assert net.forward(np.ones((1, 4))).shape == (1, 3)


def test_no_pickle_is_read(path, tmp_path):
    """A pickle that would run a command is refused like any other file, and does not run."""

    class Command:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    path.write_bytes(pickle.dumps(Command()))
    with pytest.raises(ValueError, match="model: "):
        MLP.load(path)
    assert not (tmp_path / "ran").exists()
