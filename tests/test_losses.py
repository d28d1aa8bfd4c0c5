"""The loss table: value and gradient of every loss against scalar formulas, extreme predictions, and what is refused.

Tolerances are small multiples of the dtype's eps: a loss is a handful of operations an entry and a short sum.
"""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest

from gpu_mlp import MLP, Trainer
from gpu_mlp.activations import ACTIVATIONS, Scratch
from gpu_mlp.losses import (
    DEFAULT_LOSS,
    FUSED,
    LOSSES,
    MSE,
    NLL,
    BinaryCrossEntropy,
    CrossEntropy,
    Hinge,
    Huber,
    Loss,
    Poisson,
    get,
)

in_both = pytest.mark.parametrize("dtype", [np.float32, np.float64], ids=["float32", "float64"])
labels_and_rows = pytest.mark.parametrize("labels", [True, False], ids=["labels", "rows"])
N, ROWS = 3, 7  # outputs and rows, where nothing else is said


def scratch(shape: tuple[int, ...], dtype: type) -> Scratch:
    """Scratch full of NaN: whoever reads it before writing it is found out."""
    return Scratch(*(np.full(shape, np.nan, dtype) for _ in range(3)), np.ones(shape, bool))


def evaluate(loss: Loss, y_hat: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """L of every row and ∂L/∂ŷ; neither argument may be changed."""
    g, before = np.full_like(y_hat, np.nan), (y_hat.copy(), y.copy())
    values = loss.rows(y_hat, y, g, scratch(y_hat.shape, y_hat.dtype))
    assert np.array_equal(before[0], y_hat)
    assert np.array_equal(before[1], y)
    return np.array(values), g


def fused(output: str, loss: Loss, z: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """L of every row and ∂L/∂z from the fused pair."""
    g, before = np.full_like(z, np.nan), (z.copy(), y.copy())
    values = FUSED[output, loss.name](loss, z, y, g, scratch(z.shape, z.dtype))
    assert np.array_equal(before[0], z)
    assert np.array_equal(before[1], y)
    return np.array(values), g


def general(output: str, loss: Loss, z: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The same through ŷ and f′."""
    f, t = ACTIVATIONS[output], scratch(z.shape, z.dtype)
    h = np.empty_like(z)
    f.f(z, h, t)
    values, g = evaluate(loss, h, y)
    f.df(g, z if f.reads == "z" else h, t)
    return values, g


def close(value: np.ndarray, wanted: np.ndarray, eps: float) -> None:
    assert np.isfinite(value).all()
    assert np.isfinite(wanted).all()
    np.testing.assert_allclose(value, wanted, rtol=eps, atol=eps)


# --- values and gradients against scalar formulas ------------------------------------------------------------------


def huber(d: float, delta: float) -> float:
    return d * d / 2 if abs(d) <= delta else delta * (abs(d) - delta / 2)


def log_cosh(d: float) -> float:
    return math.log(math.cosh(d))


# L and ∂L/∂ŷ of one entry; the losses over real targets are means of them.
ENTRIES = {
    "mse": (MSE(), lambda p, y: (p - y) ** 2, lambda p, y: 2 * (p - y)),
    "half_mse": (get("half_mse"), lambda p, y: (p - y) ** 2 / 2, lambda p, y: p - y),
    "mae": (get("mae"), lambda p, y: abs(p - y), lambda p, y: int(p > y) - int(p < y)),
    "huber": (Huber(), lambda p, y: huber(p - y, 1), lambda p, y: max(-1, min(1, p - y))),
    "huber, delta 0.3": (Huber(0.3), lambda p, y: huber(p - y, 0.3), lambda p, y: max(-0.3, min(0.3, p - y))),
    "log_cosh": (get("log_cosh"), lambda p, y: log_cosh(p - y), lambda p, y: math.tanh(p - y)),
    "poisson": (Poisson(), lambda p, y: p - y * math.log(p), lambda p, y: 1 - y / p),
    "binary_cross_entropy": (
        BinaryCrossEntropy(),
        lambda p, y: -y * math.log(p) - (1 - y) * math.log(1 - p),
        lambda p, y: (1 - y) / (1 - p) - y / p,
    ),
    "hinge": (Hinge(), lambda p, y: max(0, 1 - y * p), lambda p, y: -y if y * p < 1 else 0),
}


def predictions(loss: Loss, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Random ŷ in the loss's domain, and targets that it takes; some of them equal."""
    shape = (ROWS, N)
    if loss.name == "poisson":
        return rng.uniform(0.1, 5, shape), rng.poisson(2, shape).astype(float)
    if loss.name == "binary_cross_entropy":
        y = rng.uniform(size=shape)
        y[0], y[1] = 0, 1
        return rng.uniform(0.02, 0.98, shape), y
    if loss.name == "hinge":
        return rng.normal(size=shape) * 1.5, rng.choice([-1.0, 1.0], shape)
    y_hat, y = rng.normal(size=shape) * 2, rng.normal(size=shape)
    y[2] = y_hat[2] = np.float32(0.5)
    return y_hat, y


def test_every_loss_has_a_formula():
    assert {loss.name for loss, _, _ in ENTRIES.values()} | {"cross_entropy", "nll"} == set(LOSSES)
    assert all(LOSSES[name]().name == name for name in LOSSES)


@in_both
@pytest.mark.parametrize("case", ENTRIES)
def test_losses_of_entries(case, dtype):
    loss, value, gradient = ENTRIES[case]
    y_hat, y = (a.astype(dtype) for a in predictions(loss, np.random.default_rng(0)))
    values, g = evaluate(loss, y_hat, y)
    assert g.dtype == dtype
    wanted = [math.fsum(value(float(p), float(t)) for p, t in zip(*row)) / N for row in zip(y_hat, y)]
    close(values, np.array(wanted), 32 * np.finfo(dtype).eps)
    wanted_g = [[gradient(float(p), float(t)) / N for p, t in zip(*row)] for row in zip(y_hat, y)]
    close(g, np.array(wanted_g, np.float64), 64 * np.finfo(dtype).eps)


@pytest.mark.parametrize("case", ENTRIES)
def test_the_formulas_themselves(case):
    """The gradient of a row is the slope of its value, by central differences away from the kinks."""
    loss, value, gradient = ENTRIES[case]
    y_hat, y = predictions(loss, np.random.default_rng(1))
    for p, t in zip(y_hat.ravel(), y.ravel()):
        if loss.name == "mae" and p == t:
            continue
        slope = (value(p + 1e-6, t) - value(p - 1e-6, t)) / 2e-6
        assert gradient(p, t) == pytest.approx(slope, rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("case", ENTRIES)
def test_a_mean_over_the_outputs(case):
    """The same outputs twice over: the same loss."""
    loss = ENTRIES[case][0]
    y_hat, y = predictions(loss, np.random.default_rng(2))
    once, g_once = evaluate(loss, y_hat, y)
    twice, g_twice = evaluate(loss, np.hstack([y_hat, y_hat]), np.hstack([y, y]))
    close(twice, once, 1e-14)
    close(g_twice, np.hstack([g_once, g_once]) / 2, 1e-14)


@pytest.mark.parametrize("name", ["mse", "half_mse", "mae", "huber", "log_cosh"])
def test_a_perfect_prediction_costs_nothing(name):
    """Exactly nothing, and never less than nothing for a nearly perfect one (log_cosh subtracts log 2: an eps)."""
    y = np.random.default_rng(3).normal(size=(5, 4))
    values, g = evaluate(get(name), y.copy(), y)
    np.testing.assert_allclose(values, 0, rtol=0, atol=2 * np.finfo(float).eps if name == "log_cosh" else 0)
    assert not g.any()


# --- the losses over classes ----------------------------------------------------------------------------------------

CLASS_WEIGHT = (0.5, 2.0, 0.0)
CATEGORICAL = {
    "cross_entropy": CrossEntropy(),
    "smoothing": CrossEntropy(label_smoothing=0.2),
    "class_weight": CrossEntropy(class_weight=CLASS_WEIGHT),
    "smoothing and class_weight": CrossEntropy(label_smoothing=0.2, class_weight=CLASS_WEIGHT),
    "nll": NLL(),
    "nll, class_weight": NLL(class_weight=CLASS_WEIGHT),
}


def class_targets(labels: bool, rng: np.random.Generator, n: int = N) -> np.ndarray:
    if labels:
        return rng.integers(0, n, ROWS)
    y = rng.uniform(size=(ROWS, n))
    y[0] = np.eye(n)[1]  # a row that is a label
    return y / y.sum(axis=1, keepdims=True)


def cross_entropy(loss: Loss, z: np.ndarray, y: np.ndarray) -> tuple[list, list]:
    """Σ_c −w_c t_c log p_c of every row and its gradient in z, (Σ_c w_c t_c) p − w ⊙ t, from the definitions."""
    values, gradients = [], []
    for row, target in zip(z.astype(float), y):
        t = [float(c == target) for c in range(len(row))] if y.ndim == 1 else [float(v) for v in target]
        t = [(1 - loss.label_smoothing) * v + loss.label_smoothing / len(row) for v in t]
        w = [1.0] * len(row) if loss.class_weight is None else loss.class_weight
        top = max(row)
        log_sum = math.log(math.fsum(math.exp(v - top) for v in row))
        log_p = [v - top - log_sum for v in row]
        values.append(-math.fsum(w[c] * t[c] * log_p[c] for c in range(len(row))))
        mass = math.fsum(w[c] * t[c] for c in range(len(row)))
        gradients.append([mass * math.exp(log_p[c]) - w[c] * t[c] for c in range(len(row))])
    return values, gradients


@in_both
@labels_and_rows
@pytest.mark.parametrize("case", CATEGORICAL)
def test_classes_from_z(case, labels, dtype):
    loss, rng = CATEGORICAL[case], np.random.default_rng(4)
    z, y = (rng.normal(size=(ROWS, N)) * 4).astype(dtype), class_targets(labels, rng)
    y = y if labels else y.astype(dtype)
    output = "softmax" if loss.name == "cross_entropy" else "log_softmax"
    values, g = fused(output, loss, z, y)
    wanted, wanted_g = cross_entropy(loss, z, y)
    close(values, np.array(wanted), 64 * np.finfo(dtype).eps)
    close(g, np.array(wanted_g), 32 * np.finfo(dtype).eps)


@labels_and_rows
@pytest.mark.parametrize("case", CATEGORICAL)
def test_a_fused_pair_is_the_general_path_for_classes(case, labels):
    """Through ŷ: log p and 1 / p of probabilities down to 1e-6 lose a few digits, no more."""
    loss, rng = CATEGORICAL[case], np.random.default_rng(5)
    z, y = rng.normal(size=(ROWS, N)) * 3, class_targets(labels, rng)
    output = "softmax" if loss.name == "cross_entropy" else "log_softmax"
    for one, other in zip(fused(output, loss, z, y), general(output, loss, z, y)):
        close(one, other, 1e-12)


@pytest.mark.parametrize(("output", "loss"), [("sigmoid", BinaryCrossEntropy()), ("exp", Poisson())])
def test_a_fused_pair_is_the_general_path(output, loss):
    rng = np.random.default_rng(6)
    z, y = rng.normal(size=(ROWS, N)) * 3, predictions(loss, rng)[1]
    values, g = fused(output, loss, z, y)
    values_general, g_general = general(output, loss, z, y)
    close(values, values_general, 1e-11)
    close(g, g_general, 1e-11)


def test_the_pairs_that_are_fused():
    pairs = {
        ("softmax", "cross_entropy"),
        ("log_softmax", "nll"),
        ("sigmoid", "binary_cross_entropy"),
        ("exp", "poisson"),
    }
    assert set(FUSED) == pairs
    for output, loss in FUSED:
        assert MLP([2, 2], output=output).fuses(get(loss))
        assert Trainer(MLP([2, 2], output=output)).loss.name == DEFAULT_LOSS[output] == loss
    assert not MLP([2, 2], output="softmax").fuses(get("mse"))
    assert Trainer(MLP([2, 2], output="tanh")).loss.name == "mse"


def test_softmax_with_nll_of_its_logarithm_is_the_same_loss():
    rng = np.random.default_rng(7)
    z, y = rng.normal(size=(ROWS, N)), class_targets(True, rng)
    for one, other in zip(fused("softmax", CrossEntropy(), z, y), fused("log_softmax", NLL(), z, y)):
        assert np.array_equal(one, other)


@labels_and_rows
def test_the_weights_of_rows_by_their_class(labels):
    """Only labels have a class each; torch's CrossEntropyLoss divides by Σ w_y for them and by the rows otherwise."""
    y = np.array([0, 2, 1]) if labels else np.eye(3)[[0, 2, 1]]
    weights = CrossEntropy(class_weight=[0.5, 2, 3]).label_weights(y)
    assert (weights is None) if not labels else (weights.tolist() == [0.5, 3, 2])
    assert CrossEntropy().label_weights(y) is None


@in_both
def test_hinge_on_both_sides_of_its_margin(dtype):
    """1 − yŷ, and nothing from yŷ = 1 on; the derivative at the margin itself is 0."""
    y_hat = np.array([[0.875], [1.0], [1.125], [-1.125]], dtype)
    values, g = evaluate(Hinge(), y_hat, np.ones_like(y_hat))
    assert values.tolist() == [0.125, 0, 0, 2.125]
    assert g.ravel().tolist() == [-1, 0, 0, -1]
    values, g = evaluate(Hinge(), -y_hat, -np.ones_like(y_hat))
    assert values.tolist() == [0.125, 0, 0, 2.125]
    assert g.ravel().tolist() == [1, 0, 0, 1]


def test_hinge_of_labels():
    """A label is +1 in its own column and −1 elsewhere."""
    rng = np.random.default_rng(8)
    y_hat, y = rng.normal(size=(ROWS, N)), rng.integers(0, N, ROWS)
    signs = np.where(np.arange(N) == y[:, None], 1.0, -1.0)
    for one, other in zip(evaluate(Hinge(), y_hat, y), evaluate(Hinge(), y_hat, signs)):
        assert np.array_equal(one, other)


# --- extreme predictions --------------------------------------------------------------------------------------------

EXTREME = [0.0, -0.0, 88.0, -88.0, 89.0, -89.0, 104.0, -104.0, 710.0, -710.0, 745.0, -745.0, 1e4, -1e4, 1e-40, -1e-40]


@in_both
@labels_and_rows
@pytest.mark.parametrize("case", CATEGORICAL)
def test_extreme_logits_of_classes(case, labels, dtype):
    """All pairs of extreme logits beside a 0. The sums are exact to an eps of the largest logit."""
    loss = CATEGORICAL[case]
    z = np.array([[a, b, 0.0] for a in EXTREME for b in EXTREME], dtype)
    rng = np.random.default_rng(9)
    y = rng.integers(0, N, len(z)) if labels else np.tile([0.2, 0.3, 0.5], (len(z), 1)).astype(dtype)
    output = "softmax" if loss.name == "cross_entropy" else "log_softmax"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        values, g = fused(output, loss, z, y)
    wanted, wanted_g = cross_entropy(loss, z, y)
    eps = float(np.finfo(dtype).eps)
    assert np.isfinite(values).all()
    assert (np.abs(values - wanted) <= 8 * eps * (1 + np.abs(z).max(axis=1))).all()
    close(g, np.array(wanted_g), 32 * eps)


@in_both
def test_exact_limits_of_classes(dtype):
    z = np.array([[1e4, 0.0], [1e4, 0.0], [-1e4, 1e4]], dtype)
    values, g = fused("softmax", CrossEntropy(), z, np.array([0, 1, 0]))
    assert values.tolist() == [0, 1e4, 2e4]
    assert g.tolist() == [[0, 0], [1, -1], [-1, 1]]


@in_both
def test_extreme_logits_of_a_probability(dtype):
    """softplus(z) − y z is z − y z for large z and −y z for large −z."""
    z = np.array([[v] for v in EXTREME], dtype)
    for target in (0.0, 0.25, 1.0):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            values, g = fused("sigmoid", BinaryCrossEntropy(), z, np.full_like(z, target))
        wanted = [max(v, 0) + math.log1p(math.exp(-abs(v))) - target * v for v in z.ravel().astype(float)]
        wanted_g = [1 / (1 + math.exp(-v)) - target if v > -700 else -target for v in z.ravel().astype(float)]
        close(values, np.array(wanted), 8 * np.finfo(dtype).eps)
        close(g.ravel(), np.array(wanted_g), 8 * np.finfo(dtype).eps)


@in_both
def test_extreme_log_rates(dtype):
    """exp(z) − y z: −y z for large −z; a rate beyond the range of the dtype is infinite, and so is its cost."""
    z = np.array([[v] for v in EXTREME if v <= 88], dtype)
    for target in (0.0, 3.0):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            values, g = fused("exp", Poisson(), z, np.full_like(z, target))
        close(values, np.array([math.exp(v) - target * v for v in z.ravel().astype(float)]), 64 * np.finfo(dtype).eps)
        close(g.ravel(), np.array([math.exp(v) - target for v in z.ravel().astype(float)]), 64 * np.finfo(dtype).eps)


@in_both
@pytest.mark.parametrize("name", ["mse", "half_mse", "mae", "huber", "log_cosh"])
def test_large_differences(name, dtype):
    """Nothing but the square of mse grows beyond the difference itself."""
    d = np.array([[v] for v in EXTREME], dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        values, g = evaluate(get(name), d, np.zeros_like(d))
    value = {
        "mse": lambda v: v * v,
        "half_mse": lambda v: v * v / 2,
        "mae": abs,
        "huber": lambda v: huber(v, 1),
        "log_cosh": lambda v: abs(v) + math.log1p(math.exp(-2 * abs(v))) - math.log(2),
    }[name]
    gradient = {"mse": lambda v: 2 * v, "half_mse": lambda v: v, "mae": np.sign}.get(name, math.tanh)
    close(values, np.array([value(float(v)) for v in d[:, 0]]), 8 * np.finfo(dtype).eps)
    if name == "huber":
        gradient = lambda v: max(-1, min(1, v))  # noqa: E731
    close(g[:, 0], np.array([gradient(float(v)) for v in d[:, 0]]), 8 * np.finfo(dtype).eps)


@in_both
def test_a_probability_that_rounded_to_0_or_1_keeps_a_finite_cost(dtype):
    """0 and 1 stand for something that was rounded away: the cost is large, and says which way to go."""
    y_hat = np.array([[0.0, 1.0, 0.0, 1.0]], dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        values, g = evaluate(BinaryCrossEntropy(), y_hat, np.array([[1.0, 0.0, 0.0, 1.0]], dtype))
        right, g_right = evaluate(BinaryCrossEntropy(), y_hat, np.array([[0.0, 1.0, 0.0, 1.0]], dtype))
    assert -2 * math.log(np.finfo(dtype).eps) / 4 <= values[0] < math.inf  # two of the four outputs are wrong
    assert 0 <= right[0] <= np.finfo(dtype).eps
    assert np.isfinite(g).all()
    assert not g_right.any()
    assert g[0, 0] < 0 < g[0, 1]
    assert not g[0, 2:].any()


@in_both
@labels_and_rows
def test_a_class_probability_that_underflowed_keeps_a_finite_cost(labels, dtype):
    y = np.array([1]) if labels else np.array([[0.0, 1.0]], dtype)
    values, g = evaluate(CrossEntropy(), np.array([[1.0, 0.0]], dtype), y)
    assert -math.log(np.finfo(dtype).eps) < values[0] < math.inf
    assert np.isfinite(g).all()
    assert g[0, 1] < 0


@pytest.mark.parametrize("precision", ["float32", "float64"])
@pytest.mark.parametrize("size", [1.0, 8.5, 10.0, 18.5, 50.0, 100.0, 1e3, 1e4])
@pytest.mark.parametrize(
    ("output", "loss"),
    [
        ("softplus", "poisson"),
        ("sigmoid", "poisson"),
        ("softmax", "poisson"),
        ("sigmoid", "binary_cross_entropy"),
        ("softmax", "binary_cross_entropy"),
        ("softmax", "cross_entropy"),
        ("log_softmax", "nll"),
    ],
)
def test_a_network_that_is_sure_of_the_wrong_thing_can_still_learn(output, loss, size, precision):
    """Logits of ± size, on every side of every target: cost and gradients stay in bounds, without a warning."""
    net = MLP([1, 2], output=output, precision=precision)
    net.weights[0][...] = [[1.0], [-1.0]]
    x = np.array([[size], [-size], [size], [-size]])
    y = {"poisson": [[9, 0], [9, 0], [0, 9], [0, 9]], "cross_entropy": [0, 0, 1, 1], "nll": [0, 0, 1, 1]}.get(
        loss, [[1, 0], [1, 0], [0, 1], [0, 1]]
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cost, g = net.cost_and_gradients(x, np.array(y), loss)
    assert math.isfinite(cost)
    assert np.isfinite(g.theta).all()
    assert np.isfinite(g.input).all()
    # ∂L/∂z of an output is at most y or 1 in all of these; what 1 − ŷ loses to rounding must not blow it up
    assert np.abs(g.biases[0]).max() <= 10


# --- what is refused ------------------------------------------------------------------------------------------------


def refuse(output: str, loss: str | Loss, y: object, error: type, message: str, n: int = 3) -> None:
    """Both the network and the trainer refuse these targets, in these words, and change nothing."""
    net = MLP([2, n], output=output)
    theta, y = net.theta.tobytes(), np.asarray(y)
    x = np.zeros((len(y), 2))
    for attempt in (
        lambda: net.cost(x, y, loss),
        lambda: net.cost_and_gradients(x, y, loss),
        lambda: Trainer(net, loss).step(x, y),
    ):
        with pytest.raises(error, match=message):
            attempt()
    assert net.theta.tobytes() == theta


@pytest.mark.parametrize("loss", ["mse", "half_mse", "mae", "huber", "log_cosh"])
@pytest.mark.parametrize(
    ("y", "error", "message"),
    [
        (np.zeros((4, 2)), ValueError, r"^y: expected shape \(batch, 3\) for loss .*, got \(4, 2\)"),
        (np.zeros(4), ValueError, r"^y: expected shape \(batch, 3\) .*got \(4,\)"),
        (np.zeros((4, 3, 1)), ValueError, r"^y: expected shape \(batch, 3\) .*got \(4, 3, 1\)"),
        (np.full((4, 3), "a"), TypeError, "^y: expected numbers for loss .*got dtype <U1"),
        (np.zeros((4, 3), complex), TypeError, "^y: expected numbers .*complex128"),
        (np.zeros((4, 3), object), TypeError, "^y: expected numbers .*object"),
        ([[0, 0, 0], [0, 0, np.nan]], ValueError, "^y: row 1, output 2 is not finite"),
        ([[0, np.inf, 0], [0, 0, 0]], ValueError, "^y: row 0, output 1 is not finite"),
    ],
    ids=["columns", "labels", "three axes", "strings", "complex", "objects", "nan", "inf"],
)
def test_bad_real_targets(loss, y, error, message):
    refuse("identity", loss, y, error, message)


@pytest.mark.parametrize(
    ("output", "loss", "y", "error", "message"),
    [
        ("exp", "poisson", [[1, 2, -1]], ValueError, "^y: row 0, output 2 is negative.*'poisson' takes counts"),
        ("sigmoid", "binary_cross_entropy", [[0, 1, 2]], ValueError, r"^y: row 0, output 2 is outside \[0, 1\]"),
        ("sigmoid", "binary_cross_entropy", [[0, 0, 0], [0, -0.1, 0]], ValueError, "^y: row 1, output 1 is outside"),
        ("identity", "hinge", [[1, -1, 0]], ValueError, "^y: row 0, output 2 is 0.*'hinge' needs −1 or .1"),
        ("identity", "hinge", [0, 3, 1], ValueError, r"^y: label 3 in row 1 is outside 0\.\.2"),
        ("softmax", "cross_entropy", [0, 1, 3], ValueError, r"^y: label 3 in row 2 is outside 0\.\.2, one a network"),
        ("softmax", "cross_entropy", [0, -1], ValueError, r"^y: label -1 in row 1 is outside 0\.\.2"),
        ("softmax", "cross_entropy", [0.0, 1.0], TypeError, r"^y: expected integer class labels 0\.\.2, got .*float64"),
        ("softmax", "cross_entropy", ["a", "b"], TypeError, r"^y: expected integer class labels 0\.\.2, got .*<U1"),
        ("softmax", "cross_entropy", [[0.5, 0.5]], ValueError, r"^y: expected shape \(batch, 3\)"),
        ("softmax", "cross_entropy", [[0.5, 0.5, 0.5]], ValueError, r"^y: row 0 sums to 1\.5; .*sums to 1"),
        ("softmax", "cross_entropy", [[1, 0, 0], [0, 0, 0]], ValueError, "^y: row 1 sums to 0"),
        ("softmax", "cross_entropy", [[1.5, -0.5, 0]], ValueError, "^y: row 0, output 1 is negative, not a prob"),
        ("softmax", "cross_entropy", [[np.nan, 0.5, 0.5]], ValueError, "^y: row 0, output 0 is not finite"),
        ("log_softmax", "nll", [0, 1, 5], ValueError, r"^y: label 5 in row 2 is outside 0\.\.2"),
        ("log_softmax", "nll", [[-1.0, -2.0, -3.0]], ValueError, "^y: row 0, output 0 is negative"),
    ],
)
def test_targets_that_mean_nothing_to_a_loss(output, loss, y, error, message):
    refuse(output, loss, y, error, message)


def test_another_number_of_rows_is_refused():
    net = MLP([2, 3])
    with pytest.raises(ValueError, match=r"^y: expected 4 rows, as many as x has, got shape \(5, 3\)"):
        net.cost(np.zeros((4, 2)), np.zeros((5, 3)))
    with pytest.raises(ValueError, match=r"^y: expected 4 rows, as many as x has, got shape \(\)"):
        net.cost(np.zeros((4, 2)), 3.0)


def test_targets_at_the_edge_are_taken():
    x = np.zeros((2, 2))
    softmax = MLP([2, 3], output="softmax")
    for y in ([0, 2], [True, False], np.array([0, 2], np.uint8), [[1, 0, 0], [0.3334, 0.3333, 0.3333]]):
        assert math.isfinite(softmax.cost(x, np.array(y), "cross_entropy"))
    assert math.isfinite(MLP([2, 3], output="sigmoid").cost(x, [[0, 1, True], [0, 0, 0]], "binary_cross_entropy"))
    assert math.isfinite(MLP([2, 3], output="exp").cost(x, np.zeros((2, 3), int), "poisson"))


@pytest.mark.parametrize("loss", ["mse", "binary_cross_entropy", "hinge"])
def test_one_output_takes_a_flat_y(loss):
    net = MLP([2, 1], output="sigmoid")
    x, y = np.random.default_rng(10).normal(size=(3, 2)), np.array([1, 1, 1])
    assert net.cost(x, y, loss) == net.cost(x, y[:, None], loss)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Huber(0), ValueError, r"^delta: expected a finite number in \(0"),
        (lambda: Huber(math.inf), ValueError, "^delta"),
        (lambda: Huber("wide"), TypeError, "^delta"),
        (lambda: CrossEntropy(label_smoothing=1.5), ValueError, r"^label_smoothing: .*\[0, 1\], got 1\.5"),
        (lambda: CrossEntropy(label_smoothing=-0.1), ValueError, "^label_smoothing"),
        (lambda: CrossEntropy(class_weight=[1, -1]), ValueError, "^class_weight"),
        (lambda: CrossEntropy(class_weight=[0, 0]), ValueError, "^class_weight: at least one weight must be positive"),
        (lambda: CrossEntropy(class_weight=[1, math.nan]), ValueError, "^class_weight"),
        (lambda: NLL(class_weight=["a", "b"]), TypeError, "^class_weight"),
        (lambda: get("crossentropy"), ValueError, "^loss: unknown name 'crossentropy'; did you mean 'cross_entropy'"),
        (lambda: get("MSE"), ValueError, "did you mean 'mse'"),
        (lambda: get(MSE), TypeError, "^loss: expected a name"),
        (lambda: get(None), TypeError, "^loss: expected a name"),
    ],
)
def test_bad_parameters(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize("loss", [CrossEntropy(class_weight=[1, 2]), NLL(class_weight=[1, 2])])
def test_class_weights_of_another_number_of_classes(loss):
    output = {"cross_entropy": "softmax", "nll": "log_softmax"}[loss.name]
    with pytest.raises(ValueError, match=r"^class_weight: expected 3 weights, one a class, got 2"):
        MLP([2, 3], output=output).cost(np.zeros((1, 2)), [0], loss)


def test_class_weights_may_come_as_an_array():
    ours, same = CrossEntropy(class_weight=np.array([1, 2, 3])), CrossEntropy(class_weight=(1.0, 2.0, 3.0))
    assert ours == same
    assert hash(ours) == hash(same)
