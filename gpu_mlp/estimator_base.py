"""What the two estimators share: the fit, minibatch by minibatch or over the whole set, its books, and what it leaves.

Leans on `hyperparameters` for what the parameters mean, on `samples` for the data, on `solvers` for the arithmetic of a
fit and on scikit-learn for what an estimator is.
"""

from __future__ import annotations

import time
import warnings
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.base import BaseEstimator, _fit_context
from sklearn.exceptions import ConvergenceWarning
from sklearn.model_selection import train_test_split
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted

from . import conversion, hyperparameters, samples, solvers
from .hyperparameters import Hyperparameters
from .network import MLP
from .optimizers import LBFGS
from .progress import Progress
from .signals import interrupt_between_steps


class BaseMLP(Hyperparameters, BaseEstimator):
    """An estimator with one `MLP` in it; what the classifier and the regressor differ in is left to them."""

    _parameter_constraints = hyperparameters.CONSTRAINTS

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
        hidden = hyperparameters.hidden_sizes(self)
        hyperparameters.check_combinations(self, incremental)
        X, y, sample_weight = samples.from_device(self, X, y, sample_weight, first)
        X, y, class_weight = self._training_data(X, y, incremental, first)
        weight = samples.weights(X, sample_weight, class_weight)
        y = y.reshape(-1, 1) if y.ndim == 1 else y
        self.n_outputs_ = y.shape[1]
        self._random_state = check_random_state(self.random_state)
        if first:
            self._begin((X.shape[1], *hidden, self.n_outputs_), X.dtype)
        else:
            self._fitted.take(self.coefs_, self.intercepts_)
        try:
            if hyperparameters.full_batch(self):
                self._fit_full_batch(samples.rowwise(X), y, weight)
            else:
                self._fit_stochastic(samples.rowwise(X), y, weight, incremental)
        finally:
            self._show()
        self._refuse_bad_weights()
        return self

    def _begin(self, sizes: tuple[int, ...], dtype: np.dtype) -> None:
        """A new network with scikit-learn's initial weights, and everything a fit counts set to nothing."""
        self.n_iter_ = 0
        self.t_ = 0
        self.n_layers_ = len(sizes)
        self.out_activation_ = self._out_activation()
        drawn = list(solvers.draw_weights(self._random_state, sizes, self.activation in ("logistic", "sigmoid")))
        dropped = bool(np.any(np.asarray(self.dropout) > 0))
        seed = int(self._random_state.randint(2**31 - 1)) if dropped else 0
        net = hyperparameters.network(self, sizes, dtype, seed)
        solvers.load(net, *map(list, zip(*drawn)))
        self._fitted = solvers.Fitted(net)
        self._fitted.best = self._fitted.theta()
        self._show()
        if not hyperparameters.full_batch(self):
            self.loss_curve_: list[float] = []
            self._no_improvement_count = 0
            self.best_loss_: Any = None if self.early_stopping else np.inf
            self.validation_scores_: Any = [] if self.early_stopping else None
            self.best_validation_score_: Any = -np.inf if self.early_stopping else None

    # --- minibatches ---

    def _fit_stochastic(self, X: Any, y: NDArray[Any], weight: NDArray[Any] | None, incremental: bool) -> None:
        fitted, net = self._fitted, self._fitted.net
        (X, y, weight), held_out = self._split(X, y, weight)
        rows = solvers.Rows(net, X, self._targets(y), weight)
        n = len(rows)
        batch_size = min(200, n) if self.batch_size == "auto" else solvers.at_most(int(self.batch_size), n)
        if fitted.descent is None or not incremental:
            fitted.descent = hyperparameters.descent(self, net, -(-n // batch_size))
        descent = fitted.descent
        descent.objective = hyperparameters.objective(self, net)  # alpha may have been set since
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
            chosen = self._fitted.net._ops.to_device(rows) if samples.on_device(X) else rows
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

        objective, rule = hyperparameters.objective(self, net), hyperparameters.optimizer(self)
        assert isinstance(rule, LBFGS)
        try:
            result = solvers.minimise(net, objective, rows, rule, self.max_iter, after_iteration)
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

    @property
    def network(self) -> MLP:
        """The fitted `MLP`: to save, to export, or to train on with a `Trainer`."""
        check_is_fitted(self)
        self._fitted.take(self.coefs_, self.intercepts_)
        return self._fitted.net

    def _outputs(self, X: Any) -> Any:
        """ŷ of the network for new rows, (n_samples, n_outputs): a CuPy array where they are on the GPU."""
        X = samples.unseen(self, self.network._ops, X)
        return self._fitted.forward(X)

    def _to_host(self, array: Any) -> NDArray[Any]:
        return self._fitted.net._ops.to_host(array)

    def _partial_fit_is_possible(self) -> bool:
        if hyperparameters.full_batch(self):
            raise AttributeError(f"partial_fit: solver={self.solver!r} takes the whole data set at once")
        return True

    def _score_rows(self, X: Any, y: Any, sample_weight: Any) -> float:
        """The score of data of which some is on the GPU."""
        y, sample_weight = (self._to_host(a) if samples.on_device(a) else a for a in (y, sample_weight))
        return self._score(y, self._to_host(self.predict(X)), sample_weight)

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
        return conversion.to_sklearn(self)

    @classmethod
    def from_sklearn(cls, estimator: Any, **parameters: Any) -> Any:
        """scikit-learn's estimator of the same name as this one, fitted where that one is, with equal predictions.

        ``parameters`` are set beside those it has, such as ``device="cuda"``; a ``precision`` of 16 bits rounds.
        """
        return conversion.from_sklearn(cls, estimator, parameters)

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
