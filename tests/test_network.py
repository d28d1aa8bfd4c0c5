"""The network as a user meets it: what it takes, what it refuses and with which words, and what it leaves alone."""

from __future__ import annotations

import copy
import math
import pickle
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from helpers import assert_close, blobs, network_forward, same_bits

from gpu_mlp import L2, MLP, SGD, CrossEntropy, Trainer, activations, initializers, losses

ALIGNMENT = 256


def network(**options):
    return MLP([4, 5, 3], **{"activation": "tanh", "output": "softmax", "precision": "float64", **options})


def batch(rows=6):
    x, y = blobs(rows, features=4)
    return x, y


# --- what it is --------------------------------------------------------------------------------------------------


def test_attributes():
    net = MLP(np.array([4, 6, 5, 3]), ["relu", "tanh"], "softmax", dropout=[0.1, 0.0], precision="float32", seed=7)
    assert net.sizes == (4, 6, 5, 3)
    assert net.activation == ("relu", "tanh")
    assert net.output == "softmax"
    assert net.dropout == (0.1, 0.0)
    assert (net.precision, net.device, net.seed) == ("float32", "cpu", 7)
    assert net.n_parameters == 4 * 6 + 6 + 6 * 5 + 5 + 5 * 3 + 3
    assert [W.shape for W in net.weights] == [(6, 4), (5, 6), (3, 5)]
    assert [b.shape for b in net.biases] == [(6,), (5,), (3,)]
    assert repr(net) == (
        "MLP([4, 6, 5, 3], activation=['relu', 'tanh'], output='softmax', precision='float32', device='cpu')"
    )
    assert repr(MLP([2, 1])) == "MLP([2, 1], output='identity', precision='float32', device='cpu')"


@pytest.mark.parametrize("precision", ["float64", "float32", "float16"])
def test_parameters_are_aligned_views_of_one_flat_array(precision):
    net = MLP([3, 7, 5, 2], precision=precision)
    parts = [*net.weights, *net.biases]
    for part in parts:
        assert np.shares_memory(part, net.theta)
        assert part.ctypes.data % ALIGNMENT == 0
        assert part.flags.c_contiguous
    assert sum(part.size for part in parts) == net.n_parameters
    net.theta[...] = 0
    for i, part in enumerate(parts, 1):
        part[...] = i
    assert sorted(np.unique(net.theta)) == [0, *range(1, len(parts) + 1)]
    assert np.count_nonzero(net.theta) == net.n_parameters


def test_what_is_written_through_a_view_is_what_the_network_computes_with():
    x, _ = batch()
    for precision in ("float64", "float32", "float16"):
        net = network(precision=precision)
        for W, b in zip(net.weights, net.biases):
            W[...], b[...] = 0.25, 0.5
        _, hs = network_forward([np.full((5, 4), 0.25), np.full((3, 5), 0.25)], [np.full(5, 0.5), np.full(3, 0.5)],
                                ["tanh", "softmax"], x)  # fmt: skip
        assert_close(net.forward(x), hs[-1], 5e-3 if precision == "float16" else 1e-6)
        net.theta[...] = 0
        np.testing.assert_allclose(net.forward(x), 1 / 3, rtol=1e-3)


@pytest.mark.parametrize("hidden", [[], [5], [5, 6, 7, 8]])
def test_networks_of_any_depth(hidden):
    net = MLP([4, *hidden, 3], "tanh", precision="float64")
    x, _ = batch()
    _, hs = network_forward(net.weights, net.biases, ["tanh"] * len(hidden) + ["identity"], x)
    assert_close(net.forward(x), hs[-1], 1e-12)


def test_widths_of_one():
    net = MLP([1, 1, 1], "tanh", precision="float64")
    W, V = (float(w[0, 0]) for w in net.weights)
    assert_close(net.forward([[2.0]]), [[V * math.tanh(2 * W)]], 1e-14)


# --- initial weights ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("init", "variance"),
    [
        ("glorot_uniform", 2 / 700),
        ("glorot_normal", 2 / 700),
        ("he_uniform", 2 / 300),
        ("he_normal", 2 / 300),
        ("lecun_uniform", 1 / 300),
        ("lecun_normal", 1 / 300),
    ],
)
def test_initial_weights_have_the_variance_of_their_recipe(init, variance):
    W = MLP([300, 400], init=init, precision="float64").weights[0]
    n = W.size
    assert abs(W.mean()) < 5 * math.sqrt(variance / n)
    kurtosis = 1.8 if "uniform" in init else 3.0  # of which the variance of the variance is made
    assert abs(W.var() - variance) < 5 * variance * math.sqrt((kurtosis - 1) / n)
    if "uniform" in init:
        assert abs(W).max() <= math.sqrt(3 * variance)


@pytest.mark.parametrize("sizes", [[30, 50], [50, 30], [40, 40]])
def test_orthogonal_weights(sizes):
    W = MLP(sizes, init="orthogonal", precision="float64").weights[0]
    gram = W @ W.T if W.shape[0] <= W.shape[1] else W.T @ W
    assert_close(gram, np.eye(min(sizes)), 1e-13)


def test_auto_takes_what_each_activation_asks_for():
    names = ["relu", "selu", "tanh"]
    net = MLP([100, 80, 60, 40, 20], names, "softmax", seed=5, precision="float64")
    for name, W in zip([*names, "softmax"], net.weights):
        init = activations.get(name).init
        bound = {"he_uniform": math.sqrt(6 / W.shape[1]), "glorot_uniform": math.sqrt(6 / sum(W.shape))}.get(init)
        assert init in initializers.INITIALIZERS
        if bound is not None:
            assert 0.97 * bound < abs(W).max() <= bound
    assert not any(b.any() for b in net.biases)


def test_init_takes_a_function():
    net = MLP([2, 3, 1], init=lambda rng, shape: np.arange(shape[0] * shape[1]).reshape(shape))
    np.testing.assert_array_equal(net.weights[0], [[0, 1], [2, 3], [4, 5]])
    with pytest.raises(ValueError, match=r"init: expected an array of shape \(3, 2\), got \(2, 3\)"):
        MLP([2, 3, 1], init=lambda rng, shape: np.zeros(shape[::-1]))


# --- what is refused: the network --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"sizes": [4]}, ValueError, "sizes: expected at least an input and an output width"),
        ({"sizes": []}, ValueError, "sizes: expected at least"),
        ({"sizes": [4, 0, 3]}, ValueError, "sizes: expected an integer of at least 1, got 0"),
        ({"sizes": [4, -1]}, ValueError, "sizes: expected an integer of at least 1, got -1"),
        ({"sizes": [4, 2.5]}, TypeError, r"sizes: expected an integer, got 2.5 \(float\)"),
        ({"sizes": [4, True]}, TypeError, "sizes: expected an integer, got the bool True"),
        ({"sizes": "4,3"}, TypeError, "sizes: expected a list of widths such as"),
        ({"sizes": 4}, TypeError, "sizes: expected a list of widths"),
        ({"sizes": np.array([4.0, 3.0])}, TypeError, "sizes: expected an integer"),
        ({"activation": "rleu"}, ValueError, "activation: unknown name 'rleu'; did you mean 'relu'"),
        ({"activation": "Tanh"}, ValueError, "activation: unknown name 'Tanh'; did you mean 'tanh'"),
        ({"activation": ["relu", "relu"]}, ValueError, "activation: expected one value or 1, .* got 2"),
        ({"activation": []}, ValueError, "activation: expected one value or 1, one a hidden layer, got 0"),
        ({"activation": None}, TypeError, "activation: expected one value or a list of 1"),
        ({"activation": [3]}, TypeError, "activation: expected a name, got int"),
        ({"output": "sofmax"}, ValueError, "output: unknown name 'sofmax'; did you mean 'softmax'"),
        ({"output": None}, TypeError, "output: expected a name, got NoneType"),
        ({"dropout": 1.0}, ValueError, r"dropout: expected a finite number in \[0, 1\), got 1.0"),
        ({"dropout": -0.1}, ValueError, r"dropout: expected a finite number in \[0, 1\)"),
        ({"dropout": math.nan}, ValueError, "dropout: expected a finite number"),
        ({"dropout": [0.1, 0.2]}, ValueError, "dropout: expected one value or 1, one a hidden layer, got 2"),
        ({"dropout": "0.5"}, TypeError, "dropout: expected one value or a list of 1"),
        ({"dropout": ["a"]}, TypeError, "dropout: expected a number"),
        ({"dropout": True}, TypeError, "dropout: expected a number"),
        ({"activation": "softmax", "dropout": 0.5}, ValueError, "dropout: not on a softmax layer.*use 0 there"),
        ({"activation": "log_softmax", "dropout": [0.5]}, ValueError, "dropout: not on a log_softmax layer"),
        ({"init": "he_nromal"}, ValueError, "init: unknown name 'he_nromal'; did you mean 'he_normal'"),
        ({"init": 3}, TypeError, "init: expected a name"),
        ({"precision": "float23"}, ValueError, "precision: unknown name 'float23'; did you mean 'float32'"),
        ({"precision": np.float32}, TypeError, "precision: expected a name"),
        ({"device": "gpu"}, ValueError, "device: unknown name 'gpu'.*known: auto, cpu, cuda"),
        ({"seed": -1}, ValueError, "seed: expected an integer of at least 0"),
        ({"seed": 2**64}, ValueError, "seed: expected an integer of at most"),
        ({"seed": 1.0}, TypeError, "seed: expected an integer"),
    ],
)
def test_a_network_that_cannot_be_is_refused(arguments, error, match):
    with pytest.raises(error, match=match):
        MLP(**{"sizes": [4, 5, 3], **arguments})


def test_a_network_of_no_hidden_layer_takes_any_single_activation():
    assert MLP([4, 3], "tanh", dropout=0.5).activation == ()
    assert MLP([4, 3], [], dropout=[]).dropout == ()


# --- what is refused: the data -----------------------------------------------------------------------------------

BAD_X = [
    (np.zeros((3, 5)), ValueError, r"x: expected shape \(batch, 4\), got \(3, 5\)"),
    (np.zeros(4), ValueError, r"x: expected shape \(batch, 4\), got \(4,\); for one sample use x\[None, :\]"),
    (np.zeros(5), ValueError, r"x: expected shape \(batch, 4\), got \(5,\)"),
    (np.zeros((2, 2, 4)), ValueError, r"x: expected shape \(batch, 4\)"),
    (1.0, ValueError, r"x: expected shape \(batch, 4\), got \(\)"),
    ([], ValueError, r"x: expected shape \(batch, 4\), got \(0,\)"),
    (np.zeros((3, 4), complex), TypeError, "x: expected real numbers, got dtype complex128"),
    (np.zeros((3, 4), object), TypeError, "x: expected real numbers, got dtype object"),
    (np.array([["1"] * 4]), TypeError, "x: expected real numbers, got dtype <U1"),
    (np.zeros((3, 4), "M8[s]"), TypeError, "x: expected real numbers, got dtype datetime64"),
    (None, TypeError, "x: expected real numbers, got dtype object"),
    ("x", TypeError, "x: expected real numbers"),
    ({"a": 1}, TypeError, "x: expected real numbers, got dtype object"),
    ([[1, 2, 3, "a"]], TypeError, "x: expected real numbers"),
]


@pytest.mark.parametrize(("x", "error", "match"), BAD_X)
def test_x_that_cannot_be_is_refused(x, error, match):
    net = network()
    for call in (
        lambda: net.forward(x),
        lambda: net.cost(x, np.zeros(3, int), "cross_entropy"),
        lambda: net.cost_and_gradients(x, np.zeros(3, int), "cross_entropy"),
        lambda: Trainer(net).step(x, np.zeros(3, int)),
        lambda: Trainer(net).fit((x, np.zeros(3, int)), progress=False),
        lambda: Trainer(net).evaluate(x, np.zeros(3, int)),
    ):
        with pytest.raises(error, match=match):
            call()


def test_x_of_rows_of_different_length_is_refused():
    with pytest.raises((TypeError, ValueError)):
        network().forward([[1, 2, 3, 4], [1, 2]])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16])
def test_x_that_is_not_finite_is_refused_by_row_and_column(bad, dtype):
    x = np.ones((300, 4), dtype)
    x[217, 3] = bad
    with pytest.raises(ValueError, match=f"x: row 217, column 3 is {bad}; every value must be finite"):
        network().forward(x)


def test_infinities_that_cancel_are_seen():
    x = np.ones((3, 4))
    x[1, 0], x[2, 1] = math.inf, -math.inf
    with pytest.raises(ValueError, match="x: row 1, column 0 is inf"):
        network().forward(x)


def test_finite_values_whose_sum_is_not_are_taken():
    x = np.full((3, 4), 1e308)
    assert np.isfinite(network().forward(x)).all()


@pytest.mark.parametrize(
    ("precision", "value"),
    [("float32", 1e39), ("float16", 70000.0), ("float16", 100_000), ("tf32", -1e300), ("bfloat16", 1e39)],
)
def test_x_too_large_for_the_precision_is_refused(precision, value):
    """As floats or as integers; silently they would become infinities."""
    if precision == "bfloat16":
        pytest.importorskip("ml_dtypes")
    x = np.ones((5, 4)) if isinstance(value, float) else np.ones((5, 4), np.int64)
    x[2, 1] = value
    net = network(precision=precision)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for call in (lambda: net.forward(x), lambda: net.cost(x, np.zeros(5, int), "cross_entropy")):
            with pytest.raises(ValueError, match="row 2, column 1") as caught:
                call()
            name = {"tf32": "float32"}.get(precision, precision)
            assert str(caught.value).startswith("x")
            assert name in str(caught.value)


BAD_Y = [
    ("cross_entropy", [0, 1, 3], ValueError, "y: label 3 in row 2 is outside 0..2, one a network output"),
    ("cross_entropy", [0, -1, 1], ValueError, "y: label -1 in row 1 is outside 0..2"),
    ("cross_entropy", [0.0, 1.0, 2.0], TypeError, "y: expected integer class labels 0..2, got dtype float64"),
    ("cross_entropy", ["a", "b", "c"], TypeError, "y: expected integer class labels 0..2, got dtype <U1"),
    ("cross_entropy", [0, 1], ValueError, r"y: expected 3 rows, as many as x has, got shape \(2,\)"),
    ("cross_entropy", 1, ValueError, r"y: expected 3 rows, as many as x has, got shape \(\)"),
    ("cross_entropy", np.full((3, 2), 0.5), ValueError, r"y: expected shape \(batch, 3\)"),
    ("cross_entropy", np.full((3, 3), 0.5), ValueError, "y: row 0 sums to 1.5; a row of class probabilities sums to 1"),
    ("cross_entropy", [[2, -1, 0]] * 3, ValueError, "y: row 0, output 1 is negative, not a probability"),
    ("cross_entropy", [[1, 0, 0], [math.nan, 0, 1], [0, 1, 0]], ValueError, "y: row 1, output 0 is not finite"),
    ("mse", np.zeros(3), ValueError, r"y: expected shape \(batch, 3\) for loss 'mse', got \(3,\)"),
    ("mse", np.zeros((3, 3), complex), TypeError, "y: expected numbers for loss 'mse', got dtype complex128"),
    ("mse", np.full((3, 3), None), TypeError, "y: expected numbers for loss 'mse', got dtype object"),
    ("mse", [[0, 0, 0], [0, 0, math.inf], [0, 0, 0]], ValueError, "y: row 1, output 2 is not finite"),
]  # fmt: skip


@pytest.mark.parametrize(("loss", "y", "error", "match"), BAD_Y)
def test_y_that_cannot_be_is_refused(loss, y, error, match):
    net, x = network(), np.zeros((3, 4))
    for call in (
        lambda: net.cost(x, y, loss),
        lambda: net.cost_and_gradients(x, y, loss),
        lambda: Trainer(net, loss).step(x, y),
        lambda: Trainer(net, loss).fit((x, y), progress=False),
    ):
        with pytest.raises(error, match=match):
            call()


@pytest.mark.parametrize(
    ("w", "error", "match"),
    [
        (np.ones(2), ValueError, r"sample_weight: expected shape \(3,\), one a sample, got \(2,\)"),
        (np.ones((3, 1)), ValueError, r"sample_weight: expected shape \(3,\)"),
        (1.0, ValueError, r"sample_weight: expected shape \(3,\)"),
        ([1, -1, 1], ValueError, r"sample_weight: row 1 is negative"),
        ([0, 0, 0], ValueError, "sample_weight: every weight is 0"),
        ([1, math.nan, 1], ValueError, "sample_weight: row 1 is nan"),
        (["a", "b", "c"], TypeError, "sample_weight: expected real numbers"),
    ],
)
def test_weights_that_cannot_be_are_refused(w, error, match):
    net, x, y = network(), np.zeros((3, 4)), np.zeros(3, int)
    for call in (
        lambda: net.cost(x, y, "cross_entropy", sample_weight=w),
        lambda: Trainer(net).step(x, y, w),
        lambda: Trainer(net).fit((x, y, w), progress=False),
    ):
        with pytest.raises(error, match=match):
            call()


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"loss": "mes"}, ValueError, "loss: unknown name 'mes'; did you mean 'mse'"),
        ({"loss": None}, TypeError, "loss: expected a name"),
        ({"loss": "nll"}, ValueError, "loss: nll needs .*use output='log_softmax'"),
        ({"loss": CrossEntropy(class_weight=[1, 2])}, ValueError, "class_weight: expected 3 weights, .* got 2"),
        ({"loss": "mse", "regularizer": "l2"}, TypeError, "regularizer: expected L1, L2, ElasticNet or None, got str"),
    ],
)
def test_a_cost_that_cannot_be_is_refused(arguments, error, match):
    net, x, y = network(), np.zeros((3, 4)), np.zeros((3, 3))
    for call in (net.cost, net.cost_and_gradients):
        with pytest.raises(error, match=match):
            call(x, y, **arguments)


@pytest.mark.parametrize("lam", [-1.0, math.nan, math.inf])
def test_a_penalty_that_cannot_be_is_refused(lam):
    with pytest.raises(ValueError, match="lam: expected a finite number"):
        L2(lam)
    with pytest.raises(ValueError, match="on: unknown name 'wieghts'; did you mean 'weights'"):
        L2(1.0, on="wieghts")


# --- what is taken -----------------------------------------------------------------------------------------------


def forms_of(x):
    """The same numbers in every way that they may come."""
    wide = np.zeros((2 * len(x), 2 * x.shape[1]))
    wide[::2, 1::2] = x
    frozen = x.copy()
    frozen.flags.writeable = False
    return {
        "list": x.tolist(),
        "tuple of lists": tuple(row.tolist() for row in x),
        "list of arrays": list(x),
        "F-order": np.asfortranarray(x),
        "strided": wide[::2, 1::2],
        "reversed": x[::-1, ::-1].copy()[::-1, ::-1],
        "transposed": x.T.copy().T,
        "read-only": frozen,
        "big-endian": x.astype(">f8"),
        "float32": x.astype(np.float32),
        "float16": x.astype(np.float16),
        "longdouble": x.astype(np.longdouble),
        "int64": x.astype(np.int64),
        "uint8": x.astype(np.uint8),
        "int8": x.astype(np.int8),
    }


@pytest.mark.parametrize("form", sorted(forms_of(np.zeros((2, 4)))))
@pytest.mark.parametrize("precision", ["float64", "float32", "float16"])
def test_x_may_come_in_any_form(form, precision):
    x = np.random.default_rng(0).integers(0, 100, (9, 4)).astype(float)
    y = np.arange(9) % 3
    given = forms_of(x)[form]
    before = copy.deepcopy(given)
    nets = [network(precision=precision) for _ in range(2)]
    assert same_bits(nets[0].forward(given), nets[1].forward(x))
    (J, g), (K, h) = (net.cost_and_gradients(a, y, "cross_entropy") for net, a in zip(nets, (given, x)))
    assert J == K
    assert same_bits(g.theta, h.theta)
    assert same_bits(g.input, h.input)
    for shuffle in (True, False):
        for net, a in zip(nets, (given, x)):
            Trainer(net, optimizer=SGD(lr=0.1)).fit((a, y), epochs=2, batch_size=4, shuffle=shuffle, progress=False)
        assert same_bits(nets[0].theta, nets[1].theta)
    for trained, plain in zip((nets[0],), (nets[1],)):
        assert Trainer(trained).evaluate(given, y) == Trainer(plain).evaluate(x, y)
    np.testing.assert_equal(given, before)


def test_x_may_be_bools():
    x = np.random.default_rng(0).random((9, 4)) > 0.5
    assert same_bits(network().forward(x), network().forward(x.astype(float)))


def test_x_may_be_bfloat16():
    ml_dtypes = pytest.importorskip("ml_dtypes")
    x = batch()[0].astype(ml_dtypes.bfloat16)
    assert same_bits(network().forward(x), network().forward(x.astype(float)))
    x[2, 1] = math.nan
    with pytest.raises(ValueError, match="x: row 2, column 1 is nan"):
        network().forward(x)


def test_x_may_be_a_data_frame():
    pandas = pytest.importorskip("pandas")
    x, y = batch(30)
    frame, labels = pandas.DataFrame(x, columns=list("abcd")), pandas.Series(y)
    nets = [network() for _ in range(2)]
    assert same_bits(nets[0].forward(frame), nets[1].forward(x))
    Trainer(nets[0]).fit((frame, labels), epochs=2, batch_size=7, validation=0.2, progress=False)
    Trainer(nets[1]).fit((x, y), epochs=2, batch_size=7, validation=0.2, progress=False)
    assert same_bits(nets[0].theta, nets[1].theta)
    with pytest.raises(TypeError, match="x: expected real numbers"):
        nets[0].forward(frame.assign(a="text"))


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int32, np.uint64, bool])
def test_labels_may_be_any_integers(dtype):
    x, y = batch()
    y = y % 2 if dtype is bool else y
    expected = network().cost(x, y, "cross_entropy")
    assert network().cost(x, y.astype(dtype), "cross_entropy") == expected
    assert network().cost(x, y.astype(dtype).tolist(), "cross_entropy") == expected


def test_one_output_takes_a_column_or_a_vector():
    x, _ = batch()
    y = np.arange(6.0)
    net = MLP([4, 3, 1], precision="float64")
    assert net.cost(x, y) == net.cost(x, y[:, None]) == net.cost(x, y.astype(int)) == net.cost(x, y.tolist())


def test_masked_values_are_refused():
    """The mask would be lost without a word, and what lies under it taken for data."""
    x = np.ma.masked_array(np.ones((3, 4)), mask=np.eye(3, 4, dtype=bool))
    with pytest.raises((TypeError, ValueError), match=r"x: .*mask"):
        network().forward(x)
    assert network().forward(np.ma.masked_array(np.ones((3, 4)))).shape == (3, 3), "one that hides nothing is an array"


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_nothing_that_is_passed_in_is_written_to(dtype):
    precision = np.dtype(dtype).name
    rng = np.random.default_rng(0)
    x, y = rng.random((40, 4)).astype(dtype), rng.dirichlet(np.ones(3), 40).astype(dtype)
    w = rng.random(40)
    arrays = [x, y, w]
    copies = [a.copy() for a in arrays]
    for a in arrays:
        a.flags.writeable = False
    for output, loss in (
        ("softmax", "cross_entropy"),
        ("sigmoid", "binary_cross_entropy"),
        ("identity", "mse"),
        ("softplus", "poisson"),
        ("identity", "huber"),
        ("tanh", "mae"),
        ("softmax", "log_cosh"),
    ):
        net = MLP([4, 5, 3], "gelu", output, dropout=0.2, precision=precision)
        net.forward(x)
        net.cost_and_gradients(x, y, loss, sample_weight=w)
        trainer = Trainer(net, loss)
        trainer.step(x, y, w)
        trainer.fit((x, y, w), epochs=2, batch_size=16, validation=(x, y, w), progress=False)
        trainer.fit((x, y, w), epochs=1, batch_size=40, shuffle=False, validation=0.5, progress=False)
        Trainer(MLP([4, 3], output=output, precision=precision), loss, "lbfgs").fit((x, y, w), epochs=2, progress=False)
    for a, b in zip(arrays, copies):
        assert same_bits(a, b)


# --- what comes out ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("precision", "dtype"),
    [("float64", "f8"), ("float32", "f4"), ("tf32", "f4"), ("float16", "f4"), ("bfloat16", "f4")],
)
def test_dtypes_of_what_comes_out(precision, dtype):
    if precision == "bfloat16":
        pytest.importorskip("ml_dtypes")
    net = network(precision=precision)
    x, y = batch()
    assert net.forward(x).dtype == net.theta.dtype == np.dtype(dtype)
    J, g = net.cost_and_gradients(x, y, "cross_entropy")
    assert isinstance(J, float)
    assert isinstance(net.cost(x, y, "cross_entropy"), float)
    assert {a.dtype for a in (g.theta, g.input, *g.weights, *g.biases)} == {np.dtype(dtype)}
    assert [a.shape for a in g.weights] == [W.shape for W in net.weights]
    assert g.input.shape == x.shape


def test_what_comes_out_is_the_caller_s():
    """A later call does not change an earlier result, and writing into a result changes no network."""
    net = network()
    x, y = batch()
    first, (_, g) = net.forward(x), net.cost_and_gradients(x, y, "cross_entropy")
    copies = first.copy(), g.theta.copy(), g.input.copy()
    theta = net.theta.copy()
    net.forward(x * 2)
    net.cost_and_gradients(x * 2, y, "cross_entropy")
    Trainer(net, optimizer=SGD(lr=0.0)).step(x, y)
    for a, b in zip((first, g.theta, g.input), copies):
        assert same_bits(a, b)
        a[...] = 7
    assert same_bits(net.theta, theta)
    assert same_bits(net.forward(x), copies[0])


def test_a_batch_of_no_rows():
    net = network()
    x, y = np.zeros((0, 4)), np.zeros(0, int)
    assert net.forward(x).shape == (0, 3)
    penalty = 0.05 * sum((W**2).sum() for W in net.weights)
    assert_close(net.cost(x, y, "cross_entropy", L2(0.1)), penalty, 1e-14)
    J, g = net.cost_and_gradients(x, y, "cross_entropy", L2(0.1))
    assert_close(J, penalty, 1e-14)
    for gW, W in zip(g.weights, net.weights):
        assert_close(gW, 0.1 * W, 1e-14)
    assert not any(gb.any() for gb in g.biases)
    assert g.input.shape == (0, 4)
    assert net.cost(x, y, "cross_entropy") == 0


@pytest.mark.parametrize("loss", sorted(losses.LOSSES))
def test_a_batch_of_no_rows_under_every_loss(loss):
    output = {"cross_entropy": "softmax", "nll": "log_softmax", "poisson": "exp", "binary_cross_entropy": "sigmoid"}
    net = network(output=output.get(loss, "identity"))
    assert net.cost_and_gradients(np.zeros((0, 4)), np.zeros((0, 3)), loss)[0] == 0


def test_dropout_is_for_training_alone():
    x, y = batch(40)
    plain, dropped = network(), network(dropout=0.5)
    assert same_bits(plain.forward(x), dropped.forward(x))
    assert plain.cost(x, y, "cross_entropy") == dropped.cost(x, y, "cross_entropy")
    assert same_bits(*(net.cost_and_gradients(x, y, "cross_entropy")[1].theta for net in (plain, dropped)))
    Trainer(plain, optimizer=SGD(lr=0.1)).step(x, y)
    Trainer(dropped, optimizer=SGD(lr=0.1)).step(x, y)
    assert not np.array_equal(plain.theta, dropped.theta)


def test_dropout_keeps_the_expectation_of_a_linear_layer():
    """Averaged over many rounds, the gradient of a linear network with dropout is the one without."""
    x, _ = batch(3)
    y = np.zeros((3, 2))
    net = MLP([4, 50, 2], "identity", precision="float64", dropout=0.3)
    # ŷ = Σ_j V_j m_j h_j / keep; with huber far from y the gradient is linear in the masks
    net.biases[-1][...] = 1e6
    _, g = net.cost_and_gradients(x, y, "huber")
    trainer = Trainer(net, "huber", SGD(lr=1.0))
    steps, n = np.zeros_like(net.theta), 400
    before = net.theta.copy()
    for _ in range(n):
        trainer.step(x, y)
        steps += before - net.theta
        net.theta[...] = before
    spread = np.sqrt(0.3 / 0.7 / n)  # of the mean of n independent m / keep, relative to 1
    found = steps / n
    for segment, mean in zip(net.layout.weights(found), g.weights):
        assert np.abs(segment - mean).max() <= 5 * spread * np.abs(mean).max() * math.sqrt(3)


# --- threads, copies ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["float64", "float32", "float16"])
def test_one_network_predicts_from_several_threads_at_once(precision):
    net = MLP([20, 64, 48, 5], ["gelu", "tanh"], "softmax", precision=precision)
    rng = np.random.default_rng(0)
    inputs = [rng.normal(size=(n, 20)) for n in (1, 700, 33, 256, 1000, 5, 90, 300)]
    expected = [net.forward(x) for x in inputs]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(5):
            for found, y_hat in zip(pool.map(net.forward, inputs), expected):
                assert_close(found, y_hat, 1e-6)


@pytest.mark.parametrize("precision", ["float64", "bfloat16"])
@pytest.mark.parametrize("twin_of", [copy.deepcopy, lambda n: pickle.loads(pickle.dumps(n))], ids=["copy", "pickle"])
def test_a_copy_is_the_same_network_with_weights_of_its_own(precision, twin_of):
    if precision == "bfloat16":
        pytest.importorskip("ml_dtypes")
    x, y = batch()
    net = network(precision=precision, dropout=0.1, seed=11)
    net.metadata["name"] = ["mine"]
    Trainer(net, optimizer=SGD(lr=0.1)).step(x, y)
    twin = twin_of(net)
    assert same_bits(twin.theta, net.theta)
    assert repr(twin) == repr(net)
    assert (twin.dropout, twin.seed, twin.metadata) == (net.dropout, net.seed, {"name": ["mine"]})
    assert same_bits(twin.forward(x), net.forward(x))
    before = net.forward(x)
    twin.theta[...] = 0
    twin.metadata["name"].append("other")
    assert same_bits(net.forward(x), before)
    assert net.metadata == {"name": ["mine"]}
