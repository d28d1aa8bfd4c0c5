"""The optimizers of the compiled jobs: what a step's coefficients are, and what they make of one parameter.

A leaf: Numba, and the types of `optimizers`.

The rules themselves, with their sources, are in `gpu_mlp/optimizers.py`; here each is written
once more as formulas that LLVM writes into one loop over θ, which reads and writes every array once. A job is compiled
for the number of its rule, so that of a chain of ifs over it one branch is left.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ..optimizers import OPTIMIZERS, SGD, Adadelta, Adagrad, Adam, Adamax, Lion, NAdam, Optimizer, RAdam, RMSprop
from .formulas import formula

# In this order: those with the moment v alone, with none, with m alone, with both. MOVING: RMSprop with momentum.
ADAGRAD, RMSPROP, PLAIN, MOMENTUM, NESTEROV, LION, MOVING, ADAM, NADAM, RADAM, ADAMAX, ADADELTA = range(12)


class Rule(NamedTuple):
    """A rule as a job takes it: its number, its moments by their names in the job's record, in the optimizer's order,
    and its numbers by theirs."""

    number: int
    moments: str
    numbers: dict[str, float]


def of(optimizer: Optimizer) -> Rule | None:
    """The rule of an optimizer; None for one that is no job: with ``amsgrad`` or ``centered``, Muon, a user's own."""
    if type(optimizer) not in OPTIMIZERS.values():
        return None
    given = {
        "decay": getattr(optimizer, "weight_decay", 0.0),
        "decoupled": getattr(optimizer, "decoupled", getattr(optimizer, "decoupled_weight_decay", False)),
        "eps": getattr(optimizer, "eps", 0.0),
    }
    if hasattr(optimizer, "betas"):
        given["beta1"], given["beta2"] = optimizer.betas
    match optimizer:
        case SGD(momentum=momentum, dampening=dampening):
            number = NESTEROV if optimizer.nesterov else MOMENTUM if momentum else PLAIN
            return Rule(number, "m", given | {"beta1": momentum, "extra": dampening})
        case Adam(amsgrad=False):
            return Rule(ADAM, "mv", given | {"extra": optimizer.epsilon_hat})
        case NAdam():
            return Rule(NADAM, "mv", given | {"extra": optimizer.momentum_decay})
        case RAdam():
            return Rule(RADAM, "mv", given)
        case Adamax():
            return Rule(ADAMAX, "mv", given)
        case Adagrad():
            return Rule(ADAGRAD, "v", given | {"extra": optimizer.lr_decay})
        case Adadelta():
            return Rule(ADADELTA, "vm", given | {"beta2": optimizer.rho})
        case RMSprop(centered=False):
            number = MOVING if optimizer.momentum else RMSPROP
            return Rule(number, "vm", given | {"beta1": optimizer.momentum, "beta2": optimizer.alpha})
        case Lion():
            return Rule(LION, "m", given | {"decoupled": True})
    return None


@formula
def reads_m(f):
    """Whether a rule has the moment m: a momentum, or Adadelta's Δ²."""
    return f > PLAIN


@formula
def reads_v(f):
    """Whether a rule has the moment v: averaged or added squares, or Adamax's u."""
    return f < PLAIN or f > LION


@formula
def nadam_mu(beta1, decay, step):
    """μ_t = β₁ (1 − ½ · 0.96^(t · decay))"""
    return beta1 * (1 - 0.5 * 0.96 ** (step * decay))


@formula
def coefficients(f, lr, step, beta1, beta2, eps, extra):
    """(a, b, c) of a step, counted from 1, as `moved` takes them; ``extra`` is the number that a rule has beside."""
    if PLAIN < f < LION:
        return lr, 1.0 if step == 1 else 1 - extra, 0.0
    if f == ADAM:  # both bias corrections are moved into the step size and ε
        root = np.sqrt(1 - beta2**step)
        return lr * root / (1 - beta1**step), eps * (1.0 if extra else root), 0.0
    if f == NADAM:
        product, i = 1.0, 1.0
        while i <= step and product >= 1e-17:  # up to where 1 − Π is 1
            product *= nadam_mu(beta1, extra, i)
            i += 1
        mu, after = nadam_mu(beta1, extra, step), nadam_mu(beta1, extra, step + 1)
        root = np.sqrt(1 - beta2**step)
        return lr * (1 - mu) / (1 - product) * root, eps * root, lr * after / (1 - product * after) * root
    if f == RADAM:
        correction, limit, size = 1 - beta2**step, 2 / (1 - beta2) - 1, lr / (1 - beta1**step)
        rho = limit - 2 * step * beta2**step / correction
        if rho <= 5:
            return size, eps, 0.0
        rectifier = np.sqrt((rho - 4) * (rho - 2) * limit / ((limit - 4) * (limit - 2) * rho))
        return size * rectifier * np.sqrt(correction), eps, 1.0
    if f == ADAMAX:
        return lr / (1 - beta1**step), eps, 0.0
    if f == ADAGRAD:
        return lr / (1 + (step - 1) * extra), eps, 0.0
    return lr, eps, 0.0


@formula
def averaged(m, g, beta, one):
    """m + (1 − β)(g − m)"""
    return m + (one - beta) * (g - m)


@formula
def moved(f, t, g, m, v, beta1, beta2, a, b, c, one):
    """(θ, m, v) of one parameter after a step with its gradient g; t is θ, shrunk where its decay is decoupled."""
    if f == PLAIN:
        return t - a * g, m, v
    if PLAIN < f < LION:
        m = beta1 * m + b * g
        return t - a * (g + beta1 * m if f == NESTEROV else m), m, v
    if f == LION:
        return t - a * np.sign(beta1 * m + (one - beta1) * g), averaged(m, g, beta2, one), v
    if f == ADAMAX:
        m, v = averaged(m, g, beta1, one), max(beta2 * v, abs(g) + b)
        return t - a * m / v, m, v
    if f == ADAGRAD:
        v = v + g * g
        return t - a * g / (np.sqrt(v) + b), m, v
    v = beta2 * v + (one - beta2) * g * g
    if f == RMSPROP:
        return t - a * g / (np.sqrt(v) + b), m, v
    if f == MOVING:
        m = beta1 * m + g / (np.sqrt(v) + b)
        return t - a * m, m, v
    if f == ADADELTA:
        way = g * (np.sqrt(m + b) / np.sqrt(v + b))
        return t - a * way, beta2 * m + (one - beta2) * way * way, v
    m = averaged(m, g, beta1, one)
    if f == ADAM:
        return t - a * m / (np.sqrt(v) + b), m, v
    if f == NADAM:
        return t - (a * g + c * m) / (np.sqrt(v) + b), m, v
    return t - (a * m / (np.sqrt(v) + b) if c != 0 else a * m), m, v  # RAdam
