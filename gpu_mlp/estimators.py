"""`MLPClassifier` and `MLPRegressor`: scikit-learn's estimators of the same names, computed by this library.

Leans on scikit-learn for what an estimator is (validation of parameters and data, label encoding, splits, scores) and
on `solvers` for the fit. With the same ``random_state`` the initial weights, the shuffles and the validation split are
scikit-learn's own, and in float64 on the CPU so are the loss curve and the coefficients, up to rounding.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Sequence
from numbers import Integral, Real
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import activations, checks, ops, schedules, solvers
from . import precision as precisions
from .network import MLP
from .ops.interface import Operations
from .optimizers import LBFGS, OPTIMIZERS, SGD, Adam, Optimizer
from .precision import PRECISIONS
from .progress import Progress
from .schedules import Schedule
from .signals import interrupt_between_steps

try:
    from scipy.sparse import issparse
    from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin, _fit_context
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.metrics import accuracy_score, r2_score
    from sklearn.model_selection import train_test_split
    from sklearn.preprocessing import LabelBinarizer
    from sklearn.utils import check_random_state, column_or_1d
    from sklearn.utils._param_validation import Interval, Options, StrOptions
    from sklearn.utils.class_weight import compute_sample_weight
    from sklearn.utils.metaestimators import available_if
    from sklearn.utils.multiclass import _check_partial_fit_first_call, type_of_target, unique_labels
    from sklearn.utils.validation import (
        _check_n_features,
        _check_sample_weight,
        check_is_fitted,
        check_X_y,
        validate_data,
    )
except ImportError as error:
    raise ImportError(
        f"the estimators need scikit-learn 1.7 or later ({error}): pip install 'gpu-mlp[sklearn]'"
    ) from error

__all__ = ["MLPClassifier", "MLPRegressor"]

Callback = Callable[[Any, "dict[str, float]"], Any]
HIDDEN = tuple(name for name, f in activations.ACTIVATIONS.items() if not f.rowwise)  # what a hidden layer may be
OUR_NAME = {"logistic": "sigmoid"}  # scikit-learn's name of an activation, where it is another
THEIR_NAME = {ours: theirs for theirs, ours in OUR_NAME.items()}
THEIR_ACTIVATIONS = ("identity", "logistic", "tanh", "relu")
THEIR_SOLVERS = ("lbfgs", "sgd", "adam")
SCIPY_FTOL = 1e7 * float(np.finfo(np.float64).eps)  # L-BFGS-B's own default, which scikit-learn leaves alone
FLOATS = (np.float64, np.float32)
SPARSE = ("csr", "csc")
DLPACK_CUDA = (2, 13)  # kDLCUDA, kDLCUDAManaged


class _BaseMLP(BaseEstimator):
    """What both estimators share: the parameters' types, one fit and its bookkeeping, conversion and pickling."""

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

    _parameter_constraints = {  # noqa: RUF012  (scikit-learn reads it from the class)
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

    def _keep(self, parameters: dict[str, Any]) -> None:
        """Store the arguments of a constructor, ``locals()`` there, as they came."""
        for name, value in parameters.items():
            if name not in ("self", "__class__"):
                setattr(self, name, value)

    # --- fitting ---

    @_fit_context(prefer_skip_nested_validation=True)
    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> Any:
        """Fit the network to the data, from new weights, or with ``warm_start`` from those it has.

        X: (n_samples, n_features) numbers, dense or sparse; y: (n_samples,) or (n_samples, n_outputs); sample_weight:
        (n_samples,) or None. float32 and float64 are computed in as they come, anything else in float64. With
        device="cuda" an X on the GPU (CuPy, ``__cuda_array_interface__``, DLPack) is used where it is. Returns self.
        """
        return self._fit(X, y, sample_weight, incremental=False)

    def _fit(self, X: Any, y: Any, sample_weight: Any, incremental: bool) -> Any:
        first = not hasattr(self, "coefs_") or (not self.warm_start and not incremental)
        hidden = self._hidden_sizes()
        self._check_combinations(incremental)
        X, y, sample_weight = self._from_device(X, y, sample_weight, first)
        X, y, class_weight = self._training_data(X, y, incremental, first)
        if sample_weight is not None:
            sample_weight = _check_sample_weight(sample_weight, _stand_in(X) if _on_device(X) else X)
        if class_weight is not None:
            sample_weight = class_weight if sample_weight is None else sample_weight * class_weight
        y = y.reshape(-1, 1) if y.ndim == 1 else y
        self.n_outputs_ = y.shape[1]
        self._random_state = check_random_state(self.random_state)
        if first:
            self._begin((X.shape[1], *hidden, self.n_outputs_), X.dtype)
        else:
            self._fitted.take(self.coefs_, self.intercepts_)
        try:
            if self._full_batch:
                self._fit_full_batch(_rowwise(X), y, sample_weight)
            else:
                self._fit_stochastic(_rowwise(X), y, sample_weight, incremental)
        finally:
            self._show()
        self._refuse_bad_weights()
        return self

    def _from_device(self, X: Any, y: Any, sample_weight: Any, reset: bool) -> tuple[Any, Any, Any]:
        """X as a CuPy array, checked, where it is on the GPU; what else is there comes to the host, y and weights."""
        if not any(map(_on_device, (X, y, sample_weight))):
            return X, y, sample_weight
        work = ops.make(self.device, precisions.get("float32"))
        y, sample_weight = (work.to_host(work.to_device(a)) if _on_device(a) else a for a in (y, sample_weight))
        return (self._device_rows(work, X, reset) if _on_device(X) else X), y, sample_weight

    def _device_rows(self, work: Operations, X: Any, reset: bool) -> Any:
        """X on the GPU, (n_samples, n_features), with the checks that scikit-learn makes of one on the host."""
        if not work.waits:
            checks.on_host("X", X)
        X = work.to_device(X)
        if X.ndim != 2:
            raise ValueError(f"X: expected 2 dimensions, (n_samples, n_features), got shape {X.shape}")
        if X.dtype not in FLOATS:
            X = work.to_device(X, np.float64)
        if not work.all_finite(X):
            raise ValueError("Input X contains NaN or infinity.")
        _check_n_features(self, X, reset=reset)
        if reset and hasattr(self, "feature_names_in_"):
            del self.feature_names_in_  # of an earlier fit; an array on the GPU has none
        return X

    def _hidden_sizes(self) -> list[int]:
        sizes = self.hidden_layer_sizes
        sizes = list(sizes) if hasattr(sizes, "__iter__") else [sizes]
        if any(size <= 0 for size in sizes):
            raise ValueError(f"hidden_layer_sizes must be > 0, got {sizes}.")
        return sizes

    @property
    def _full_batch(self) -> bool:
        return self.solver == "lbfgs" or isinstance(self.solver, LBFGS)

    def _check_combinations(self, incremental: bool) -> None:
        """Refuse parameters that mean nothing together, before any work."""
        if incremental and self.early_stopping:
            raise ValueError("early_stopping: partial_fit does not support early_stopping=True")
        if self.schedule is not None and self.solver == "sgd" and self.learning_rate != "constant":
            raise ValueError(
                f"schedule: learning_rate={self.learning_rate!r} is one already; leave learning_rate at 'constant'"
            )
        if not all(callable(callback) for callback in self.callbacks):
            raise TypeError("callbacks: every one must be callable as callback(estimator, row)")
        if self._full_batch:
            for name in ("schedule", "clip_norm"):
                if getattr(self, name) is not None:
                    raise ValueError(f"{name}: L-BFGS finds its steps itself, so it can have none")

    def _begin(self, sizes: tuple[int, ...], dtype: np.dtype) -> None:
        """A new network with scikit-learn's initial weights, and everything a fit counts set to nothing."""
        self.n_iter_ = 0
        self.t_ = 0
        self.n_layers_ = len(sizes)
        self.out_activation_ = self._out_activation()
        f = OUR_NAME.get(self.activation, self.activation)
        drawn = list(solvers.draw_weights(self._random_state, sizes, f == "sigmoid"))
        dropped = bool(np.any(np.asarray(self.dropout) > 0))
        net = solvers.network(
            sizes,
            f,
            OUR_NAME.get(self.out_activation_, self.out_activation_),
            self.dropout if np.ndim(self.dropout) == 0 else list(self.dropout),
            dtype.name if self.precision == "auto" else self.precision,
            self.device,
            int(self._random_state.randint(2**31 - 1)) if dropped else 0,
        )
        solvers.load(net, *map(list, zip(*drawn)))
        self._fitted = solvers.Fitted(net)
        self._fitted.best = self._fitted.theta()
        self._show()
        if not self._full_batch:
            self.loss_curve_: list[float] = []
            self._no_improvement_count = 0
            self.best_loss_: Any = None if self.early_stopping else np.inf
            self.validation_scores_: Any = [] if self.early_stopping else None
            self.best_validation_score_: Any = -np.inf if self.early_stopping else None

    def _objective(self) -> solvers.Objective:
        net = self._fitted.net
        return solvers.objective(self.loss, net.output, net.sizes[-1], float(self.alpha), net._precision.master_dtype)

    def _optimizer(self) -> Optimizer:
        """The rule that ``solver`` names, with scikit-learn's hyperparameters for its three."""
        if isinstance(self.solver, Optimizer):
            return self.solver
        lr = float(self.learning_rate_init)
        if self.solver == "sgd":
            return SGD(lr, self.momentum, nesterov=bool(self.nesterovs_momentum and self.momentum > 0))
        if self.solver == "adam":
            return Adam(lr, (self.beta_1, self.beta_2), self.epsilon, epsilon_hat=True)
        if self.solver == "lbfgs":
            return LBFGS(tolerance_grad=self.tol, tolerance_change=SCIPY_FTOL, max_eval=self.max_fun)
        return OPTIMIZERS[self.solver](lr=lr)

    # --- minibatches ---

    def _fit_stochastic(self, X: Any, y: NDArray[Any], weight: NDArray[Any] | None, incremental: bool) -> None:
        fitted, net = self._fitted, self._fitted.net
        (X, y, weight), held_out = self._split(X, y, weight)
        rows = solvers.Rows(net, X, self._targets(y), weight)
        n = len(rows)
        batch_size = min(200, n) if self.batch_size == "auto" else solvers.at_most(int(self.batch_size), n)
        if fitted.descent is None or not incremental:
            fitted.descent = self._descent(-(-n // batch_size))
        descent = fitted.descent
        descent.objective = self._objective()  # alpha may have been set since
        feed = rows.feed(batch_size)
        order = np.arange(n) if self.shuffle else None
        shown = Progress(1 if incremental else self.max_iter, n, bool(self.progress))
        self.n_iter_ = 0
        with interrupt_between_steps() as interrupted, descent._tuned(batch_size):

            def after_batch(count: int) -> bool:
                shown.advance(count)
                return interrupted.is_set()

            try:
                for _ in range(self.max_iter):
                    started = time.perf_counter()
                    if order is not None:
                        order = solvers.reorder(order, self._random_state)
                    loss = descent.run_epoch(rows, feed, order, after_batch)
                    if interrupted.is_set():
                        warnings.warn("Training interrupted by user.", stacklevel=5)
                        break
                    if self._end_epoch(descent, loss, n, held_out, started, shown) or incremental:
                        break
                    if self.n_iter_ == self.max_iter:
                        self._warn_of_max_iter()
            finally:
                shown.close()
                descent.end_fit()
        if self.early_stopping and fitted.best is not None:
            fitted.put(fitted.best)
        fitted.best = None

    def _descent(self, steps: int) -> solvers.Descent:
        """A descent from no momentum; ``steps`` are the updates of an epoch."""
        lr = self.solver.lr if isinstance(self.solver, Optimizer) else self.learning_rate_init
        rate = solvers.Rate(lr, self.learning_rate if self.solver == "sgd" else "constant", self.power_t)
        schedule = None
        if self.schedule is not None:
            schedule = schedules.get(self.schedule).over(steps * self.max_iter, self.max_iter)
        clip_norm = None if self.clip_norm is None else float(self.clip_norm)
        return solvers.Descent(self._fitted.net, self._objective(), self._optimizer(), rate, schedule, clip_norm)

    def _split(self, X: Any, y: NDArray[Any], weight: NDArray[Any] | None) -> tuple[Any, Any]:
        """(X, y, weight) to train on, and with ``early_stopping`` the like of it to score on, y in its own terms."""
        if not self.early_stopping:
            return (X, y, weight), None
        kept, held = train_test_split(
            np.arange(len(y)),
            random_state=self._random_state,
            test_size=self.validation_fraction,
            stratify=self._strata(y),
        )
        if len(held) < 2:
            raise ValueError(
                "validation_fraction: the validation set is too small; increase validation_fraction or the data"
            )

        def part(rows: NDArray[np.int64]) -> tuple[Any, NDArray[Any], NDArray[Any] | None]:
            chosen = self._fitted.net._ops.to_device(rows) if _on_device(X) else rows
            return X[chosen], y[rows], None if weight is None else weight[rows]

        X_held, y_held, weight_held = part(held)
        return part(kept), (X_held, self._decode(y_held), weight_held)

    def _end_epoch(
        self, descent: solvers.Descent, loss: float, n: int, held_out: Any, started: float, shown: Progress
    ) -> bool:
        """Keep the books of an epoch; whether it was the last."""
        bad = descent.bad_step()
        if bad:
            raise ValueError(
                f"Solver produced non-finite parameter weights (update {bad}, which is not applied). The input data "
                "may contain large values and need to be preprocessed."
            )
        self.n_iter_ += 1
        self.loss_ = loss
        self.t_ += n
        self.loss_curve_.append(loss)
        if self.verbose:
            print(f"Iteration {self.n_iter_}, loss = {loss:.8f}")
        row = {"epoch": float(self.n_iter_), "loss": loss, "learning_rate": descent.rate.now}
        if held_out is None:
            self._watch_loss()
        else:
            row["validation_score"] = self._watch_score(*held_out)
        solvers.observe_plateau(descent, loss if held_out is None else -row["validation_score"])
        descent.rate.end_epoch(self.t_)
        row["seconds"] = time.perf_counter() - started
        shown.end_epoch({name: row[name] for name in ("loss", "validation_score") if name in row})
        return self._converged(descent) | self._called_off(row)

    def _converged(self, descent: solvers.Descent) -> bool:
        """Whether neither the loss nor the score has improved for long enough, and the rate is not to be cut for it."""
        if self._no_improvement_count <= self.n_iter_no_change:
            return False
        stopping = descent.rate.stop_or_cut()
        if self.verbose:
            what = "Validation score" if self.early_stopping else "Training loss"
            then = "Stopping." if stopping else f"Setting learning rate to {descent.rate.now:f}"
            print(f"{what} did not improve more than tol={self.tol:f} for {self.n_iter_no_change} epochs. {then}")
        if not stopping:
            self._no_improvement_count = 0
        return stopping

    def _watch_loss(self) -> None:
        loss = self.loss_curve_[-1]
        stayed = loss > self.best_loss_ - self.tol
        self._no_improvement_count = self._no_improvement_count + 1 if stayed else 0
        self.best_loss_ = min(self.best_loss_, loss)

    def _watch_score(self, X: Any, y: NDArray[Any], weight: NDArray[Any] | None) -> float:
        """The score on the validation part; the weights are remembered where it is the best so far."""
        y_hat = self._to_host(self._fitted.forward(X))
        score = self._score(y, self._decode(y_hat), weight) if np.isfinite(y_hat).all() else np.nan
        self.validation_scores_.append(score)
        if self.verbose:
            print(f"Validation score: {score:f}")
        stayed = score < self.best_validation_score_ + self.tol
        self._no_improvement_count = self._no_improvement_count + 1 if stayed else 0
        if score > self.best_validation_score_:
            self.best_validation_score_ = score
            self._fitted.best = self._fitted.theta()
        return float(score)

    def _called_off(self, row: dict[str, float]) -> bool:
        """Call every callback; whether one of them answered True."""
        if not self.callbacks:
            return False
        self._show()
        answers = [callback(self, dict(row)) for callback in self.callbacks]
        self._fitted.take(self.coefs_, self.intercepts_)
        return any(isinstance(answer, (bool, np.bool_)) and bool(answer) for answer in answers)

    # --- the whole set at once ---

    def _fit_full_batch(self, X: Any, y: NDArray[Any], weight: NDArray[Any] | None) -> None:
        net = self._fitted.net
        rows = solvers.Rows(net, X, self._targets(y), weight)
        shown = Progress(self.max_iter, len(rows), bool(self.progress))
        iterations, started = 0, time.perf_counter()

        def after_iteration(loss: float) -> bool:
            nonlocal iterations
            iterations += 1
            if self.verbose:
                print(f"Iteration {iterations}, loss = {loss:.8f}")
            shown.advance(len(rows))
            shown.end_epoch({"loss": loss})
            seconds = time.perf_counter() - started
            return self._called_off({"epoch": float(iterations), "loss": loss, "seconds": seconds})

        rule = self._optimizer()
        assert isinstance(rule, LBFGS)
        try:
            result = solvers.minimise(net, self._objective(), rows, rule, self.max_iter, after_iteration)
        finally:
            shown.close()
        self._fitted.best = None
        self.loss_ = float(result.fun)
        self.n_iter_ = min(int(result.nit), self.max_iter)
        if result.status == 1:
            self._warn_of_max_iter()
        elif result.status not in (0, 99):  # 99: a callback ended the run
            warnings.warn(f"lbfgs failed to converge: {result.message}", ConvergenceWarning, stacklevel=5)

    # --- what a fit leaves behind ---

    def _show(self) -> None:
        """Bring `coefs_` and `intercepts_` up to date, in lists of their own: what a user puts into them is noticed."""
        if self._fitted.net._ops.waits:
            self._fitted.show()
        self.coefs_, self.intercepts_ = list(self._fitted.coefs), list(self._fitted.intercepts)

    def _refuse_bad_weights(self) -> None:
        if not all(np.isfinite(array).all() for array in (*self.coefs_, *self.intercepts_)):
            raise ValueError(
                "Solver produced non-finite parameter weights. The input data may contain large values and need to be "
                "preprocessed."
            )

    def _warn_of_max_iter(self) -> None:
        warnings.warn(
            f"max_iter: the {self.max_iter} iterations were used up before the optimization converged",
            ConvergenceWarning,
            stacklevel=6,
        )

    def _outputs(self, X: Any) -> NDArray[Any]:
        """ŷ of the network for new rows, (n_samples, n_outputs): a CuPy array where they are on the GPU."""
        check_is_fitted(self)
        if _on_device(X):
            self._fitted.take(self.coefs_, self.intercepts_)
            return self._fitted.forward(self._device_rows(self._fitted.net._ops, X, reset=False))
        X = validate_data(self, X, accept_sparse=SPARSE, reset=False)
        self._fitted.take(self.coefs_, self.intercepts_)
        return self._fitted.forward(_rowwise(X))

    @property
    def network(self) -> MLP:
        """The fitted `MLP`: to save, to export, or to train on with a `Trainer`."""
        check_is_fitted(self)
        self._fitted.take(self.coefs_, self.intercepts_)
        return self._fitted.net

    def _to_host(self, array: Any) -> NDArray[Any]:
        return self._fitted.net._ops.to_host(array)

    def _partial_fit_is_possible(self) -> bool:
        if self._full_batch:
            raise AttributeError(f"partial_fit: solver={self.solver!r} takes the whole data set at once")
        return True

    def _score_rows(self, X: Any, y: Any, sample_weight: Any) -> float:
        """The score of data of which some is on the GPU."""
        y, sample_weight = (self._to_host(a) if _on_device(a) else a for a in (y, sample_weight))
        y_hat = self.predict(X)
        return self._score(y, self._to_host(y_hat) if _on_device(y_hat) else y_hat, sample_weight)

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.sparse = True
        return tags

    def __getstate__(self) -> dict[str, Any]:
        state = dict(super().__getstate__())
        if "_fitted" in state:  # the arrays shown are views of the network's: they are made again with it
            self._fitted.take(self.coefs_, self.intercepts_)
            del state["coefs_"], state["intercepts_"]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "_fitted" in state:
            self._show()

    # --- scikit-learn's own estimators ---

    def to_sklearn(self) -> Any:
        """This estimator as scikit-learn's of the same name, fitted where this one is, with equal predictions.

        What scikit-learn has no counterpart of is left out with a warning where it only matters to another fit (the
        solver, dropout, …); an activation that it lacks is a ValueError.
        """
        theirs = _counterpart(self)
        activation = THEIR_NAME.get(self.activation, self.activation)
        if activation not in THEIR_ACTIVATIONS:
            raise ValueError(
                f"activation: scikit-learn has none called {self.activation!r}, only {', '.join(THEIR_ACTIVATIONS)}"
            )
        wanted = theirs().get_params()
        parameters = {name: value for name, value in self.get_params().items() if name in wanted}
        parameters["activation"] = activation
        if self.solver not in THEIR_SOLVERS:
            parameters["solver"] = wanted["solver"]
        lost = [name for name in _altered(self) if name not in wanted and name not in ("device", "progress")]
        lost += ["solver"] * (self.solver not in THEIR_SOLVERS)
        if lost:
            warnings.warn(f"scikit-learn cannot fit with this {', '.join(lost)}; left out", stacklevel=2)
        made = theirs(**parameters)
        if hasattr(self, "_fitted"):
            self._hand_over(made)
        return made

    def _hand_over(self, made: Any) -> None:
        """Give scikit-learn's estimator what this one has learned; the state of the optimizer stays here."""
        self._fitted.take(self.coefs_, self.intercepts_)
        for name, value in vars(self).items():
            if name not in self.get_params() and name not in ("_fitted", "coefs_", "intercepts_", "loss"):
                setattr(made, name, value.copy() if isinstance(value, (list, np.ndarray)) else value)
        made.coefs_ = [np.array(coef, order="C") for coef in self.coefs_]
        made.intercepts_ = [np.array(intercept) for intercept in self.intercepts_]
        made._best_coefs = [coef.copy() for coef in made.coefs_]
        made._best_intercepts = [intercept.copy() for intercept in made.intercepts_]

    @classmethod
    def from_sklearn(cls, estimator: Any, **parameters: Any) -> Any:
        """scikit-learn's estimator of the same name as this one, fitted where that one is, with equal predictions.

        ``parameters`` are set beside those it has, such as ``device="cuda"``; a ``precision`` of 16 bits rounds.
        """
        if not isinstance(estimator, _counterpart(cls)):
            raise TypeError(
                f"estimator: expected scikit-learn's {cls.__name__}, got {type(estimator).__module__}."
                f"{type(estimator).__name__}"
            )
        made = cls(**{**estimator.get_params(), **parameters})
        if not hasattr(estimator, "coefs_"):
            return made
        made._validate_params()
        skipped = {"coefs_", "intercepts_", "_optimizer", "_best_coefs", "_best_intercepts"}
        for name, value in vars(estimator).items():
            if name not in skipped and name not in estimator.get_params() and name != "loss":
                setattr(made, name, value.copy() if isinstance(value, (list, np.ndarray)) else value)
        sizes = (len(estimator.coefs_[0]), *(len(b) for b in estimator.intercepts_))
        f, output = (OUR_NAME.get(name, name) for name in (made.activation, estimator.out_activation_))
        dtype = estimator.coefs_[0].dtype
        net = solvers.network(
            sizes, f, output, made.dropout, dtype.name if made.precision == "auto" else made.precision, made.device
        )
        solvers.load(net, estimator.coefs_, estimator.intercepts_)
        made._fitted = solvers.Fitted(net)
        made._show()
        return made

    def _validated(self, X: Any, y: Any, reset: bool, y_numeric: bool = False) -> tuple[Any, NDArray[Any]]:
        """X and y after scikit-learn's checks; of an X on the GPU, which has had its own, a stand-in goes through."""
        options = {"multi_output": True, "y_numeric": y_numeric, "dtype": FLOATS}
        if _on_device(X):
            return X, check_X_y(_stand_in(X), y, estimator=self, **options)[1]
        return validate_data(self, X, y, accept_sparse=SPARSE, reset=reset, **options)

    # --- what the two differ in ---

    def _training_data(self, X: Any, y: Any, incremental: bool, reset: bool) -> tuple[Any, NDArray[Any], Any]:
        """X and y, checked and encoded, and what every sample's class weighs, or None."""
        raise NotImplementedError

    def _out_activation(self) -> str:
        raise NotImplementedError

    def _targets(self, y: NDArray[Any]) -> NDArray[Any]:
        """The encoded y as the network's loss takes it."""
        return y

    def _decode(self, y: NDArray[Any]) -> NDArray[Any]:
        """Encoded targets, or ŷ, in the terms of the y that `fit` was given."""
        raise NotImplementedError

    def _strata(self, y: NDArray[Any]) -> NDArray[Any] | None:
        """What the validation part is to have in proportion."""
        return None

    def _score(self, y: NDArray[Any], predicted: NDArray[Any], weight: NDArray[Any] | None) -> float:
        raise NotImplementedError

    def predict(self, X: Any) -> NDArray[Any]:
        """What the network makes of new rows."""
        raise NotImplementedError


class MLPClassifier(ClassifierMixin, _BaseMLP):
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
        **_BaseMLP._parameter_constraints,
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
        y_hat = self._outputs(X)
        return self._decode(self._to_host(y_hat) if _on_device(y_hat) else y_hat)

    def score(self, X: Any, y: Any, sample_weight: Any = None) -> float:
        """The accuracy on X and y; arguments as in `fit`."""
        if any(map(_on_device, (X, y, sample_weight))):
            return self._score_rows(X, y, sample_weight)
        return super().score(X, y, sample_weight)

    def predict_proba(self, X: Any) -> NDArray[Any]:
        """The probability of every class, (n_samples, n_classes), in the order of ``classes_``."""
        y_hat = self._outputs(X)
        if y_hat.shape[1] > 1:
            return y_hat
        both = (
            self._fitted.net._ops.empty((len(y_hat), 2), y_hat.dtype)
            if _on_device(y_hat)
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
        X, y = self._validated(X, y, reset)
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


class MLPRegressor(RegressorMixin, _BaseMLP):
    """A multilayer perceptron for real targets: scikit-learn's MLPRegressor on this library.

    The parameters up to ``max_fun`` have scikit-learn's names, order, defaults and meaning
    (https://scikit-learn.org/stable/modules/generated/sklearn.neural_network.MLPRegressor.html): ``loss`` is
    "squared_error", half the mean squared error, or "poisson", half the Poisson deviance of a rate exp(z), for y ≥ 0.
    What comes after them, what ``activation`` and ``solver`` accept beyond, and what `fit` leaves behind are as in
    `MLPClassifier`, without ``class_weight`` and ``classes_``.
    """

    _parameter_constraints = {  # noqa: RUF012
        **_BaseMLP._parameter_constraints,
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
        if any(map(_on_device, (X, y, sample_weight))):
            return self._score_rows(X, y, sample_weight)
        return super().score(X, y, sample_weight)

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.target_tags.multi_output = True
        return tags

    def _training_data(self, X: Any, y: Any, incremental: bool, reset: bool) -> tuple[Any, NDArray[Any], Any]:
        X, y = self._validated(X, y, reset, y_numeric=True)
        if self.loss == "poisson" and (y < 0).any():
            raise ValueError("y: some values are negative, and loss='poisson' needs y >= 0")
        return X, column_or_1d(y, warn=True) if y.ndim == 2 and y.shape[1] == 1 else y, None

    def _out_activation(self) -> str:
        return "exp" if self.loss == "poisson" else "identity"

    def _decode(self, y: NDArray[Any]) -> NDArray[Any]:
        return y.ravel() if y.shape[1] == 1 else y

    def _score(self, y: NDArray[Any], predicted: NDArray[Any], weight: NDArray[Any] | None) -> float:
        return r2_score(y, predicted, sample_weight=weight)


def _on_device(array: Any) -> bool:
    """Whether an array is in a GPU's memory: CuPy's, or any with ``__cuda_array_interface__`` or DLPack."""
    if hasattr(array, "__cuda_array_interface__"):
        return True
    return hasattr(array, "__dlpack_device__") and array.__dlpack_device__()[0] in DLPACK_CUDA


def _stand_in(X: Any) -> NDArray[Any]:
    """A host array of as many rows as X, for checks that count them."""
    return np.zeros((len(X), 1), X.dtype)


def _rowwise(X: Any) -> Any:
    """A sparse X in the format whose rows can be taken; a dense one as it is."""
    return X.tocsr() if issparse(X) else X


def _counterpart(ours: Any) -> Any:
    """scikit-learn's class of the same name."""
    from sklearn import neural_network

    kind = ours if isinstance(ours, type) else type(ours)
    return neural_network.MLPClassifier if issubclass(kind, MLPClassifier) else neural_network.MLPRegressor


def _altered(estimator: Any) -> list[str]:
    """The parameters that differ from their defaults."""
    default = type(estimator)().get_params()
    return [name for name, value in estimator.get_params().items() if not np.array_equal(value, default[name])]
