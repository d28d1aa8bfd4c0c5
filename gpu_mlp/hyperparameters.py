"""The parameters of the estimators: what each may be, which go together, and the parts of a fit that they describe.

Leans on scikit-learn for the table of what is allowed and on `solvers` for the parts; changes no estimator.
"""

from __future__ import annotations

from numbers import Integral, Real
from typing import TYPE_CHECKING, Any

import numpy as np
from sklearn.utils._param_validation import Interval, Options, StrOptions

from . import activations, ops, schedules, solvers
from .network import MLP
from .optimizers import LBFGS, OPTIMIZERS, SGD, Adam, Optimizer
from .precision import PRECISIONS
from .schedules import Schedule

if TYPE_CHECKING:
    from .estimator_base import BaseMLP

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


def hidden_sizes(estimator: BaseMLP) -> list[int]:
    """The widths of the hidden layers; ValueError where one is not positive."""
    sizes = estimator.hidden_layer_sizes
    sizes = list(sizes) if hasattr(sizes, "__iter__") else [sizes]
    if any(size <= 0 for size in sizes):
        raise ValueError(f"hidden_layer_sizes must be > 0, got {sizes}.")
    return sizes


def full_batch(estimator: BaseMLP) -> bool:
    """Whether the solver takes the whole data set at once."""
    return estimator.solver == "lbfgs" or isinstance(estimator.solver, LBFGS)


def check_combinations(estimator: BaseMLP, incremental: bool) -> None:
    """Refuse parameters that mean nothing together, before any work."""
    if incremental and estimator.early_stopping:
        raise ValueError("early_stopping: partial_fit does not support early_stopping=True")
    if estimator.schedule is not None and estimator.solver == "sgd" and estimator.learning_rate != "constant":
        raise ValueError(
            f"schedule: learning_rate={estimator.learning_rate!r} is one already; leave learning_rate at 'constant'"
        )
    if not all(callable(callback) for callback in estimator.callbacks):
        raise TypeError("callbacks: every one must be callable as callback(estimator, row)")
    if full_batch(estimator):
        for name in ("schedule", "clip_norm"):
            if getattr(estimator, name) is not None:
                raise ValueError(f"{name}: L-BFGS finds its steps itself, so it can have none")


def network(estimator: BaseMLP, sizes: tuple[int, ...], dtype: np.dtype, seed: int = 0) -> MLP:
    """The network of these widths, its weights still zeros; in ``dtype``, X's, where precision is "auto"."""
    f, output = (OUR_NAME.get(name, name) for name in (estimator.activation, estimator.out_activation_))
    dropout = estimator.dropout if np.ndim(estimator.dropout) == 0 else list(estimator.dropout)
    precision = dtype.name if estimator.precision == "auto" else estimator.precision
    return solvers.network(sizes, f, output, dropout, precision, estimator.device, seed)


def objective(estimator: BaseMLP, net: MLP) -> solvers.Objective:
    """J, as scikit-learn counts it."""
    dtype = net._precision.master_dtype
    return solvers.objective(estimator.loss, net.output, net.sizes[-1], float(estimator.alpha), dtype)


def optimizer(estimator: BaseMLP) -> Optimizer:
    """The rule that ``solver`` names, with scikit-learn's hyperparameters for its three."""
    solver = estimator.solver
    if isinstance(solver, Optimizer):
        return solver
    lr = float(estimator.learning_rate_init)
    if solver == "sgd":
        return SGD(lr, estimator.momentum, nesterov=bool(estimator.nesterovs_momentum and estimator.momentum > 0))
    if solver == "adam":
        return Adam(lr, (estimator.beta_1, estimator.beta_2), estimator.epsilon, epsilon_hat=True)
    if solver == "lbfgs":
        return LBFGS(tolerance_grad=estimator.tol, tolerance_change=SCIPY_FTOL, max_eval=estimator.max_fun)
    return OPTIMIZERS[solver](lr=lr)


def descent(estimator: BaseMLP, net: MLP, steps: int) -> solvers.Descent:
    """A descent from no momentum; ``steps`` are the updates of an epoch."""
    solver = estimator.solver
    lr = solver.lr if isinstance(solver, Optimizer) else estimator.learning_rate_init
    rate = solvers.Rate(lr, estimator.learning_rate if solver == "sgd" else "constant", estimator.power_t)
    schedule = None
    if estimator.schedule is not None:
        schedule = schedules.get(estimator.schedule).over(steps * estimator.max_iter, estimator.max_iter)
    clip_norm = None if estimator.clip_norm is None else float(estimator.clip_norm)
    return solvers.Descent(net, objective(estimator, net), optimizer(estimator), rate, schedule, clip_norm)
