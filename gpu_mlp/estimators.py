"""`MLPClassifier` and `MLPRegressor`: scikit-learn's estimators of the same names, computed by this library.

Leans on `estimator_base` for the fit and on scikit-learn for labels, classes and scores. With the same ``random_state``
the initial weights, the shuffles and the validation split are scikit-learn's own, and in float64 on the CPU so are the
loss curve and the coefficients, up to rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .optimizers import Optimizer
from .schedules import Schedule

try:  # the rooms below need scikit-learn too
    from sklearn.base import ClassifierMixin, RegressorMixin, _fit_context
    from sklearn.metrics import accuracy_score, r2_score
    from sklearn.preprocessing import LabelBinarizer
    from sklearn.utils import column_or_1d
    from sklearn.utils._param_validation import StrOptions
    from sklearn.utils.class_weight import compute_sample_weight
    from sklearn.utils.metaestimators import available_if
    from sklearn.utils.multiclass import _check_partial_fit_first_call, type_of_target, unique_labels

    from . import samples
    from .estimator_base import BaseMLP
    from .hyperparameters import CONSTRAINTS, Callback
except ImportError as error:
    raise ImportError(
        f"the estimators need scikit-learn 1.7 or later ({error}): pip install 'gpu-mlp[sklearn]'"
    ) from error

__all__ = ["MLPClassifier", "MLPRegressor"]


class MLPClassifier(ClassifierMixin, BaseMLP):
    """A multilayer perceptron that minimises the log loss: scikit-learn's MLPClassifier on this library.

    The parameters up to ``max_fun`` have scikit-learn's names, order, defaults and meaning
    (https://scikit-learn.org/stable/modules/generated/sklearn.neural_network.MLPClassifier.html). ``activation`` may
    also be any elementwise one of this library, and ``solver`` any optimizer of it: a name, whose learning rate is
    ``learning_rate_init`` and whose other hyperparameters are its defaults, or an instance, which has its own.

    device: "auto", "cpu" or "cuda". precision: "auto" computes in X's type (float32 or float64), or one of
    `precision.PRECISIONS`. dropout: the rate at which the hidden layers' values are dropped while fitting, or one a
    layer. class_weight: None, "balanced" or {class: weight} (a list of them for multilabel y); multiplies the sample
    weights. schedule: a name or a `schedules.Schedule` for the learning rate of every update; "on_plateau" watches the
    training loss, or the validation score with ``early_stopping``. clip_norm: gradients are scaled down to this global
    norm. callbacks: each is called as ``callback(estimator, row)`` after an epoch, with row = {"epoch": …, "loss": …,
    …}, and ends the fit by returning True. progress: show a progress bar.

    After `fit`: ``classes_``, (n_classes,); ``coefs_``, a list of (n_in, n_out), and ``intercepts_``, a list of
    (n_out,); ``loss_``, ``loss_curve_``, ``best_loss_``, ``validation_scores_``, ``best_validation_score_``,
    ``n_iter_``, ``t_``, ``n_layers_``, ``n_outputs_``, ``out_activation_``, ``n_features_in_`` and
    ``feature_names_in_``, as in scikit-learn. On the CPU the coefficients are views of the network's weights.

    A parameter of a wrong type or value is scikit-learn's InvalidParameterError, a ValueError, when `fit` is called.
    """

    classes_: NDArray[Any]
    class_weight: Any
    _parameter_constraints = {  # noqa: RUF012
        **CONSTRAINTS,
        "class_weight": [StrOptions({"balanced"}), dict, list, None],
    }
    loss = "log_loss"

    def __init__(
        self,
        hidden_layer_sizes: Any = (100,),
        activation: str = "relu",
        *,
        solver: str | Optimizer = "adam",
        alpha: float = 0.0001,
        batch_size: int | str = "auto",
        learning_rate: str = "constant",
        learning_rate_init: float = 0.001,
        power_t: float = 0.5,
        max_iter: int = 200,
        shuffle: bool = True,
        random_state: Any = None,
        tol: float = 1e-4,
        verbose: bool | int = False,
        warm_start: bool = False,
        momentum: float = 0.9,
        nesterovs_momentum: bool = True,
        early_stopping: bool = False,
        validation_fraction: float = 0.1,
        beta_1: float = 0.9,
        beta_2: float = 0.999,
        epsilon: float = 1e-8,
        n_iter_no_change: float = 10,
        max_fun: int = 15000,
        device: str = "auto",
        precision: str = "auto",
        dropout: Any = 0.0,
        class_weight: Any = None,
        schedule: str | Schedule | None = None,
        clip_norm: float | None = None,
        callbacks: Sequence[Callback] = (),
        progress: bool = False,
    ) -> None:
        self._keep(locals())

    @available_if(lambda self: self._partial_fit_is_possible())
    @_fit_context(prefer_skip_nested_validation=True)
    def partial_fit(self, X: Any, y: Any, sample_weight: Any = None, classes: Any = None) -> Any:
        """One pass over the data from where the last one stopped; not for solver "lbfgs".

        X, y, sample_weight: as in `fit`. classes: (n_classes,), all there will ever be, needed at the first call.
        Returns self.
        """
        if _check_partial_fit_first_call(self, classes):
            self._label_binarizer = LabelBinarizer()
            self._label_binarizer.fit(y if type_of_target(y).startswith("multilabel") else classes)
        return self._fit(X, y, sample_weight, incremental=True)

    def predict(self, X: Any) -> NDArray[Any]:
        """The class of every sample, (n_samples,), or the (n_samples, n_outputs) 0/1 rows of a multilabel fit."""
        return self._decode(self._to_host(self._outputs(X)))

    def score(self, X: Any, y: Any, sample_weight: Any = None) -> float:
        """The accuracy on X and y; arguments as in `fit`."""
        if samples.on_device(X, y, sample_weight):
            return self._score_rows(X, y, sample_weight)
        return super().score(X, y, sample_weight)

    def predict_proba(self, X: Any) -> NDArray[Any]:
        """The probability of every class, (n_samples, n_classes), in the order of ``classes_``."""
        y_hat = self._outputs(X)
        if y_hat.shape[1] > 1:
            return y_hat
        both = (
            self._fitted.net._ops.empty((len(y_hat), 2), y_hat.dtype)
            if samples.on_device(y_hat)
            else np.empty((len(y_hat), 2), y_hat.dtype)
        )
        both[:, 0], both[:, 1] = 1 - y_hat[:, 0], y_hat[:, 0]
        return both

    def predict_log_proba(self, X: Any) -> NDArray[Any]:
        """The logarithm of `predict_proba`, (n_samples, n_classes); −inf for a probability that is 0."""
        y_hat = self.predict_proba(X)
        with np.errstate(divide="ignore"):
            return np.log(y_hat, out=y_hat)

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.classifier_tags.multi_label = True
        return tags

    def _training_data(self, X: Any, y: Any, incremental: bool, reset: bool) -> tuple[Any, NDArray[Any], Any]:
        X, y = samples.checked(self, X, y, reset)
        y = column_or_1d(y, warn=True) if y.ndim == 2 and y.shape[1] == 1 else y
        if not hasattr(self, "classes_") or not (self.warm_start or incremental):
            self._label_binarizer = LabelBinarizer().fit(y)
            self.classes_ = self._label_binarizer.classes_
        else:
            self._check_classes(unique_labels(y))
        if self.class_weight == "balanced" and incremental:
            raise ValueError("class_weight: 'balanced' needs all of y, so partial_fit cannot have it; give a dict")
        class_weight = None if self.class_weight is None else compute_sample_weight(self.class_weight, y)
        return X, self._label_binarizer.transform(y).astype(bool), class_weight

    def _check_classes(self, found: NDArray[Any]) -> None:
        """With ``warm_start`` y has the classes of the last fit, in `partial_fit` no others."""
        unknown = sorted(set(found.tolist()) - set(self.classes_.tolist()))
        if unknown:
            raise ValueError(f"`y` has classes not in `self.classes_`: {unknown}; those known are {self.classes_}")
        if self.warm_start and len(found) != len(self.classes_):
            raise ValueError(
                "warm_start can only be used where `y` has the same classes as in the previous call to fit; it had "
                f"{self.classes_}, and `y` has {found}"
            )

    def _out_activation(self) -> str:
        return "softmax" if self._label_binarizer.y_type_ == "multiclass" else "logistic"

    def _targets(self, y: NDArray[Any]) -> NDArray[Any]:
        return y.argmax(axis=1) if self.out_activation_ == "softmax" else y

    def _decode(self, y: NDArray[Any]) -> NDArray[Any]:
        return self._label_binarizer.inverse_transform(y.ravel() if self.n_outputs_ == 1 else y)

    def _strata(self, y: NDArray[Any]) -> NDArray[Any] | None:
        return y if self.n_outputs_ == 1 else None  # as scikit-learn has it: two classes only

    def _score(self, y: NDArray[Any], predicted: NDArray[Any], weight: NDArray[Any] | None) -> float:
        return accuracy_score(y, predicted, sample_weight=weight)


class MLPRegressor(RegressorMixin, BaseMLP):
    """A multilayer perceptron for real targets: scikit-learn's MLPRegressor on this library.

    The parameters up to ``max_fun`` have scikit-learn's names, order, defaults and meaning
    (https://scikit-learn.org/stable/modules/generated/sklearn.neural_network.MLPRegressor.html): ``loss`` is
    "squared_error", half the mean squared error, or "poisson", half the Poisson deviance of a rate exp(z), for y ≥ 0.
    What comes after them, what ``activation`` and ``solver`` accept beyond, and what `fit` leaves behind are as in
    `MLPClassifier`, without ``class_weight`` and ``classes_``.
    """

    _parameter_constraints = {  # noqa: RUF012
        **CONSTRAINTS,
        "loss": [StrOptions({"squared_error", "poisson"})],
    }

    def __init__(
        self,
        loss: str = "squared_error",
        hidden_layer_sizes: Any = (100,),
        activation: str = "relu",
        *,
        solver: str | Optimizer = "adam",
        alpha: float = 0.0001,
        batch_size: int | str = "auto",
        learning_rate: str = "constant",
        learning_rate_init: float = 0.001,
        power_t: float = 0.5,
        max_iter: int = 200,
        shuffle: bool = True,
        random_state: Any = None,
        tol: float = 1e-4,
        verbose: bool | int = False,
        warm_start: bool = False,
        momentum: float = 0.9,
        nesterovs_momentum: bool = True,
        early_stopping: bool = False,
        validation_fraction: float = 0.1,
        beta_1: float = 0.9,
        beta_2: float = 0.999,
        epsilon: float = 1e-8,
        n_iter_no_change: float = 10,
        max_fun: int = 15000,
        device: str = "auto",
        precision: str = "auto",
        dropout: Any = 0.0,
        schedule: str | Schedule | None = None,
        clip_norm: float | None = None,
        callbacks: Sequence[Callback] = (),
        progress: bool = False,
    ) -> None:
        self._keep(locals())

    @available_if(lambda self: self._partial_fit_is_possible())
    @_fit_context(prefer_skip_nested_validation=True)
    def partial_fit(self, X: Any, y: Any, sample_weight: Any = None) -> Any:
        """One pass over the data from where the last one stopped; not for solver "lbfgs". Arguments as in `fit`."""
        return self._fit(X, y, sample_weight, incremental=True)

    def predict(self, X: Any) -> NDArray[Any]:
        """The value of every sample: (n_samples,), or (n_samples, n_outputs) where y had several columns."""
        return self._decode(self._outputs(X))

    def score(self, X: Any, y: Any, sample_weight: Any = None) -> float:
        """R² on X and y; arguments as in `fit`."""
        if samples.on_device(X, y, sample_weight):
            return self._score_rows(X, y, sample_weight)
        return super().score(X, y, sample_weight)

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.target_tags.multi_output = True
        return tags

    def _training_data(self, X: Any, y: Any, incremental: bool, reset: bool) -> tuple[Any, NDArray[Any], Any]:
        X, y = samples.checked(self, X, y, reset, y_numeric=True)
        if self.loss == "poisson" and (y < 0).any():
            raise ValueError("y: some values are negative, and loss='poisson' needs y >= 0")
        return X, column_or_1d(y, warn=True) if y.ndim == 2 and y.shape[1] == 1 else y, None

    def _out_activation(self) -> str:
        return "exp" if self.loss == "poisson" else "identity"

    def _decode(self, y: NDArray[Any]) -> NDArray[Any]:
        return y.ravel() if y.shape[1] == 1 else y

    def _score(self, y: NDArray[Any], predicted: NDArray[Any], weight: NDArray[Any] | None) -> float:
        return r2_score(y, predicted, sample_weight=weight)
