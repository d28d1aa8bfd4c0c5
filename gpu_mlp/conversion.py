"""Estimators made of scikit-learn's own of the same name, and the other way round, fitted where the source is.

Leans on scikit-learn for its classes and on `hyperparameters` for the network that stands in for theirs.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

import numpy as np
from sklearn import neural_network
from sklearn.base import ClassifierMixin

from . import hyperparameters, solvers
from .hyperparameters import THEIR_NAME

THEIR_ACTIVATIONS = ("identity", "logistic", "tanh", "relu")
THEIR_SOLVERS = ("lbfgs", "sgd", "adam")
ONLY_HERE = ("device", "progress")  # parameters that another library has no use for, whatever they are


def to_sklearn(ours: Any) -> Any:
    """scikit-learn's estimator of the same name as ``ours``."""
    kind = _counterpart(type(ours))
    activation = THEIR_NAME.get(ours.activation, ours.activation)
    if activation not in THEIR_ACTIVATIONS:
        raise ValueError(
            f"activation: scikit-learn has none called {ours.activation!r}, only {', '.join(THEIR_ACTIVATIONS)}"
        )
    wanted = kind().get_params()
    parameters = {name: value for name, value in ours.get_params().items() if name in wanted}
    parameters["activation"] = activation
    lost = [name for name in _altered(ours) if name not in wanted and name not in ONLY_HERE]
    if ours.solver not in THEIR_SOLVERS:
        parameters["solver"] = wanted["solver"]
        lost.append("solver")
    if lost:
        warnings.warn(f"scikit-learn cannot fit with this {', '.join(lost)}; left out", stacklevel=3)
    theirs = kind(**parameters)
    if hasattr(ours, "_fitted"):
        ours._fitted.take(ours.coefs_, ours.intercepts_)
        _hand_over(ours, theirs, ("_fitted", "coefs_", "intercepts_"))
        theirs.coefs_ = [np.array(coef, order="C") for coef in ours.coefs_]
        theirs.intercepts_ = [np.array(intercept) for intercept in ours.intercepts_]
        theirs._best_coefs = [coef.copy() for coef in theirs.coefs_]
        theirs._best_intercepts = [intercept.copy() for intercept in theirs.intercepts_]
    return theirs


def from_sklearn(kind: type, theirs: Any, parameters: dict[str, Any]) -> Any:
    """The estimator of class ``kind`` that ``theirs`` is, with ``parameters`` beside those it has."""
    if not isinstance(theirs, _counterpart(kind)):
        raise TypeError(
            f"estimator: expected scikit-learn's {kind.__name__}, got {type(theirs).__module__}.{type(theirs).__name__}"
        )
    ours = kind(**{**theirs.get_params(), **parameters})
    if hasattr(theirs, "coefs_"):
        ours._validate_params()
        _hand_over(theirs, ours, ("coefs_", "intercepts_", "_optimizer", "_best_coefs", "_best_intercepts"))
        sizes = (len(theirs.coefs_[0]), *(len(b) for b in theirs.intercepts_))
        net = hyperparameters.network(ours, sizes, theirs.coefs_[0].dtype)
        solvers.load(net, theirs.coefs_, theirs.intercepts_)
        ours._fitted = solvers.Fitted(net)
        ours._show()
    return ours


def _hand_over(source: Any, made: Any, left_out: Iterable[str]) -> None:
    """Give ``made`` what a fit has left in ``source``, but for what is of another kind there."""
    left_out = {*left_out, *source.get_params(), "loss"}
    for name, value in vars(source).items():
        if name not in left_out:
            setattr(made, name, value.copy() if isinstance(value, (list, np.ndarray)) else value)


def _counterpart(kind: type) -> Any:
    """scikit-learn's class of the same name."""
    return neural_network.MLPClassifier if issubclass(kind, ClassifierMixin) else neural_network.MLPRegressor


def _altered(estimator: Any) -> list[str]:
    """The parameters that differ from their defaults."""
    default = type(estimator)().get_params()
    return [name for name, value in estimator.get_params().items() if not np.array_equal(value, default[name])]
