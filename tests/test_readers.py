"""Readers: every format against bytes written by hand or by another library, and every broken file refused by name.

Leans on pandas and pyarrow where they are installed; the files are made in pytest's temporary folder.
"""

from __future__ import annotations

import gzip
import io
import struct
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gpu_mlp import readers
from gpu_mlp.readers import RawData, csv_files, numpy_files, read, read_idx, untrusted
from gpu_mlp.readers import idx as idx_room

QUICK = settings(
    max_examples=40, deadline=None, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def write(folder: Path, name: str, content: str | bytes) -> Path:
    """A file of ``content``, packed where its name ends in .gz."""
    file = folder / name
    data = content.encode() if isinstance(content, str) else content
    file.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    return file


def refusal(file: object, *args: object, **options: object) -> str:
    """The message of the ValueError that reading ``file`` must end in: one line, naming the file."""
    with pytest.raises(ValueError) as caught:
        read(file, *args, **options)  # type: ignore[arg-type]
    message = str(caught.value)
    assert "\n" not in message
    assert str(file).split(",")[0] in message or "target" in message
    return message


def attempt(file: Path, *args: str) -> RawData | None:
    """What is in ``file``, or None where it is refused, as it must be, by a ValueError of one line naming the file."""
    try:
        return read(file, *args)
    except ValueError as error:
        message = str(error)
    assert "\n" not in message
    assert str(file) in message
    return None


# --- IDX -------------------------------------------------------------------------------------------------------------

IMAGES = bytes(range(12))


def idx(shape: tuple[int, ...], payload: bytes, code: int = 0x08) -> bytes:
    return bytes([0, 0, code, len(shape)]) + struct.pack(f">{len(shape)}I", *shape) + payload


def mnist_folder(folder: Path, ending: str = "", n: int = 3, n_test: int = 2) -> Path:
    for prefix, rows in (("train", n), ("t10k", n_test)):
        pixels = bytes(range(rows * 4))
        write(folder, f"{prefix}-images-idx3-ubyte{ending}", idx((rows, 2, 2), pixels))
        write(folder, f"{prefix}-labels-idx1-ubyte{ending}", idx((rows,), bytes(range(rows))))
    return folder


@pytest.mark.parametrize(
    ("code", "letter", "dtype", "values"),
    [
        (0x08, "B", np.uint8, [0, 1, 255]),
        (0x09, "b", np.int8, [-128, 0, 127]),
        (0x0B, "h", np.int16, [-32768, 258, 32767]),
        (0x0C, "i", np.int32, [-(2**31), 16909060, 2**31 - 1]),
        (0x0D, "f", np.float32, [-1.5, 0.25, 3.0e38]),
        (0x0E, "d", np.float64, [-1.5, 0.1, 1e300]),
    ],
)
@pytest.mark.parametrize("ending", ["", ".gz"])
def test_idx_reads_every_type_big_endian(tmp_path, code, letter, dtype, values, ending):
    content = idx((3, 1), struct.pack(f">3{letter}", *values), code)
    array = read_idx(write(tmp_path, f"a-images-idx2-data{ending}", content))
    assert array.dtype == dtype
    assert array.dtype.isnative
    assert array.shape == (3, 1)
    np.testing.assert_array_equal(array[:, 0], np.array(values, dtype))


def test_idx_keeps_the_row_major_order_of_its_dimensions(tmp_path):
    array = read_idx(write(tmp_path, "a-idx3-ubyte", idx((2, 3, 2), IMAGES)))
    assert array.tolist() == [[[0, 1], [2, 3], [4, 5]], [[6, 7], [8, 9], [10, 11]]]
    assert array.flags.writeable


@pytest.mark.parametrize("ending", ["", ".gz"])
def test_idx_folder_gives_training_and_test_part(tmp_path, ending):
    data = read(mnist_folder(tmp_path, ending))
    assert data.x.dtype == np.uint8
    assert data.x.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    assert data.y.tolist() == [0, 1, 2]
    assert data.test.x.shape == (2, 4)
    assert data.test.y.tolist() == [0, 1]
    assert data.name == tmp_path.name
    assert len(data) == 3


def test_idx_folder_without_a_test_part(tmp_path):
    mnist_folder(tmp_path)
    for name in ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"):
        (tmp_path / name).unlink()
    assert read(tmp_path).test is None


def test_idx_folder_prefers_the_unpacked_file(tmp_path):
    mnist_folder(tmp_path)
    write(tmp_path, "train-images-idx3-ubyte.gz", b"broken")
    assert len(read(tmp_path)) == 3


def test_idx_folder_without_images_is_refused(tmp_path):
    assert "train-images-idx3-ubyte[.gz] is not there" in refusal(tmp_path)


def test_idx_folder_takes_no_target(tmp_path):
    assert "its own labels files; got target='y'" in refusal(mnist_folder(tmp_path), "y")


def test_idx_folder_parts_must_agree(tmp_path):
    mnist_folder(tmp_path)
    write(tmp_path, "t10k-images-idx3-ubyte", idx((2, 3, 2), IMAGES))
    assert "the training part has 4 columns, the test part 6" in refusal(tmp_path)


def test_idx_folder_needs_labels_in_both_parts(tmp_path):
    mnist_folder(tmp_path)
    (tmp_path / "t10k-labels-idx1-ubyte").unlink()
    assert "no labels file beside it" in refusal(tmp_path)
    assert "only the training part has labels" in refusal(tmp_path, require_target=False)


@pytest.mark.parametrize("images", ["train-images-idx3-ubyte", "train-images.idx3-ubyte", "train-images-idx3-ubyte.gz"])
@pytest.mark.parametrize("labels", ["train-labels-idx1-ubyte", "train-labels-idx1-ubyte.gz"])
def test_idx_labels_are_found_beside_their_images(tmp_path, images, labels):
    file = write(tmp_path, images, idx((3, 2, 2), IMAGES))
    write(tmp_path, labels, idx((3,), b"\7\0\2"))
    data = read(file)
    assert data.y.tolist() == [7, 0, 2]
    assert data.test is None


def test_idx_labels_given_as_target(tmp_path):
    file = write(tmp_path, "pictures.idx", idx((3, 2, 2), IMAGES))
    labels = write(tmp_path, "classes.idx", idx((3,), b"\1\0\1"))
    assert read(file, str(labels)).y.tolist() == [1, 0, 1]
    assert read(file, labels).y.tolist() == [1, 0, 1]
    assert "give target=PATH" in refusal(file)
    assert read(file, require_target=False).y is None


def test_idx_labels_must_be_as_many(tmp_path):
    file = write(tmp_path, "pictures.idx", idx((3, 2, 2), IMAGES))
    labels = write(tmp_path, "classes.idx", idx((2,), b"\1\0"))
    with pytest.raises(ValueError, match=r"classes.idx: x has 3 rows and y has 2"):
        read(file, labels)


@pytest.mark.parametrize(
    ("head", "found"),
    [
        (b"", "an empty file"),
        (b"\0\0\x08", "00 00 08"),
        (b"\0\1\x08\1", "00 01 08 01"),
        (b"\x89PNG", "89 50 4e 47"),
        (b"\0\0\x0a\1", "00 00 0a 01"),
        (b"\0\0\x08\0", "00 00 08 00"),
        (b"\0\0\x08\x21", "00 00 08 21"),
    ],
)
@pytest.mark.parametrize("ending", ["", ".gz"])
def test_idx_bad_magic(tmp_path, head, found, ending):
    file = write(tmp_path, f"a-idx1-ubyte{ending}", head + bytes(max(0, len(head) - 3) * 20))
    message = refusal(file, require_target=False)
    assert "not an IDX file" in message
    assert message.endswith(f"found {found}")


def test_idx_length_is_told_in_bytes(tmp_path):
    whole = idx((3, 2, 2), IMAGES)
    short = refusal(write(tmp_path, "short-idx3-ubyte", whole[:-1]), require_target=False)
    assert "a header of 16 bytes and 3 x 2 x 2 uint8 values make an expected 28 bytes, found 27" in short
    assert "28 bytes, found 29" in refusal(write(tmp_path, "long-idx3-ubyte", whole + b"\0"), require_target=False)
    packed = refusal(write(tmp_path, "short-idx3-ubyte.gz", whole[:-1]), require_target=False)
    assert "expected 12 bytes after the header, found 11" in packed
    packed = refusal(write(tmp_path, "long-idx3-ubyte.gz", whole + b"\0"), require_target=False)
    assert "expected 12 bytes after the header, found more than 12" in packed


def test_idx_without_data_is_refused(tmp_path):
    assert "declares 0 x 28 values" in refusal(write(tmp_path, "a-idx2-ubyte", idx((0, 28), b"")), require_target=False)


@pytest.mark.parametrize("ending", ["", ".gz"])
def test_idx_lying_dimensions_allocate_nothing(tmp_path, ending, monkeypatch):
    monkeypatch.setattr(idx_room, "read_exactly", lambda *_: pytest.fail("went on to read"))
    file = write(tmp_path, f"a-idx4-ubyte{ending}", idx((2**32 - 1,) * 4, IMAGES))
    assert f"expected {(2**32 - 1) ** 4 + 20} bytes, found" in refusal(file, require_target=False)


def test_idx_gzip_bomb_is_read_no_further_than_expected(tmp_path, monkeypatch):
    file = write(tmp_path, "a-idx1-ubyte.gz", idx((1000,), bytes(20_000_000)))
    asked = []
    plain_read = gzip.GzipFile.read
    monkeypatch.setattr(gzip.GzipFile, "read", lambda self, size=-1: asked.append(size) or plain_read(self, size))
    assert "expected 1000 bytes after the header, found more than 1000" in refusal(file, require_target=False)
    assert all(size >= 0 for size in asked)
    assert sum(asked) == 4 + 4 + 1000 + 1


@pytest.mark.parametrize("ending", ["", ".gz"])
def test_idx_cut_at_every_byte(tmp_path, ending):
    whole = write(tmp_path, f"whole-idx3-ubyte{ending}", idx((3, 2, 2), IMAGES)).read_bytes()
    file = tmp_path / f"cut-idx3-ubyte{ending}"
    for length in range(len(whole)):
        file.write_bytes(whole[:length])
        refusal(file, require_target=False)
    file.write_bytes(whole)
    assert len(read(file, require_target=False)) == 3


def test_gzip_damage_is_refused(tmp_path):
    file = write(tmp_path, "a-idx1-ubyte.gz", idx((4,), b"abcd"))
    broken = bytearray(file.read_bytes())
    broken[-5] ^= 1  # the checksum
    file.write_bytes(broken)
    assert "CRC" in refusal(file, require_target=False)


@pytest.mark.parametrize("ending", ["", ".gz"])
def test_long_files_are_read_in_pieces(tmp_path, monkeypatch, ending):
    monkeypatch.setattr(untrusted, "CHUNK_BYTES", 5)
    file = write(tmp_path, f"a-idx1-ubyte{ending}", idx((12,), IMAGES))
    assert read_idx(file).tolist() == list(IMAGES)


def test_idx_of_the_most_dimensions(tmp_path):
    shape = (2, *[1] * 29, 2, 3)
    assert read_idx(write(tmp_path, "a-idx32-ubyte", idx(shape, IMAGES))).shape == shape


@QUICK
@given(st.lists(st.integers(1, 5), min_size=1, max_size=4), st.sampled_from(sorted(idx_room.IDX_DTYPES)), st.data())
def test_idx_round_trip(tmp_path, shape, code, data):
    dtype = np.dtype(idx_room.IDX_DTYPES[code])
    size = int(np.prod(shape)) * dtype.itemsize
    payload = data.draw(st.binary(min_size=size, max_size=size))
    array = read_idx(write(tmp_path, "any-idx", idx(tuple(shape), payload, code)))
    assert array.shape == tuple(shape)
    assert array.astype(dtype).tobytes() == payload


# --- NPY and NPZ -----------------------------------------------------------------------------------------------------

X = np.arange(12, dtype=np.uint8).reshape(3, 4)
Y = np.array([2, 0, 1])


def npz(folder: Path, **arrays: object) -> Path:
    np.savez_compressed(folder / "d.npz", **arrays)
    return folder / "d.npz"


@pytest.mark.parametrize("x_key", ["x", "X", "data", "features"])
@pytest.mark.parametrize("y_key", ["y", "Y", "labels", "label", "target", "targets"])
def test_npz_finds_x_and_y_by_their_usual_names(tmp_path, x_key, y_key):
    data = read(npz(tmp_path, **{x_key: X, y_key: Y, "note": np.zeros(7)}))
    assert data.x.dtype == np.uint8
    np.testing.assert_array_equal(data.x, X)
    np.testing.assert_array_equal(data.y, Y)
    assert (data.target_name, data.feature_names, data.test) == (y_key, None, None)


@pytest.mark.parametrize("x", ["x", "X"])
def test_npz_training_and_test_part(tmp_path, x):
    file = npz(tmp_path, **{f"{x}_train": X, "y_train": Y, f"{x}_test": X[:2] + 1, "y_test": Y[:2]})
    for data in (read(file), read(file, "y_train")):
        np.testing.assert_array_equal(data.x, X)
        np.testing.assert_array_equal(data.test.x, X[:2] + 1)
        np.testing.assert_array_equal(data.test.y, Y[:2])


def test_npz_training_part_alone(tmp_path):
    assert read(npz(tmp_path, x_train=X, y_train=Y)).test is None
    file = npz(tmp_path, x_train=X, y_test=Y)
    assert "has x_train but no y_train (its keys: x_train, y_test)" in refusal(file)
    assert read(file, require_target=False).y is None


def test_npz_parts_must_agree(tmp_path):
    file = npz(tmp_path, x_train=X, y_train=Y, x_test=X[:, :3], y_test=Y)
    assert "the training part has 4 columns, the test part 3" in refusal(file)
    assert "only the training part has labels" in refusal(npz(tmp_path, x_train=X, y_train=Y, x_test=X))


def test_npz_target_names_any_key(tmp_path):
    data = read(npz(tmp_path, spectra=X, grade=Y), "grade")
    np.testing.assert_array_equal(data.x, X)
    np.testing.assert_array_equal(data.y, Y)
    data = read(npz(tmp_path, x=X, y=Y, other=-Y), "other")
    np.testing.assert_array_equal(data.y, -Y)
    np.testing.assert_array_equal(data.x, X)


def test_npz_unknown_keys_are_listed(tmp_path):
    file = npz(tmp_path, x=X, grade=Y)
    assert "is called 'zzz' (its keys: x, grade)" in refusal(file, "zzz")
    message = refusal(file, "grad")
    assert "no array to be y is called 'grad'; did you mean 'grade'? (its keys: x, grade)" in message
    assert "no array to be y is called y, Y, labels, label, target, targets (its keys: x, grade)" in refusal(file)
    assert read(file, require_target=False).y is None
    assert read(file, "grad", require_target=False).y is None
    message = refusal(npz(tmp_path, spectra=X, masses=X, grade=Y), "grade")
    assert "no array to be x is called x, X, data, features (its keys: spectra, masses, grade)" in message


def test_npz_ambiguous_keys_are_refused(tmp_path):
    assert "the keys x, data could all be meant" in refusal(npz(tmp_path, x=X, data=X, y=Y))
    assert "the keys y, labels could all be meant" in refusal(npz(tmp_path, x=X, labels=Y, y=Y))


def test_npy_pair(tmp_path):
    np.save(tmp_path / "x.npy", X)
    np.save(tmp_path / "y.npy", Y)
    x, y = str(tmp_path / "x.npy"), str(tmp_path / "y.npy")
    for data in (read(x, y), read(f"{x},{y}"), read(f"{x}, {y}")):
        assert data.x.dtype == np.uint8
        np.testing.assert_array_equal(data.x, X)
        np.testing.assert_array_equal(data.y, Y)
    assert read(x, require_target=False).y is None
    assert "holds x only; give target=PATH" in refusal(x)
    assert "already names the file of y" in refusal(f"{x},{y}", y)
    with pytest.raises(FileNotFoundError, match=r"no\.npy: no such file"):
        read(x, tmp_path / "no.npy")
    assert "it is the path of the .npy file of y" in refusal(x, str(tmp_path))


@pytest.mark.parametrize("dtype", ["u1", "<i2", ">i4", "<u8", "<f2", "<f4", ">f8", "?"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_numpy_dtype_and_order_are_kept(tmp_path, dtype, order):
    x = np.array(np.arange(12).reshape(3, 4) % 2, dtype=dtype, order=order)
    np.savez(tmp_path / "a.npz", x=x, y=Y)
    read_x = read(tmp_path / "a.npz").x
    assert read_x.dtype == np.dtype(dtype).newbyteorder("=")
    np.testing.assert_array_equal(read_x, x)


def test_shapes_of_x_and_y(tmp_path):
    images = np.arange(24.0).reshape(2, 3, 2, 2)
    data = read(npz(tmp_path, x=images, y=np.array([[1], [2]])))
    np.testing.assert_array_equal(data.x, images.reshape(2, 12))
    assert data.y.tolist() == [1, 2]
    data = read(npz(tmp_path, x=np.arange(3.0), y=np.arange(6.0).reshape(3, 2)))
    assert data.x.tolist() == [[0.0], [1.0], [2.0]]
    assert data.y.shape == (3, 2)


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        (np.array(["b", "a", "é"]), ["b", "a", "é"]),
        (np.array([b"b", "é".encode(), b"c"]), ["b", "é", "c"]),
        (np.array([True, False, True]), [True, False, True]),
    ],
)
def test_labels_may_be_text_or_booleans(tmp_path, labels, expected):
    assert read(npz(tmp_path, x=X, y=labels)).y.tolist() == expected


class Bomb:
    """Unpickling one ends the test."""

    def __reduce__(self):
        return pytest.fail, ("a pickle was loaded",)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x": np.array([[1, "a"]], object), "y": [1]}, "array 'x': holds pickled Python objects"),
        ({"x": np.array([[Bomb()]]), "y": [1]}, "array 'x': holds pickled Python objects"),
        ({"x": X, "y": np.array([1, None, "a"])}, "array 'y': holds pickled Python objects"),
        ({"x": X + 1j, "y": Y}, "array 'x': dtype complex128 is not accepted"),
        ({"x": X, "y": Y + 1j}, "array 'y': dtype complex128 is not accepted"),
        ({"x": np.zeros(3, "M8[s]"), "y": Y}, r"array 'x': dtype datetime64\[s\] is not accepted"),
        ({"x": np.zeros(3, [("a", "f4"), ("b", "f4")]), "y": Y}, "array 'x': dtype .* is not accepted"),
        ({"x": np.zeros(3, [("é", "f4")]), "y": Y}, "array 'x': dtype .* is not accepted"),
        ({"x": np.array([["a"]] * 3), "y": Y}, "array 'x': x must hold real numbers, got dtype <U1"),
        ({"x": X, "y": Y[:2]}, "array 'y': x has 3 rows and y has 2"),
        ({"x": X, "y": np.zeros((3, 2, 2))}, r"array 'y': y must be \(n,\) or \(n, k\), got shape \(3, 2, 2\)"),
        ({"x": X, "y": np.float64(1)}, r"array 'y': y must be \(n,\) or \(n, k\), got shape \(\)"),
        ({"x": np.float64(1), "y": Y}, r"array 'x': x must be \(n, d\), got a single number"),
        ({"x": X[:0], "y": Y[:0]}, r"array 'x': no rows or no columns, shape \(0, 4\)"),
        ({"x": X[:, :0], "y": Y}, r"array 'x': no rows or no columns, shape \(3, 0\)"),
        ({"x": X, "y": np.array([b"\xff", b"a", b"b"])}, "array 'y': cut short or not a valid UTF-8 label"),
    ],
)
def test_numpy_arrays_that_are_refused(tmp_path, arrays, message):
    with pytest.raises(ValueError, match=rf"d\.npz, {message}"):
        read(npz(tmp_path, **arrays))


def npy_bytes(array: np.ndarray, version: tuple[int, int] = (1, 0)) -> bytes:
    stream = io.BytesIO()
    np.lib.format.write_array(stream, array, version=version)
    return stream.getvalue()


@pytest.mark.parametrize("version", [(1, 0), (2, 0), (3, 0)])
def test_npy_format_versions(tmp_path, version):
    file = write(tmp_path, "x.npy", npy_bytes(X, version))
    np.testing.assert_array_equal(read(file, require_target=False).x, X)


def test_npy_of_an_unknown_version(tmp_path):
    file = write(tmp_path, "x.npy", npy_bytes(X).replace(b"NUMPY\1\0", b"NUMPY\4\0"))
    assert "not a valid NPY file (format version (4, 0))" in refusal(file, require_target=False)


@pytest.mark.parametrize("shape", ["(3, 5)", "(3, 3)", "(3000000000000, 4)", "(4000, 4000000000000000000000)"])
def test_npy_header_that_lies_about_the_shape(tmp_path, shape):
    whole = npy_bytes(X)
    old = b"(3, 4), }" + b" " * 40
    assert old in whole
    file = write(tmp_path, "x.npy", whole.replace(old, f"{shape}, }}".encode().ljust(len(old))))
    message = refusal(file, require_target=False)
    assert f"shape {shape} of uint8 needs" in message
    assert message.endswith("found 12")


@pytest.mark.parametrize("shape", ["(-3, -4)", "(0, 4)"])
def test_npy_header_with_an_impossible_shape(tmp_path, shape):
    whole = npy_bytes(X)
    file = write(tmp_path, "x.npy", whole.replace(b"(3, 4), }".ljust(20), f"{shape}, }}".encode().ljust(20)))
    assert f"no rows or no columns, shape {shape}" in refusal(file, require_target=False)


def test_npy_with_bytes_left_over(tmp_path):
    file = write(tmp_path, "x.npy", npy_bytes(X) + b"\0")
    assert "shape (3, 4) of uint8 needs 12 bytes after the header, found 13" in refusal(file, require_target=False)


@pytest.mark.parametrize("compressed", [False, True])
def test_npz_cut_at_every_byte(tmp_path, compressed):
    (np.savez_compressed if compressed else np.savez)(tmp_path / "whole.npz", x=X, y=Y)
    whole = (tmp_path / "whole.npz").read_bytes()
    file = tmp_path / "cut.npz"
    for length in range(len(whole)):
        file.write_bytes(whole[:length])
        refusal(file)
    file.write_bytes(whole)
    assert len(read(file)) == 3


def test_npy_cut_at_every_byte(tmp_path):
    whole = npy_bytes(X)
    for length in range(len(whole)):
        refusal(write(tmp_path, "cut.npy", whole[:length]), require_target=False)


@pytest.mark.parametrize("compressed", [False, True])
def test_npz_with_any_byte_changed_reads_or_is_refused(tmp_path, compressed):
    (np.savez_compressed if compressed else np.savez)(tmp_path / "whole.npz", x=X, y=Y)
    whole = (tmp_path / "whole.npz").read_bytes()
    refused = 0
    for place in range(len(whole)):
        broken = bytearray(whole)
        broken[place] ^= 0xFF
        data = attempt(write(tmp_path, "broken.npz", bytes(broken)))
        if data is None:
            refused += 1
        else:  # a byte that says nothing about the arrays, such as a date
            np.testing.assert_array_equal(data.x, X)
            np.testing.assert_array_equal(data.y, Y)
    assert refused > len(whole) // 3


def test_npz_bomb_is_refused_by_its_claim(tmp_path, monkeypatch):
    file = tmp_path / "bomb.npz"
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x.npy", npy_bytes(np.zeros(4_000_000, np.uint8)))
    claim, more = struct.pack("<I", 4_000_128), struct.pack("<I", 8_000_128)
    assert file.read_bytes().count(claim) == 2  # in the member's own header and in the directory
    file.write_bytes(file.read_bytes().replace(claim, more))
    monkeypatch.setattr(numpy_files, "_npy_array", lambda *_: pytest.fail("went on to read"))
    assert "cannot unpack into the 8000128 it claims" in refusal(file, require_target=False)


def test_npz_without_arrays(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("readme.txt", "nothing")
    assert "holds no arrays" in refusal(tmp_path / "a.npz")


@QUICK
@given(
    st.integers(1, 5),
    st.integers(1, 4),
    st.sampled_from(["u1", "i2", "f4", "f8", ">f4", "?"]),
    st.booleans(),
    st.randoms(use_true_random=False),
)
def test_npz_round_trip(tmp_path, n, d, dtype, compressed, random):
    x = np.array([[random.randint(0, 255) for _ in range(d)] for _ in range(n)]).astype(dtype)
    y = np.array([random.randint(-9, 9) for _ in range(n)])
    (np.savez_compressed if compressed else np.savez)(tmp_path / "t.npz", x=x, y=y)
    data = read(tmp_path / "t.npz")
    np.testing.assert_array_equal(data.x, x)
    np.testing.assert_array_equal(data.y, y)


# --- CSV -------------------------------------------------------------------------------------------------------------

TABLE = "age,colour,grade\n31,red,1\n,blue,0\n4.5e1,NA,1\n"


def test_csv_columns(tmp_path):
    data = read(write(tmp_path, "t.csv", TABLE), "grade")
    assert data.feature_names == ["age", "colour"]
    assert (data.target_name, data.name) == ("grade", "t.csv")
    assert data.x["age"].dtype == np.float64
    np.testing.assert_array_equal(data.x["age"], [31, np.nan, 45])
    assert data.x["colour"].tolist() == ["red", "blue", None]
    assert data.y.dtype == np.int64
    assert data.y.tolist() == [1, 0, 1]
    assert len(data) == 3


@pytest.mark.parametrize("token", ["", "NA", "N/A", "NaN", "nan", "null", "NULL", "None", "?"])
def test_csv_missing_tokens(tmp_path, token):
    data = read(write(tmp_path, "t.csv", f"a,b,y\n1,u,0\n{token},{token},1\n {token} ,{token},1\n"), "y")
    np.testing.assert_array_equal(data.x["a"], [1, np.nan, np.nan])
    assert data.x["b"].tolist() == ["u", None, None]


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
@pytest.mark.parametrize("name", ["t.csv", "t.csv.gz", "T.CSV"])
def test_csv_delimiter_is_sniffed(tmp_path, delimiter, name):
    text = TABLE.replace(",", delimiter)
    file = tmp_path / name
    file.write_bytes(gzip.compress(text.encode()) if name.endswith("gz") else text.encode())
    assert read(file, "grade").x["colour"].tolist() == ["red", "blue", None]


@pytest.mark.parametrize("name", ["t.tsv", "t.tsv.gz"])
def test_tsv_is_cut_at_tabs_alone(tmp_path, name):
    data = read(write(tmp_path, name, "a,b,c\ty\n1,2,3\t0\n"), "y")
    assert data.x["a,b,c"].tolist() == ["1,2,3"]


def test_csv_quotes_and_line_ends(tmp_path):
    text = '\ufeff"na,me", note ,y\r\n1,"say ""hi""\r\nthere",0\r\n\r\n2,"a,b",1'
    data = read(write(tmp_path, "t.csv", text), "y")
    assert data.feature_names == ["na,me", "note"]
    assert data.x["note"].tolist() == ['say "hi"\r\nthere', "a,b"]
    np.testing.assert_array_equal(data.x["na,me"], [1, 2])


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        (["1", "-2", "+3"], np.array([1, -2, 3])),
        (["1", "2.5", "3"], np.array([1, 2.5, 3])),
        (["1.0", "2.0", "0.0"], np.array([1.0, 2.0, 0.0])),
        (["9007199254740993", "9007199254740992", "1"], np.array([9007199254740993, 9007199254740992, 1])),
        (["1", "NA", "0"], np.array([1, np.nan, 0])),
        (["99999999999999999999", "1", "2"], np.array([1e20, 1, 2])),
        (["1_000", "1", "2"], np.array(["1_000", "1", "2"], object)),
        (["cat", "?", "dog"], np.array(["cat", None, "dog"], object)),
        (["True", "False", "True"], np.array(["True", "False", "True"], object)),
    ],
)
def test_csv_target_column(tmp_path, fields, expected):
    file = write(tmp_path, "t.csv", "a,y\n" + "".join(f"0,{field}\n" for field in fields))
    y = read(file, "y").y
    assert y.dtype == expected.dtype
    np.testing.assert_array_equal(y, expected)


def test_csv_several_targets(tmp_path):
    file = write(tmp_path, "t.csv", "a,y1,y2,c\n1,2,3.5,u\n4,5,NA,v\n")
    data = read(file, "y2, y1")
    assert data.feature_names == ["a", "c"]
    np.testing.assert_array_equal(data.y, [[3.5, 2], [np.nan, 5]])
    assert data.target_name == "y2, y1"
    assert "column 'c' holds text; several targets must all be numeric" in refusal(file, "y1,c")
    assert "names a column twice" in refusal(file, "y1,y1")
    assert "no column 'y3'" in refusal(file, "y1,y3")


def test_csv_target_whose_name_has_a_comma(tmp_path):
    assert read(write(tmp_path, "t.csv", 'a,"x,y"\n1,2\n'), "x,y").y.tolist() == [2]


def test_csv_target_must_be_named(tmp_path):
    file = write(tmp_path, "t.csv", TABLE)
    assert "which column is the target? Give target=NAME (its columns: age, colour, grade)" in refusal(file)
    assert "no column 'grad'; did you mean 'grade'? (its columns: age, colour, grade)" in refusal(file, "grad")
    wide = write(tmp_path, "w.csv", ",".join(f"c{i}" for i in range(30)) + "\n" + ",".join("0" * 30) + "\n")
    assert refusal(wide).endswith("c18, c19, ... (30 in all))")


def test_csv_without_a_target_for_prediction(tmp_path):
    file = write(tmp_path, "t.csv", TABLE)
    data = read(file, require_target=False)
    assert (data.y, data.target_name, data.feature_names) == (None, None, ["age", "colour", "grade"])
    data = read(file, "grade", require_target=False)
    assert data.y.tolist() == [1, 0, 1]
    data = read(file, "price", require_target=False)
    assert (data.y, data.target_name, data.feature_names) == (None, None, ["age", "colour", "grade"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "an empty file"),
        ("\n\n", "an empty file"),
        ("\ufeff", "an empty file"),
        ("a,y\n", "only a header row"),
        ("a,y\n\n \n".replace(" ", ""), "only a header row"),
        ("a,y\n1,2\n1,2,3\n", "line 3: 3 fields, but the header has 2"),
        ('a,y\n"1\n1",2\n\n1\n', "line 5: 1 field, but the header has 2"),
        ("b,a,a,y\n1,2,3,4\n", "two columns are called 'a'"),
        ("a,a,y\n1,2,3\n", "two columns are called 'a'; every name must be there once$"),
        (
            "1,1,0\n1,2,3\n",
            "two columns are called '1'; .* the first line holds only numbers: is the header row missing",
        ),
        (",a,y\n1,2,3\n", "column 1 has no name; .*index=False"),
        ("a, ,y\n1,2,3\n", "column 2 has no name"),
        ("y\n1\n", "no column is left for the features \\(its columns: y\\)"),
        ("a,y\n1,0\n2,1\ninf,0\n", "line 4, column 'a': inf"),
        ("a,y\n-Infinity,0\n", "line 2, column 'a': inf"),
        ('a,b,y\n1,"x\ny",0\n1e999,z,1\n', "line 4, column 'a': inf, or too large for a float64"),
        ("a,y\n0,inf\n", "line 2, column 'y': inf"),
        ('a,y\n1,"2\n3,4\n', "line 3: unexpected end of data; is a quote left open"),
        ('a,y\n1,2\n"1"x,2\n', "line 3: ',' expected after '\"'"),
        ("a,y\n1,2\n1\0,2\n", "line 3: a NUL character"),
        ("a;y\n1,5;0\n2,5;1\n", r"column 'a': decimal commas \('1,5'\)"),
    ],
)
def test_csv_that_is_refused(tmp_path, text, message):
    with pytest.raises(ValueError, match=rf"t\.csv.*{message}"):
        read(write(tmp_path, "t.csv", text), "y")


def test_csv_text_column_may_hold_inf(tmp_path):
    assert read(write(tmp_path, "t.csv", "a,y\ninf,0\nfar,1\n"), "y").x["a"].tolist() == ["inf", "far"]


def test_csv_that_is_not_utf8(tmp_path):
    latin = write(tmp_path, "t.csv", "a,y\nb,1\ncaf\xe9,2\n".encode("latin-1"))
    assert "line 3: byte 0xe9 is not UTF-8; save the file as UTF-8" in refusal(latin, "y")
    assert "line 1: byte 0xff is not UTF-8" in refusal(write(tmp_path, "t.csv", TABLE.encode("utf-16")), "y")


def test_csv_line_number_beyond_the_first_chunk(tmp_path, monkeypatch):
    monkeypatch.setattr(csv_files, "CHUNK_FIELDS", 8)
    rows = "".join(f"{i},0\n" for i in range(50))
    assert "line 52: 1 field, but" in refusal(write(tmp_path, "t.csv", f"a,y\n{rows}1\n"), "y")
    assert "line 52, column 'a': inf" in refusal(write(tmp_path, "t.csv", f"a,y\n{rows}inf,0\n"), "y")
    assert "line 52: unexpected end of data" in refusal(write(tmp_path, "t.csv", f'a,y\n{rows}"1,0\n'), "y")


def test_csv_column_that_turns_out_late_to_be_text_or_fractional(tmp_path, monkeypatch):
    monkeypatch.setattr(csv_files, "CHUNK_FIELDS", 8)
    rows = "".join(f"0{i},,{i}\n" for i in range(50))
    data = read(write(tmp_path, "t.csv", f"a,b,y\n{rows}end,u,0.5\n"), "y")
    assert data.x["a"].tolist() == [f"0{i}" for i in range(50)] + ["end"]
    assert data.x["b"].tolist() == [None] * 50 + ["u"]
    assert data.y.tolist() == [*map(float, range(50)), 0.5]


def test_csv_long_fields(tmp_path):
    assert "field larger than field limit" in refusal(write(tmp_path, "t.csv", f"a,y\n{'1' * 200_000},2\n"), "y")
    assert "line 2, column 'a': inf, or too large" in refusal(write(tmp_path, "t.csv", f"a,y\n{'1' * 5000},2\n"), "y")


def test_csv_cut_at_every_byte(tmp_path):
    whole = '\ufeffage,"colour, outer",grade\n31,"ré""d",1\n,blue,0\n'.encode()
    refused = 0
    for length in range(len(whole)):
        data = attempt(write(tmp_path, "cut.csv", whole[:length]), "grade")
        if data is None:
            refused += 1
        else:
            assert 1 <= len(data) <= 2
    assert refused > len(whole) // 2


def test_csv_gz_cut_at_every_byte(tmp_path):
    whole = gzip.compress(TABLE.encode())
    file = tmp_path / "cut.csv.gz"
    for length in range(len(whole)):
        file.write_bytes(whole[:length])
        refusal(file, "grade")


def test_csv_agrees_with_pandas(tmp_path):
    pandas = pytest.importorskip("pandas")
    rng = np.random.default_rng(0)
    n = 2000
    frame = pandas.DataFrame(
        {
            "normal": rng.normal(size=n) * 10.0 ** rng.integers(-300, 300, n),
            "count": rng.integers(-(2**40), 2**40, n),
            "gaps": np.where(rng.random(n) < 0.3, np.nan, rng.random(n)),
            "word": rng.choice(["a,b", 'q"q', "two\nlines", "ä ö", "x"], n),
            "some": rng.choice(np.array(["u", "v", None], object), n),
            "y": rng.integers(0, 5, n),
        }
    )
    file = tmp_path / "t.csv"
    frame.to_csv(file, index=False)
    ours, theirs = read(file, "y"), pandas.read_csv(file)
    assert ours.feature_names == list(theirs.columns[:-1])
    for name in ("normal", "count", "gaps"):
        np.testing.assert_array_equal(ours.x[name], frame[name].to_numpy(np.float64))
    for name in ("word", "some"):
        assert ours.x[name].tolist() == [None if pandas.isna(v) else v for v in theirs[name]]
    np.testing.assert_array_equal(ours.y, theirs["y"])


PLAIN = (
    st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=6)
    .map(str.strip)
    .filter(lambda text: text and text not in csv_files.MISSING)
)


@QUICK
@given(
    st.lists(
        st.tuples(
            st.one_of(st.none(), st.floats(allow_nan=False, allow_infinity=False)),
            st.one_of(st.none(), PLAIN),
            st.integers(-(2**63), 2**63 - 1),
        ),
        min_size=1,
        max_size=12,
    ),
    st.sampled_from([",", "\t"]),
    st.sampled_from(["\n", "\r\n"]),
    st.integers(1, 20),
)
def test_csv_round_trip(tmp_path, rows, delimiter, line_end, chunk):
    import csv

    stream = io.StringIO(newline="")
    writer = csv.writer(stream, delimiter=delimiter, lineterminator=line_end, quoting=csv.QUOTE_ALL)
    writer.writerow(["number", "text", "y"])
    rows = [*rows, (1.0, "certainly text", 0)]
    writer.writerows([["" if f is None else repr(f) if isinstance(f, float) else f for f in row] for row in rows])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(csv_files, "CHUNK_FIELDS", chunk)
        data = read(write(tmp_path, "t.csv", stream.getvalue()), "y")
    expected = [np.nan if number is None else number for number, _, _ in rows]
    np.testing.assert_array_equal(data.x["number"], expected)
    assert data.x["text"].tolist() == [text for _, text, _ in rows]
    assert data.y.tolist() == [label for _, _, label in rows]


# --- Parquet ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def parquet(tmp_path):
    """A function that writes named Arrow columns into t.parquet."""
    pyarrow = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")

    def save(**columns):
        pq.write_table(pyarrow.table(columns), tmp_path / "t.parquet")
        return tmp_path / "t.parquet"

    return save


def test_parquet_columns(parquet):
    import decimal

    import pyarrow

    file = parquet(
        whole=pyarrow.array([1, 2, 3], pyarrow.int16()),
        gaps=pyarrow.array([1, None, 3], pyarrow.int64()),
        half=pyarrow.array([0.5, 1.5, None], pyarrow.float16()),
        real=pyarrow.array([0.5, float("nan"), None], pyarrow.float32()),
        flag=pyarrow.array([True, None, False]),
        money=pyarrow.array([decimal.Decimal("1.25"), None, decimal.Decimal("-3")]),
        word=pyarrow.array(["a", None, "é"]),
        long=pyarrow.array(["a", None, "é"], pyarrow.large_string()),
        code=pyarrow.array(["v", "u", None]).dictionary_encode(),
        none=pyarrow.nulls(3),
        y=pyarrow.array([2**62 + 1, 2**62, 0]),
    )
    data = read(file, "y")
    nan = np.nan
    numbers = {
        "whole": [1, 2, 3],
        "gaps": [1, nan, 3],
        "half": [0.5, 1.5, nan],
        "real": [0.5, nan, nan],
        "flag": [1, nan, 0],
        "money": [1.25, nan, -3],
        "none": [nan, nan, nan],
    }
    for name, values in numbers.items():
        assert data.x[name].dtype == np.float64
        np.testing.assert_array_equal(data.x[name], values)
    for name, texts in {"word": ["a", None, "é"], "long": ["a", None, "é"], "code": ["v", "u", None]}.items():
        assert data.x[name].dtype == object
        assert data.x[name].tolist() == texts
    assert data.y.dtype == np.int64
    assert data.y.tolist() == [2**62 + 1, 2**62, 0]
    assert (data.target_name, data.name) == ("y", "t.parquet")


def test_parquet_boolean_and_text_targets(parquet):
    file = parquet(a=[1, 2], flag=[True, False], word=["u", "v"])
    assert read(file, "flag").y.tolist() == [True, False]
    assert read(file, "flag").y.dtype == bool
    assert read(file, "word").y.tolist() == ["u", "v"]
    assert read(file, "a, flag").y.tolist() == [[1, 1], [2, 0]]


def test_parquet_leaves_out_the_index_of_pandas(tmp_path):
    pandas = pytest.importorskip("pandas")
    pytest.importorskip("pyarrow")
    frame = pandas.DataFrame({"a": [1.5, 2.5], "y": [0, 1]}, index=[7, 9])
    frame.to_parquet(tmp_path / "t.parquet")
    assert read(tmp_path / "t.parquet", "y").feature_names == ["a"]


def test_parquet_refusals(parquet, tmp_path):
    import datetime

    import pyarrow
    import pyarrow.parquet as pq

    nested = {"list<": [[1], [2]], "struct<": [{"p": 1}, {"p": 2}]}
    for kind, values in nested.items():
        assert f"column 'deep' holds {kind}" in refusal(parquet(deep=values, y=[0, 1]), "y")
    assert "column 'deep' holds binary" in refusal(parquet(deep=[b"1", b"2"], y=[0, 1]), "y")
    assert "column 'day' holds date32[day]" in refusal(parquet(day=[datetime.date(2020, 1, 1)] * 2, y=[0, 1]), "y")
    message = refusal(parquet(a=[1.0, float("inf")], y=[0, 1]), "y")
    assert "row 1 (counting from 0), column 'a': inf" in message
    assert "no column 'z'" in refusal(parquet(a=[1], y=[0]), "z")
    assert "no column is left for the features" in refusal(parquet(y=[0]), "y")
    empty = pyarrow.table({"a": pyarrow.array([], pyarrow.int64()), "y": pyarrow.array([], pyarrow.int64())})
    pq.write_table(empty, tmp_path / "e.parquet")
    assert "no rows; columns: a, y" in refusal(tmp_path / "e.parquet", "y")
    twice = pyarrow.Table.from_arrays([pyarrow.array([1])] * 2, names=["a", "a"])
    pq.write_table(twice, tmp_path / "e.parquet")
    assert "two columns are called 'a'" in refusal(tmp_path / "e.parquet", "y")


def test_parquet_cut_short(parquet, tmp_path):
    whole = parquet(a=[1, 2], y=[0, 1]).read_bytes()
    for length in [*range(0, len(whole), 7), len(whole) - 1]:
        refusal(write(tmp_path, "cut.parquet", whole[:length]), "y")


def test_parquet_text_that_is_not_utf8(parquet, tmp_path):
    file = parquet(a=["café"], y=[0])
    broken = file.read_bytes().replace("café".encode(), b"caf\xff\xff")
    message = refusal(write(tmp_path, "broken.parquet", broken), "y")
    assert "column 'a': cut short or not a valid Parquet file ('utf-8' codec can't decode" in message


def test_parquet_without_pyarrow(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    file = write(tmp_path, "t.parquet", b"PAR1")
    assert "Parquet needs pyarrow; pip install 'gpu-mlp[data]'" in refusal(file, "y")


def test_parquet_of_many_row_groups_agrees_with_pandas(tmp_path):
    pandas = pytest.importorskip("pandas")
    pytest.importorskip("pyarrow")
    rng = np.random.default_rng(0)
    frame = pandas.DataFrame(
        {"a": rng.normal(size=1000), "b": rng.choice(["u", "v"], 1000), "y": rng.integers(0, 3, 1000)}
    )
    frame["b"] = frame["b"].astype("category")
    frame.to_parquet(tmp_path / "t.parquet", row_group_size=64)
    data = read(tmp_path / "t.parquet", "y")
    np.testing.assert_array_equal(data.x["a"], frame["a"])
    assert data.x["b"].tolist() == frame["b"].tolist()
    np.testing.assert_array_equal(data.y, frame["y"])


# --- what the path is ------------------------------------------------------------------------------------------------


def test_unknown_endings_list_those_accepted(tmp_path):
    message = refusal(write(tmp_path, "t.xlsx", b"PK"))
    assert "accepted endings: .csv .csv.gz .tsv .tsv.gz .npz .npy .parquet" in message
    assert "digits, fashion-mnist" in message


def test_missing_files_suggest_a_built_in_set(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"^fashon-mnist: no such file or folder; did you mean 'fashion-mnist'\?"
    ):
        read("fashon-mnist")
    with pytest.raises(
        FileNotFoundError, match=r"q\.csv: no such file or folder \(built-in sets: digits, fashion-mnist"
    ):
        read(tmp_path / "q.csv", "y")


def test_built_in_sets_by_name():
    data = read("digits")
    assert (data.name, data.x.shape, len(data)) == ("digits", (1797, 64), 1797)
    with pytest.raises(ValueError, match="target: the built-in set 'digits' has its own labels; got target='y'"):
        read("digits", "y")


def test_a_table_knows_its_number_of_rows():
    assert len(RawData({"a": np.zeros(5), "b": np.zeros(5)})) == 5
    assert len(RawData(np.zeros((4, 2)))) == 4


def test_importing_the_readers_imports_no_heavy_package():
    import subprocess

    code = (
        "import sys, gpu_mlp.readers; print([m for m in ('pandas', 'pyarrow', 'sklearn', 'scipy') if m in sys.modules])"
    )
    root = Path(readers.__file__).parents[2]
    run = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
