"""The parameters of the estimators: what each may be, which go together, and the parts of a fit that they describe.

Leans on scikit-learn for the table of what is allowed and on `solvers` for the parts; changes no estimator.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from numbers import Integral, Real
from typing import Any

import numpy as np
from sklearn.utils._param_validation import Interval, Options, StrOptions

from . import activations, ops, schedules, solvers
from .network import MLP
from .optimizers import LBFGS, OPTIMIZERS, SGD, Adam, Optimizer
from .precision import PRECISIONS
from .schedules import Schedule

Callback = Callable[[Any, "dict[str, float]"], Any]
HIDDEN = tuple(name for name, f in activations.ACTIVATIONS.items() if not f.rowwise)  # what a hidden layer may be
OUR_NAME = {"logistic": "sigmoid"}  # scikit-learn's name of an activation, where it is another
THEIR_NAME = {ours: theirs for theirs, ours in OUR_NAME.items()}
SCIPY_FTOL = 1e7 * float(np.finfo(np.float64).eps)  # L-BFGS-B's own default, which scikit-learn leaves alone

CONSTRAINTS: dict[str, list[Any]] = {  # of those that both estimators have
    "hidden_layer_sizes": ["array-like", Interval(Integral, 1, None, closed="left")],
    "activation": [StrOptions({*HIDDEN, *OUR_NAME})],
    "solver": [StrOptions(set(OPTIMIZERS)), Optimizer],
    "alpha": [Interval(Real, 0, None, closed="left")],
    "batch_size": [StrOptions({"auto"}), Interval(Integral, 1, None, closed="left")],
    "learning_rate": [StrOptions({"constant", "invscaling", "adaptive"})],
    "learning_rate_init": [Interval(Real, 0, None, closed="neither")],
    "power_t": [Interval(Real, 0, None, closed="left")],
    "max_iter": [Interval(Integral, 1, None, closed="left")],
    "shuffle": ["boolean"],
    "random_state": ["random_state"],
    "tol": [Interval(Real, 0, None, closed="left")],
    "verbose": ["verbose"],
    "warm_start": ["boolean"],
    "momentum": [Interval(Real, 0, 1, closed="both")],
    "nesterovs_momentum": ["boolean"],
    "early_stopping": ["boolean"],
    "validation_fraction": [Interval(Real, 0, 1, closed="left")],
    "beta_1": [Interval(Real, 0, 1, closed="left")],
    "beta_2": [Interval(Real, 0, 1, closed="left")],
    "epsilon": [Interval(Real, 0, None, closed="neither")],
    "n_iter_no_change": [Interval(Integral, 1, None, closed="left"), Options(Real, {np.inf})],
    "max_fun": [Interval(Integral, 1, None, closed="left")],
    "device": [StrOptions(set(ops.DEVICES))],
    "precision": [StrOptions({"auto", *PRECISIONS})],
    "dropout": [Interval(Real, 0, 1, closed="left"), "array-like"],
    "schedule": [StrOptions({"constant", "inverse_scaling", "cosine", "one_cycle", "on_plateau"}), Schedule, None],
    "clip_norm": [Interval(Real, 0, None, closed="neither"), None],
    "callbacks": [list, tuple],
    "progress": ["boolean"],
}


class Hyperparameters:
    """What an estimator was made with, under the names of its arguments, and what its output is."""

    hidden_layer_sizes: Any
    activation: str
    solver: str | Optimizer
    alpha: float
    batch_size: int | str
    learning_rate: str
    learning_rate_init: float
    power_t: float
    max_iter: int
    loss: str
    shuffle: bool
    random_state: Any
    tol: float
    verbose: bool | int
    warm_start: bool
    momentum: float
    nesterovs_momentum: bool
    early_stopping: bool
    validation_fraction: float
    beta_1: float
    beta_2: float
    epsilon: float
    n_iter_no_change: float
    max_fun: int
    device: str
    precision: str
    dropout: Any
    schedule: str | Schedule | None
    clip_norm: float | None
    callbacks: Sequence[Callback]
    progress: bool
    out_activation_: str


def hidden_sizes(chosen: Hyperparameters) -> list[int]:
    """The widths of the hidden layers; ValueError where one is not positive."""
    sizes = chosen.hidden_layer_sizes
    sizes = list(sizes) if hasattr(sizes, "__iter__") else [sizes]
    if any(size <= 0 for size in sizes):
        raise ValueError(f"hidden_layer_sizes must be > 0, got {sizes}.")
    return sizes


def full_batch(chosen: Hyperparameters) -> bool:
    """Whether the solver takes the whole data set at once."""
    return chosen.solver == "lbfgs" or isinstance(chosen.solver, LBFGS)


def check_combinations(chosen: Hyperparameters, incremental: bool) -> None:
    """Refuse parameters that mean nothing together, before any work."""
    if incremental and chosen.early_stopping:
        raise ValueError("early_stopping: partial_fit does not support early_stopping=True")
    if chosen.schedule is not None and chosen.solver == "sgd" and chosen.learning_rate != "constant":
        raise ValueError(
            f"schedule: learning_rate={chosen.learning_rate!r} is one already; leave learning_rate at 'constant'"
        )
    if not all(callable(callback) for callback in chosen.callbacks):
        raise TypeError("callbacks: every one must be callable as callback(estimator, row)")
    if full_batch(chosen):
        for name in ("schedule", "clip_norm"):
            if getattr(chosen, name) is not None:
                raise ValueError(f"{name}: L-BFGS finds its steps itself, so it can have none")


def network(chosen: Hyperparameters, sizes: tuple[int, ...], dtype: np.dtype, seed: int = 0) -> MLP:
    """The network of these widths, its weights still zeros; in ``dtype``, X's, where precision is "auto"."""
    f, output = (OUR_NAME.get(name, name) for name in (chosen.activation, chosen.out_activation_))
    dropout = chosen.dropout if np.ndim(chosen.dropout) == 0 else list(chosen.dropout)
    precision = dtype.name if chosen.precision == "auto" else chosen.precision
    return solvers.network(sizes, f, output, dropout, precision, chosen.device, seed)


def objective(chosen: Hyperparameters, net: MLP) -> solvers.Objective:
    """J, as scikit-learn counts it."""
    dtype = net._precision.master_dtype
    return solvers.objective(chosen.loss, net.output, net.sizes[-1], float(chosen.alpha), dtype)


def optimizer(chosen: Hyperparameters) -> Optimizer:
    """The rule that ``solver`` names, with scikit-learn's hyperparameters for its three."""
    solver = chosen.solver
    if isinstance(solver, Optimizer):
        return solver
    lr = float(chosen.learning_rate_init)
    if solver == "sgd":
        return SGD(lr, chosen.momentum, nesterov=bool(chosen.nesterovs_momentum and chosen.momentum > 0))
    if solver == "adam":
        return Adam(lr, (chosen.beta_1, chosen.beta_2), chosen.epsilon, epsilon_hat=True)
    if solver == "lbfgs":
        return LBFGS(tolerance_grad=chosen.tol, tolerance_change=SCIPY_FTOL, max_eval=chosen.max_fun)
    return OPTIMIZERS[solver](lr=lr)


def descent(chosen: Hyperparameters, net: MLP, steps: int) -> solvers.Descent:
    """A descent from no momentum; ``steps`` are the updates of an epoch."""
    solver = chosen.solver
    lr = solver.lr if isinstance(solver, Optimizer) else chosen.learning_rate_init
    rate = solvers.Rate(lr, chosen.learning_rate if solver == "sgd" else "constant", chosen.power_t)
    schedule = None
    if chosen.schedule is not None:
        schedule = schedules.get(chosen.schedule).over(steps * chosen.max_iter, chosen.max_iter)
    clip_norm = None if chosen.clip_norm is None else float(chosen.clip_norm)
    return solvers.Descent(net, objective(chosen, net), optimizer(chosen), rate, schedule, clip_norm)
