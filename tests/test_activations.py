"""The activation table row by row: f and f′ against scalar formulas of the math module, up to the ends of the range.

The tolerance is a small multiple of the dtype's eps, since each function is a handful of operations: absolute where
|f| ≤ 1, relative beyond.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from contextlib import nullcontext

import numpy as np
import pytest

from gpu_mlp import MLP
from gpu_mlp.activations import ACTIVATIONS, Activation, Scratch, get

SELU_SCALE, SELU_ALPHA = 1.0507009873554805, 1.6732632423543772


def sigmoid(z: float) -> float:
    return 1 / (1 + math.exp(-z)) if z >= 0 else math.exp(z) / (1 + math.exp(z))


def softplus(z: float) -> float:
    return max(z, 0) + math.log1p(math.exp(-abs(z)))


def sech2(z: float) -> float:
    """1 / cosh² z, which is 1 − tanh² z, without overflow and without cancellation."""
    return 4 * sigmoid(2 * z) * sigmoid(-2 * z)


def normal_cdf(z: float) -> float:
    return math.erfc(-z / math.sqrt(2)) / 2


def normal_density(z: float) -> float:
    return math.exp(-z * z / 2) / math.sqrt(2 * math.pi)


def gelu_argument(z: float) -> float:
    """2u, since (1 + tanh u) / 2 = σ(2u)"""
    return 2 * math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)


def gelu_argument_slope(z: float) -> float:
    return 2 * math.sqrt(2 / math.pi) * (1 + 3 * 0.044715 * z * z)


def mish_gate(z: float) -> float:
    return math.tanh(softplus(z))


def exp(z: float) -> float:
    return math.exp(z) if z < 709.78 else math.inf


def clip(value: float, low: float, high: float) -> float:
    return min(max(value, low), high)


# f and f′ of one number; at a kink, the value that the table is to take.
FORMULAS = {
    "identity": (lambda z: z, lambda z: 1),
    "relu": (lambda z: max(z, 0), lambda z: z > 0),
    "leaky_relu": (lambda z: z if z > 0 else 0.01 * z, lambda z: 1 if z > 0 else 0.01),
    "elu": (lambda z: z if z > 0 else math.expm1(z), lambda z: 1 if z > 0 else math.exp(z)),
    "selu": (
        lambda z: SELU_SCALE * (z if z > 0 else SELU_ALPHA * math.expm1(z)),
        lambda z: SELU_SCALE * (1 if z > 0 else SELU_ALPHA * math.exp(z)),
    ),
    "celu": (lambda z: max(z, 0) + min(0, math.expm1(min(z, 0))), lambda z: 1 if z > 0 else math.exp(z)),
    "gelu": (lambda z: z * normal_cdf(z), lambda z: normal_cdf(z) + z * normal_density(z)),
    "gelu_tanh": (
        lambda z: z * sigmoid(gelu_argument(z)),
        lambda z: (
            sigmoid(gelu_argument(z))
            + z * gelu_argument_slope(z) * sigmoid(gelu_argument(z)) * sigmoid(-gelu_argument(z))
        ),
    ),
    "silu": (lambda z: z * sigmoid(z), lambda z: sigmoid(z) * (1 + z * sigmoid(-z))),
    "mish": (lambda z: z * mish_gate(z), lambda z: mish_gate(z) + z * sigmoid(z) * sech2(softplus(z))),
    "tanh": (math.tanh, sech2),
    "sigmoid": (sigmoid, lambda z: sigmoid(z) * sigmoid(-z)),
    "softplus": (softplus, sigmoid),
    "softsign": (lambda z: z / (1 + abs(z)), lambda z: 1 / (1 + abs(z)) ** 2),
    "hardtanh": (lambda z: clip(z, -1, 1), lambda z: -1 < z < 1),
    "hardsigmoid": (lambda z: clip(z / 6 + 0.5, 0, 1), lambda z: (-3 < z < 3) / 6),
    "hardswish": (
        lambda z: z * clip(z / 6 + 0.5, 0, 1),
        lambda z: 0 if z <= -3 else 1 if z >= 3 else z / 3 + 0.5,
    ),
    "relu6": (lambda z: clip(z, 0, 6), lambda z: 0 < z < 6),
    "relu_squared": (lambda z: max(z, 0) ** 2, lambda z: 2 * max(z, 0)),
    "sine": (math.sin, math.cos),
    "exp": (exp, exp),
}
ROWWISE = ["softmax", "log_softmax"]
# Functions whose values near 0 are to keep their digits: relative accuracy everywhere. The others lose some to a
# cancellation, 1 + erf or z / 6 + 1/2, as they do everywhere else.
RELATIVE = [
    "identity", "relu", "leaky_relu", "elu", "selu", "celu", "silu", "mish", "tanh", "sigmoid", "softplus", "softsign",
    "hardtanh", "relu6", "relu_squared", "sine", "exp",
]  # fmt: skip

SIZES = [1e-45, 1e-40, 1e-30, 1e-10, 1e-4, 0.1, 0.99, 1, 1.01, 2.99, 3, 3.01, 5.99, 6, 6.01, 10, 17, 20, 40, 80, 87]
SIZES += [88, 88.8, 89, 103.9, 104, 120, 708, 709.7, 709.8, 744, 745, 746, 1000, 1e4]
GRID = np.array([0.0, -0.0, *SIZES, *(-size for size in SIZES), 5e-324, -5e-324, *np.linspace(-9, 9, 290)])
DTYPES = [np.float32, np.float64]
elementwise = pytest.mark.parametrize("name", FORMULAS)
every = pytest.mark.parametrize("name", [*FORMULAS, *ROWWISE])
in_both = pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "float64"])


def scratch(shape: tuple[int, ...], dtype: type) -> Scratch:
    """Scratch full of NaN: whoever reads it before writing it is found out."""
    return Scratch(*(np.full(shape, np.nan, dtype) for _ in range(3)), np.ones(shape, bool))


def grid(dtype: type) -> np.ndarray:
    return GRID.astype(dtype)[None, :]


def apply(name: str, z: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """h and f′(z) ⊙ 1. For exp, ∞ beyond the range of the dtype is right and may be warned of."""
    f = ACTIVATIONS[name]
    h, g = np.full_like(z, np.nan), np.ones_like(z)
    with np.errstate(over="ignore") if name == "exp" else nullcontext():
        f.f(z, h, scratch(z.shape, z.dtype))
        f.df(g, {"h": h, "z": z, "none": None}[f.reads], scratch(z.shape, z.dtype))
    return h, g


def expected(formula, z: np.ndarray) -> np.ndarray:
    """The formula in double precision at the very numbers in z, then as z's dtype has it."""
    values = np.array([float(formula(float(v))) for v in z.ravel()]).reshape(z.shape)
    with np.errstate(over="ignore"):
        return values.astype(z.dtype)


def check(value: np.ndarray, wanted: np.ndarray, z: np.ndarray, ulps: float, absolute: float = 1.0) -> None:
    """|value − wanted| ≤ ulps · eps · max(|wanted|, absolute), infinities where they belong, no NaN.

    A value below the smallest normal number may be 0: 1 / (1 + exp(−z)) is where exp(−z) is ∞.
    """
    info = np.finfo(value.dtype)
    assert not np.isnan(value).any(), z[np.isnan(value)]
    infinite = np.isinf(wanted)
    assert (value[infinite] == wanted[infinite]).all()
    value, wanted = (np.where(infinite, 0, a).astype(np.float64) for a in (value, wanted))
    error = np.abs(value - wanted)
    allowed = ulps * float(info.eps) * np.maximum(np.abs(wanted), absolute) + float(info.tiny) * np.maximum(
        1, np.abs(z)
    )
    worst = np.argmax(error / allowed)
    assert (error <= allowed).all(), (z.ravel()[worst], value.ravel()[worst], wanted.ravel()[worst])


# --- f and f′ against the formulas ---------------------------------------------------------------------------------


def test_every_row_has_a_formula():
    assert {*FORMULAS, *ROWWISE} == set(ACTIVATIONS)
    assert {name for name, f in ACTIVATIONS.items() if f.rowwise} == set(ROWWISE)
    assert all(f.name == name for name, f in ACTIVATIONS.items())


@in_both
@elementwise
def test_f(name, dtype):
    z = grid(dtype)
    h, _ = apply(name, z)
    assert h.dtype == dtype
    check(h, expected(FORMULAS[name][0], z), z, 16)


@in_both
@pytest.mark.parametrize("name", RELATIVE)
def test_f_keeps_its_digits_near_zero(name, dtype):
    z = grid(dtype)
    h, _ = apply(name, z)
    check(h, expected(FORMULAS[name][0], z), z, 16, absolute=0.0)


@in_both
@elementwise
def test_derivative(name, dtype):
    """32 eps: f′ of a gated function is a sum of terms of up to three factors each."""
    z = grid(dtype)
    _, g = apply(name, z)
    check(g, expected(FORMULAS[name][1], z), z, 32)


@in_both
@elementwise
def test_derivative_multiplies_what_is_there(name, dtype):
    rng = np.random.default_rng(0)
    z = rng.normal(size=(7, 13)).astype(dtype) * 3
    f = ACTIVATIONS[name]
    h = np.empty_like(z)
    f.f(z, h, scratch(z.shape, dtype))
    before = rng.normal(size=z.shape).astype(dtype)
    g = before.copy()
    f.df(g, {"h": h, "z": z, "none": None}[f.reads], scratch(z.shape, dtype))
    check(g, before * expected(FORMULAS[name][1], z), z, 64)


@elementwise
def test_the_formulas_themselves(name):
    """The two formulas of a row belong together: f′ is the slope of f, away from the kinks, by central differences."""
    f, df = FORMULAS[name]
    for z in np.linspace(-8, 8, 108):  # none of its points is near a kink
        slope = (f(z + 1e-5) - f(z - 1e-5)) / 2e-5
        assert float(df(z)) == pytest.approx(slope, rel=1e-6, abs=1e-6), z


@in_both
@every
def test_no_warning_and_no_nan_anywhere(name, dtype):
    """What is done about an overflow on the way is part of the function: a user is not to hear of it."""
    z = np.concatenate([grid(dtype), -grid(dtype)])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        h, g = apply(name, z)
    assert not np.isnan(h).any()
    assert not np.isnan(g).any()


# What each function tends to, at −10,000 and at 10,000.
LIMITS = {
    "identity": (-1e4, 1e4),
    "relu": (0, 1e4),
    "leaky_relu": (-1e2, 1e4),
    "elu": (-1, 1e4),
    "selu": (-SELU_SCALE * SELU_ALPHA, SELU_SCALE * 1e4),
    "celu": (-1, 1e4),
    "gelu": (0, 1e4),
    "gelu_tanh": (0, 1e4),
    "silu": (0, 1e4),
    "mish": (0, 1e4),
    "tanh": (-1, 1),
    "sigmoid": (0, 1),
    "softplus": (0, 1e4),
    "softsign": (-1e4 / 10001, 1e4 / 10001),
    "hardtanh": (-1, 1),
    "hardsigmoid": (0, 1),
    "hardswish": (0, 1e4),
    "relu6": (0, 6),
    "relu_squared": (0, 1e8),
    "exp": (0, math.inf),
}


@in_both
@pytest.mark.parametrize("name", LIMITS)
def test_limits(name, dtype):
    """0 may be what a sigmoid rounds to below the smallest normal number, times z."""
    h, g = apply(name, np.array([[-1e4, 1e4]], dtype))
    zero = 1e4 * float(np.finfo(dtype).tiny)
    np.testing.assert_allclose(h[0], np.array(LIMITS[name], dtype), rtol=2 * np.finfo(dtype).eps, atol=zero)
    flat_left = name not in ("identity", "leaky_relu", "softsign")
    flat_right = name in ("tanh", "sigmoid", "hardtanh", "hardsigmoid", "relu6")
    assert (abs(g[0, 0]) <= zero) == flat_left
    assert (abs(g[0, 1]) <= zero) == flat_right


@in_both
@pytest.mark.parametrize("name", [name for name in LIMITS if name not in ("relu_squared", "exp")])
def test_the_ends_of_the_range(name, dtype):
    """However far out, f is its asymptote and f′ the slope of that, although z² has no number there any more."""
    end = float(np.finfo(dtype).max) * 0.9
    for size in (1e15, end):
        z = np.array([[-size, size]], dtype)
        with np.errstate(over="ignore", invalid="ignore"):
            h, g = apply(name, z)
        for value, slope, at, near, sign in zip(h[0], g[0], z[0], LIMITS[name], (-1, 1)):
            straight = abs(near) >= 100  # there the asymptote is a line through 0
            wanted = near / (sign * 1e4) * float(at) if straight else round(near, 3) if name == "softsign" else near
            assert float(value) == pytest.approx(wanted, rel=1e-6, abs=1e-6)
            assert float(slope) == pytest.approx(near / (sign * 1e4) if straight else 0, rel=1e-6, abs=1e-6)


# f′ at every kink: PyTorch's value, and so 0 or 1 on the flat or the straight side.
AT_KINKS = {
    "relu": {0: 0},
    "leaky_relu": {0: 0.01},
    "selu": {0: SELU_SCALE * SELU_ALPHA},
    "hardtanh": {-1: 0, 1: 0},
    "hardsigmoid": {-3: 0, 3: 0},
    "hardswish": {-3: 0, 3: 1},
    "relu6": {0: 0, 6: 0},
}


@in_both
@pytest.mark.parametrize("name", AT_KINKS)
def test_the_derivative_at_a_kink(name, dtype):
    for kink, value in AT_KINKS[name].items():
        z = np.array([[kink, -0.0 if kink == 0 else kink]], dtype)
        _, g = apply(name, z)
        assert g.tolist() == [[dtype(value), dtype(value)]], (kink, g)


@elementwise
def test_the_table_knows_the_kinks(name):
    """A kink is where the slopes of f on the two sides differ; all of them lie at whole numbers."""
    f = FORMULAS[name][0]
    kinks = []
    for z in range(-8, 9):
        left, right = (f(z) - f(z - 1e-7)) / 1e-7, (f(z + 1e-7) - f(z)) / 1e-7
        if abs(left - right) > 1e-3 * max(1, abs(left)):
            kinks.append(z)
    assert sorted(ACTIVATIONS[name].kinks) == kinks == sorted(AT_KINKS.get(name, {}))


# --- what is written and what is read ------------------------------------------------------------------------------


@in_both
@every
@pytest.mark.parametrize("shape", [(1, 1), (1, 31), (5, 7), (300, 2)], ids=str)
def test_in_place_is_the_same_to_the_bit(name, dtype, shape):
    z = (np.random.default_rng(1).normal(size=shape) * 4).astype(dtype)
    f = ACTIVATIONS[name]
    before, h = z.copy(), np.full_like(z, np.nan)
    f.f(z, h, scratch(shape, dtype))
    assert np.array_equal(z, before)  # out of place, z is left alone
    assert np.isfinite(h).all()
    f.f(z, z, scratch(shape, dtype))
    assert z.tobytes() == h.tobytes()


@in_both
@every
def test_the_derivative_reads_what_the_table_says_and_leaves_it_alone(name, dtype):
    rng = np.random.default_rng(2)
    z = rng.normal(size=(6, 9)).astype(dtype) * 3
    f = ACTIVATIONS[name]
    h = np.empty_like(z)
    f.f(z, h, scratch(z.shape, dtype))
    saved = {"h": h, "z": z, "none": None}[f.reads]
    before = None if saved is None else saved.copy()
    g = rng.normal(size=z.shape).astype(dtype)
    f.df(g, saved, scratch(z.shape, dtype))
    assert np.isfinite(g).all()
    assert saved is None or np.array_equal(saved, before)


@every
def test_float32_follows_float64(name):
    """Within some eps of float32, of the larger of 1 and |h|, on inputs that both types hold exactly."""
    z = (np.random.default_rng(3).normal(size=(50, 20)) * 3).astype(np.float32)
    for narrow, wide in zip(apply(name, z), apply(name, z.astype(np.float64))):
        error = np.abs(narrow - wide) / np.maximum(1, np.abs(wide))
        assert np.isfinite(error).all()
        assert error.max() < 64 * np.finfo(np.float32).eps


@every
def test_nan_is_passed_on(name):
    """A network that has gone wrong must not look as if it had not."""
    h, _ = apply(name, np.array([[0.5, np.nan, 1.0]]))
    assert np.isnan(h[0, 1])


@every
def test_values_lie_in_the_declared_range(name):
    f, z = ACTIVATIONS[name], np.concatenate([grid(np.float64), -grid(np.float64)])
    z = z[:, np.abs(z[0]) < 30]  # beyond, σ(z) rounds to 1
    h, _ = apply(name, z)
    if f.range == "positive":
        assert (h > 0).all()
    elif f.range == "unit":
        assert ((h > 0) & (h < 1)).all()
    elif f.range == "simplex":
        assert ((h > 0) & (h < 1)).all()
        np.testing.assert_allclose(h.sum(axis=1), 1, rtol=1e-14)
    elif f.range == "log_simplex":
        assert (h < 0).all()
        np.testing.assert_allclose(np.exp(h).sum(axis=1), 1, rtol=1e-14)
    else:
        assert f.range == "real"
        assert name not in ("softplus", "exp", "sigmoid", *ROWWISE)


# --- the row-wise ones ---------------------------------------------------------------------------------------------

ROWS = np.array(
    [
        [0.0, 0.0, 0.0, 0.0],
        [1.0, 2.0, 3.0, 4.0],
        [1e4, 0.0, -1e4, 1e4],
        [745.0, 745.0, 0.0, -745.0],
        [88.0, -88.0, 89.0, -89.0],
        [-1e4, -1e4, -1e4, -1e4 + 1],
        [1e-40, -1e-40, 0.0, -0.0],
        [1e30, 1e30, -1e30, 0.0],
    ]
)


def log_softmax(row: np.ndarray) -> list[float]:
    top = max(row)
    log_sum = math.log(math.fsum(math.exp(v - top) for v in row))
    return [v - top - log_sum for v in row]


@in_both
def test_softmax(dtype):
    z = ROWS.astype(dtype)
    h, _ = apply("softmax", z)
    wanted = np.array([[math.exp(v) for v in log_softmax(row)] for row in z.astype(float)])
    check(h, wanted.astype(dtype), z, 8)


@in_both
def test_log_softmax(dtype):
    z = ROWS.astype(dtype)
    h, _ = apply("log_softmax", z)
    wanted = np.array([log_softmax(row) for row in z.astype(float)])
    check(h, wanted.astype(dtype), z, 8)


@in_both
@pytest.mark.parametrize("name", ROWWISE)
def test_the_derivative_is_the_transposed_jacobian(name, dtype):
    """Written out: ∂softmax_i/∂z_j = p_i (δ_ij − p_j), ∂log_softmax_i/∂z_j = δ_ij − p_j."""
    z = ROWS.astype(dtype)
    rng = np.random.default_rng(4)
    g = rng.normal(size=z.shape).astype(dtype)
    before, f, h = g.astype(np.float64), ACTIVATIONS[name], np.empty_like(z)
    f.f(z, h, scratch(z.shape, dtype))
    f.df(g, h, scratch(z.shape, dtype))
    for row, out, given in zip(z.astype(float), g, before):
        p = np.array([math.exp(v) for v in log_softmax(row)])
        jacobian = np.eye(4) - p[None, :]
        if name == "softmax":
            jacobian *= p[:, None]
        check(out, jacobian.T @ given, row, 32, absolute=np.abs(given).sum())


@pytest.mark.parametrize(("name", "value"), [("softmax", 1.0), ("log_softmax", 0.0)])
def test_a_row_of_one_entry(name, value):
    h, g = apply(name, np.array([[3.0], [-1e4]]))
    assert h.tolist() == [[value], [value]]
    assert g.tolist() == [[0.0], [0.0]]


@pytest.mark.parametrize("name", ROWWISE)
def test_rows_do_not_mix(name):
    z = np.random.default_rng(5).normal(size=(4, 6))
    h, _ = apply(name, z)
    alone = [apply(name, z[i : i + 1])[0] for i in range(4)]
    assert np.array_equal(h, np.concatenate(alone))


# --- looking one up ------------------------------------------------------------------------------------------------


def test_looking_up_by_name():
    assert get("gelu") is ACTIVATIONS["gelu"]
    own = dataclasses.replace(ACTIVATIONS["gelu"], name="my_own")
    assert isinstance(own, Activation)
    assert get(own) is own


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("rleu", ValueError, "activation: unknown name 'rleu'; did you mean 'relu'.*known: identity, relu"),
        ("ReLU", ValueError, "did you mean 'relu'"),
        ("swoosh3000", ValueError, "activation: unknown name 'swoosh3000' .known"),
        (3, TypeError, "activation: expected a name, got int"),
        (None, TypeError, "activation: expected a name, got NoneType"),
    ],
)
def test_an_unknown_name_is_refused(name, error, message):
    with pytest.raises(error, match=message):
        get(name)


def test_the_message_says_which_argument_it_was():
    with pytest.raises(ValueError, match=r"^output: unknown name 'softmaxx'; did you mean 'softmax'"):
        MLP([2, 2], output="softmaxx")
    with pytest.raises(ValueError, match=r"^activation: unknown name 'than'; did you mean 'tanh'"):
        MLP([2, 2, 2], activation="than")
