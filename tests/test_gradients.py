"""Every gradient against finite differences: hidden activation × output × loss × regularizer, entry by entry.

The step and the tolerances are gradcheck's own: eps 1e-6, atol 1e-5, rtol 1e-3 in float64. The truncation error of a
central difference is about eps² and its rounding error about 1e-16 · J / eps, both far below atol.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest

import gpu_mlp.network
from gpu_mlp import L1, L2, MLP, CrossEntropy, ElasticNet, Trainer
from gpu_mlp.activations import ACTIVATIONS
from gpu_mlp.gradcheck import GradcheckReport, gradcheck
from gpu_mlp.losses import FUSED, LOSSES, MSE, NLL, Huber
from gpu_mlp.ops import numpy_ops

EVERY = [
    "identity", "relu", "leaky_relu", "elu", "selu", "celu", "gelu", "gelu_tanh", "silu", "mish", "tanh", "sigmoid",
    "softplus", "softsign", "hardtanh", "hardsigmoid", "hardswish", "relu6", "relu_squared", "sine", "exp", "softmax",
    "log_softmax",
]  # fmt: skip
# Which outputs each loss can be taken of, written down by hand: ŷ must be a rate, a probability, a row of them, or
# the logarithm of such a row; the others take any number.
OUTPUTS = {
    "mse": EVERY,
    "half_mse": EVERY,
    "mae": EVERY,
    "huber": EVERY,
    "log_cosh": EVERY,
    "hinge": EVERY,
    "poisson": ["sigmoid", "softplus", "exp", "softmax"],
    "binary_cross_entropy": ["sigmoid", "softmax"],
    "cross_entropy": ["softmax"],
    "nll": ["log_softmax"],
}
ALLOWED = [(output, loss) for loss, outputs in OUTPUTS.items() for output in outputs]
REFUSED = [(output, loss) for loss, outputs in OUTPUTS.items() for output in EVERY if output not in outputs]
REGULARIZERS = [
    None,
    L2(0.3),
    L1(0.2),
    ElasticNet(0.1, 0.2),
    L2(0.3, on="all"),
    L1(0.2, on="all"),
    ElasticNet(0.1, 0.2, on="all"),
]


def randomise(net: MLP, rng: np.random.Generator, scale: float = 0.7) -> MLP:
    """Draw every W and b anew, so that no bias stands at 0, where relu and L1 have their kinks."""
    for W, b in zip(net.weights, net.biases):
        W[...] = rng.normal(size=W.shape) * scale
        b[...] = rng.normal(size=b.shape) * scale
    return net


def target(loss: str, shape: tuple[int, int], rng: np.random.Generator, labels: bool = False) -> np.ndarray:
    """Random targets that mean something to the loss, as rows or as labels."""
    rows, n = shape
    if labels:
        return rng.integers(0, n, rows)
    if loss == "hinge":
        return rng.choice([-1.0, 1.0], shape)
    if loss == "poisson":
        return rng.integers(0, 5, shape).astype(float)
    if loss == "binary_cross_entropy":
        return rng.uniform(size=shape)
    if loss in ("cross_entropy", "nll"):
        y = rng.uniform(0.1, 1, shape)
        return y / y.sum(axis=1, keepdims=True)
    return rng.normal(size=shape) * 1.5


def problem(
    hidden: list[str], output: str, loss: str, labels: bool = False, sizes: tuple[int, ...] = (1, 2, 2)
) -> tuple[MLP, np.ndarray, np.ndarray]:
    """A tiny network and a batch of two rows whose gradients are not all zero.

    Units die (relu) or saturate (hardtanh), and of a gradient that is zero a check proves nothing: the first seed is
    taken for which ∂L/∂W of the first layer, the longest chain, is there.
    """
    for seed in range(100):
        rng = np.random.default_rng(seed)
        net = randomise(MLP(sizes, hidden, output, precision="float64"), rng)
        x = rng.normal(size=(2, sizes[0]))
        y = target(loss, (2, sizes[-1]), rng, labels)
        cost, g = net.cost_and_gradients(x, y, loss)
        if abs(cost) < 1e3 and np.abs(g.weights[0]).max() > 1e-3:
            return net, x, y
    raise AssertionError(f"no seed gives ∂L/∂W[0] ≠ 0 for {hidden}, {output}, {loss}")


def passes(report: GradcheckReport, what: object = "") -> bool:
    """The check as a whole, with nothing skipped and something compared; else its table as the failure's message."""
    passed = report.ok and report.skipped == 0 and report.checked > 0
    assert passed, f"{what}\n{report}"
    return passed


# --- the cross product -------------------------------------------------------------------------------------------


def test_the_lists_above_name_every_row_of_the_tables():
    assert set(EVERY) == set(ACTIVATIONS)
    assert set(OUTPUTS) == set(LOSSES)
    assert set(FUSED) <= set(ALLOWED)


@pytest.mark.parametrize(("output", "loss"), ALLOWED)
def test_every_hidden_activation_with_every_output_and_loss_and_regularizer(output, loss):
    """Every entry of every triple; the seven regularizers and both forms of targets come round in the 23 of a pair.

    There are 3,358 triples: the hidden layer has one unit, or two where its entries mix. Wider and deeper below.
    """
    shift = EVERY.index(output) + list(OUTPUTS).index(loss)  # so that an activation meets them all from pair to pair
    for i, hidden in enumerate(EVERY):
        regularizer = REGULARIZERS[(i + shift) % len(REGULARIZERS)]
        labels = loss in ("cross_entropy", "nll", "hinge") and i % 2 == 0
        sizes = (1, 2 if ACTIVATIONS[hidden].rowwise else 1, 2)
        net, x, y = problem([hidden], output, loss, labels, sizes)
        assert passes(gradcheck(net, x, y, loss, regularizer), (hidden, output, loss, regularizer))


@pytest.mark.parametrize("above", EVERY)
def test_every_activation_above_and_below_another(above):
    """Three hidden layers, none square: each activation over two others, on a loss that is kind to all of them."""
    i = EVERY.index(above)
    hidden = [EVERY[(i + 7) % 23], EVERY[(i + 11) % 23], above]
    net, x, y = problem(hidden, "identity", "log_cosh", sizes=(2, 4, 3, 5, 3))
    assert passes(gradcheck(net, x, y, "log_cosh", REGULARIZERS[i % len(REGULARIZERS)]), hidden)


@pytest.mark.parametrize(("output", "loss"), REFUSED)
def test_a_loss_that_means_nothing_on_an_output_is_refused_and_says_what_to_use(output, loss):
    net = MLP([2, 3], output=output, precision="float64")
    x, y = np.ones((4, 2)), np.full((4, 3), 1 / 3)
    fitting = OUTPUTS[loss]
    for attempt in (
        lambda: net.cost(x, y, loss),
        lambda: net.cost_and_gradients(x, y, loss),
        lambda: gradcheck(net, x, y, loss),
        lambda: Trainer(net, loss=loss),
    ):
        with pytest.raises(ValueError, match=f"^loss: {loss} needs .*{output!r}.*use output=") as refusal:
            attempt()
        assert all(repr(name) in str(refusal.value) for name in fitting)
    other = [fused for f, fused in FUSED if f == output]
    assert all(repr(name) in str(refusal.value) for name in other)  # or the loss that goes with this output
    for name in fitting:  # and what it says works
        assert np.isfinite(MLP([2, 3], output=name, precision="float64").cost(x, y, loss))


@pytest.mark.parametrize("loss", [CrossEntropy(), NLL()], ids=["cross_entropy", "nll"])
def test_one_output_is_no_choice_of_classes(loss):
    output = OUTPUTS[loss.name][0]
    with pytest.raises(ValueError, match=r"at least 2 outputs.*output='sigmoid'.*binary_cross_entropy"):
        MLP([2, 1], output=output).cost(np.ones((1, 2)), np.ones((1, 1)), loss)


# --- wide inputs: the saturated and the linear ends of every activation --------------------------------------------


@pytest.mark.parametrize("name", EVERY)
def test_every_activation_far_from_zero(name):
    """z reaches beyond ±6, so that both ends of each function are met (exp stays where J keeps its digits)."""
    rng = np.random.default_rng(5)
    net = randomise(MLP([2, 12, 2], name, precision="float64"), rng)
    x = rng.normal(size=(12, 2)) * (2 if name == "exp" else 6)
    z = x @ net.weights[0].T + net.biases[0]
    assert z.min() < -6 or name == "exp"
    assert z.max() > 6 or name == "exp"
    assert passes(gradcheck(net, x, rng.normal(size=(12, 2)), "mse"), name)


# --- weights of samples and classes, smoothing, labels and rows ----------------------------------------------------


@pytest.mark.parametrize(("output", "loss"), [(OUTPUTS[loss][0], loss) for loss in OUTPUTS] + sorted(FUSED))
def test_sample_weights(output, loss):
    rng = np.random.default_rng(1)
    net = randomise(MLP([3, 4, 3], "tanh", output, precision="float64"), rng)
    x, y = rng.normal(size=(5, 3)), target(loss, (5, 3), rng)
    w = np.array([0.5, 2.0, 0.0, 1.0, 3.0])
    report = gradcheck(net, x, y, loss, L2(0.1), w)
    assert passes(report)
    _, g = net.cost_and_gradients(x, y, loss, L2(0.1), w)
    assert not g.input[2].any()  # a sample of weight 0 has no say
    assert g.input[[0, 1, 3, 4]].any(axis=1).all()


@pytest.mark.parametrize("labels", [True, False], ids=["labels", "rows"])
@pytest.mark.parametrize("weighted", [False, True], ids=["", "sample_weight"])
@pytest.mark.parametrize(
    ("output", "loss"),
    [
        ("softmax", CrossEntropy()),
        ("softmax", CrossEntropy(label_smoothing=0.1)),
        ("softmax", CrossEntropy(class_weight=[0.2, 1.0, 3.0, 0.5])),
        ("softmax", CrossEntropy(label_smoothing=0.3, class_weight=[0.2, 0.0, 3.0, 0.5])),
        ("log_softmax", NLL()),
        ("log_softmax", NLL(class_weight=[0.2, 1.0, 3.0, 0.0])),
    ],
    ids=["cross_entropy", "smoothing", "class_weight", "smoothing-class_weight", "nll", "nll-class_weight"],
)
def test_class_losses(output, loss, weighted, labels):
    rng = np.random.default_rng(2)
    net = randomise(MLP([3, 5, 4], "gelu", output, precision="float64"), rng)
    x, y = rng.normal(size=(6, 3)), target(loss.name, (6, 4), rng, labels)
    assert passes(gradcheck(net, x, y, loss, sample_weight=rng.uniform(0.1, 2, 6) if weighted else None))


def test_hinge_takes_labels_as_signs():
    rng = np.random.default_rng(3)
    net = randomise(MLP([3, 5, 4], "silu", precision="float64"), rng)
    x, y = rng.normal(size=(6, 3)), rng.integers(0, 4, 6)
    signs = np.where(np.arange(4) == y[:, None], 1.0, -1.0)
    assert passes(gradcheck(net, x, y, "hinge"))
    assert net.cost(x, y, "hinge") == net.cost(x, signs, "hinge")


@pytest.mark.parametrize("delta", [0.1, 1.0, 5.0])
def test_huber_on_both_sides_of_delta(delta):
    rng = np.random.default_rng(4)
    net = randomise(MLP([2, 4, 3], "tanh", precision="float64"), rng)
    assert passes(gradcheck(net, rng.normal(size=(8, 2)), rng.normal(size=(8, 3)) * 2, Huber(delta)))


# --- shapes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("output", "loss"), ALLOWED)
def test_without_a_hidden_layer(output, loss):
    rng = np.random.default_rng(6)
    net = randomise(MLP([3, 2], output=output, precision="float64"), rng)
    assert passes(gradcheck(net, rng.normal(size=(3, 3)), target(loss, (3, 2), rng), loss, ElasticNet(0.1, 0.1)))


@pytest.mark.parametrize(("output", "loss"), [("identity", "mse"), *sorted(FUSED)])
def test_a_batch_of_one_row(output, loss):
    rng = np.random.default_rng(7)
    net = randomise(MLP([3, 4, 2], "mish", output, precision="float64"), rng)
    assert passes(gradcheck(net, rng.normal(size=(1, 3)), target(loss, (1, 2), rng), loss, L2(0.1)))


@pytest.mark.parametrize("sizes", [[1, 1], [1, 1, 1, 1], [5, 1, 4, 1], [1, 7, 1, 2]], ids=str)
def test_layers_of_one_unit(sizes):
    rng = np.random.default_rng(8)
    net = randomise(MLP(sizes, "softplus", precision="float64"), rng)
    assert passes(gradcheck(net, rng.normal(size=(4, sizes[0])), rng.normal(size=(4, sizes[-1])), "log_cosh", L1(0.1)))


@pytest.mark.parametrize("hidden", ["softmax", "log_softmax", ["softmax", "log_softmax"], ["log_softmax", "relu"]])
def test_rowwise_hidden_layers(hidden):
    rng = np.random.default_rng(9)
    net = randomise(MLP([3, 4, 5, 2], hidden, "sigmoid", precision="float64"), rng, scale=1.5)
    assert passes(gradcheck(net, rng.normal(size=(5, 3)), rng.uniform(size=(5, 2)), "mse", L2(0.1)))


@pytest.mark.parametrize("regularizer", REGULARIZERS, ids=str)
@pytest.mark.parametrize(("output", "loss"), [("identity", "mse"), *sorted(FUSED)])
def test_a_batch_of_no_rows_costs_its_penalty(output, loss, regularizer):
    """J = λΩ and ∂J/∂θ = λ∇Ω, worked out here from W and b themselves."""
    rng = np.random.default_rng(10)
    net = randomise(MLP([3, 4, 2], "relu", output, precision="float64"), rng)
    y = np.empty(0, np.int64) if loss == "cross_entropy" else np.empty((0, 2))
    cost, g = net.cost_and_gradients(np.empty((0, 3)), y, loss, regularizer)
    l1, l2, on = (0, 0, "weights") if regularizer is None else (regularizer.l1, regularizer.l2, regularizer.on)
    covered = [*net.weights, *(net.biases if on == "all" else ())]
    expected = math.fsum(float((l1 * np.abs(a) + l2 * a * a / 2).sum()) for a in covered)
    assert cost == pytest.approx(expected, rel=1e-13, abs=0)
    assert net.cost(np.empty((0, 3)), y, loss, regularizer) == pytest.approx(expected, rel=1e-13, abs=0)
    assert g.input.shape == (0, 3)
    for a, ga in zip(net.weights, g.weights):
        np.testing.assert_allclose(ga, l1 * np.sign(a) + l2 * a, rtol=1e-14, atol=0)
    for a, ga in zip(net.biases, g.biases):
        np.testing.assert_allclose(ga, (l1 * np.sign(a) + l2 * a) * (on == "all"), rtol=1e-14, atol=0)
    assert passes(gradcheck(net, np.empty((0, 3)), y, loss, regularizer))


def test_a_large_batch_in_many_blocks_and_chunks(monkeypatch):
    """Wider than a block of the elementwise passes, longer than a chunk: sums over both, sampled entries."""
    monkeypatch.setattr(gpu_mlp.network, "CHUNK_ROWS", 130)
    rng = np.random.default_rng(11)
    net = randomise(MLP([7, 300, 20, 5], ["gelu", "softmax"], "softmax", precision="float64"), rng, scale=0.3)
    x, y, w = rng.normal(size=(421, 7)), rng.integers(0, 5, 421), rng.uniform(size=421)
    loss = CrossEntropy(label_smoothing=0.1, class_weight=[1, 2, 3, 0.5, 1])
    # a mean over 421 rows: one x has a gradient of about 1e-5, so atol must lie below that to say anything
    report = gradcheck(net, x, y, loss, L2(0.01), w, atol=1e-9, max_entries=6)
    assert passes(report)
    assert report.checked == 6 + 6 + 6 + 6 + 6 + 5 + 6  # b[2] has only five
    assert min(row.max_gradient for row in report.rows) > 1e-6
    monkeypatch.undo()
    cost, g = net.cost_and_gradients(x, y, loss, L2(0.01), w)
    assert cost == pytest.approx(report.cost, rel=1e-13)
    assert np.isfinite(g.theta).all()


def test_an_output_of_thousands_of_classes():
    """A row longer than a block: one row at a time."""
    rng = np.random.default_rng(12)
    net = randomise(MLP([2, 20_000], output="softmax", precision="float64"), rng)
    report = gradcheck(
        net, rng.normal(size=(3, 2)), np.array([0, 19_999, 7]), "cross_entropy", max_entries=3, atol=1e-9
    )
    assert passes(report)


# --- the check itself ----------------------------------------------------------------------------------------------


def small(activation: str = "tanh", output: str = "identity", rows: int = 4) -> tuple[MLP, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(20)
    net = randomise(MLP([3, 4, 2], activation, output, precision="float64"), rng)
    return net, rng.normal(size=(rows, 3)), rng.normal(size=(rows, 2))


def scaled(df, factor):
    def wrong(g, s, t):
        df(g, s, t)
        g *= factor

    return wrong


@pytest.mark.parametrize("name", [name for name in EVERY if ACTIVATIONS[name].reads != "none"])
def test_a_wrong_derivative_of_any_activation_is_caught_and_placed(name, monkeypatch):
    """One per cent off is ten times the tolerance: all below the layer is wrong, all above it is right."""
    monkeypatch.setenv("GPU_MLP_NUMBA", "0")  # a compiled pass does not read the table
    row = ACTIVATIONS[name]
    monkeypatch.setitem(ACTIVATIONS, name, dataclasses.replace(row, df=scaled(row.df, 1.01)))
    net, x, y = problem([name, "elu" if name == "tanh" else "tanh"], "identity", "mse", sizes=(2, 2, 3, 2))
    report = gradcheck(net, x, y, "mse", atol=1e-8)  # a small gradient is 1 % off as well
    assert not report.ok
    assert {row.name for row in report.rows if not row.ok} == {"W[0]", "b[0]", "input"}, str(report)
    assert "FAILED" in str(report)


@pytest.mark.parametrize("name", EVERY)
def test_a_wrong_derivative_of_any_output_is_caught(name, monkeypatch):
    row = ACTIVATIONS[name]
    monkeypatch.setitem(ACTIVATIONS, name, dataclasses.replace(row, df=scaled(row.df, 1.01)))
    net, x, y = problem(["relu" if name == "tanh" else "tanh"], name, "mse")
    assert not any(row.ok for row in gradcheck(net, x, y, "mse", atol=1e-8).rows)


@pytest.mark.parametrize(("output", "loss"), sorted(FUSED))
def test_a_wrong_fused_pair_is_caught(output, loss, monkeypatch):
    right = FUSED[output, loss]

    def wrong(self, z, y, g, t):
        values = right(self, z, y, g, t)
        g[:, 0] *= 0.99
        return values

    monkeypatch.setitem(FUSED, (output, loss), wrong)
    rng = np.random.default_rng(21)
    net = randomise(MLP([3, 4, 2], "tanh", output, precision="float64"), rng)
    report = gradcheck(net, rng.normal(size=(4, 3)), target(loss, (4, 2), rng), loss)
    assert not any(row.ok for row in report.rows)


@pytest.mark.parametrize("loss", [loss for loss in OUTPUTS if "identity" in OUTPUTS[loss]])
def test_a_wrong_gradient_of_a_loss_is_caught(loss, monkeypatch):
    right = LOSSES[loss].rows

    def wrong(self, y_hat, y, g, t):
        values = right(self, y_hat, y, g, t)
        g *= 1.01
        return values

    monkeypatch.setattr(LOSSES[loss], "rows", wrong)
    rng = np.random.default_rng(22)
    net = randomise(MLP([3, 4, 2], "tanh", precision="float64"), rng)
    assert not gradcheck(net, rng.normal(size=(4, 3)), target(loss, (4, 2), rng), loss).ok


def test_a_penalty_that_is_left_out_of_the_gradient_is_caught(monkeypatch):
    net, x, y = small()
    monkeypatch.setattr(numpy_ops.NumpyOperations, "add_penalty_gradient", lambda *arguments: None)
    report = gradcheck(net, x, y, "mse", L2(0.1))
    assert [row.name for row in report.rows if not row.ok] == ["W[0]", "W[1]"]


@pytest.mark.parametrize(
    ("operation", "wrong", "fails"),
    [
        ("weight_gradient", lambda self, gz, h_in, gW, accumulate: gW.fill(0), ["W[0]", "W[1]"]),
        ("input_gradient", None, ["W[0]", "b[0]", "input"]),
    ],
)
def test_a_wrong_operation_is_caught(operation, wrong, fails, monkeypatch):
    net, x, y = small()
    used = type(net._ops)
    if wrong is None:
        right = used.input_gradient

        def wrong(self, gz, W, *others):
            right(self, gz, W + 0.05, *others)

    monkeypatch.setattr(used, operation, wrong)
    report = gradcheck(net, x, y, "mse")
    assert [row.name for row in report.rows if not row.ok] == fails


def test_a_bias_gradient_that_forgets_a_row_is_caught(monkeypatch):
    right = numpy_ops._ColumnSums.add
    monkeypatch.setattr(numpy_ops._ColumnSums, "add", lambda self, block: right(self, block[1:]))
    net, x, y = small()
    report = gradcheck(net, x, y, "mse")
    assert [row.name for row in report.rows if not row.ok] == ["b[0]", "b[1]"]


def test_one_wrong_entry_among_many_is_caught(monkeypatch):
    net, x, y = small()
    right = MLP.cost_and_gradients

    def wrong(self, *arguments):
        cost, g = right(self, *arguments)
        g.weights[1][1, 2] += 3e-3
        return cost, g

    monkeypatch.setattr(MLP, "cost_and_gradients", wrong)
    report = gradcheck(net, x, y, "mse")
    (bad,) = [row for row in report.rows if not row.ok]
    assert bad.name == "W[1]"
    assert bad.max_abs_error == pytest.approx(3e-3, rel=1e-3)


def test_the_report_names_every_array_in_order():
    net, x, y = small()
    report = gradcheck(net, x, y, "mse", L2(0.1))
    assert [row.name for row in report.rows] == ["W[0]", "W[1]", "b[0]", "b[1]", "input"]
    assert [row.size for row in report.rows] == [row.checked for row in report.rows] == [12, 8, 4, 2, 12]
    assert report.cost == net.cost(x, y, "mse", L2(0.1))
    assert report.checked == 38
    _, g = net.cost_and_gradients(x, y, "mse", L2(0.1))
    for row, gradient in zip(report.rows, [*g.weights, *g.biases, g.input]):
        assert row.max_gradient == np.abs(gradient).max()
        assert 0 < row.max_abs_error < 1e-7
        assert 0 < row.max_rel_error < 1e-4
    table = str(report)
    assert "passed" in table
    assert len(table.splitlines()) == 7
    for row in report.rows:
        assert row.name in table


def test_theta_and_x_are_left_as_they_were():
    net, x, y = small()
    net.weights[0][0, 0] = -0.0
    net.weights[0][0, 1] = 5e-324
    theta, before = net.theta.tobytes(), x.tobytes()
    x.flags.writeable = False
    gradcheck(net, x, y, "mse")
    assert net.theta.tobytes() == theta
    assert x.tobytes() == before


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_theta_is_put_back_when_something_goes_wrong(error, monkeypatch):
    net, x, y = small()
    theta, moved = net.theta.tobytes(), []
    right = MLP.cost

    def wrong(self, *arguments):
        moved.append(net.theta.tobytes() != theta)
        if len(moved) == 12:
            raise error
        return right(self, *arguments)

    monkeypatch.setattr(MLP, "cost", wrong)
    with pytest.raises(error):
        gradcheck(net, x, y, "mse")
    assert moved[-1]  # it was raised while θ stood elsewhere
    assert net.theta.tobytes() == theta


def test_max_entries_samples_each_array_by_the_seed(monkeypatch):
    net, x, y = small()
    moved: list[set[int]] = []
    right = MLP.cost

    def watch(self, *arguments):
        moved[-1] |= set(np.flatnonzero(net.theta != theta))
        return right(self, *arguments)

    theta = net.theta.copy()
    monkeypatch.setattr(MLP, "cost", watch)
    for seed in (0, 0, 1):
        moved.append(set())
        report = gradcheck(net, x, y, "mse", max_entries=3, seed=seed)
        assert [row.checked for row in report.rows] == [3, 3, 3, 2, 3]
        assert report.ok
    assert len(moved[0]) == 3 + 3 + 3 + 2
    assert moved[0] == moved[1] != moved[2]


def test_kinks_of_activations_are_skipped_and_counted():
    """With b = 0 and one x = 0 every relu of the second row stands at its kink, where one side has slope 0."""
    net = MLP([1, 3, 1], "relu", precision="float64")
    net.weights[0][...] = [[1.0], [2.0], [-1.0]]
    net.weights[1][...] = [[1.0, -2.0, 3.0]]
    report = gradcheck(net, np.array([[1.0], [0.0]]), np.array([[0.3], [0.4]]), "mse")
    rows = {row.name: row for row in report.rows}
    assert rows["b[0]"].skipped == 3
    assert rows["b[0]"].checked == 0
    assert rows["input"].skipped == 1
    assert rows["input"].checked == 1
    assert rows["W[0]"].skipped == rows["W[1]"].skipped == rows["b[1]"].skipped == 0
    assert not rows["b[0]"].ok  # more than half
    assert rows["input"].ok  # exactly half
    assert not report.ok
    assert report.skipped == 4
    assert "too many at a kink" in str(report)


@pytest.mark.parametrize(
    ("name", "kink"),
    [("relu", 0), ("leaky_relu", 0), ("selu", 0), ("relu6", 0), ("relu6", 6), ("hardtanh", -1), ("hardtanh", 1),
     ("hardsigmoid", -3), ("hardsigmoid", 3), ("hardswish", -3), ("hardswish", 3)],
)  # fmt: skip
def test_every_kink_of_the_table_is_one_and_is_found(name, kink):
    """Half an eps away from it the interval straddles it and nothing is compared; farther away all is right."""
    for distance, skipped in ((0.5e-6, 1), (-0.5e-6, 1), (1e-4, 0), (-1e-4, 0)):
        net = MLP([1, 1, 1], name, precision="float64")
        net.weights[0][...] = net.weights[1][...] = 1.0
        report = gradcheck(net, np.array([[float(kink)]]) + distance, np.array([[0.5]]), "mse")
        rows = {row.name: row for row in report.rows}
        assert rows["b[0]"].skipped == rows["input"].skipped == skipped, (distance, str(report))
        assert rows["b[1]"].skipped == 0
        assert report.ok == (not skipped), (distance, str(report))


@pytest.mark.parametrize(("loss", "y"), [("mae", [[0.75, 2.0]]), ("hinge", [[1.0, -1.0]])], ids=["mae", "hinge"])
def test_kinks_of_losses_are_skipped_and_counted(loss, y):
    """The first output stands at the kink, ŷ = y or yŷ = 1, and the second does not."""
    net = MLP([1, 2], precision="float64")
    net.weights[0][...] = [[0.5], [0.25]]
    net.biases[0][...] = [0.25 if loss == "mae" else 0.5, 0.125]
    x = np.array([[1.0]])
    rows = gradcheck(net, x, np.array(y), loss).rows
    assert [row.skipped for row in rows] == [1, 1, 1]  # W[0][0], b[0][0] and x move the first output
    assert [row.checked for row in rows] == [1, 1, 0]
    assert [row.ok for row in rows] == [True, True, False]
    net.biases[0][0] += 1e-3
    assert passes(gradcheck(net, x, np.array(y), loss))


def test_kinks_of_hinge_with_labels():
    net = MLP([1, 3], precision="float64")
    net.weights[0][...] = 0.1
    net.biases[0][...] = [0.2, 1.0, 0.3]
    rows = gradcheck(net, np.array([[0.0]]), np.array([1]), "hinge").rows
    assert [row.skipped for row in rows] == [0, 1, 1]  # x = 0: W does not move ŷ; b[1] and x do
    assert sum(row.skipped for row in gradcheck(net, np.array([[0.0]]), np.array([0]), "hinge").rows) == 0


@pytest.mark.parametrize("on", ["weights", "all"])
@pytest.mark.parametrize("make", [L1, lambda lam, on: ElasticNet(lam, 0.1, on)], ids=["L1", "ElasticNet"])
def test_kinks_of_an_l1_penalty_are_skipped_and_counted(make, on):
    net, x, y = small()
    net.weights[1][0, :2] = [0.0, 5e-7]
    net.biases[0][3] = 0.0
    rows = {row.name: row for row in gradcheck(net, x, y, "mse", make(0.1, on)).rows}
    assert rows["W[1]"].skipped == 2
    assert rows["b[0]"].skipped == (on == "all")
    assert all(row.ok for row in rows.values())
    assert gradcheck(net, x, y, "mse", L2(0.1, on)).skipped == 0


def test_what_is_not_finite_never_passes():
    net, x, y = small("identity")
    with np.errstate(all="ignore"):
        report = gradcheck(net, x * 1e200, y, "mse")
    assert not np.isfinite(report.cost)
    assert not report.ok
    assert not any(row.ok for row in report.rows)
    net.weights[0][0, 0] = np.nan
    report = gradcheck(net, x, y, "mse")
    assert not report.ok
    assert report.skipped == 0
    report = gradcheck(net, x, y, "mae")
    assert not report.ok
    assert report.skipped == 0  # NaN is no kink


def test_a_gradient_that_is_nan_never_passes(monkeypatch):
    net, x, y = small()
    right = MLP.cost_and_gradients

    def wrong(self, *arguments):
        cost, g = right(self, *arguments)
        g.biases[1][0] = np.nan
        return cost, g

    monkeypatch.setattr(MLP, "cost_and_gradients", wrong)
    report = gradcheck(net, x, y, "mse")
    assert [row.name for row in report.rows if not row.ok] == ["b[1]"]


@pytest.mark.parametrize("precision", ["float32", "tf32", "float16"])
def test_only_float64_can_be_checked(precision):
    net = MLP([3, 2], precision=precision)
    with pytest.raises(ValueError, match=f"^net: .*{precision}.*precision='float64'"):
        gradcheck(net, np.ones((1, 3)), np.ones((1, 2)), "mse")


@pytest.mark.parametrize(
    ("argument", "value", "error"),
    [
        ("eps", 0, ValueError),
        ("eps", float("nan"), ValueError),
        ("atol", -1e-9, ValueError),
        ("rtol", "small", TypeError),
        ("max_entries", 0, ValueError),
        ("max_entries", 2.5, TypeError),
        ("seed", -1, ValueError),
        ("loss", "msee", ValueError),
        ("regularizer", 0.1, TypeError),
        ("sample_weight", [1.0], ValueError),
        ("x", [[1.0, np.nan, 0.0]], ValueError),
        ("y", [[1.0]], ValueError),
        ("net", None, TypeError),
    ],
)
def test_bad_arguments_are_refused_by_name(argument, value, error):
    net, x, y = small()
    arguments = {"net": net, "x": x, "y": y, "loss": "mse"} | {argument: value}
    with pytest.raises(error, match=f"^{argument}"):
        gradcheck(**arguments)


def test_float32_and_integer_inputs_are_checked_as_float64():
    net, x, _ = small()
    assert passes(gradcheck(net, x.astype(np.float32), np.array([[1, 2]] * 4), MSE()))
    assert passes(gradcheck(net, np.arange(12).reshape(4, 3), np.array([[True, False]] * 4), "huber"))
    assert passes(gradcheck(net, [[1, 2, 3]], [[0.5, 0.25]], "mse"))
