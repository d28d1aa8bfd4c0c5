"""The kernels' own sin and cos against NumPy's in longer numbers, on the emulated GPU: kernels/sine.cuh."""

from __future__ import annotations

import numpy as np
import pytest
from cuda_on_cpu.fixtures import emulated_gpu  # noqa: F401

from gpu_mlp.ops import launch

pytestmark = pytest.mark.usefixtures("emulated_gpu")

# The derivative's name in the kernels is df_sine; NumPy's functions in the type that holds the most digits.
FUNCTIONS = {"f_sine": np.sin, "df_sine": np.cos}
LONGER = {"float32": np.float64, "float64": np.longdouble}
ULPS = {"float32": 2, "float64": 3}
# Up to where z is reduced by subtraction, and the numbers of each type that come closest to a multiple of pi / 2.
MODERATE = {"float32": 105615.0, "float64": 2.0**31}
AWKWARD = {"float32": [16367173.0 * 2.0**72], "float64": [6381956970095103.0 * 2.0**797]}


def computed(function, z):
    """f_sine or df_sine of every entry, as a kernel computes it."""
    import cupy

    macros = (("F", function), ("KEEPS_Z", "0"), ("HAS_BIAS", "0"), ("DROPOUT", "0"))
    kernel = launch.kernel("forward.cu", "bias_activation", z.dtype.name, 1, macros)
    product, h = cupy.asarray(z[None]), cupy.empty((1, z.size), z.dtype)
    no_dropout = (np.uint32(0), np.uint32(0), np.uint64(0), np.int64(0), None)
    geometry = launch.tile(1, z.size, 1)
    launch.launch(kernel, geometry, (product, None, h, np.int64(1), np.int64(z.size), *no_dropout))
    return cupy.asnumpy(h)[0]


def arguments(dtype):
    """Small, moderate and huge ones, multiples of pi / 2 among them, and both sides of where the reduction changes."""
    rng = np.random.default_rng(0)
    edge, largest = MODERATE[dtype], np.finfo(dtype).max
    sizes = np.exp(rng.uniform(np.log(1e-30), np.log(largest), 2000))
    turns = rng.integers(-(2**20), 2**20, 1000) * (np.pi / 2)
    around_edge = edge * (1 + np.linspace(-1e-6, 1e-6, 100))
    z = [rng.uniform(-4, 4, 1000), rng.uniform(-edge, edge, 1000), sizes, -sizes, turns, around_edge, AWKWARD[dtype]]
    return np.concatenate([*z, [largest, -largest]]).astype(dtype)


@pytest.mark.parametrize("dtype", LONGER)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_every_finite_argument_to_a_few_ulps(function, dtype):
    z = arguments(dtype)
    expected = FUNCTIONS[function](z.astype(LONGER[dtype]))
    ulp = np.spacing(np.abs(expected).astype(dtype)).astype(LONGER[dtype])
    error = np.abs(computed(function, z).astype(LONGER[dtype]) - expected) / ulp
    assert np.isfinite(error).all()
    assert error.max() <= ULPS[dtype], z[error.argmax()]


@pytest.mark.parametrize("dtype", LONGER)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_no_number_gives_no_number(function, dtype):
    z = np.array([np.inf, -np.inf, np.nan], dtype)
    assert np.isnan(computed(function, z)).all()


@pytest.mark.parametrize("dtype", LONGER)
def test_zero_is_exact(dtype):
    z = np.zeros(1, dtype)
    assert computed("f_sine", z)[0] == 0
    assert computed("df_sine", z)[0] == 1
