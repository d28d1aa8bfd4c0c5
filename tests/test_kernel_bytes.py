"""The streaming kernels move each array once: bytes counted on the emulated GPU against benchmarks/kernel_bytes.py."""

from __future__ import annotations

import csv
import importlib
import sys
from pathlib import Path

import numpy as np
import pytest
from cuda_on_cpu.fixtures import emulated_gpu, require_compiler  # noqa: F401

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
import kernel_bytes

RESULTS = Path(kernel_bytes.__file__).parent / "results"

# Activations, gz with gb, and the optimizers; a minibatch and the sums over theta as well.
ONCE = ("bias_activation", "activation_gradient", "update", "gather", "penalty", "square_norm", "average")


def excess(moved):
    """The streams that a kernel does not move exactly once."""
    streams = [one for one in moved if one.kernel in ONCE and one.array not in kernel_bytes.BESIDES]
    return [one for one in streams if (one.read, one.written) != (one.must_read, one.must_write)]


@pytest.fixture(scope="module")
def moved():
    require_compiler()
    return list(kernel_bytes.measure())


def test_every_array_is_moved_once(moved):
    assert {one.kernel for one in moved} >= set(ONCE)
    assert excess(moved) == []


def test_what_is_moved_besides_is_listed(moved):
    """Whatever a kernel touches has a rule in its case, or stands among the small arrays."""
    unknown = [one for one in moved if not (one.must_read or one.must_write) and one.array not in kernel_bytes.BESIDES]
    assert unknown == []


def test_a_second_pass_is_seen(emulated_gpu, monkeypatch):  # noqa: F811
    """A kernel that reads its product once more is found out."""
    once = "out;\n        S x[VEC];"
    launch = importlib.import_module("gpu_mlp.ops.launch")  # the one that the stand-in's users have
    text = launch.text
    assert once in text("forward.cu")
    twice = "out;\nif (*(const volatile char*)(product + row * n + column) == 99) return;\nS x[VEC];"
    monkeypatch.setattr(launch, "text", lambda name: text(name).replace(once, twice))
    monkeypatch.setattr(kernel_bytes, "STORAGE", ("float32",))
    found = {(one.kernel, one.array) for one in excess(kernel_bytes.measure())}
    assert found == {("bias_activation", "product")}


def test_bytes_are_counted_by_the_emulator(emulated_gpu):  # noqa: F811
    """A kernel whose bytes are known by hand: 4 a float, each read twice, every other one written."""
    import cupy

    code = """extern "C" __global__ void f(const float* x, float* y, const int* unused) {
        y[2 * threadIdx.x] = x[threadIdx.x] + *(const volatile float*)(x + threadIdx.x);
    }"""
    x, y, unused = cupy.zeros(32, np.float32), cupy.zeros(64, np.float32), cupy.zeros(1, np.int32)
    cupy.RawModule(code=code).get_function("f")((1,), (32,), (x, y, unused))
    assert emulated_gpu.traffic == [("f", {"x": (256, 0), "y": (0, 128), "unused": (0, 0)})]


def test_the_committed_table_is_what_is_counted(moved):
    """To write it anew: see benchmarks/kernel_bytes.py."""
    with open(RESULTS / "kernel_bytes.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    counted = [{field: str(value) for field, value in vars(one).items()} for one in moved]
    assert [{field: row[field] for field in counted[0]} for row in rows] == counted
