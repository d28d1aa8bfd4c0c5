"""Accuracy, top-k accuracy, RMSE and R² against scikit-learn, whole and in chunks, and through `Trainer.evaluate`."""

from __future__ import annotations

import math

import numpy as np
import pytest
from helpers import PROPERTY, assert_close, blobs, waves
from hypothesis import given
from hypothesis import strategies as st

from gpu_mlp import MLP, Hinge, Trainer, metrics

sk = pytest.importorskip("sklearn.metrics", reason="scikit-learn is the yardstick here")

TIGHT = 1e-12


def measure(name, y_hat, y, weight=None, loss="mse", cuts=()):
    """The metric over chunks that begin at ``cuts``."""
    merit = metrics.make(name, loss, y_hat.shape[1])
    for part in np.split(np.arange(len(y)), sorted(cuts)):
        merit.add(y_hat[part], y[part], None if weight is None else weight[part])
    assert merit.name == name
    return merit.value()


def problem(seed, rows, outputs, weighted):
    rng = np.random.default_rng(seed)
    y = rng.normal(size=(rows, outputs)) * 3 + 10
    y_hat = y + rng.normal(size=(rows, outputs))
    return y_hat, y, rng.uniform(0.1, 3, rows) if weighted else None


CUTS = st.lists(st.integers(0, 30), max_size=5)


@PROPERTY
@given(st.integers(0, 10**6), st.integers(2, 30), st.integers(1, 4), st.booleans(), CUTS)
def test_rmse_and_r2(seed, rows, outputs, weighted, cuts):
    y_hat, y, w = problem(seed, rows, outputs, weighted)
    expected = math.sqrt(sk.mean_squared_error(y, y_hat, sample_weight=w))
    assert_close(measure("rmse", y_hat, y, w, cuts=cuts), expected, TIGHT)
    assert_close(measure("r2", y_hat, y, w, cuts=cuts), sk.r2_score(y, y_hat, sample_weight=w), 1e-9, scale=1.0)


@PROPERTY
@given(st.integers(0, 10**6), st.integers(1, 30), st.integers(3, 6), st.booleans(), st.booleans(), CUTS)
def test_accuracy_and_top_k(seed, rows, classes, weighted, as_rows, cuts):
    rng = np.random.default_rng(seed)
    y_hat = rng.dirichlet(np.ones(classes), rows)
    y = rng.integers(0, classes, rows)
    w = rng.uniform(0.1, 3, rows) if weighted else None
    target = np.eye(classes)[y] if as_rows else y
    found = measure("accuracy", y_hat, target, w, "cross_entropy", cuts)
    assert_close(found, sk.accuracy_score(y, y_hat.argmax(axis=1), sample_weight=w), TIGHT)
    for k in range(2, classes):
        found = measure(f"top_{k}_accuracy", y_hat, target, w, "cross_entropy", cuts)
        assert_close(found, sk.top_k_accuracy_score(y, y_hat, k=k, sample_weight=w, labels=range(classes)), TIGHT)
    assert measure(f"top_{classes}_accuracy", y_hat, target, w, "nll") == pytest.approx(1.0)


@PROPERTY
@given(st.integers(0, 10**6), st.integers(1, 30), st.integers(1, 4), st.booleans(), CUTS)
def test_accuracy_of_independent_outputs(seed, rows, outputs, weighted, cuts):
    """The share of entries on the right side of 1/2: scikit-learn's accuracy over all of them, laid end to end."""
    rng = np.random.default_rng(seed)
    y_hat, y = rng.random((rows, outputs)), rng.integers(0, 2, (rows, outputs)).astype(float)
    w = rng.uniform(0.1, 3, rows) if weighted else None
    flat = None if w is None else w.repeat(outputs)
    expected = sk.accuracy_score(y.ravel() > 0.5, y_hat.ravel() > 0.5, sample_weight=flat)
    assert_close(measure("accuracy", y_hat, y, w, "binary_cross_entropy", cuts), expected, TIGHT)


def test_accuracy_of_a_hinge_score():
    y_hat = np.array([[0.3], [-0.2], [0.1], [-5.0]])
    y = np.array([[1.0], [-1.0], [-1.0], [1.0]])
    assert measure("accuracy", y_hat, y, loss="hinge") == 0.5
    labels = np.array([0, 1, 1])
    scores = np.array([[-3.0, -4.0], [-1.0, -0.5], [2.0, 1.0]])
    assert measure("accuracy", scores, labels, loss="hinge") == pytest.approx(2 / 3)


def test_r2_far_from_zero():
    """A mean of 10⁸ beside a spread of 1: sums of squares would have nothing left of it."""
    rng = np.random.default_rng(0)
    y = 1e8 + rng.normal(size=(1000, 1))
    y_hat = y + 0.1 * rng.normal(size=y.shape)
    assert_close(measure("r2", y_hat, y, cuts=range(10, 1000, 10)), sk.r2_score(y, y_hat), 1e-6)


def test_r2_of_a_constant_target():
    y = np.full((5, 1), 2.0)
    assert measure("r2", y, y) == sk.r2_score(y, y) == 1
    assert measure("r2", y + 1, y) == sk.r2_score(y, y + 1) == 0


def test_rows_of_no_weight_do_not_count():
    y_hat, y, w = problem(1, 20, 2, True)
    w[10:] = 0
    for name in ("rmse", "r2"):
        assert_close(measure(name, y_hat, y, w, cuts=(10,)), measure(name, y_hat[:10], y[:10], w[:10]), TIGHT)
        assert_close(measure(name, y_hat[::-1], y[::-1], w[::-1], cuts=(10,)), measure(name, y_hat, y, w), TIGHT)


def test_no_rows_have_no_figure():
    empty = np.zeros((0, 2))
    assert math.isnan(measure("rmse", empty, empty))
    assert math.isnan(measure("r2", empty, empty))
    assert math.isnan(measure("accuracy", empty, np.zeros(0, int), loss="cross_entropy"))


@pytest.mark.parametrize(
    ("name", "loss", "n", "match"),
    [
        ("acuracy", "cross_entropy", 3, "metrics: unknown name 'acuracy'; did you mean 'accuracy'"),
        ("accuracy", "mse", 3, "metrics: accuracy needs classes, and loss 'mse' has none; known for it: rmse, r2"),
        ("top_2_accuracy", "mse", 3, "metrics: top_2_accuracy needs classes"),
        ("top_4_accuracy", "cross_entropy", 3, "metrics.*at most 3"),
        ("top_0_accuracy", "cross_entropy", 3, "metrics.*at least 1"),
        ("top_K_accuracy", "cross_entropy", 3, "metrics.*top_"),
        ("top_-1_accuracy", "cross_entropy", 3, "metrics"),
    ],
)
def test_unknown_and_unfit_names_are_refused(name, loss, n, match):
    with pytest.raises(ValueError, match=match):
        metrics.make(name, loss, n)


@pytest.mark.parametrize("name", [3, None])
def test_a_name_is_a_string(name):
    with pytest.raises(TypeError, match="metrics: expected a name"):
        metrics.make(name, "mse", 3)


@pytest.mark.parametrize(
    ("loss", "n", "names"),
    [
        ("cross_entropy", 10, ("accuracy",)),
        ("nll", 100, ("accuracy", "top_5_accuracy")),
        ("binary_cross_entropy", 3, ("accuracy",)),
        ("hinge", 1, ("accuracy",)),
        ("mse", 1, ("rmse", "r2")),
        ("poisson", 4, ("rmse", "r2")),
    ],
)
def test_the_defaults_can_be_made(loss, n, names):
    assert metrics.default(loss, n) == names
    for name in names:
        assert metrics.make(name, loss, n).name == name


# --- through a trainer -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["float64", "float32", "float16", "bfloat16"])
@pytest.mark.parametrize("chunk", [7, 10_000])
def test_evaluate_a_classifier(monkeypatch, precision, chunk):
    if precision == "bfloat16":
        pytest.importorskip("ml_dtypes")
    monkeypatch.setattr("gpu_mlp.network.CHUNK_ROWS", chunk)
    x, y = blobs(101, classes=5, spread=2.0)
    w = np.random.default_rng(0).random(101)
    net = MLP([6, 9, 5], output="softmax", precision=precision)
    found = Trainer(net).evaluate(x, y, w, metrics=["accuracy", "top_2_accuracy"])
    p = net.forward(x).astype(np.float64)
    assert set(found) == {"loss", "accuracy", "top_2_accuracy"}
    assert_close(found["accuracy"], sk.accuracy_score(y, p.argmax(axis=1), sample_weight=w), TIGHT)
    # probabilities of 16 bits may be equal, and then either may be the second
    expected = sk.top_k_accuracy_score(y, p, k=2, sample_weight=w)
    assert_close(found["top_2_accuracy"], expected, 0.05 if "16" in precision else TIGHT)
    tolerance = {"float64": 1e-12, "float32": 1e-5}.get(precision, 2e-2)
    assert_close(found["loss"], sk.log_loss(y, p / p.sum(axis=1, keepdims=True), sample_weight=w), tolerance)


@pytest.mark.parametrize("chunk", [7, 10_000])
def test_evaluate_a_regression(monkeypatch, chunk):
    monkeypatch.setattr("gpu_mlp.network.CHUNK_ROWS", chunk)
    x, y = waves(60)
    w = np.random.default_rng(0).random(60)
    net = MLP([3, 9, 2], "tanh", precision="float64")
    found = Trainer(net).evaluate(x, y, w)
    y_hat = net.forward(x)
    assert_close(found["rmse"] ** 2, sk.mean_squared_error(y, y_hat, sample_weight=w), TIGHT)
    assert_close(found["r2"], sk.r2_score(y, y_hat, sample_weight=w), 1e-10)
    assert_close(found["loss"], found["rmse"] ** 2, TIGHT)


def test_evaluate_scores_and_probabilities():
    x, y = blobs(50, classes=2, spread=3.0)
    net = MLP([6, 5, 1], output="sigmoid", precision="float64")
    found = Trainer(net).evaluate(x, y)["accuracy"]
    assert found == pytest.approx(sk.accuracy_score(y, net.forward(x)[:, 0] > 0.5))
    net = MLP([6, 5, 1], precision="float64")
    found = Trainer(net, loss=Hinge()).evaluate(x, 2 * y - 1)["accuracy"]
    assert found == pytest.approx(sk.accuracy_score(y, net.forward(x)[:, 0] > 0))


def test_evaluate_leaves_the_network_and_the_data_alone():
    x, y = blobs(20)
    net = MLP([6, 5, 3], output="softmax", dropout=0.5)
    theta, copy = net.theta.copy(), x.copy()
    trainer = Trainer(net)
    assert trainer.evaluate(x, y) == trainer.evaluate(x, y)
    np.testing.assert_array_equal(net.theta, theta)
    np.testing.assert_array_equal(x, copy)
    assert trainer.rounds == 0
