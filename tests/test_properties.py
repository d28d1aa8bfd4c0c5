"""What has to hold whatever the network and the data: symmetries of J and ŷ, and runs that repeat to the bit.

Found by hypothesis over small networks; each property is a statement of mathematics, not a recorded number.
"""

from __future__ import annotations

import dataclasses
from unittest import mock

import numpy as np
import pytest
from helpers import (
    PROPERTY,
    TOLERANCE,
    activation,
    assert_close,
    blobs,
    network_forward,
    network_gradients,
    same_bits,
    waves,
)
from hypothesis import assume, given
from hypothesis import strategies as st

from gpu_mlp import L1, L2, MLP, SGD, CrossEntropy, ElasticNet, Trainer, optimizers
from gpu_mlp.precision import get as get_precision

SMOOTH = ("identity", "tanh", "sigmoid", "gelu", "silu", "softplus", "sine", "softsign", "mish", "softmax")
KINKED = ("relu", "leaky_relu", "elu", "hardtanh", "relu6")
PAIRS = (
    ("softmax", "cross_entropy"),
    ("log_softmax", "nll"),
    ("sigmoid", "binary_cross_entropy"),
    ("exp", "poisson"),
    ("identity", "mse"),
    ("identity", "huber"),
    ("tanh", "mae"),
    ("softmax", "mse"),
)
# Two float64 sums of the same terms in another order: 2⁻⁵² times a few hundred.
ROUNDING = 1e-12


@dataclasses.dataclass
class Case:
    """A network with a batch of data that fits it."""

    net: MLP
    x: np.ndarray
    y: np.ndarray
    loss: str

    def cost_and_gradients(self, x=None, y=None, w=None, regularizer=None):
        x, y = self.x if x is None else x, self.y if y is None else y
        return self.net.cost_and_gradients(x, y, self.loss, regularizer, w)


@st.composite
def cases(draw, precision="float64", max_rows=12, activations=SMOOTH + KINKED, dropout=False):
    hidden = draw(st.lists(st.integers(2, 7), max_size=3))
    output, loss = draw(st.sampled_from(PAIRS))
    n_in, n_out = draw(st.integers(1, 6)), draw(st.integers(2, 5))
    names = [draw(st.sampled_from(activations)) for _ in hidden]
    rates = [0.0 if not dropout or name == "softmax" else draw(st.sampled_from([0.0, 0.3, 0.8])) for name in names]
    seed = draw(st.integers(0, 2**32 - 1))
    net = MLP([n_in, *hidden, n_out], names, output, dropout=rates, precision=precision, seed=seed)
    rng = np.random.default_rng(seed)
    for b in net.biases:
        b[...] = rng.normal(size=b.shape) * 0.3
    rows = draw(st.integers(1, max_rows))
    x = rng.normal(size=(rows, n_in))
    if loss in ("cross_entropy", "nll"):
        y = rng.integers(0, n_out, rows) if draw(st.booleans()) else rng.dirichlet(np.ones(n_out), rows)
    elif loss == "binary_cross_entropy":
        y = rng.random((rows, n_out))
    else:
        y = abs(rng.normal(size=(rows, n_out)))
    return Case(net, x, y, loss)


# --- against the plain algorithm -----------------------------------------------------------------------------------


@PROPERTY
@given(cases(), st.booleans())
def test_everything_follows_the_book(case, weighted):
    """ŷ, J and every gradient are those of algorithms 6.3 and 6.4, spelled out in plain NumPy."""
    names = [*case.net.activation, case.net.output]
    w = np.random.default_rng(0).uniform(0.1, 3, len(case.x)) if weighted else None
    J, gW, gb = network_gradients(case.net.weights, case.net.biases, names, case.x, case.y, case.loss, w)
    cost, g = case.cost_and_gradients(w=w)
    _, hs = network_forward(case.net.weights, case.net.biases, names, case.x)
    assert_close(case.net.forward(case.x), hs[-1], ROUNDING)
    assert_close(cost, J, ROUNDING, scale=1.0)
    assert_close(case.net.cost(case.x, case.y, case.loss, sample_weight=w), J, ROUNDING, scale=1.0)
    for found, expected in (*zip(g.weights, gW), *zip(g.biases, gb)):
        assert_close(found, expected, 1e-11, scale=1e-3)


# --- the batch ---------------------------------------------------------------------------------------------------


@PROPERTY
@given(cases(), st.randoms(use_true_random=False))
def test_permuting_a_batch_changes_nothing_but_the_order(case, random):
    order = list(range(len(case.x)))
    random.shuffle(order)
    assert_close(case.net.forward(case.x[order]), case.net.forward(case.x)[order], ROUNDING)
    (J, g), (K, h) = case.cost_and_gradients(), case.cost_and_gradients(case.x[order], case.y[order])
    assert_close(K, J, ROUNDING, scale=1.0)
    assert_close(h.theta, g.theta, ROUNDING, scale=1.0)
    assert_close(h.input, g.input[order], ROUNDING, scale=1.0)


@PROPERTY
@given(cases())
def test_a_row_does_not_see_its_neighbours(case):
    whole = case.net.forward(case.x)
    for i in range(len(case.x)):
        assert_close(case.net.forward(case.x[i : i + 1])[0], whole[i], ROUNDING)


@PROPERTY
@given(cases(), st.data())
def test_integer_sample_weights_are_repetitions(case, data):
    times = np.array(data.draw(st.lists(st.integers(0, 3), min_size=len(case.x), max_size=len(case.x))))
    assume(times.any())
    J, g = case.cost_and_gradients(w=times)
    K, h = case.cost_and_gradients(case.x.repeat(times, axis=0), case.y.repeat(times, axis=0))
    assert_close(J, K, ROUNDING, scale=1.0)
    assert_close(g.theta, h.theta, ROUNDING, scale=1.0)
    copies = np.add.reduceat(np.vstack([h.input, np.zeros_like(h.input[:1])]), np.cumsum(times) - times)
    copies[times == 0] = 0
    assert_close(g.input, copies, ROUNDING, scale=1.0)


@PROPERTY
@given(cases(), st.floats(1e-3, 1e3))
def test_only_the_proportion_of_the_sample_weights_counts(case, factor):
    w = np.random.default_rng(1).uniform(0.1, 2, len(case.x))
    (J, g), (K, h) = case.cost_and_gradients(w=w), case.cost_and_gradients(w=w * factor)
    assert_close(K, J, ROUNDING, scale=1.0)
    assert_close(h.theta, g.theta, ROUNDING, scale=1.0)


@PROPERTY
@given(cases(), st.integers(1, 5))
def test_chunks_of_a_batch_add_up(case, rows):
    """A pass that is cut into chunks, as a large batch is, gives what the whole gives."""
    J, g = case.cost_and_gradients()
    y_hat = case.net.forward(case.x)
    with mock.patch("gpu_mlp.network.CHUNK_ROWS", rows):
        K, h = case.cost_and_gradients()
        assert_close(K, J, ROUNDING, scale=1.0)
        assert_close(case.net.cost(case.x, case.y, case.loss), J, ROUNDING, scale=1.0)
        assert_close(h.theta, g.theta, ROUNDING, scale=1.0)
        assert_close(h.input, g.input, ROUNDING, scale=1.0)
        assert_close(case.net.forward(case.x), y_hat, ROUNDING)


@PROPERTY
@given(cases(), st.integers(0, 12))
def test_the_mean_over_two_parts_is_the_mean_of_their_means(case, cut):
    cut = min(cut, len(case.x))
    J, g = case.cost_and_gradients()
    parts = [case.cost_and_gradients(case.x[rows], case.y[rows]) for rows in (slice(cut), slice(cut, None))]
    shares = cut / len(case.x), 1 - cut / len(case.x)
    assert_close(sum(s * K for s, (K, _) in zip(shares, parts)), J, ROUNDING, scale=1.0)
    assert_close(sum(s * h.theta for s, (_, h) in zip(shares, parts)), g.theta, ROUNDING, scale=1.0)


# --- micro-batches -----------------------------------------------------------------------------------------------


@PROPERTY
@given(cases(dropout=True), st.integers(2, 9), st.booleans(), st.sampled_from([None, L1(0.1), L2(0.3, on="all")]))
def test_micro_batches_give_the_update_of_the_whole_batch(case, k, weighted, regularizer):
    """accumulate=k, also where k does not divide the batch or exceeds it, with dropout, weights and penalties."""
    w = np.random.default_rng(2).uniform(0, 2, len(case.x)) if weighted else None
    results = []
    for accumulate in (1, k):
        net = clone(case.net)
        trainer = Trainer(net, case.loss, SGD(lr=0.05, momentum=0.9), regularizer, accumulate=accumulate, clip_norm=3.0)
        costs = [float(trainer.step(case.x, case.y, w)) for _ in range(3)]
        results.append((np.array(costs), net.theta.copy()))
    assert_close(results[1][0], results[0][0], 1e-11, scale=1.0)
    assert_close(results[1][1], results[0][1], 1e-11)


@PROPERTY
@given(st.integers(2, 7), st.integers(0, 5))
def test_micro_batches_with_class_weights(k, seed):
    x, y = blobs(23, seed=seed)
    loss = CrossEntropy(class_weight=[0.2, 3.0, 1.0], label_smoothing=0.1)
    thetas = []
    for accumulate in (1, k):
        net = MLP([6, 5, 3], output="softmax", precision="float64", seed=seed, dropout=0.2)
        trainer = Trainer(net, loss, SGD(lr=0.1), accumulate=accumulate, apply_at_once=False)
        for _ in range(3):
            trainer.step(x, y)
        thetas.append(net.theta.copy())
    assert_close(thetas[1], thetas[0], 1e-11)


@pytest.mark.parametrize("k", [2, 3, 7])
@pytest.mark.parametrize("shuffle", [True, False])
def test_micro_batches_in_a_whole_run(k, shuffle):
    """Also where the last minibatch of an epoch is short."""
    x, y = blobs(103)
    thetas = []
    for accumulate in (1, k):
        net = MLP([6, 8, 3], output="softmax", precision="float64", dropout=0.3)
        trainer = Trainer(net, optimizer=SGD(lr=0.1, momentum=0.5), accumulate=accumulate)
        trainer.fit((x, y), epochs=2, batch_size=20, shuffle=shuffle, progress=False)
        thetas.append(net.theta.copy())
    assert_close(thetas[1], thetas[0], 1e-11)


def clone(net):
    twin = MLP(net.sizes, net.activation, net.output, net.dropout, precision=net.precision, seed=net.seed)
    twin.theta[...] = net.theta
    return twin


# --- the penalty -------------------------------------------------------------------------------------------------


@PROPERTY
@given(cases(), st.floats(0, 10), st.floats(0, 10), st.sampled_from(["weights", "all"]))
def test_the_penalty_is_what_its_formula_says(case, l1, l2, on):
    parts = [*case.net.weights, *(case.net.biases if on == "all" else [])]
    omega = sum(l1 * abs(p).sum() + l2 / 2 * (p**2).sum() for p in parts)
    (J, g), (K, h) = case.cost_and_gradients(), case.cost_and_gradients(regularizer=ElasticNet(l1, l2, on))
    assert_close(K - J, omega, 1e-11, scale=abs(K) + abs(J) + 1)
    assert_close(case.net.cost(case.x, case.y, case.loss, ElasticNet(l1, l2, on)), K, ROUNDING, scale=1.0)
    for found, plain, p in zip(h.weights, g.weights, case.net.weights):
        assert_close(found, plain + l1 * np.sign(p) + l2 * p, ROUNDING, scale=1.0)
    for found, plain, p in zip(h.biases, g.biases, case.net.biases):
        assert_close(found, plain + (l1 * np.sign(p) + l2 * p if on == "all" else 0), ROUNDING, scale=1.0)
    assert same_bits(h.input, g.input)


@PROPERTY
@given(cases(), st.sampled_from([L1, L2]), st.floats(1e-3, 1), st.floats(0, 100), st.sampled_from(["weights", "all"]))
def test_lambda_scales_the_penalty_linearly(case, kind, lam, factor, on):
    J, g = case.cost_and_gradients()
    (K, h), (M, k) = (case.cost_and_gradients(regularizer=kind(lam * f, on)) for f in (1, factor))
    assert_close(M - J, factor * (K - J), 1e-9, scale=abs(M) + factor * abs(K) + 1)
    assert_close(k.theta - g.theta, factor * (h.theta - g.theta), 1e-10, scale=(1 + factor) * 10)


# --- identities of the activations -------------------------------------------------------------------------------


@PROPERTY
@given(cases(), st.floats(-50, 50), st.sampled_from(["softmax", "log_softmax"]))
def test_a_shift_of_all_logits_changes_nothing(case, shift, output):
    net = MLP(case.net.sizes, case.net.activation, output, precision="float64", seed=case.net.seed)
    y = np.arange(len(case.x)) % net.sizes[-1]
    loss = "cross_entropy" if output == "softmax" else "nll"
    y_hat, (J, g) = net.forward(case.x), net.cost_and_gradients(case.x, y, loss)
    net.biases[-1][...] += shift
    assert_close(net.forward(case.x), y_hat, 1e-12 * (1 + abs(shift)), scale=1.0)
    K, h = net.cost_and_gradients(case.x, y, loss)
    assert_close(K, J, 1e-12 * (1 + abs(shift)), scale=1.0)
    assert_close(h.theta, g.theta, 1e-12 * (1 + abs(shift)), scale=1.0)


@PROPERTY
@given(cases(), st.floats(0.01, 100))
def test_the_temperature_of_a_softmax_is_a_factor_on_its_logits(case, temperature):
    """softmax(W h / T) = softmax(W h)^(1/T), normalised."""
    net = MLP(case.net.sizes, case.net.activation, "softmax", precision="float64", seed=case.net.seed)
    p = net.forward(case.x)
    net.weights[-1][...] /= temperature
    powers = (p / p.max(axis=1, keepdims=True)) ** (1 / temperature)
    assert_close(net.forward(case.x), powers / powers.sum(axis=1, keepdims=True), 1e-10)


@PROPERTY
@given(cases())
def test_softmax_and_log_softmax_are_one_function(case):
    sizes, names, seed = case.net.sizes, case.net.activation, case.net.seed
    p, log_p = (
        MLP(sizes, names, output, precision="float64", seed=seed).forward(case.x)
        for output in ("softmax", "log_softmax")
    )
    assert_close(np.exp(log_p), p, ROUNDING)
    assert_close(p.sum(axis=1), np.ones(len(p)), ROUNDING)
    y = np.arange(len(case.x)) % sizes[-1]
    costs = [
        MLP(sizes, names, output, precision="float64", seed=seed).cost(case.x, y, loss)
        for output, loss in (("softmax", "cross_entropy"), ("log_softmax", "nll"))
    ]
    assert_close(costs[0], costs[1], ROUNDING, scale=1.0)


@PROPERTY
@given(cases(activations=("relu", "leaky_relu", "identity")), st.floats(0.01, 100))
def test_a_positive_factor_passes_through_a_relu(case, factor):
    """f(a z) = a f(z) for a > 0: scaling one layer and dividing the next by it gives the same network."""
    assume(len(case.net.sizes) > 2)
    y_hat = case.net.forward(case.x)
    case.net.weights[0][...] *= factor
    case.net.biases[0][...] *= factor
    case.net.weights[1][...] /= factor
    assert_close(case.net.forward(case.x), y_hat, ROUNDING * 10, scale=1.0)


@PROPERTY
@given(cases(), st.permutations(range(5)))
def test_hidden_units_have_no_order(case, order):
    """Permuting a layer's units, with the rows of W and b and the columns of the next W, changes no output."""
    assume(len(case.net.sizes) > 2)
    order = [i for i in order if i < case.net.sizes[1]] + list(range(5, case.net.sizes[1]))
    y_hat = case.net.forward(case.x)
    W, b, V = case.net.weights[0], case.net.biases[0], case.net.weights[1]
    W[...], b[...], V[...] = W[order], b[order], V[:, order]
    assert_close(case.net.forward(case.x), y_hat, ROUNDING)


@PROPERTY
@given(st.floats(0.1, 10), st.integers(0, 100))
def test_mse_scales_with_the_square_of_its_unit(unit, seed):
    x, y = waves(9, seed=seed)
    net = MLP([3, 4, 2], "tanh", precision="float64", seed=seed)
    J = net.cost(x, y, "mse")
    assert_close(net.cost(x, y, "half_mse"), J / 2, ROUNDING)
    net.weights[-1][...] *= unit
    net.biases[-1][...] *= unit
    assert_close(net.cost(x, y * unit, "mse"), J * unit**2, ROUNDING * 10)


# --- precision ---------------------------------------------------------------------------------------------------


@PROPERTY
@given(cases(), st.sampled_from(["float32", "tf32", "bfloat16", "float16"]))
def test_other_precisions_follow_float64_within_their_rounding(case, precision):
    if precision == "bfloat16":
        pytest.importorskip("ml_dtypes")
    net = MLP(case.net.sizes, case.net.activation, case.net.output, precision=precision, seed=case.net.seed)
    storage = get_precision(precision).storage_dtype
    x = case.x.astype(storage).astype(np.float64)  # exactly the same numbers go in
    case.net.theta[...] = case.net.theta.astype(storage)
    for mine, theirs in zip((*net.weights, *net.biases), (*case.net.weights, *case.net.biases)):
        mine[...] = theirs
    tolerance = TOLERANCE[precision] * len(net.sizes)  # each layer rounds what it passes on
    assert_close(net.forward(x), case.net.forward(x), tolerance, scale=1.0)
    J, g = case.net.cost_and_gradients(x, case.y, case.loss)
    K, h = net.cost_and_gradients(x, case.y, case.loss)
    assert_close(K, J, tolerance, scale=1.0)
    if case.loss == "mae" or set(case.net.activation) & set(KINKED):
        return  # a rounding error may put a value on the other side of a kink, where the gradient jumps
    for a, b in (*zip(h.weights, g.weights), *zip(h.biases, g.biases)):
        assert_close(a, b, 4 * tolerance, scale=1.0)


@pytest.mark.parametrize("precision", ["float64", "float32"])
def test_the_initial_weights_are_the_same_in_every_precision(precision):
    wide, net = (MLP([7, 5, 3], ["tanh"], seed=9, precision=p) for p in ("float64", precision))
    for a, b in zip(wide.weights, net.weights):
        np.testing.assert_array_equal(a.astype(b.dtype), b)


# --- repetition --------------------------------------------------------------------------------------------------


def run(net_seed, precision="float32", optimizer="adam", **options):
    x, y = blobs(150, dtype=np.float32)
    net = MLP([6, 16, 12, 3], ["gelu", "relu"], "softmax", dropout=0.2, precision=precision, seed=net_seed)
    trainer = Trainer(net, optimizer=optimizer, regularizer=L2(1e-4), **options)
    history = trainer.fit((x, y), epochs=3, batch_size=32, validation=0.2, progress=False)
    return net, history


@pytest.mark.parametrize("precision", ["float64", "float32", "tf32", "float16", "bfloat16"])
@pytest.mark.parametrize("optimizer", ["sgd", "adam", "muon"])
def test_the_same_seed_gives_the_same_bits(precision, optimizer):
    if precision == "bfloat16":
        pytest.importorskip("ml_dtypes")
    (a, past), (b, present) = run(5, precision, optimizer), run(5, precision, optimizer)
    assert same_bits(a.theta, b.theta)
    for column in ("cost", "validation_loss", "validation_accuracy"):
        assert past[column] == present[column]
    assert not np.array_equal(a.theta, run(6, precision, optimizer)[0].theta)


def test_the_order_of_the_data_follows_the_trainer_s_seed():
    """With one network seed, another trainer seed shuffles (and splits) otherwise, and the same one does not."""
    same, again, other = (run(5, seed=s)[0].theta for s in (1, 1, 2))
    assert same_bits(same, again)
    assert not np.array_equal(same, other)


def test_no_seed_draws_a_new_one_that_can_be_used_again():
    a, b = MLP([3, 4, 1], seed=None), MLP([3, 4, 1], seed=None)
    assert a.seed != b.seed
    assert not np.array_equal(a.theta, b.theta)
    assert same_bits(MLP([3, 4, 1], seed=a.seed).theta, a.theta)


@pytest.mark.parametrize("rule", sorted(set(optimizers.OPTIMIZERS) - {"lbfgs"}))
def test_a_run_cut_in_two_is_the_run(rule):
    """A second fit goes on with the moments, the step count, the shuffles and the dropout masks of the first."""
    x, y = blobs(90, dtype=np.float32)
    thetas = []
    for epochs in ([4], [1, 3]):
        net = MLP([6, 8, 3], "gelu", "softmax", dropout=0.2)
        trainer = Trainer(net, optimizer=rule)
        for n in epochs:
            trainer.fit((x, y), epochs=n, batch_size=16, progress=False)
        thetas.append(net.theta.copy())
    assert same_bits(*thetas)


def test_steps_by_hand_are_the_steps_of_fit():
    x, y = blobs(60, dtype=np.float32)
    nets = [MLP([6, 8, 3], output="softmax", dropout=0.2) for _ in range(2)]
    Trainer(nets[0]).fit((x, y), epochs=2, batch_size=25, shuffle=False, progress=False)
    by_hand = Trainer(nets[1])
    for _ in range(2):
        for start in (0, 25, 50):
            by_hand.step(x[start : start + 25], y[start : start + 25])
    assert same_bits(nets[0].theta, nets[1].theta)


def test_the_reference_of_these_tests_knows_a_hand_worked_network():
    """x = (1, 2), W = (3, −1), b = 1: z = 2, ŷ = σ(2); mse against 0: J = ŷ², ∂J/∂z = 2 ŷ · ŷ (1 − ŷ)."""
    s = 1 / (1 + np.exp(-2.0))
    J, gW, gb = network_gradients([[[3.0, -1.0]]], [[1.0]], ["sigmoid"], [[1.0, 2.0]], [[0.0]], "mse")
    assert_close(activation("sigmoid", [[2.0]]), [[s]], 1e-15)
    assert_close(J, s**2, 1e-14)
    slope = 2 * s * s * (1 - s)
    assert_close(gW[0], [[slope, 2 * slope]], 1e-14)
    assert_close(gb[0], [slope], 1e-14)
