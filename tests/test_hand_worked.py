"""Two small networks worked out with pencil and paper: every z, h, ŷ, L, J and every gradient, and one update.

The literals are the hand calculation, with the steps in the comments; nothing here was printed by the library. Weights
in units of ln 2 and ln 3 make softmax and sigmoid give fractions.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest

from gpu_mlp import L1, L2, MLP, SGD, Trainer, activations, losses, precision
from gpu_mlp.ops.interface import Slot
from gpu_mlp.ops.numpy_ops import NumpyOperations

LN2 = 0.6931471805599453
LN3 = 1.0986122886681098


@dataclass
class Worked:
    """A network with two layers, a batch of two rows, and what the hand calculation gives for it."""

    sizes: list[int]
    hidden: str
    output: str
    loss: str
    x: list
    y: list
    W: list
    b: list
    z: list  # of both layers
    h: list
    L: float
    gz: list
    gW: list
    gb: list
    gx: list

    def net(self, precision: str = "float64") -> MLP:
        net = MLP(self.sizes, self.hidden, self.output, precision=precision)
        for l in (0, 1):
            net.weights[l][...] = self.W[l]
            net.biases[l][...] = self.b[l]
        return net


# A. 2-3-2, relu and softmax, cross-entropy with the labels 1 and 0.
#
# Layer 0: z = W x + b
#   row 0, x = (1, 2):    1 + 2 − 2 = 1,    1 − 2 + 0 = −1,   −1 + 1 + 1/2 = 1/2     h = (1, 0, 1/2)
#   row 1, x = (2, −1):   2 − 1 − 2 = −1,   2 + 1 + 0 = 3,    −2 − 1/2 + 1/2 = −2    h = (0, 3, 0)
# Layer 1, in units of ln 2:
#   row 0:  1 + 0 + 1 + 2 = 4,   −1 + 0 + 2 + 0 = 1   exp z = 16, 2    ŷ = (16, 2) / 18 = (8/9, 1/9)    L = ln 9
#   row 1:  0 + 3 + 0 + 2 = 5,    0 + 6 + 0 + 0 = 6   exp z = 32, 64   ŷ = (32, 64) / 96 = (1/3, 2/3)   L = ln 3
# L = (2 ln 3 + ln 3) / 2
# gz[1] = (ŷ − y) / 2:  row 0: (8/9, 1/9 − 1) / 2 = (4/9, −4/9);   row 1: (1/3 − 1, 2/3) / 2 = (−1/3, 1/3)
# gb[1] = 4/9 − 1/3 = 1/9, and −1/9
# gW[1] = gzᵀ h, first row: 4/9 · (1, 0, 1/2) − 1/3 · (0, 3, 0) = (4/9, −1, 2/9); the second is its negative
# gh[0] = gz W, where both entries of gz differ in the sign alone: gz₀ · (W₀ − W₁) with W₀ − W₁ = (2, −1, −2) ln 2
#   row 0: 4/9 · (2, −1, −2) ln 2 = (8/9, −4/9, −8/9) ln 2;   row 1: −1/3 · (2, −1, −2) ln 2 = (−2/3, 1/3, 2/3) ln 2
# gz[0]: row 0 keeps the entries 0 and 2, where z > 0; row 1 keeps the entry 1
# gW[0] = gzᵀ x in units of ln 2: 8/9 · (1, 2);  1/3 · (2, −1);  −8/9 · (1, 2)
# gx = gz W in units of ln 2: row 0: 8/9 · (1, 1) − 8/9 · (−1, 1/2) = (16/9, 4/9);   row 1: 1/3 · (1, −1)
A = Worked(
    sizes=[2, 3, 2],
    hidden="relu",
    output="softmax",
    loss="cross_entropy",
    x=[[1, 2], [2, -1]],
    y=[1, 0],
    W=[[[1, 1], [1, -1], [-1, 1 / 2]], [[LN2, LN2, 2 * LN2], [-LN2, 2 * LN2, 4 * LN2]]],
    b=[[-2, 0, 1 / 2], [2 * LN2, 0]],
    z=[[[1, -1, 1 / 2], [-1, 3, -2]], [[4 * LN2, LN2], [5 * LN2, 6 * LN2]]],
    h=[[[1, 0, 1 / 2], [0, 3, 0]], [[8 / 9, 1 / 9], [1 / 3, 2 / 3]]],
    L=3 / 2 * LN3,
    gz=[[[8 / 9 * LN2, 0, -8 / 9 * LN2], [0, 1 / 3 * LN2, 0]], [[4 / 9, -4 / 9], [-1 / 3, 1 / 3]]],
    gW=[
        [[8 / 9 * LN2, 16 / 9 * LN2], [2 / 3 * LN2, -1 / 3 * LN2], [-8 / 9 * LN2, -16 / 9 * LN2]],
        [[4 / 9, -1, 2 / 9], [-4 / 9, 1, -2 / 9]],
    ],
    gb=[[8 / 9 * LN2, 1 / 3 * LN2, -8 / 9 * LN2], [1 / 9, -1 / 9]],
    gx=[[16 / 9 * LN2, 4 / 9 * LN2], [1 / 3 * LN2, -1 / 3 * LN2]],
)

# B. 2-2-1, sigmoid and identity, mean squared error.
#
# Layer 0, in units of ln 3, where σ(0) = 1/2, σ(ln 3) = 3/4 and σ(−ln 3) = 1/4:
#   row 0, x = (1, 2):    1 + 0 + 0 = 1,     1 − 2 + 1 = 0      h = (3/4, 1/2)
#   row 1, x = (−1, 1):  −1 + 0 + 0 = −1,   −1 − 1 + 1 = −1     h = (1/4, 1/4)
# Layer 1:  row 0: 4 · 3/4 − 2 · 1/2 + 1 = 3;   row 1: 4 · 1/4 − 2 · 1/4 + 1 = 3/2
# ŷ − y = 3 − 1 = 2 and 3/2 − 2 = −1/2;   L = (4 + 1/4) / 2 = 17/8
# gz[1] = 2 (ŷ − y) / 2 = 2 and −1/2;   gb[1] = 3/2
# gW[1] = 2 · (3/4, 1/2) − 1/2 · (1/4, 1/4) = (11/8, 7/8)
# gh[0] = gz W:  row 0: 2 · (4, −2) = (8, −4);   row 1: −1/2 · (4, −2) = (−2, 1)
# gz[0] = gh h (1 − h):  row 0: (8 · 3/16, −4 · 1/4) = (3/2, −1);   row 1: (−2 · 3/16, 1 · 3/16) = (−3/8, 3/16)
# gb[0] = (3/2 − 3/8, −1 + 3/16) = (9/8, −13/16)
# gW[0] = gzᵀ x:  3/2 · (1, 2) − 3/8 · (−1, 1) = (15/8, 21/8);   −1 · (1, 2) + 3/16 · (−1, 1) = (−19/16, −29/16)
# gx = gz W in units of ln 3:  3/2 · (1, 0) − 1 · (1, −1) = (1/2, 1);   −3/8 · (1, 0) + 3/16 · (1, −1) = (−3/16, −3/16)
B = Worked(
    sizes=[2, 2, 1],
    hidden="sigmoid",
    output="identity",
    loss="mse",
    x=[[1, 2], [-1, 1]],
    y=[[1], [2]],
    W=[[[LN3, 0], [LN3, -LN3]], [[4, -2]]],
    b=[[0, LN3], [1]],
    z=[[[LN3, 0], [-LN3, -LN3]], [[3], [3 / 2]]],
    h=[[[3 / 4, 1 / 2], [1 / 4, 1 / 4]], [[3], [3 / 2]]],
    L=17 / 8,
    gz=[[[3 / 2, -1], [-3 / 8, 3 / 16]], [[2], [-1 / 2]]],
    gW=[[[15 / 8, 21 / 8], [-19 / 16, -29 / 16]], [[11 / 8, 7 / 8]]],
    gb=[[9 / 8, -13 / 16], [3 / 2]],
    gx=[[1 / 2 * LN3, LN3], [-3 / 16 * LN3, -3 / 16 * LN3]],
)

both = pytest.mark.parametrize("case", [A, B], ids=["relu-softmax", "sigmoid-identity"])


def close(value: object, expected: object, rtol: float = 1e-14) -> None:
    """Equal but for a few roundings, against the largest entry: an exact 0 may come out as a rounding error."""
    value, expected = np.asarray(value, np.float64), np.asarray(expected, np.float64)
    assert value.shape == expected.shape
    assert np.isfinite(value).all()
    np.testing.assert_allclose(value, expected, rtol=0, atol=rtol * max(1.0, np.abs(expected).max()))


@both
def test_each_operation(case):
    ops = NumpyOperations(precision.get("float64"))
    f = [activations.get(case.hidden), activations.get(case.output)]
    loss = losses.get(case.loss)
    x, y = np.array(case.x, np.float64), np.array(case.y)
    W, b = [np.array(w, np.float64) for w in case.W], [np.array(v, np.float64) for v in case.b]
    state = np.zeros(len(Slot))
    state[Slot.LOSS_SCALE] = 1

    h, z = [x, None, None], [None, None]
    for l in (0, 1):
        h[l + 1], z[l] = np.empty((2, len(b[l]))), np.empty((2, len(b[l])))
        ops.affine_activation(h[l], W[l], b[l], f[l], h[l + 1], z[l], None, state)
        close(z[l], case.z[l])
        close(h[l + 1], case.h[l])

    ops.total_weight(loss, y, None, state)
    assert state[Slot.TOTAL_WEIGHT] == 2
    fused = (case.output, case.loss) in losses.FUSED
    gz, gb = [np.empty((2, len(v))) for v in b], [np.empty(len(v)) for v in b]
    ops.loss_and_gradient(loss, f[1], fused, z[1] if fused else h[2], z[1], y, None, gz[1], gb[1], False, state)
    close(state[Slot.COST], case.L)
    close(gz[1], case.gz[1])
    close(gb[1], case.gb[1])

    saved = {"h": h[1], "z": z[0]}[f[0].reads]
    ops.input_gradient(gz[1], W[1], f[0], saved, None, gz[0], gb[0], False, state)
    close(gz[0], case.gz[0])
    close(gb[0], case.gb[0])
    gx = np.empty((2, 2))
    ops.input_gradient(gz[0], W[0], activations.IDENTITY, None, None, gx, None, False, state)
    close(gx, case.gx)
    for l in (0, 1):
        gW = np.empty(W[l].shape)
        ops.weight_gradient(gz[l], h[l], gW, False)
        close(gW, case.gW[l])


@both
@pytest.mark.parametrize(("name", "rtol"), [("float64", 1e-14), ("float32", 1e-6)])
def test_the_network(case, name, rtol):
    """A handful of roundings of 1e-16 or 6e-8 each."""
    net = case.net(name)
    x, y = np.array(case.x, np.float64), np.array(case.y)
    close(net.forward(x), case.h[1], rtol)
    close(net.cost(x, y, case.loss), case.L, rtol)
    J, g = net.cost_and_gradients(x, y, case.loss)
    close(J, case.L, rtol)
    close(g.input, case.gx, rtol)
    for l in (0, 1):
        close(g.weights[l], case.gW[l], rtol)
        close(g.biases[l], case.gb[l], rtol)


def test_labels_and_their_rows_are_the_same():
    net, x = A.net(), np.array(A.x)
    rows = np.array([[0, 1], [1, 0]])
    J, g = net.cost_and_gradients(x, rows, "cross_entropy")
    close(J, A.L)
    close(g.weights[0], A.gW[0])


def test_l2_on_the_weights():
    """λΩ = 1/10 · ½ (1 + 1 + 1 + 1 + 1 + 1/4 + (1 + 1 + 4 + 1 + 4 + 16) ln² 2) and λ∇Ω = W / 10, biases untouched."""
    net, x, y = A.net(), np.array(A.x), np.array(A.y)
    expected = 3 / 2 * LN3 + 21 / 80 + 27 / 20 * LN2 * LN2
    close(net.cost(x, y, "cross_entropy", L2(1 / 10)), expected)
    J, g = net.cost_and_gradients(x, y, "cross_entropy", L2(1 / 10))
    close(J, expected)
    close(
        g.weights[0],
        [
            [8 / 9 * LN2 + 1 / 10, 16 / 9 * LN2 + 1 / 10],
            [2 / 3 * LN2 + 1 / 10, -1 / 3 * LN2 - 1 / 10],
            [-8 / 9 * LN2 - 1 / 10, -16 / 9 * LN2 + 1 / 20],
        ],
    )
    close(
        g.weights[1],
        [[4 / 9 + LN2 / 10, -1 + LN2 / 10, 2 / 9 + LN2 / 5], [-4 / 9 - LN2 / 10, 1 + LN2 / 5, -2 / 9 + 2 * LN2 / 5]],
    )
    close(g.biases[0], A.gb[0])
    close(g.biases[1], A.gb[1])
    close(g.input, A.gx)


def test_l1_on_everything():
    """λΩ = 1/4 (3 ln 3 + ln 3 + 6 + 1) = ln 3 + 7/4, and λ∇Ω = ± 1/4, but 0 where the entry is 0."""
    net, x, y = B.net(), np.array(B.x), np.array(B.y)
    J, g = net.cost_and_gradients(x, y, "mse", L1(1 / 4, on="all"))
    close(J, 17 / 8 + 7 / 4 + LN3)
    close(g.weights[0], [[15 / 8 + 1 / 4, 21 / 8], [-19 / 16 + 1 / 4, -29 / 16 - 1 / 4]])
    close(g.weights[1], [[11 / 8 + 1 / 4, 7 / 8 - 1 / 4]])
    close(g.biases[0], [9 / 8, -13 / 16 + 1 / 4])
    close(g.biases[1], [3 / 2 + 1 / 4])
    close(g.input, B.gx)


def test_sample_weights():
    """Weights 1 and 3: L = (1 · ln 9 + 3 · ln 3) / 4, and each row of gz[1] is wᵢ (ŷᵢ − yᵢ) / 4.

    Row 0: (8/9, −8/9) / 4 = (2/9, −2/9);   row 1: 3 · (−2/3, 2/3) / 4 = (−1/2, 1/2).
    gW[1], first row: 2/9 · (1, 0, 1/2) − 1/2 · (0, 3, 0) = (2/9, −3/2, 1/9).
    gz[0] = gz₀ (2, −1, −2) ln 2 through the masks: row 0: (4/9, 0, −4/9) ln 2;   row 1: (0, 1/2, 0) ln 2.
    """
    J, g = A.net().cost_and_gradients(np.array(A.x), np.array(A.y), "cross_entropy", sample_weight=[1, 3])
    close(J, 5 / 4 * LN3)
    close(g.weights[1], [[2 / 9, -3 / 2, 1 / 9], [-2 / 9, 3 / 2, -1 / 9]])
    close(g.biases[1], [2 / 9 - 1 / 2, 1 / 2 - 2 / 9])
    close(g.biases[0], [4 / 9 * LN2, 1 / 2 * LN2, -4 / 9 * LN2])
    # gx: row 0: (4/9 · (1, 1) − 4/9 · (−1, 1/2)) ln 2;   row 1: 1/2 · (1, −1) ln 2
    close(g.input, [[8 / 9 * LN2, 2 / 9 * LN2], [1 / 2 * LN2, -1 / 2 * LN2]])


def test_class_weights():
    """Class 0 weighs 4 and class 1 weighs 1, the labels being 1 and 0: wᵢ = 1 and 4, and L = Σ wᵢLᵢ / Σ wᵢ.

    L = (ln 9 + 4 ln 3) / 5 = 6/5 ln 3.  gz[1]: row 0: (8/9, −8/9) / 5;   row 1: 4 · (−2/3, 2/3) / 5.
    gb[1] = 8/45 − 24/45 = −16/45.
    """
    loss = losses.CrossEntropy(class_weight=[4, 1])
    J, g = A.net().cost_and_gradients(np.array(A.x), np.array(A.y), loss)
    close(J, 6 / 5 * LN3)
    close(g.biases[1], [-16 / 45, 16 / 45])
    # gW[1], first row: 8/45 · (1, 0, 1/2) − 24/45 · (0, 3, 0)
    close(g.weights[1], [[8 / 45, -8 / 5, 4 / 45], [-8 / 45, 8 / 5, -4 / 45]])


def test_label_smoothing():
    """With ε = 1/2 the target rows are 1/2 y + 1/4: (1/4, 3/4) for label 1 and (3/4, 1/4) for label 0.

    L = −(1/4 ln 8/9 + 3/4 ln 1/9 + 3/4 ln 1/3 + 1/4 ln 2/3) / 2, where −ln 8/9 = 2 ln 3 − 3 ln 2 and
    −ln 2/3 = ln 3 − ln 2: (1/2 + 3/2 + 3/4 + 1/4) ln 3 − (3/4 + 1/4) ln 2, over 2.
    gz[1]: row 0: (8/9 − 1/4) / 2 = 23/72;   row 1: (1/3 − 3/4) / 2 = −5/24.   gb[1] = 23/72 − 15/72 = 1/9.
    """
    loss = losses.CrossEntropy(label_smoothing=1 / 2)
    J, g = A.net().cost_and_gradients(np.array(A.x), np.array(A.y), loss)
    close(J, 3 / 2 * LN3 - LN2 / 2)
    close(g.biases[1], [1 / 9, -1 / 9])
    close(g.weights[1], [[23 / 72, -15 / 24, 23 / 144], [-23 / 72, 15 / 24, -23 / 144]])


@pytest.mark.parametrize("at_once", [True, False], ids=["apply_at_once", "stored"])
def test_one_step_of_sgd_with_l2(at_once):
    """W ← W − ½ (gW + W / 10) = 19/20 W − gW / 2 and b ← b − gb / 2.

    Applied at once, W of layer 1 changes before the gradient of layer 0 is worked out, which must not see that.
    """
    net = A.net()
    trainer = Trainer(net, "cross_entropy", SGD(lr=1 / 2), L2(1 / 10), apply_at_once=at_once)
    assert trainer.apply_at_once is at_once
    cost = trainer.step(np.array(A.x), np.array(A.y))
    close(float(cost), 3 / 2 * LN3 + 21 / 80 + 27 / 20 * LN2 * LN2)  # J before the step
    close(
        net.weights[0],
        [
            [19 / 20 - 4 / 9 * LN2, 19 / 20 - 8 / 9 * LN2],
            [19 / 20 - 1 / 3 * LN2, -19 / 20 + 1 / 6 * LN2],
            [-19 / 20 + 4 / 9 * LN2, 19 / 40 + 8 / 9 * LN2],
        ],
    )
    close(net.biases[0], [-2 - 4 / 9 * LN2, -1 / 6 * LN2, 1 / 2 + 4 / 9 * LN2])
    close(
        net.weights[1],
        [
            [19 / 20 * LN2 - 2 / 9, 19 / 20 * LN2 + 1 / 2, 19 / 10 * LN2 - 1 / 9],
            [-19 / 20 * LN2 + 2 / 9, 19 / 10 * LN2 - 1 / 2, 19 / 5 * LN2 + 1 / 9],
        ],
    )
    close(net.biases[1], [2 * LN2 - 1 / 18, 1 / 18])


@pytest.mark.parametrize("at_once", [True, False], ids=["apply_at_once", "stored"])
def test_one_step_of_sgd_with_l1_on_everything_and_weight_decay(at_once):
    """θ ← θ − ½ (g + ¼ sign θ + θ / 5) = 9/10 θ − g / 2 − sign θ / 8."""
    net = B.net()
    optimizer = SGD(lr=1 / 2, weight_decay=1 / 5)
    trainer = Trainer(net, "mse", optimizer, L1(1 / 4, on="all"), apply_at_once=at_once)
    trainer.step(np.array(B.x), np.array(B.y))
    close(
        net.weights[0],
        [
            [9 / 10 * LN3 - 15 / 16 - 1 / 8, -21 / 16],
            [9 / 10 * LN3 + 19 / 32 - 1 / 8, -9 / 10 * LN3 + 29 / 32 + 1 / 8],
        ],
    )
    close(net.weights[1], [[36 / 10 - 11 / 16 - 1 / 8, -18 / 10 - 7 / 16 + 1 / 8]])
    close(net.biases[0], [-9 / 16, 9 / 10 * LN3 + 13 / 32 - 1 / 8])
    close(net.biases[1], [9 / 10 - 3 / 4 - 1 / 8])


def test_two_steps_of_momentum():
    """One weight and one bias, so that the second gradient is a short calculation too.

    w = 1, b = 0, x = 2, y = 1, half_mse, η = 1/4, μ = 1/2:
    step 1: ŷ − y = 1;  gw = 2, gb = 1;  m = (2, 1);  w = 1 − 1/2 = 1/2, b = −1/4
    step 2: ŷ − y = 1 − 1/4 − 1 = −1/4;  gw = −1/2, gb = −1/4;  m = (1 − 1/2, 1/2 − 1/4) = (1/2, 1/4);
            w = 1/2 − 1/8 = 3/8, b = −1/4 − 1/16 = −5/16
    """
    net = MLP([1, 1], precision="float64")
    net.weights[0][...] = 1
    trainer = Trainer(net, "half_mse", SGD(lr=1 / 4, momentum=1 / 2))
    x, y = np.array([[2.0]]), np.array([[1.0]])
    assert float(trainer.step(x, y)) == 1 / 2
    assert (net.weights[0].item(), net.biases[0].item()) == (1 / 2, -1 / 4)
    assert float(trainer.step(x, y)) == 1 / 32
    assert (net.weights[0].item(), net.biases[0].item()) == (3 / 8, -5 / 16)


def test_a_clipped_step():
    """ŷ − y = 1 and x = (2, 2): the gradient (2, 2, 1) has the norm 3, so clip_norm 1/2 divides it by 6."""
    net = MLP([2, 1], precision="float64")
    net.weights[0][...] = 0
    net.biases[0][...] = 1
    trainer = Trainer(net, "half_mse", SGD(lr=1.0), clip_norm=1 / 2)
    trainer.step(np.array([[2.0, 2.0]]), np.array([[0.0]]))
    # PyTorch's clip divides by the norm + 1e-6, and so does this one: 3e-7 off
    close(net.weights[0], [[-1 / 3, -1 / 3]], rtol=1e-6)
    close(net.biases[0], [1 - 1 / 6], rtol=1e-6)
