"""Data sets, splits and minibatch order: properties that must hold for every size, seed and class balance.

Leans on scikit-learn for the digits where it is installed, and on Debian's Fashion-MNIST where that is.
"""

from __future__ import annotations

import gzip
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpu_mlp import data, readers
from gpu_mlp.data import epoch_order, load, load_digits, load_fashion_mnist, split, take
from gpu_mlp.readers import RawData

QUICK = settings(max_examples=60, deadline=None, database=None)
DEBIAN = Path("/usr/share/datasets/fashion-mnist")


# --- the sets --------------------------------------------------------------------------------------------------------


def test_digits_are_those_of_scikit_learn():
    sklearn = pytest.importorskip("sklearn.datasets")
    ours, theirs = load_digits(), sklearn.load_digits()
    np.testing.assert_array_equal(ours.x, theirs.data)
    np.testing.assert_array_equal(ours.y, theirs.target)


def test_digits_are_small_numbers_in_bytes():
    digits = load_digits()
    assert (digits.x.shape, digits.x.dtype, digits.y.shape, digits.y.dtype) == ((1797, 64), np.uint8, (1797,), np.uint8)
    assert np.bincount(digits.y).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    assert (digits.x.min(), digits.x.max(), int(digits.x.sum())) == (0, 16, 561718)
    assert (digits.name, digits.test) == ("digits", None)
    assert digits.x.flags.writeable


def test_digits_file_is_reproducible_and_says_where_it_is_from():
    folder = Path(readers.__file__).parents[1] / "datasets"
    with zipfile.ZipFile(folder / "digits.npz") as archive:
        infos = archive.infolist()
    assert [info.filename for info in infos] == ["x.npy", "y.npy"]
    assert {info.date_time for info in infos} == {(1980, 1, 1, 0, 0, 0)}
    licence = (folder / "digits-LICENSE.txt").read_text()
    for fact in ("E. Alpaydin and C. Kaynak, 1998", "https://doi.org/10.24432/C50P49", "CC BY 4.0", "1797"):
        assert fact in licence


def test_digits_load_from_inside_a_zip(tmp_path):
    import subprocess
    import sys

    package = Path(readers.__file__).parents[1]
    with zipfile.ZipFile(tmp_path / "bundle.zip", "w") as bundle:
        bundle.writestr("gpu_mlp/__init__.py", "")
        rooms = [f"readers/{path.name}" for path in (package / "readers").glob("*.py")]
        for name in ("checks.py", "data.py", "datasets/digits.npz", *rooms):
            bundle.write(package / name, f"gpu_mlp/{name}")
    code = "from gpu_mlp import data; print(data.__file__, int(data.load('digits').x.sum()))"
    environment = {"PYTHONPATH": str(tmp_path / "bundle.zip")}
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    file, total = run.stdout.split()
    assert "bundle.zip" in file
    assert total == "561718"


def fashion_folder(folder: Path) -> Path:
    """A Fashion-MNIST of three and two 2 x 2 pictures."""
    for prefix, n in (("train", 3), ("t10k", 2)):
        images = bytes([0, 0, 8, 3]) + struct.pack(">3I", n, 2, 2) + bytes(range(4 * n))
        labels = bytes([0, 0, 8, 1]) + struct.pack(">I", n) + bytes(range(n))
        (folder / f"{prefix}-images-idx3-ubyte.gz").write_bytes(gzip.compress(images))
        (folder / f"{prefix}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(labels))
    return folder


def test_fashion_mnist_from_a_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("FASHION_MNIST_DIR", "/nowhere")
    fashion_folder(tmp_path)
    for raw in (load_fashion_mnist(tmp_path), load("fashion-mnist", folder=tmp_path)):
        assert (raw.name, len(raw), len(raw.test), raw.y.tolist()) == ("fashion-mnist", 3, 2, [0, 1, 2])


def test_fashion_mnist_from_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("FASHION_MNIST_DIR", str(fashion_folder(tmp_path)))
    assert len(load_fashion_mnist()) == 3
    assert len(load("fashion-mnist")) == 3


def test_fashion_mnist_that_is_not_there_says_how_to_get_it(tmp_path):
    how = r"apt-get install dataset-fashion-mnist, or name a folder with its four IDX files"
    with pytest.raises(FileNotFoundError, match=rf"/nowhere lacks the folder; {how}"):
        load_fashion_mnist("/nowhere")
    (fashion_folder(tmp_path) / "t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(FileNotFoundError, match=rf"lacks t10k-labels; {how}"):
        load_fashion_mnist(tmp_path)


@pytest.mark.skipif(not DEBIAN.is_dir(), reason="Debian's package dataset-fashion-mnist is not installed")
def test_fashion_mnist_of_debian(monkeypatch):
    monkeypatch.delenv("FASHION_MNIST_DIR", raising=False)
    raw = load("fashion-mnist")
    assert (raw.x.shape, raw.test.x.shape, raw.x.dtype) == ((60000, 784), (10000, 784), np.uint8)
    assert np.bincount(raw.y).tolist() == [6000] * 10
    assert np.bincount(raw.test.y).tolist() == [1000] * 10


def test_load_reads_files_too(tmp_path):
    file = tmp_path / "t.csv"
    file.write_text("a,y\n1,0\n")
    assert load(file, "y").y.tolist() == [0]
    assert load(str(file), require_target=False).y is None
    assert len(load("digits")) == 1797
    for source, target in ((file, "y"), ("digits", None), ("fashion-mnist", "y")):
        with pytest.raises(ValueError, match="folder: only for the built-in set fashion-mnist"):
            load(source, target, folder=tmp_path)


# --- subsets ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "kept"),
    [
        ([3, 0, 3], [3, 0, 3]),
        (np.array([True, False, True, False]), [0, 2]),
        (slice(1, 3), [1, 2]),
        (np.array([2], np.uint8), [2]),
        ([], []),
    ],
)
def test_take(rows, kept):
    x, y = np.arange(8.0).reshape(4, 2), np.array(list("abcd"))
    matrix = RawData(x, y, ["p", "q"], "t", "name", test=RawData(x, y))
    part = take(matrix, rows)
    assert part.x.tolist() == x[kept].tolist()
    assert part.y.tolist() == y[kept].tolist()
    assert (part.feature_names, part.target_name, part.name, part.test) == (["p", "q"], "t", "name", None)
    table = take(RawData({"p": x[:, 0], "q": y}), rows)
    assert table.x["p"].tolist() == x[kept, 0].tolist()
    assert table.x["q"].tolist() == y[kept].tolist()
    assert table.y is None
    assert len(matrix) == 4


def test_take_a_slice_copies_nothing():
    raw = RawData(np.zeros((4, 2)), np.zeros(4))
    part = take(raw, slice(1, 3))
    assert np.shares_memory(part.x, raw.x)
    assert np.shares_memory(part.y, raw.y)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([4], "expected indices from 0 to 3, got 4 to 4"),
        ([1, -1], "expected indices from 0 to 3, got -1 to 1"),
        ([0.0], r"expected \(k,\) integers or \(4,\) booleans, got float64"),
        ([True, False], r"expected \(k,\) integers or \(4,\) booleans, got bool of \(2,\)"),
        ([[0]], r".* got int64 of \(1, 1\)"),
        (2, r".* got int64 of \(\)"),
    ],
)
def test_take_refusals(rows, message):
    with pytest.raises(ValueError, match=f"rows: {message}"):
        take(RawData(np.zeros((4, 2))), rows)


# --- splits ----------------------------------------------------------------------------------------------------------


@QUICK
@given(st.integers(2, 300), st.floats(1e-6, 1 - 1e-6), st.integers(0, 2**40))
def test_split_is_a_partition_of_the_asked_size(n, fraction, seed):
    first, second = split(n, fraction, seed)
    assert first.dtype == second.dtype == np.int64
    assert sorted([*first.tolist(), *second.tolist()]) == list(range(n))
    assert len(second) == min(max(1, round(fraction * n)), n - 1)
    assert (np.diff(first) > 0).all()
    assert (np.diff(second) > 0).all()


def test_split_depends_on_the_seed_alone():
    one = split(500, 0.2, 7)
    again = split(500, 0.2, 7)
    np.testing.assert_array_equal(one[1], again[1])
    assert set(split(500, 0.2, 8)[1]) != set(one[1])
    assert len(set(one[1]) & set(np.flatnonzero(np.arange(500) >= 400))) < 60  # it is shuffled, not the last rows


def test_split_holds_out_every_row_equally_often():
    held_out = np.zeros(20, int)
    for seed in range(2000):
        held_out[split(20, 0.25, seed)[1]] += 1
    assert held_out.sum() == 2000 * 5
    # Each count is binomial(2000, 1/4): mean 500, deviation 19.4; five deviations fail a fair shuffle once in 100 000.
    assert np.abs(held_out - 500).max() < 97


@QUICK
@given(st.lists(st.integers(0, 6), min_size=4, max_size=200), st.floats(0.01, 0.6), st.integers(0, 1000))
def test_stratified_split_keeps_the_proportions(codes, fraction, seed):
    n = len(codes)
    sizes = np.bincount(codes, minlength=7)
    total = min(max(1, round(fraction * n)), n - 1)
    if total > np.maximum(sizes - 1, 0).sum():
        with pytest.raises(ValueError, match=r"stratify: .* hold out a smaller fraction"):
            split(n, fraction, seed, codes)
        return
    first, second = split(n, fraction, seed, codes)
    assert len(second) == total
    assert sorted([*first.tolist(), *second.tolist()]) == list(range(n))
    held_out = np.bincount(np.array(codes)[second], minlength=7)
    assert (held_out[sizes == 1] == 0).all()
    assert (held_out < sizes)[sizes > 0].all()
    quotas = np.where(sizes > 1, sizes, 0) * total / sizes[sizes > 1].sum()
    assert (held_out >= np.minimum(np.floor(quotas - 1e-9), sizes - 1)).all()
    if (np.ceil(quotas) < sizes)[sizes > 1].all():  # where no class runs out, largest remainders go one up at most
        assert (held_out <= np.ceil(quotas + 1e-9)).all()


def test_stratified_split_by_hand():
    codes = np.repeat([0, 1, 2, 3], [50, 30, 19, 1])
    _, second = split(100, 0.1, 0, codes)
    # Of 99 rows in classes that can be cut, 10: quotas 5.05, 3.03, 1.92, and the remainder goes to the third class.
    assert np.bincount(codes[second], minlength=4).tolist() == [5, 3, 2, 0]


def test_stratified_split_depends_on_the_seed_alone():
    codes = np.arange(200) % 4
    np.testing.assert_array_equal(split(200, 0.25, 3, codes)[1], split(200, 0.25, 3, codes)[1])
    assert set(split(200, 0.25, 4, codes)[1]) != set(split(200, 0.25, 3, codes)[1])


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((1, 0.5, 0), ValueError, "n: expected an integer of at least 2, got 1"),
        ((10, 0.0, 0), ValueError, r"fraction: expected a finite number in \(0, 1\), got 0"),
        ((10, 1, 0), ValueError, r"fraction: expected a finite number in \(0, 1\), got 1"),
        ((10, float("nan"), 0), ValueError, "fraction: expected a finite number"),
        ((10, 0.5, -1), ValueError, "seed: expected an integer of at least 0, got -1"),
        ((10, 0.5, 1.5), TypeError, "seed: expected an integer, got 1.5"),
        ((10, 0.5, 0, [0, 1]), ValueError, r"stratify: expected \(10,\) integer codes, got int64 of shape \(2,\)"),
        ((2, 0.5, 0, ["a", "b"]), ValueError, r"stratify: expected \(2,\) integer codes, got <U1"),
        ((3, 0.5, 0, [0, 1, 2]), ValueError, "3 classes that each keep a row leave at most 0 of 3 rows to hold out"),
        ((4, 0.75, 0, [0, 0, 1, 1]), ValueError, "leave at most 2 of 4 rows to hold out, fewer than 3"),
    ],
)
def test_split_refusals(arguments, error, message):
    with pytest.raises(error, match=message):
        split(*arguments)


# --- orders ----------------------------------------------------------------------------------------------------------


@QUICK
@given(st.integers(0, 300), st.integers(0, 2**40), st.integers(0, 1000))
def test_epoch_order_is_a_permutation_and_a_function(n, seed, epoch):
    order = epoch_order(n, seed, epoch)
    assert order.dtype == np.int64
    assert sorted(order.tolist()) == list(range(n))
    np.testing.assert_array_equal(order, epoch_order(n, seed, epoch))


def test_epoch_order_differs_by_seed_and_by_epoch():
    orders = {tuple(epoch_order(50, seed, epoch)) for seed in range(5) for epoch in range(5)}
    assert len(orders) == 25


def test_epoch_order_is_the_documented_stream():
    bits = np.random.PCG64(np.random.SeedSequence([3, data.EPOCH_STREAM, 2]))
    np.testing.assert_array_equal(epoch_order(40, 3, 2), np.random.Generator(bits).permutation(40))
    assert data.EPOCH_STREAM != data.SPLIT_STREAM


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: epoch_order(-1, 0, 0), "n: expected an integer of at least 0"),
        (lambda: epoch_order(5, -1, 0), "seed: expected an integer of at least 0"),
        (lambda: epoch_order(5, 0, -1), "epoch: expected an integer of at least 0"),
    ],
)
def test_epoch_order_refusals_come_at_the_call(call, message):
    with pytest.raises(ValueError, match=message):
        call()
