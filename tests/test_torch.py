"""PyTorch as an independent yardstick, in float64: passes, losses, penalties, every shared optimizer and schedule.

Passes agree to 1e-10 and fifty updates to 1e-9, relative to each tensor's norm: both sides round at 1e-16, and what
separates them is the order of sums, carried through a few layers or fifty steps. Skipped where torch is not installed.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest

from gpu_mlp import L1, L2, MLP, SGD, Adam, AdamW, CrossEntropy, ElasticNet, Trainer
from gpu_mlp.activations import ACTIVATIONS, Scratch
from gpu_mlp.losses import LOSSES, NLL, Huber
from gpu_mlp.optimizers import (
    OPTIMIZERS,
    Adadelta,
    Adagrad,
    Adamax,
    Muon,
    NAdam,
    Optimizer,
    RAdam,
    RMSprop,
)
from gpu_mlp.schedules import (
    Cosine,
    Exponential,
    OneCycle,
    PlateauState,
    ReduceOnPlateau,
    Schedule,
    StepDecay,
    Warmup,
)

torch = pytest.importorskip("torch", reason="the comparison with PyTorch needs torch")
nn, F = torch.nn, torch.nn.functional
ROWS = 12


class Function(nn.Module):
    """A plain function as a module, for the activations that torch has as functions alone."""

    def __init__(self, f: Callable) -> None:
        super().__init__()
        self.f = f

    def forward(self, z):
        return self.f(z)


MODULES = {
    "identity": nn.Identity(),
    "relu": nn.ReLU(),
    "leaky_relu": nn.LeakyReLU(),
    "elu": nn.ELU(),
    "selu": nn.SELU(),
    "celu": nn.CELU(),
    "gelu": nn.GELU(),
    "gelu_tanh": nn.GELU(approximate="tanh"),
    "silu": nn.SiLU(),
    "mish": nn.Mish(),
    "tanh": nn.Tanh(),
    "sigmoid": nn.Sigmoid(),
    "softplus": nn.Softplus(threshold=700),  # torch's default turns into the identity at 20, which is 2e-9 off
    "softsign": nn.Softsign(),
    "hardtanh": nn.Hardtanh(),
    "hardsigmoid": Function(lambda z: F.relu6(z + 3) / 6),  # torch's own f′ is 1/6 rounded to float32, also in float64
    "hardswish": nn.Hardswish(),
    "relu6": nn.ReLU6(),
    "relu_squared": Function(lambda z: torch.square(F.relu(z))),
    "sine": Function(torch.sin),
    "exp": Function(torch.exp),
    "softmax": nn.Softmax(dim=1),
    "log_softmax": nn.LogSoftmax(dim=1),
}


def tensor(array: object) -> torch.Tensor:
    """A float64 (or int64) copy."""
    array = np.asarray(array)
    return torch.tensor(array, dtype=torch.int64 if array.dtype.kind in "iu" else torch.float64)


def random_net(sizes: list[int], hidden: str | list[str], output: str = "identity", seed: int = 0) -> MLP:
    rng = np.random.default_rng(seed)
    net = MLP(sizes, hidden, output, precision="float64")
    for W, b in zip(net.weights, net.biases):
        W[...] = rng.normal(size=W.shape) / math.sqrt(W.shape[1])
        b[...] = rng.normal(size=b.shape) * 0.5
    return net


def same_in_torch(net: MLP, output: bool = True) -> nn.Sequential:
    """The network as a torch.nn.Sequential with the same numbers; without ``output`` it ends at z."""
    layers: list[nn.Module] = []
    for W, b, f in zip(net.weights, net.biases, [*net.activation, net.output]):
        linear = nn.Linear(W.shape[1], W.shape[0], dtype=torch.float64)
        linear.weight.data, linear.bias.data = tensor(W), tensor(b)
        layers += [linear, MODULES[f]]
    return nn.Sequential(*(layers if output else layers[:-1]))


def agree(ours: object, theirs: object, rtol: float = 1e-10, what: str = "") -> None:
    """‖ours − theirs‖ ≤ rtol ‖theirs‖, everything finite and something not zero."""
    ours = np.asarray(ours, np.float64)
    theirs = theirs.detach().numpy() if isinstance(theirs, torch.Tensor) else np.asarray(theirs, np.float64)
    assert ours.shape == theirs.shape, what
    assert np.isfinite(ours).all(), what
    assert np.isfinite(theirs).all(), what
    size = np.linalg.norm(theirs)
    assert size > 0, f"{what}: nothing to compare"
    error = np.linalg.norm(ours - theirs) / size
    assert error <= rtol, f"{what}: off by {error:.2e}"


def check_against_torch(net, x, y, loss, torch_loss, *, regularizer=None, sample_weight=None, output=True):
    """ŷ, J and the gradient with respect to every W, every b and x."""
    model = same_in_torch(net, output)
    xt = tensor(x).requires_grad_()
    J = torch_loss(model(xt))
    if regularizer is not None:
        J = J + torch_penalty(model, regularizer)
    J.backward()
    cost, g = net.cost_and_gradients(x, y, loss, regularizer, sample_weight)
    agree(cost, J, what="J")
    agree(net.cost(x, y, loss, regularizer, sample_weight), J, what="J without gradients")
    agree(net.forward(x), same_in_torch(net)(xt), what="ŷ")
    agree(g.input, xt.grad, what="gx")
    linears = [layer for layer in model if isinstance(layer, nn.Linear)]
    for l, linear in enumerate(linears):
        agree(g.weights[l], linear.weight.grad, what=f"gW[{l}]")
        agree(g.biases[l], linear.bias.grad, what=f"gb[{l}]")


def torch_penalty(model: nn.Module, regularizer: ElasticNet) -> torch.Tensor:
    covered = [p for p in model.parameters() if p.ndim == 2 or regularizer.on == "all"]
    return sum(regularizer.l1 * p.abs().sum() + regularizer.l2 / 2 * p.square().sum() for p in covered)


@pytest.fixture(autouse=True)
def one_thread():
    """The networks are small: handing them to threads costs more than it brings."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# --- the passes --------------------------------------------------------------------------------------------------


def test_every_activation_has_its_module():
    assert set(MODULES) == set(ACTIVATIONS)


@pytest.mark.parametrize("name", MODULES)
def test_every_hidden_activation(name):
    rng = np.random.default_rng(1)
    net = random_net([5, 17, 9, 3], name, seed=1)
    x, y = rng.normal(size=(ROWS, 5)) * (1 if name == "exp" else 3), rng.normal(size=(ROWS, 3))
    check_against_torch(net, x, y, "mse", lambda y_hat: F.mse_loss(y_hat, tensor(y)))


@pytest.mark.parametrize("name", MODULES)
def test_every_output_activation(name):
    rng = np.random.default_rng(2)
    net = random_net([5, 8, 4], "tanh", name, seed=2)
    x, y = rng.normal(size=(ROWS, 5)), rng.normal(size=(ROWS, 4))
    check_against_torch(net, x, y, "mse", lambda y_hat: F.mse_loss(y_hat, tensor(y)))


@pytest.mark.parametrize("name", MODULES)
def test_every_activation_where_it_has_a_kink(name):
    """At a kink f′ is a convention; it is PyTorch's here (for hardswish, that of the releases since 2.8)."""
    points = [-6.0, -3.0, -1.0, -0.0, 0.0, 1.0, 3.0, 6.0]
    if name == "hardswish" and tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 8):
        points = [point for point in points if abs(point) != 3]
    z = np.array([points])
    zt = tensor(z).requires_grad_()
    g = np.linspace(0.5, 2, z.size).reshape(z.shape)
    MODULES[name](zt).backward(tensor(g))
    f = ACTIVATIONS[name]
    t = Scratch(*(np.empty(z.shape) for _ in range(3)), np.empty(z.shape, bool))
    h = np.empty(z.shape)
    f.f(z, h, t)
    f.df(g, {"h": h, "z": z, "none": None}[f.reads], t)
    np.testing.assert_allclose(g, zt.grad.numpy(), rtol=1e-12, atol=1e-12)


def hinge(y_hat, signs):
    return torch.clamp(1 - tensor(signs) * y_hat, min=0).mean()


REAL = {
    "mse": lambda y: lambda y_hat: F.mse_loss(y_hat, tensor(y)),
    "half_mse": lambda y: lambda y_hat: F.mse_loss(y_hat, tensor(y)) / 2,
    "mae": lambda y: lambda y_hat: F.l1_loss(y_hat, tensor(y)),
    "huber": lambda y: lambda y_hat: F.huber_loss(y_hat, tensor(y)),
    "log_cosh": lambda y: lambda y_hat: torch.log(torch.cosh(y_hat - tensor(y))).mean(),
    "hinge": lambda y: lambda y_hat: hinge(y_hat, y),
}


@pytest.mark.parametrize("output", ["identity", "tanh", "softmax"])
@pytest.mark.parametrize("loss", REAL)
def test_losses_of_real_targets(loss, output):
    rng = np.random.default_rng(3)
    net = random_net([5, 8, 4], "gelu", output, seed=3)
    x = rng.normal(size=(ROWS, 5))
    y = rng.choice([-1.0, 1.0], (ROWS, 4)) if loss == "hinge" else rng.normal(size=(ROWS, 4)) * 2
    check_against_torch(net, x, y, loss, REAL[loss](y))


@pytest.mark.parametrize("delta", [0.05, 0.7, 3.0])
def test_huber(delta):
    rng = np.random.default_rng(4)
    net, x, y = random_net([5, 8, 4], "gelu", seed=4), rng.normal(size=(ROWS, 5)), rng.normal(size=(ROWS, 4))
    check_against_torch(net, x, y, Huber(delta), lambda y_hat: F.huber_loss(y_hat, tensor(y), delta=delta))


@pytest.mark.parametrize("output", ["sigmoid", "softmax"])
def test_binary_cross_entropy_of_probabilities(output):
    """BCELoss: on softmax this is the general path, through ŷ and the Jacobian."""
    rng = np.random.default_rng(5)
    net, x, y = random_net([5, 8, 4], "silu", output, 5), rng.normal(size=(ROWS, 5)), rng.uniform(size=(ROWS, 4))
    check_against_torch(net, x, y, "binary_cross_entropy", lambda y_hat: nn.BCELoss()(y_hat, tensor(y)))


def test_binary_cross_entropy_with_logits():
    rng = np.random.default_rng(6)
    net, x, y = (
        random_net([5, 8, 4], "silu", "sigmoid", 6),
        rng.normal(size=(ROWS, 5)) * 20,
        rng.integers(0, 2, (ROWS, 4)),
    )
    loss = nn.BCEWithLogitsLoss()
    check_against_torch(net, x, y, "binary_cross_entropy", lambda z: loss(z, tensor(y.astype(float))), output=False)


@pytest.mark.parametrize("output", ["softplus", "sigmoid", "softmax", "exp"])
def test_poisson_of_rates(output):
    """PoissonNLLLoss without its ε, which is there for rates of 0."""
    rng = np.random.default_rng(7)
    net, x, y = random_net([5, 8, 4], "elu", output, 7), rng.normal(size=(ROWS, 5)), rng.poisson(2, (ROWS, 4))
    loss = nn.PoissonNLLLoss(log_input=False, eps=0)
    check_against_torch(net, x, y, "poisson", lambda y_hat: loss(y_hat, tensor(y.astype(float))))


def test_poisson_of_log_rates():
    rng = np.random.default_rng(8)
    net, x, y = random_net([5, 8, 4], "elu", "exp", 8), rng.normal(size=(ROWS, 5)), rng.poisson(2, (ROWS, 4))
    loss = nn.PoissonNLLLoss(log_input=True)
    check_against_torch(net, x, y, "poisson", lambda z: loss(z, tensor(y.astype(float))), output=False)


CLASS_WEIGHT = [0.3, 1.0, 2.5, 0.7]


def class_targets(labels: bool, rng: np.random.Generator) -> np.ndarray:
    if labels:
        return rng.integers(0, 4, ROWS)
    rows = rng.uniform(0.05, 1, (ROWS, 4))
    return rows / rows.sum(axis=1, keepdims=True)


@pytest.mark.parametrize("labels", [True, False], ids=["labels", "rows"])
@pytest.mark.parametrize("class_weight", [None, CLASS_WEIGHT], ids=["", "weight"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
def test_cross_entropy(smoothing, class_weight, labels):
    rng = np.random.default_rng(9)
    net, x, y = random_net([5, 8, 4], "relu", "softmax", 9), rng.normal(size=(ROWS, 5)), class_targets(labels, rng)
    weight = None if class_weight is None else tensor(class_weight)
    theirs = nn.CrossEntropyLoss(weight=weight, label_smoothing=smoothing)
    ours = CrossEntropy(label_smoothing=smoothing, class_weight=class_weight)
    check_against_torch(net, x, y, ours, lambda z: theirs(z, tensor(y)), output=False)


@pytest.mark.parametrize("class_weight", [None, CLASS_WEIGHT], ids=["", "weight"])
def test_nll(class_weight):
    rng = np.random.default_rng(10)
    net, x, y = random_net([5, 8, 4], "relu", "log_softmax", 10), rng.normal(size=(ROWS, 5)), class_targets(True, rng)
    theirs = nn.NLLLoss(weight=None if class_weight is None else tensor(class_weight))
    check_against_torch(net, x, y, NLL(class_weight), lambda y_hat: theirs(y_hat, tensor(y)))


def test_nll_of_rows():
    """With rows it is cross-entropy with class probabilities, which torch takes from z."""
    rng = np.random.default_rng(11)
    net, x, y = random_net([5, 8, 4], "relu", "log_softmax", 11), rng.normal(size=(ROWS, 5)), class_targets(False, rng)
    theirs = nn.CrossEntropyLoss(weight=tensor(CLASS_WEIGHT))
    check_against_torch(net, x, y, NLL(CLASS_WEIGHT), lambda z: theirs(z, tensor(y)), output=False)


@pytest.mark.parametrize(
    "regularizer",
    [L1(0.2), L2(0.3), ElasticNet(0.1, 0.2), L1(0.2, "all"), L2(0.3, "all"), ElasticNet(0.1, 0.2, "all")],
    ids=lambda r: f"{r.l1}-{r.l2}-{r.on}",
)
def test_penalties(regularizer):
    rng = np.random.default_rng(12)
    net, x, y = random_net([5, 8, 4], "mish", seed=12), rng.normal(size=(ROWS, 5)), rng.normal(size=(ROWS, 4))
    check_against_torch(net, x, y, "mse", lambda y_hat: F.mse_loss(y_hat, tensor(y)), regularizer=regularizer)


@pytest.mark.parametrize("loss", REAL)
def test_sample_weights_of_real_targets(loss):
    rng = np.random.default_rng(13)
    net, x, w = random_net([5, 8, 4], "mish", seed=13), rng.normal(size=(ROWS, 5)), rng.uniform(0, 3, ROWS)
    y = rng.choice([-1.0, 1.0], (ROWS, 4)) if loss == "hinge" else rng.normal(size=(ROWS, 4)) * 2

    def weighted(y_hat):
        rows = torch.stack([REAL[loss](y[i : i + 1])(y_hat[i : i + 1]) for i in range(ROWS)])
        return (tensor(w) * rows).sum() / w.sum()

    check_against_torch(net, x, y, loss, weighted, sample_weight=w)


@pytest.mark.parametrize("labels", [True, False], ids=["labels", "rows"])
@pytest.mark.parametrize("class_weight", [None, CLASS_WEIGHT], ids=["", "weight"])
def test_sample_weights_of_classes(class_weight, labels):
    """Σ wᵢLᵢ / Σ wᵢ, where with labels wᵢ takes in the class's weight, as CrossEntropyLoss's own mean does."""
    rng = np.random.default_rng(14)
    net, x, y = random_net([5, 8, 4], "mish", "softmax", 14), rng.normal(size=(ROWS, 5)), class_targets(labels, rng)
    w = rng.uniform(0, 3, ROWS)
    weight = None if class_weight is None else tensor(class_weight)
    theirs = nn.CrossEntropyLoss(weight=weight, reduction="none", label_smoothing=0.1)
    total = (w * np.array(class_weight)[y]).sum() if labels and class_weight else w.sum()
    check_against_torch(
        net, x, y, CrossEntropy(label_smoothing=0.1, class_weight=class_weight),
        lambda z: (tensor(w) * theirs(z, tensor(y))).sum() / total, sample_weight=w, output=False,
    )  # fmt: skip


def test_every_loss_is_compared_above():
    assert set(LOSSES) == {*REAL, "poisson", "binary_cross_entropy", "cross_entropy", "nll"}


def test_float32_follows_torch_in_float32():
    """A float32 dot product of 64 terms is good for about 1e-6."""
    rng = np.random.default_rng(15)
    net64 = random_net([20, 64, 32, 5], ["gelu", "tanh"], "softmax", 15)
    net = MLP([20, 64, 32, 5], ["gelu", "tanh"], "softmax", precision="float32")
    for l in range(3):
        net.weights[l][...], net.biases[l][...] = net64.weights[l], net64.biases[l]
    x, y = rng.normal(size=(64, 20)).astype(np.float32), rng.integers(0, 5, 64)
    model = same_in_torch(net, output=False).float()
    F.cross_entropy(model(torch.tensor(x)), torch.tensor(y)).backward()
    _, g = net.cost_and_gradients(x, y, "cross_entropy")
    for l, linear in enumerate(layer for layer in model if isinstance(layer, nn.Linear)):
        agree(g.weights[l], linear.weight.grad.double(), 1e-5)
        agree(g.biases[l], linear.bias.grad.double(), 1e-5)


# --- the optimizers ------------------------------------------------------------------------------------------------


@pytest.fixture
def default_float64():
    """torch keeps NAdam's running product of the μ in the default dtype, and float32 would be good for 1e-7 only."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


Steps = Callable[[nn.Sequential], list]
SHARED: list[tuple[str, Optimizer, Callable, dict]] = [
    (name, ours, theirs, options)
    for name, ours, theirs, option_sets in [
        (
            "sgd",
            SGD,
            torch.optim.SGD,
            [
                {},
                {"lr": 0.1},
                {"lr": 0.1, "weight_decay": 0.01},
                {"lr": 0.05, "momentum": 0.9},
                {"lr": 0.05, "momentum": 0.9, "dampening": 0.3},
                {"lr": 0.05, "momentum": 0.9, "nesterov": True},
                {"lr": 0.05, "momentum": 0.8, "nesterov": True, "weight_decay": 0.02},
                {"lr": 0.05, "momentum": 0.7, "dampening": 0.5, "weight_decay": 0.02},
            ],
        ),
        (
            "adam",
            Adam,
            torch.optim.Adam,
            [
                {},
                {"lr": 0.02, "betas": (0.8, 0.95), "eps": 1e-4},
                {"lr": 0.02, "weight_decay": 0.1},
                {"lr": 0.02, "amsgrad": True},
                {"lr": 0.02, "amsgrad": True, "weight_decay": 0.1, "betas": (0.5, 0.6)},
            ],
        ),
        (
            "adamw",
            AdamW,
            torch.optim.AdamW,
            [
                {},
                {"lr": 0.02, "weight_decay": 0.0},
                {"lr": 0.02, "weight_decay": 0.5, "betas": (0.8, 0.95), "eps": 1e-4},
                {"lr": 0.02, "weight_decay": 0.5, "amsgrad": True, "betas": (0.5, 0.6)},
            ],
        ),
        (
            "nadam",
            NAdam,
            torch.optim.NAdam,
            [
                {},
                {"lr": 0.02, "weight_decay": 0.1, "momentum_decay": 0.02},
                {"lr": 0.02, "weight_decay": 0.1, "decoupled_weight_decay": True, "betas": (0.8, 0.95)},
            ],
        ),
        (
            "radam",
            RAdam,
            torch.optim.RAdam,
            [
                {},
                {"lr": 0.02, "weight_decay": 0.1},
                {"lr": 0.02, "weight_decay": 0.1, "decoupled_weight_decay": True},
                {"lr": 0.02, "betas": (0.7, 0.9), "eps": 1e-4},
                {"lr": 0.02, "betas": (0.9, 0.5)},  # whose rectifier never starts
            ],
        ),
        (
            "adamax",
            Adamax,
            torch.optim.Adamax,
            [{}, {"lr": 0.02, "weight_decay": 0.1, "betas": (0.8, 0.9), "eps": 1e-3}],
        ),
        (
            "adagrad",
            Adagrad,
            torch.optim.Adagrad,
            [
                {},
                {"lr": 0.1, "lr_decay": 0.05, "weight_decay": 0.1},
                {"lr": 0.1, "initial_accumulator_value": 0.3, "eps": 1e-3},
            ],
        ),
        (
            "rmsprop",
            RMSprop,
            torch.optim.RMSprop,
            [
                {},
                {"lr": 0.005, "alpha": 0.9, "weight_decay": 0.1, "eps": 1e-4},
                {"lr": 0.005, "centered": True, "eps": 1e-3},
                {"lr": 0.005, "momentum": 0.8},
                {"lr": 0.005, "momentum": 0.8, "centered": True, "weight_decay": 0.1, "eps": 1e-3},
            ],
        ),
        (
            "adadelta",
            Adadelta,
            torch.optim.Adadelta,
            [{}, {"lr": 0.5, "rho": 0.8, "eps": 1e-4, "weight_decay": 0.1}],
        ),
    ]
    for options in option_sets
]
AS_TORCH = [(ours, theirs, options) for _, ours, theirs, options in SHARED]
names = [f"{name}-{'-'.join(f'{k}={v}' for k, v in options.items())}" for name, _, _, options in SHARED]


def problem() -> tuple[MLP, list, list]:
    """A network and five batches, which the fifty steps take in turn."""
    rng = np.random.default_rng(30)
    net = random_net([6, 10, 7, 4], ["tanh", "gelu"], "softmax", 30)
    return net, [rng.normal(size=(16, 6)) for _ in range(5)], [rng.integers(0, 4, 16) for _ in range(5)]


def follow(trainer: Trainer, optimizers: Callable, clip_norm: float | None = None, steps: int = 50) -> None:
    """Take the same steps with both; after each, the cost, and at the end every W and b must agree."""
    net, xs, ys = trainer.net, *problem()[1:]
    model = same_in_torch(net, output=False)
    before = np.array(net.theta)
    theirs = optimizers(model)
    for i in range(steps):
        x, y = xs[i % 5], ys[i % 5]
        cost = F.cross_entropy(model(tensor(x)), tensor(y))
        for optimizer in theirs:
            optimizer.zero_grad()
        cost.backward()
        if clip_norm is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip_norm)
        for optimizer in theirs:
            optimizer.step()
        agree(float(trainer.step(x, y)), cost, 1e-9, f"J of step {i + 1}")
    assert np.linalg.norm(net.theta - before) > 1e-3 * np.linalg.norm(before)  # it did go somewhere
    for l, linear in enumerate(layer for layer in model if isinstance(layer, nn.Linear)):
        agree(net.weights[l], linear.weight, 1e-9, f"W[{l}]")
        agree(net.biases[l], linear.bias, 1e-9, f"b[{l}]")


@pytest.mark.parametrize(("ours", "theirs", "options"), AS_TORCH, ids=names)
def test_fifty_steps(ours, theirs, options, default_float64):
    """With the options left out, the defaults are compared as well; torch's SGD has had one for lr since 2.3."""
    follow(Trainer(problem()[0], optimizer=ours(**options)), lambda model: [theirs(model.parameters(), **options)])


@pytest.mark.parametrize("plain", [{"lr": 0.1}, {"lr": 0.1, "weight_decay": 0.05}])
def test_fifty_steps_with_a_stored_gradient(plain):
    """Plain SGD is applied at once where nothing else is asked for; stored and then applied it is the same rule."""
    trainer = Trainer(problem()[0], optimizer=SGD(**plain), apply_at_once=False)
    follow(trainer, lambda model: [torch.optim.SGD(model.parameters(), **plain)])


def test_every_optimizer_is_compared():
    """Lion is not in torch, and L-BFGS is SciPy's."""
    compared = {ours for ours, _, _ in AS_TORCH}
    assert compared | {Muon} == set(OPTIMIZERS.values()) - {OPTIMIZERS["lion"], OPTIMIZERS["lbfgs"]}


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this release of torch has no Muon")
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"lr": 0.02},
        {"lr": 0.02, "nesterov": False, "momentum": 0.8, "weight_decay": 0.5},
        {"lr": 0.02, "adjust_lr_fn": "match_rms_adamw"},
        {"lr": 0.02, "ns_steps": 3, "ns_coefficients": (2.0, -1.5, 0.5), "eps": 1e-3},
    ],
    ids=str,
)
def test_muon(options, monkeypatch):
    """torch rounds to bfloat16 before the Newton-Schulz steps and the library does not, so that cast is switched off.

    A clone stands in for it: the steps that follow overwrite their input, which the cast protects.
    """
    monkeypatch.setattr(torch.Tensor, "bfloat16", lambda matrix: matrix.clone())
    adamw = {"lr": 3e-3, "weight_decay": 0.1}

    def optimizers(model):
        matrices = [p for p in model.parameters() if p.ndim == 2]
        rest = [p for p in model.parameters() if p.ndim != 2]
        return [torch.optim.Muon(matrices, **options), torch.optim.AdamW(rest, **adamw)]

    follow(Trainer(problem()[0], optimizer=Muon(**options, adamw=AdamW(**adamw))), optimizers)


@pytest.mark.parametrize("clip_norm", [1e-2, 0.5, 100.0])
@pytest.mark.parametrize("options", [{"lr": 0.1}, {"lr": 0.1, "momentum": 0.9}], ids=["plain", "momentum"])
def test_clipping(clip_norm, options):
    """Always, sometimes and never at work."""
    trainer = Trainer(problem()[0], optimizer=SGD(**options), clip_norm=clip_norm)
    follow(trainer, lambda model: [torch.optim.SGD(model.parameters(), **options)], clip_norm)


def test_clipping_takes_the_penalty_in():
    """The norm that is clipped is that of ∂J/∂θ, λ∇Ω included, as it is when the penalty is part of torch's loss."""
    net, xs, ys = problem()
    model = same_in_torch(net, output=False)
    theirs = torch.optim.SGD(model.parameters(), lr=0.1)
    regularizer = ElasticNet(0.05, 0.1, on="all")
    trainer = Trainer(net, optimizer=SGD(lr=0.1), regularizer=regularizer, clip_norm=0.3)
    for i in range(20):
        theirs.zero_grad()
        J = F.cross_entropy(model(tensor(xs[i % 5])), tensor(ys[i % 5])) + torch_penalty(model, regularizer)
        J.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 0.3)
        assert norm > 0.3
        theirs.step()
        agree(float(trainer.step(xs[i % 5], ys[i % 5])), J, 1e-9)
    for l, linear in enumerate(layer for layer in model if isinstance(layer, nn.Linear)):
        agree(net.weights[l], linear.weight, 1e-9)


# --- the schedules -------------------------------------------------------------------------------------------------


def torch_rates(make: Callable, lr: float = 0.3, steps: int = 60) -> list[float]:
    """The learning rate of each of the first ``steps`` updates."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=lr)
    scheduler = make(optimizer)
    rates = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


S = torch.optim.lr_scheduler


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (StepDecay(7), lambda o: S.StepLR(o, 7)),
        (StepDecay(1, gamma=0.9), lambda o: S.StepLR(o, 1, gamma=0.9)),
        (Exponential(0.93), lambda o: S.ExponentialLR(o, 0.93)),
        (Cosine(length=59), lambda o: S.CosineAnnealingLR(o, 59)),
        (Cosine(length=80, lr_min=0.02), lambda o: S.CosineAnnealingLR(o, 80, eta_min=0.02)),
        (OneCycle(length=60), lambda o: S.OneCycleLR(o, 0.3, 60, cycle_momentum=False)),
        (
            OneCycle(length=60, anneal="linear"),
            lambda o: S.OneCycleLR(o, 0.3, 60, anneal_strategy="linear", cycle_momentum=False),
        ),
        (
            OneCycle(length=75, pct_start=0.11, div_factor=10, final_div_factor=50),
            lambda o: S.OneCycleLR(
                o, 0.3, 75, pct_start=0.11, div_factor=10, final_div_factor=50, cycle_momentum=False
            ),
        ),
        (OneCycle(length=61, pct_start=0), lambda o: S.OneCycleLR(o, 0.3, 61, pct_start=0.0, cycle_momentum=False)),
        (Warmup(10), lambda o: S.LinearLR(o, 1 / 3, total_iters=10)),
        (Warmup(25, start_factor=0.01), lambda o: S.LinearLR(o, 0.01, total_iters=25)),
        (Warmup(1, start_factor=0.5), lambda o: S.LinearLR(o, 0.5, total_iters=1)),
        (
            Warmup(10, then=Cosine(length=50), start_factor=0.1),
            lambda o: S.SequentialLR(
                o, [S.LinearLR(o, 0.1, total_iters=10), S.CosineAnnealingLR(o, 50)], milestones=[10]
            ),
        ),
        (
            Warmup(8, then=StepDecay(5, gamma=0.5)),
            lambda o: S.SequentialLR(o, [S.LinearLR(o, total_iters=8), S.StepLR(o, 5, gamma=0.5)], milestones=[8]),
        ),
    ],
    ids=lambda value: repr(value) if isinstance(value, Schedule) else "",
)
@pytest.mark.filterwarnings("ignore:The epoch parameter")  # torch's SequentialLR calls its own deprecated form
def test_schedules(ours, theirs):
    """torch multiplies from step to step where the library has closed forms: sixty roundings."""
    np.testing.assert_allclose([ours.at(0.3, t, 0) for t in range(60)], torch_rates(theirs), rtol=1e-12, atol=1e-17)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"patience": 0},
        {"patience": 3, "factor": 0.5},
        {"patience": 1, "factor": 0.5, "threshold": 0.0},
        {"patience": 2, "factor": 0.5, "cooldown": 4},
        {"patience": 1, "factor": 0.5, "threshold": 0.05},
        {"patience": 1, "factor": 0.5, "threshold": 0.05, "threshold_mode": "abs"},
        {"patience": 0, "factor": 0.3, "lr_min": 0.01},
        {"patience": 0, "factor": 0.3, "cooldown": 1, "lr_min": 0.01, "threshold": 0.2, "threshold_mode": "abs"},
    ],
    ids=str,
)
@pytest.mark.parametrize("seed", range(4))
def test_reduce_on_plateau(options, seed):
    """On costs that fall, stall and jump. torch's eps, which ignores cuts of less than 1e-8, is switched off."""
    rng = np.random.default_rng(seed)
    costs = np.exp(-np.arange(60) / 15) + rng.normal(size=60) * 0.05 + 0.3
    costs[20:30] = costs[:20].min()  # as good as the best is no improvement
    schedule, seen = ReduceOnPlateau(**options), PlateauState()
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.3)
    theirs_options = {"min_lr" if key == "lr_min" else key: value for key, value in options.items()}
    theirs = S.ReduceLROnPlateau(optimizer, **theirs_options, eps=0)
    rates = []
    for cost in costs:
        seen.observe(schedule, float(cost))
        theirs.step(float(cost))
        rates.append(optimizer.param_groups[0]["lr"])
        assert seen.reduce(schedule, 0.3) == pytest.approx(rates[-1], rel=1e-12, abs=0)
    assert options in ({}, {"patience": 3, "factor": 0.5}) or rates[-1] < 0.3


def test_a_schedule_at_work_in_the_trainer():
    net, xs, ys = problem()
    model = same_in_torch(net, output=False)
    theirs = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9)
    scheduler = S.OneCycleLR(theirs, 0.2, 40, cycle_momentum=False)
    trainer = Trainer(net, optimizer=SGD(lr=0.2, momentum=0.9), schedule=OneCycle(length=40))
    for i in range(40):
        theirs.zero_grad()
        F.cross_entropy(model(tensor(xs[i % 5])), tensor(ys[i % 5])).backward()
        theirs.step()
        scheduler.step() if i < 39 else None
        trainer.step(xs[i % 5], ys[i % 5])
    for l, linear in enumerate(layer for layer in model if isinstance(layer, nn.Linear)):
        agree(net.weights[l], linear.weight, 1e-9)


# --- the model file --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["float32", "float64"])
def test_a_model_file_is_the_state_dict_of_a_sequential(tmp_path, precision):
    """A Sequential of Linear and activation in turn numbers its Linears 0, 2, 4, …, and so does the file."""
    safetensors = pytest.importorskip("safetensors.torch")
    net = MLP([5, 8, 6, 3], ["gelu", "tanh"], "softmax", precision=precision, seed=3)
    path = net.save(tmp_path / "model.safetensors")
    dtype = getattr(torch, precision)
    model = nn.Sequential(
        nn.Linear(5, 8), nn.GELU(), nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 3), nn.Softmax(dim=1)
    ).to(dtype)  # fmt: skip
    model.load_state_dict(safetensors.load_file(path), strict=True)
    for W, b, linear in zip(net.weights, net.biases, model[::2]):
        assert linear.weight.dtype == linear.bias.dtype == dtype
        assert np.array_equal(linear.weight.detach().numpy(), W)
        assert np.array_equal(linear.bias.detach().numpy(), b)
    x = np.random.default_rng(0).normal(size=(7, 5))
    agree(net.forward(x), model(torch.tensor(x, dtype=dtype)).double(), 1e-12 if precision == "float64" else 1e-5)
