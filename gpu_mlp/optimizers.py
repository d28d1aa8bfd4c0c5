"""The update rules θ ← θ − η·(…), with PyTorch's names, defaults and arithmetic.

A leaf: imports NumPy alone. An optimizer holds hyperparameters and no state: its moments are flat arrays of θ's size
that the trainer owns (`moments` names them), and everything that changes with the step is a number from `coefficients`.

``rule(theta, g, moments, c, s)`` updates one block of θ and of every moment in place. ``g`` is the gradient of J
(unscaled, clipped, with λ∇Ω), which the rule may overwrite; ``c`` are the step's coefficients; ``s`` is a pair of
scratch blocks. Elements do not mix, so any cut into blocks gives the same bits; only Muon sees matrices.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import numpy as np

from . import checks
from .activations import Array

Moments = Sequence[Array]
Coefficients = tuple[float, ...]
Pair = tuple[Array, Array]
Multiply = Callable[[Array, Array, Array], object]  # a, b, out: out ← a b


@dataclass(frozen=True)
class Optimizer:
    """An update rule with its hyperparameters; ``lr`` is the learning rate η before any schedule."""

    name: ClassVar[str]
    lr: float

    def __post_init__(self) -> None:
        checks.real("lr", self.lr, 0)
        if hasattr(self, "eps"):
            checks.real("eps", self.eps, 0, open_minimum=True)  # of a gradient that is always 0 it would make 0 / 0
        for argument in ("weight_decay", "momentum_decay", "lr_decay", "initial_accumulator_value"):
            if hasattr(self, argument):
                checks.real(argument, getattr(self, argument), 0)
        for argument in ("momentum", "alpha", "rho"):
            if hasattr(self, argument):
                checks.real(argument, getattr(self, argument), 0, 1)
        for argument in ("amsgrad", "centered", "decoupled_weight_decay", "epsilon_hat", "nesterov"):
            if hasattr(self, argument):
                checks.boolean(argument, getattr(self, argument))
        for argument, count, maximum in (("betas", 2, 1), ("ns_coefficients", 3, None)):
            if hasattr(self, argument):
                numbers = _numbers(argument, getattr(self, argument), count, maximum)
                object.__setattr__(self, argument, numbers)

    @property
    def moments(self) -> tuple[str, ...]:
        """The names of the flat arrays that this rule keeps beside θ."""
        return ()

    def initial(self, moment: str) -> float:
        """The value that a moment starts from."""
        return 0.0

    def coefficients(self, lr: float, step: int) -> Coefficients:
        """What the rule needs to know of the step, counted from 1, at learning rate ``lr``."""
        return (lr,)

    def rule(self, theta: Array, g: Array, moments: Moments, c: Coefficients, s: Pair) -> None:
        """Update one block in place."""
        raise TypeError(f"{type(self).__name__} is abstract")


def _numbers(argument: str, value: Any, count: int, maximum: float | None) -> tuple[float, ...]:
    """``value`` as so many numbers, in [0, maximum) where there is one."""
    words = {2: "two", 3: "three"}
    if not isinstance(value, (tuple, list)):
        raise TypeError(f"{argument}: expected {words[count]} numbers, got {value!r}")
    if len(value) != count:
        raise ValueError(f"{argument}: expected {words[count]} numbers, got {value!r}")
    minimum = None if maximum is None else 0
    return tuple(checks.real(argument, number, minimum, maximum, open_maximum=True) for number in value)


def _decay(theta: Array, g: Array, s: Array, weight_decay: float) -> None:
    """g ← g + weight_decay · θ, the L2 form."""
    if weight_decay:
        np.multiply(theta, weight_decay, out=s)
        np.add(g, s, out=g)


def _shrink(theta: Array, lr: float, weight_decay: float) -> None:
    """θ ← (1 − η · weight_decay) θ, the decoupled form (Loshchilov and Hutter, 2019)."""
    if weight_decay:
        np.multiply(theta, 1 - lr * weight_decay, out=theta)


def _average(m: Array, g: Array, beta: float, s: Array) -> None:
    """m ← m + (1 − β)(g − m)"""
    np.subtract(g, m, out=s)
    np.multiply(s, 1 - beta, out=s)
    np.add(m, s, out=m)


def _average_square(v: Array, g: Array, beta: float, s: Array) -> None:
    """v ← β v + (1 − β) g²"""
    np.multiply(v, beta, out=v)
    np.multiply(g, g, out=s)
    np.multiply(s, 1 - beta, out=s)
    np.add(v, s, out=v)


def _descend(theta: Array, numerator: Array, denominator: Array, step_size: float, s: Array) -> None:
    """θ ← θ − step_size · numerator / denominator"""
    np.divide(numerator, denominator, out=s)
    np.multiply(s, step_size, out=s)
    np.subtract(theta, s, out=theta)


@dataclass(frozen=True)
class SGD(Optimizer):
    """θ ← θ − η g, or with momentum μ: m ← μ m + (1 − dampening) g, θ ← θ − η m (book algorithm 8.2).

    Nesterov's form steps along g + μ m. The first step sets m = g, as PyTorch does.
    """

    name = "sgd"
    lr: float = 1e-3
    momentum: float = 0.0
    dampening: float = 0.0
    weight_decay: float = 0.0
    nesterov: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.real("dampening", self.dampening, 0)
        if self.nesterov and (not self.momentum or self.dampening):
            raise ValueError("nesterov: needs a momentum above 0 and no dampening")

    @property
    def plain(self) -> bool:
        """Whether the update of one layer needs nothing but its own gradient, so that it can be applied at once."""
        return not self.momentum

    @property
    def moments(self) -> tuple[str, ...]:
        return ("momentum",) if self.momentum else ()

    def coefficients(self, lr: float, step: int) -> Coefficients:
        return lr, 1.0 if step == 1 else 1 - self.dampening

    def rule(self, theta: Array, g: Array, moments: Moments, c: Coefficients, s: Pair) -> None:
        lr, share = c
        _decay(theta, g, s[0], self.weight_decay)
        if self.momentum:
            (m,) = moments
            np.multiply(m, self.momentum, out=m)
            np.multiply(g, share, out=s[0])
            np.add(m, s[0], out=m)
            if self.nesterov:
                np.multiply(m, self.momentum, out=s[0])
                np.add(g, s[0], out=g)
            else:
                g = m
        np.multiply(g, lr, out=s[0])
        np.subtract(theta, s[0], out=theta)


@dataclass(frozen=True)
class Adam(Optimizer):
    """Kingma and Ba, 2015: m and v average g and g²; θ ← θ − η m̂ / (√v̂ + ε), bias-corrected (book algorithm 8.7).

    With ``epsilon_hat`` ε is added to √v before its bias correction (the ε̂ at the end of their section 2), as
    TensorFlow and scikit-learn do; PyTorch does not.
    """

    name = "adam"
    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    amsgrad: bool = False
    epsilon_hat: bool = False
    decoupled: ClassVar[bool] = False

    @property
    def moments(self) -> tuple[str, ...]:
        return ("m", "v", "v_max") if self.amsgrad else ("m", "v")

    def coefficients(self, lr: float, step: int) -> Coefficients:
        beta1, beta2 = self.betas
        root = math.sqrt(1 - beta2**step)
        return lr, lr * root / (1 - beta1**step), self.eps * (1 if self.epsilon_hat else root)

    def rule(self, theta: Array, g: Array, moments: Moments, c: Coefficients, s: Pair) -> None:
        # m̂ / (√v̂ + ε) with both bias corrections moved into the step size and ε: two passes fewer.
        lr, step_size, eps = c
        m, v = moments[:2]
        if self.decoupled:
            _shrink(theta, lr, self.weight_decay)
        else:
            _decay(theta, g, s[0], self.weight_decay)
        _average(m, g, self.betas[0], s[0])
        _average_square(v, g, self.betas[1], s[0])
        if self.amsgrad:
            v = np.maximum(moments[2], v, out=moments[2])
        np.sqrt(v, out=s[0])
        np.add(s[0], eps, out=s[0])
        _descend(theta, m, s[0], step_size, s[1])


@dataclass(frozen=True)
class AdamW(Adam):
    """Adam with decoupled weight decay: θ ← (1 − η·weight_decay) θ before the step (Loshchilov and Hutter, 2019)."""

    name = "adamw"
    weight_decay: float = 1e-2
    decoupled = True


def _nadam_mu(beta: float, decay: float, step: int) -> float:
    return beta * (1 - 0.5 * 0.96 ** (step * decay))


def _nadam_product(beta: float, decay: float, step: int) -> float:
    """Π_{i ≤ step} μ_i, up to where 1 − Π is 1: after about 350 steps at β₁ = 0.9, so nothing need be remembered."""
    product = 1.0
    for i in range(1, step + 1):
        product *= _nadam_mu(beta, decay, i)
        if product < 1e-17:
            break
    return product


@dataclass(frozen=True)
class NAdam(Optimizer):
    """Adam with Nesterov momentum (Dozat, 2016), μ_t = β₁ (1 − ½ · 0.96^(t · momentum_decay))."""

    name = "nadam"
    lr: float = 2e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    momentum_decay: float = 4e-3
    decoupled_weight_decay: bool = False

    @property
    def moments(self) -> tuple[str, ...]:
        return "m", "v"

    def _mu(self, step: int) -> float:
        return _nadam_mu(self.betas[0], self.momentum_decay, step)

    def coefficients(self, lr: float, step: int) -> Coefficients:
        mu, mu_next = self._mu(step), self._mu(step + 1)
        product = _nadam_product(self.betas[0], self.momentum_decay, step)
        root = math.sqrt(1 - self.betas[1] ** step)
        along_g = lr * (1 - mu) / (1 - product)
        along_m = lr * mu_next / (1 - product * mu_next)
        return lr, along_g * root, along_m * root, self.eps * root

    def rule(self, theta: Array, g: Array, moments: Moments, c: Coefficients, s: Pair) -> None:
        lr, along_g, along_m, eps = c
        m, v = moments
        if self.decoupled_weight_decay:
            _shrink(theta, lr, self.weight_decay)
        else:
            _decay(theta, g, s[0], self.weight_decay)
        _average(m, g, self.betas[0], s[0])
        _average_square(v, g, self.betas[1], s[0])
        np.multiply(g, along_g, out=g)
        np.multiply(m, along_m, out=s[0])
        np.add(g, s[0], out=g)
        np.sqrt(v, out=s[0])
        np.add(s[0], eps, out=s[0])
        _descend(theta, g, s[0], 1.0, s[1])


@dataclass(frozen=True)
class RAdam(Optimizer):
    """Rectified Adam (Liu et al., 2020): momentum alone until the variance of v is tractable, then Adam × rectifier."""

    name = "radam"
    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    decoupled_weight_decay: bool = False

    @property
    def moments(self) -> tuple[str, ...]:
        return "m", "v"

    def coefficients(self, lr: float, step: int) -> Coefficients:
        beta1, beta2 = self.betas
        correction2 = 1 - beta2**step
        rho_inf = 2 / (1 - beta2) - 1
        rho = rho_inf - 2 * step * beta2**step / correction2
        step_size = lr / (1 - beta1**step)
        if rho <= 5:
            return lr, step_size, 0.0
        rectifier = math.sqrt((rho - 4) * (rho - 2) * rho_inf / ((rho_inf - 4) * (rho_inf - 2) * rho))
        return lr, step_size * rectifier * math.sqrt(correction2), 1.0

    def rule(self, theta: Array, g: Array, moments: Moments, c: Coefficients, s: Pair) -> None:
        lr, step_size, adaptive = c
        m, v = moments
        if self.decoupled_weight_decay:
            _shrink(theta, lr, self.weight_decay)
        else:
            _decay(theta, g, s[0], self.weight_decay)
        _average(m, g, self.betas[0], s[0])
        _average_square(v, g, self.betas[1], s[0])
        if adaptive:
            np.sqrt(v, out=s[0])
            np.add(s[0], self.eps, out=s[0])
            _descend(theta, m, s[0], step_size, s[1])
        else:
            np.multiply(m, step_size, out=s[0])
            np.subtract(theta, s[0], out=theta)


@dataclass(frozen=True)
class Adamax(Optimizer):
    """Adam with the infinity norm: u ← max(β₂ u, |g| + ε), θ ← θ − η m̂ / u (Kingma and Ba, 2015, section 7)."""

    name = "adamax"
    lr: float = 2e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.real("eps", self.eps, 0, open_minimum=True)  # u of a gradient that is always 0 must not be 0

    @property
    def moments(self) -> tuple[str, ...]:
        return "m", "u"

    def coefficients(self, lr: float, step: int) -> Coefficients:
        return (lr / (1 - self.betas[0] ** step),)

    def rule(self, theta: Array, g: Array, moments: Moments, c: Coefficients, s: Pair) -> None:
        (step_size,) = c
        m, u = moments
        _decay(theta, g, s[0], self.weight_decay)
        _average(m, g, self.betas[0], s[0])
        np.multiply(u, self.betas[1], out=u)
        np.abs(g, out=g)
        np.add(g, self.eps, out=g)
        np.maximum(u, g, out=u)
        _descend(theta, m, u, step_size, s[1])


@dataclass(frozen=True)
class Adagrad(Optimizer):
    """v ← v + g², θ ← θ − η_t g / (√v + ε), η_t = η / (1 + (t − 1) lr_decay) (Duchi et al., 2011; algorithm 8.4)."""

    name = "adagrad"
    lr: float = 1e-2
    lr_decay: float = 0.0
    weight_decay: float = 0.0
    initial_accumulator_value: float = 0.0
    eps: float = 1e-10

    @property
    def moments(self) -> tuple[str, ...]:
        return ("v",)

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.real("eps", self.eps, 0, open_minimum=True)

    def initial(self, moment: str) -> float:
        return self.initial_accumulator_value

    def coefficients(self, lr: float, step: int) -> Coefficients:
        return (lr / (1 + (step - 1) * self.lr_decay),)

    def rule(self, theta: Array, g: Array, moments: Moments, c: Coefficients, s: Pair) -> None:
        (v,) = moments
        _decay(theta, g, s[0], self.weight_decay)
        np.multiply(g, g, out=s[0])
        np.add(v, s[0], out=v)
        np.sqrt(v, out=s[0])
        np.add(s[0], self.eps, out=s[0])
        _descend(theta, g, s[0], c[0], s[1])


@dataclass(frozen=True)
class RMSprop(Optimizer):
    """v averages g² at rate α; θ ← θ − η g / (√v + ε) (Hinton, 2012; book algorithms 8.5 and 8.6).

    ``centered`` takes the square of the averaged gradient off v; ``momentum`` accumulates the steps.
    """

    name = "rmsprop"
    lr: float = 1e-2
    alpha: float = 0.99
    eps: float = 1e-8
    weight_decay: float = 0.0
    momentum: float = 0.0
    centered: bool = False

    @property
    def moments(self) -> tuple[str, ...]:
        return ("v",) + ("g_average",) * self.centered + ("momentum",) * (self.momentum > 0)

    def rule(self, theta: Array, g: Array, moments: Moments, c: Coefficients, s: Pair) -> None:
        v = moments[0]
        _decay(theta, g, s[0], self.weight_decay)
        _average_square(v, g, self.alpha, s[0])
        if self.centered:
            _average(moments[1], g, self.alpha, s[0])
            np.multiply(moments[1], moments[1], out=s[0])
            np.subtract(v, s[0], out=s[0])
            np.maximum(s[0], 0, out=s[0])  # a variance: rounding may take it below 0
            np.sqrt(s[0], out=s[0])
        else:
            np.sqrt(v, out=s[0])
        np.add(s[0], self.eps, out=s[0])
        if self.momentum:
            m = moments[-1]
            np.multiply(m, self.momentum, out=m)
            np.divide(g, s[0], out=g)
            np.add(m, g, out=m)
            np.multiply(m, c[0], out=s[0])
            np.subtract(theta, s[0], out=theta)
        else:
            _descend(theta, g, s[0], c[0], s[1])


@dataclass(frozen=True)
class Adadelta(Optimizer):
    """Steps scaled by √(Δ² + ε) / √(v + ε), both averaged at rate ρ (Zeiler, 2012)."""

    name = "adadelta"
    lr: float = 1.0
    rho: float = 0.9
    eps: float = 1e-6
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.real("eps", self.eps, 0, open_minimum=True)  # with ε = 0 it would never take a step

    @property
    def moments(self) -> tuple[str, ...]:
        return "v", "delta"

    def rule(self, theta: Array, g: Array, moments: Moments, c: Coefficients, s: Pair) -> None:
        v, delta = moments
        _decay(theta, g, s[0], self.weight_decay)
        _average_square(v, g, self.rho, s[0])
        np.add(v, self.eps, out=s[0])
        np.sqrt(s[0], out=s[0])
        np.add(delta, self.eps, out=s[1])
        np.sqrt(s[1], out=s[1])
        np.divide(s[1], s[0], out=s[1])
        np.multiply(g, s[1], out=g)
        _average_square(delta, g, self.rho, s[0])
        np.multiply(g, c[0], out=g)
        np.subtract(theta, g, out=theta)


@dataclass(frozen=True)
class Lion(Optimizer):
    """θ ← (1 − η·weight_decay) θ − η sign(β₁ m + (1 − β₁) g), then m ← β₂ m + (1 − β₂) g (Chen et al., 2023)."""

    name = "lion"
    lr: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.0

    @property
    def moments(self) -> tuple[str, ...]:
        return ("m",)

    def rule(self, theta: Array, g: Array, moments: Moments, c: Coefficients, s: Pair) -> None:
        (lr,) = c
        (m,) = moments
        beta1, beta2 = self.betas
        _shrink(theta, lr, self.weight_decay)
        np.multiply(m, beta1, out=s[0])
        np.multiply(g, 1 - beta1, out=s[1])
        np.add(s[0], s[1], out=s[0])
        np.sign(s[0], out=s[0])
        np.multiply(s[0], lr, out=s[0])
        np.subtract(theta, s[0], out=theta)
        _average(m, g, beta2, s[0])


@dataclass(frozen=True)
class Muon(Optimizer):
    """Momentum, orthogonalised by Newton-Schulz steps, for every W; AdamW for the biases (Jordan et al., 2024).

    m ← m + (1 − momentum)(g − m); u = g + momentum (m − g) with Nesterov, else m;
    W ← (1 − η·weight_decay) W − η·adjust·NS(u), where adjust is √max(1, n_out / n_in) ("original") or
    0.2 √max(n_out, n_in) ("match_rms_adamw"). PyTorch runs the Newton-Schulz steps in bfloat16; they run in θ's type
    here. ``adamw`` is the rule for the biases; its learning rate follows the same schedule, in proportion.
    """

    name = "muon"
    lr: float = 1e-3
    weight_decay: float = 0.1
    momentum: float = 0.95
    nesterov: bool = True
    ns_coefficients: tuple[float, float, float] = (3.4445, -4.775, 2.0315)
    eps: float = 1e-7
    ns_steps: int = 5
    adjust_lr_fn: Literal["original", "match_rms_adamw"] | None = None
    adamw: AdamW = field(default_factory=AdamW)

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.integer("ns_steps", self.ns_steps, 1, 99)
        checks.real("lr", self.lr, 0, open_minimum=True)
        if self.adjust_lr_fn is not None:
            checks.choice("adjust_lr_fn", self.adjust_lr_fn, ("original", "match_rms_adamw"))
        if not isinstance(self.adamw, AdamW) or self.adamw.amsgrad:
            raise TypeError("adamw: expected an AdamW without amsgrad")

    @property
    def moments(self) -> tuple[str, ...]:
        return "m", "v"  # v is read for the biases alone

    def coefficients(self, lr: float, step: int) -> Coefficients:
        return lr, *self.adamw.coefficients(lr / self.lr * self.adamw.lr, step)

    def rule(self, theta: Array, g: Array, moments: Moments, c: Coefficients, s: Pair) -> None:
        self.adamw.rule(theta, g, moments, c[1:], s)

    def direction(self, g: Array, m: Array, s: Array) -> None:
        """Average ``g`` into ``m`` and turn ``g`` into the direction u that is to be orthogonalised."""
        _average(m, g, self.momentum, s)
        if self.nesterov:
            np.subtract(m, g, out=s)
            np.multiply(s, self.momentum, out=s)
            np.add(g, s, out=g)
        else:
            g[...] = m

    def orthogonalise(self, u: Array, matrices: tuple[Array, Array, Array], multiply: Multiply = np.matmul) -> Array:
        """NS(u): X ← a X + (b A + c A²) X with A = X Xᵀ, from X = u / ‖u‖; ``u``, (n_out, n_in), is used up.

        ``matrices`` are scratch: two squares of the shorter side and one of the size of ``u``. ``multiply(a, b, out)``
        is what computes a product.
        """
        a, b, c = self.ns_coefficients
        x = u if u.shape[0] <= u.shape[1] else u.T
        gram, square, y = matrices
        flat = u.reshape(-1)
        np.multiply(x, 1 / max(math.sqrt(float(np.dot(flat, flat))), self.eps), out=x)
        y = y.reshape(x.shape)
        for _ in range(self.ns_steps):
            multiply(x, x.T, gram)
            multiply(gram, gram, square)
            np.multiply(gram, b, out=gram)
            np.multiply(square, c, out=square)
            np.add(gram, square, out=gram)
            multiply(gram, x, y)
            np.multiply(x, a, out=x)
            np.add(x, y, out=x)
        return u

    def rate(self, shape: tuple[int, int]) -> float:
        """The factor on η for a W of this shape."""
        n_out, n_in = shape
        if self.adjust_lr_fn == "match_rms_adamw":
            return 0.2 * math.sqrt(max(n_out, n_in))
        return math.sqrt(max(1, n_out / n_in))


@dataclass(frozen=True)
class LBFGS(Optimizer):
    """Limited-memory BFGS on the whole data set, through SciPy's L-BFGS-B; one epoch is one iteration.

    ``history_size`` curvature pairs; stops where max |∂J/∂θ| ≤ ``tolerance_grad``, where J falls by less than
    ``tolerance_change`` relative to it, or after ``max_eval`` evaluations of J and its gradient.
    """

    name = "lbfgs"
    lr: float = 1.0
    history_size: int = 10
    tolerance_grad: float = 1e-5
    tolerance_change: float = 1e-9
    max_eval: int = 15000
    full_batch: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.lr != 1.0:
            raise ValueError(f"lr: L-BFGS finds its step by line search, so it takes no learning rate; got {self.lr}")
        checks.integer("history_size", self.history_size, 1)
        checks.integer("max_eval", self.max_eval, 1)
        checks.real("tolerance_grad", self.tolerance_grad, 0)
        checks.real("tolerance_change", self.tolerance_change, 0)


OPTIMIZERS: dict[str, type[Optimizer]] = {
    o.name: o for o in (SGD, Adam, AdamW, NAdam, RAdam, Adamax, Adagrad, RMSprop, Adadelta, Lion, Muon, LBFGS)
}


def get(optimizer: str | Optimizer, **hyperparameters: Any) -> Optimizer:
    """The optimizer called ``optimizer`` with these hyperparameters, or ``optimizer`` itself."""
    if isinstance(optimizer, Optimizer):
        return optimizer
    return OPTIMIZERS[checks.choice("optimizer", optimizer, OPTIMIZERS)](**hyperparameters)
