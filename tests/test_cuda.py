"""The CUDA implementation against the NumPy reference: the same kernels, launches and cuBLAS calls in two worlds.

On the emulated device the kernels' own text runs on the CPU (see `cuda_on_cpu`), every launch twice in opposite orders
of the threads, on memory with guards around it; `pytest -m gpu` makes the same comparisons on a real one.
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from gpu_mlp import (
    LBFGS,
    MLP,
    SGD,
    Adadelta,
    Adagrad,
    Adam,
    Adamax,
    AdamW,
    BinaryCrossEntropy,
    CrossEntropy,
    ElasticNet,
    Huber,
    Lion,
    Muon,
    NAdam,
    RAdam,
    RMSprop,
    Trainer,
)
from gpu_mlp.activations import ACTIVATIONS
from gpu_mlp.losses import LOSSES
from gpu_mlp.ops.interface import Slot

# By precision: how far a gradient may be from the reference's, relative to its norm; (emulated, real).
# float64, float32: a real device adds in another order, contracts a*b+c to one rounding, and its exp, tanh and erf are
# good to 1 or 2 units in the last place, where the emulated one calls the host's own. float32 numbers below 1.2e-38
# are zero there (-ftz=true), which no norm of these sizes can feel.
# tf32: a GEMM's inputs keep 11 bits and the reference all 24: a relative 2^-11 on each where they are rounded, as the
# emulated device does, and 2^-10 where they are cut off, as tensor cores may; the errors of a gradient through three
# GEMMs, some of them in differences, add up to a few times that.
# bfloat16, float16: both worlds round where the reference does not (a GEMM's product before the bias is added): a few
# units in the last place, 2^-8 and 2^-11; in which order float32 sums were added is lost in that.
TOLERANCES = {
    "float64": (1e-13, 1e-12),
    "float32": (2e-6, 5e-6),
    "tf32": (3e-3, 6e-3),
    "bfloat16": (2e-2, 2e-2),
    "float16": (3e-3, 3e-3),
}
PRECISIONS = list(TOLERANCES)
# After a run in float64: every rule divides by roots of what it has gathered, which lets the last digits grow.
RUN_TOLERANCE = (1e-11, 1e-9)
ELEMENTWISE = [name for name, f in ACTIVATIONS.items() if not f.rowwise]


def gradients(device, sizes, activation, output, precision, x, y, loss, **options):
    net = MLP(sizes, activation, output, precision=precision, device=device, seed=1)
    for b in net.layout.biases(net._theta):
        b[...] = 0.1
    net.theta  # noqa: B018  (the 16-bit copy is brought up to date)
    return net.cost_and_gradients(x, y, loss, **options)


def compare(gpu, precision, *arguments, **options):
    cost, expected = gradients("cpu", *arguments[:3], precision, *arguments[3:], **options)
    found_cost, found = gradients("cuda", *arguments[:3], precision, *arguments[3:], **options)
    assert np.isfinite(found_cost)
    assert np.isfinite(found.theta).all()
    tolerance = TOLERANCES[precision][gpu.real]
    assert found_cost == pytest.approx(cost, rel=10 * tolerance, abs=tolerance)
    for got, wanted in ((found.theta, expected.theta), (found.input, expected.input)):
        got, wanted = np.asarray(got, np.float64), np.asarray(wanted, np.float64)
        assert np.linalg.norm(got - wanted) <= tolerance * (np.linalg.norm(wanted) + tolerance)


def target(loss, rows, n, rng):
    if loss in ("cross_entropy", "nll", "hinge"):
        return rng.integers(0, n, rows)
    return rng.uniform(0.1, 0.9, (rows, n))


# Here that a network puts the operations together; test_operations.py compares each of them at all precisions.
@pytest.mark.parametrize(("name", "precision"), list(zip(ELEMENTWISE, itertools.cycle(["float64", "bfloat16"]))))
def test_every_activation(gpu, name, precision):
    rng = np.random.default_rng(3)
    compare(
        gpu,
        precision,
        [5, 8, 16, 3],
        name,
        "softmax",
        rng.uniform(-0.5, 0.5, (7, 5)),
        rng.integers(0, 3, 7),
        "cross_entropy",
    )


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("output", ["softmax", "log_softmax"])
def test_row_wise_layers(gpu, output, precision):
    rng = np.random.default_rng(4)
    compare(gpu, precision, [6, 16, 40], output, output, rng.normal(size=(5, 6)), rng.normal(size=(5, 40)), "mse")


@pytest.mark.parametrize("precision", ["float64", "float32", "float16"])
@pytest.mark.parametrize("loss", [name for name in LOSSES if name not in ("cross_entropy", "nll")])
def test_every_pointwise_loss(gpu, loss, precision):
    rng = np.random.default_rng(5)
    output = {"poisson": "softplus", "binary_cross_entropy": "sigmoid"}.get(loss, "tanh")
    x, y = rng.normal(size=(9, 4)), target(loss, 9, 4, rng)
    compare(gpu, precision, [4, 8, 4], "relu", output, x, y, Huber(0.3) if loss == "huber" else loss)


@pytest.mark.parametrize(
    ("output", "loss"), [("exp", "poisson"), ("sigmoid", "binary_cross_entropy"), ("log_softmax", "nll")]
)
def test_fused_pairs(gpu, output, loss):
    rng = np.random.default_rng(6)
    compare(gpu, "float64", [4, 8, 5], "gelu", output, rng.normal(size=(9, 4)), target(loss, 9, 5, rng), loss)


@pytest.mark.parametrize("labels", [True, False])
@pytest.mark.parametrize("classes", [2, 33, 1500])
def test_cross_entropy(gpu, classes, labels):
    """A warp a row, and a block a row beyond 1024 classes; smoothing, class weights and sample weights."""
    rng = np.random.default_rng(7)
    y = rng.integers(0, classes, 11)
    if not labels:
        y = rng.dirichlet(np.ones(classes), 11)
    loss = CrossEntropy(label_smoothing=0.1, class_weight=tuple(rng.uniform(0.5, 2, classes)))
    weight = rng.uniform(0, 2, 11)
    compare(gpu, "float64", [3, 4, classes], "tanh", "softmax", rng.normal(size=(11, 3)), y, loss, sample_weight=weight)


@pytest.mark.parametrize("precision", ["float64", "bfloat16"])
def test_losses_of_clipped_probabilities(gpu, precision):
    rng = np.random.default_rng(11)
    x, labels = rng.normal(size=(11, 3)), rng.integers(0, 5, 11)
    compare(gpu, precision, [3, 4, 5], "tanh", "softmax", x, labels, CrossEntropy(clip=0.2))
    y = rng.uniform(0, 1, (11, 5))
    compare(gpu, precision, [3, 4, 5], "tanh", "sigmoid", x, y, BinaryCrossEntropy(clip=0.4))


@pytest.mark.parametrize("rows", [0, 1, 31, 257])
@pytest.mark.parametrize("width", [1, 31, 64, 257])
def test_awkward_sizes(gpu, rows, width):
    """No row, one row, columns that fill no pack, and more rows than a small device's grid covers at once."""
    rng = np.random.default_rng(8)
    x, y = rng.normal(size=(rows, 3)), rng.normal(size=(rows, 2))
    compare(gpu, "float32", [3, width, 2], "silu", "identity", x, y, "mse", regularizer=ElasticNet(0.01, 0.1, on="all"))


RULES = [
    SGD(0.1, weight_decay=0.01),
    SGD(0.1, momentum=0.9, nesterov=True),
    Adam(amsgrad=True, weight_decay=0.01),
    Adam(eps=0.1, epsilon_hat=True),
    AdamW(),
    NAdam(),
    RAdam(decoupled_weight_decay=True),
    Adamax(),
    Adagrad(lr_decay=0.1, initial_accumulator_value=0.1),
    RMSprop(centered=True, momentum=0.5),
    Adadelta(),
    Lion(weight_decay=0.1),
    Muon(),
    LBFGS(),
]


def trained(device, rule, precision, **options):
    rng = np.random.default_rng(9)
    x, y, weight = rng.normal(size=(37, 13)), rng.integers(0, 3, 37), rng.uniform(0.5, 1, 37)
    dropout = 0.0 if rule.name == "lbfgs" else 0.25
    net = MLP([13, 31, 3], "gelu", "softmax", dropout=dropout, precision=precision, device=device)
    trainer = Trainer(net, "cross_entropy", rule, ElasticNet(1e-3, 1e-2, on="all"), **options)
    history = trainer.fit((x, y, weight), epochs=2, batch_size=16, progress=False, validation=(x, y))
    return np.asarray(net._ops.to_host(net._theta), np.float64), history


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: f"{rule.name}-{len(rule.moments)}")
def test_training_with_every_rule(gpu, rule):
    """Shuffled minibatches, dropout, weights, penalty, clipping and micro-batches: the reference's θ at the end."""
    options = {} if rule.name == "lbfgs" else {"clip_norm": 0.5, "accumulate": 2}
    expected, theirs = trained("cpu", rule, "float64", **options)
    found, ours = trained("cuda", rule, "float64", **options)
    assert np.isfinite(found).all()
    tolerance = RUN_TOLERANCE[gpu.real]
    assert np.linalg.norm(found - expected) <= tolerance * np.linalg.norm(expected)
    np.testing.assert_allclose(ours["cost"], theirs["cost"], rtol=tolerance)
    np.testing.assert_allclose(ours["validation_accuracy"], theirs["validation_accuracy"])


@pytest.mark.parametrize("precision", ["float16", "bfloat16"])
@pytest.mark.parametrize("rule", [SGD(0.1), AdamW(), Muon()], ids=lambda rule: rule.name)
def test_training_in_sixteen_bits(gpu, rule, precision):
    """The master copy, its 16-bit shadow and the loss scale; two epochs stay within the type's rounding."""
    expected, _ = trained("cpu", rule, precision)
    found, _ = trained("cuda", rule, precision)
    assert np.linalg.norm(found - expected) <= 1e-2 * np.linalg.norm(expected)


def test_a_scaled_gradient_that_overflows_skips_the_step(gpu):
    """float16: steps are skipped and the scale halved until gz fits; then θ moves, as the reference's does."""
    x, y = np.full((8, 3), 2.0), np.full((8, 2), 60.0)
    ends = []
    for device in ("cpu", "cuda"):
        net = MLP([3, 8, 2], "relu", "identity", precision="float16", device=device)
        trainer, thetas = Trainer(net, "mse", AdamW(lr=0.01)), []
        for _ in range(12):
            with np.errstate(over="ignore", invalid="ignore"):
                trainer.step(x, y)
            thetas.append(np.array(net._ops.to_host(net._theta)))
        slots = (Slot.LOSS_SCALE, Slot.SKIPPED, Slot.STEP, Slot.GOOD_STEPS, Slot.BAD_ROUND)
        moved = [not np.array_equal(a, b) for a, b in zip(thetas, thetas[1:])]
        ends.append(([net._ops.read_state(trainer._state, slot) for slot in slots], moved))
    assert ends[1] == ends[0]
    assert 0 < ends[0][0][1] < 11, "the case has skipped steps and applied ones"
    assert ends[0][1][:2] == [False, False]
    assert ends[0][1][-1]


@pytest.mark.parametrize("scale", [65536.0, 2.0**-14, 2.0**-15])
@pytest.mark.parametrize("norm", [1.0, np.inf])
def test_the_loss_scale_moves_as_the_reference_moves_it(gpu, norm, scale):
    """Down to its minimum, below which a gradient that does not fit is a bad round."""
    ends = []
    for device in ("cpu", "cuda"):
        net = MLP([1, 1], precision="float16", device=device)
        state = net._new_state()
        net._ops.write_state(state, {Slot.LOSS_SCALE: scale, Slot.GRADIENT_NORM: norm, Slot.ROUND: 4, Slot.COST: 0.5})
        net._ops.finish_step(3, state)
        ends.append(np.asarray(net._ops.to_host(state)))
    np.testing.assert_array_equal(ends[1], ends[0])
