"""The fit of MLPClassifier and MLPRegressor against scikit-learn's own, step by step, in float64 on the CPU.

Both get the same parameters, data and ``random_state``; after each scenario every weight, every loss and every count
has to agree: numbers to 1e-6 relative, counts exactly.
"""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from scipy import sparse

pytest.importorskip("sklearn")
from sklearn import neural_network as theirs
from sklearn.datasets import make_classification, make_multilabel_classification, make_regression
from sklearn.exceptions import ConvergenceWarning

import gpu_mlp as ours

pytestmark = pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
RELATIVE = 1e-6
EPOCHS = 20


def classes(n=230, seed=0):
    """Three classes, of which one is rare; 230 rows are one batch of 200 and a short one."""
    x, y = make_classification(n, 9, n_informative=6, n_classes=3, weights=[0.5, 0.4], random_state=seed)
    return x, y


def values(n=230, seed=0, outputs=1):
    """Scaled: on targets of some hundreds both L-BFGS part after 15 iterations, as theirs does from itself when x is
    changed in its last bit."""
    x, y = make_regression(n, 7, n_targets=outputs, noise=3.0, random_state=seed)
    return x, y / y.std()


def counts():
    x, y = values()
    return x, np.random.default_rng(0).poisson(np.exp(y / abs(y).max()))


TASKS = {
    "classes": ("MLPClassifier", classes, {}),
    "two classes": ("MLPClassifier", lambda: make_classification(230, 9, random_state=0), {}),
    "labels": ("MLPClassifier", lambda: make_multilabel_classification(230, 9, n_classes=4, random_state=0), {}),
    "values": ("MLPRegressor", values, {}),
    "several values": ("MLPRegressor", lambda: values(outputs=3), {}),
    "counts": ("MLPRegressor", counts, {"loss": "poisson"}),
}
SOLVERS = {
    "sgd": {"solver": "sgd", "learning_rate_init": 1e-3},
    "adam": {"solver": "adam", "learning_rate_init": 3e-3},
    "lbfgs": {"solver": "lbfgs"},
}


def pair(task, **parameters):
    """Ours and scikit-learn's estimator with the same parameters, and the data."""
    name, data, own = TASKS[task]
    parameters = {
        "hidden_layer_sizes": (11, 6), "activation": "tanh", "max_iter": EPOCHS, "random_state": 3, **own, **parameters,
    }  # fmt: skip
    return getattr(ours, name)(**parameters), getattr(theirs, name)(**parameters), *data()


def close(a, b):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    assert a.shape == b.shape
    assert np.isfinite(a).all()
    assert np.linalg.norm(a - b) <= RELATIVE * np.linalg.norm(b)


def fit_both(task, parameters, run):
    mine, reference, x, y = pair(task, **parameters)
    for estimator in (mine, reference):
        run(estimator, x, y)
    return mine, reference, x, y


def same_fit(task, parameters, run=lambda estimator, x, y: estimator.fit(x, y)):
    mine, reference, x, y = fit_both(task, parameters, run)
    for name in ("coefs_", "intercepts_"):
        for a, b in zip(getattr(mine, name), getattr(reference, name), strict=True):
            close(a, b)
    assert_attributes(mine, reference)
    close(mine.predict(x), reference.predict(x))
    if hasattr(reference, "predict_proba"):
        close(mine.predict_proba(x), reference.predict_proba(x))
        close(np.exp(mine.predict_log_proba(x)), np.exp(reference.predict_log_proba(x)))
    assert mine.score(x, y) == pytest.approx(reference.score(x, y), rel=RELATIVE)
    return mine, reference


def assert_attributes(mine, reference):
    """Every other fitted attribute of scikit-learn's is there and agrees."""
    fitted = {name for name in vars(reference) if name.endswith("_")} - {"coefs_", "intercepts_"}
    assert fitted >= {"n_iter_", "t_", "n_layers_", "n_outputs_", "out_activation_", "loss_", "n_features_in_"}
    for name in fitted:
        a, b = getattr(mine, name), getattr(reference, name)
        if isinstance(b, (float, list)) and np.isfinite(b).all():
            close(a, b)
        else:
            np.testing.assert_array_equal(a, b, err_msg=name)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("task", TASKS)
def test_fit(task, solver):
    mine, reference = same_fit(task, SOLVERS[solver])
    if solver != "lbfgs":
        assert len(mine.loss_curve_) == EPOCHS
        assert mine._no_improvement_count == reference._no_improvement_count


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("task", TASKS)
def test_sample_weights(task, solver):
    def run(estimator, x, y):
        estimator.fit(x, y, sample_weight=np.random.default_rng(1).uniform(0, 3, len(x)))

    same_fit(task, {**SOLVERS[solver], "alpha": 0.3}, run)


@pytest.mark.parametrize("solver", ["sgd", "adam"])
@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("weighted", [False, True])
def test_early_stopping(task, solver, weighted):
    """The best epoch is not the last, so that the weights that come back are remembered ones."""

    def run(estimator, x, y):
        weight = np.random.default_rng(1).uniform(0, 3, len(x)) if weighted else None
        estimator.fit(x, y, sample_weight=weight)

    parameters = {**SOLVERS[solver], "early_stopping": True, "validation_fraction": 0.3, "n_iter_no_change": 3}
    mine, _ = same_fit(task, {**parameters, "max_iter": 60}, run)
    assert mine.best_loss_ is None
    assert mine.best_validation_score_ == max(mine.validation_scores_)


def test_early_stopping_stops_before_the_last_epoch():
    """What the comparison above is worth: some of its runs end early, at an epoch that was not the best."""
    parameters = {**SOLVERS["adam"], "early_stopping": True, "n_iter_no_change": 3, "max_iter": 60}
    mine, _ = same_fit("classes", {**parameters, "validation_fraction": 0.3})
    assert mine.n_iter_ < 60
    assert mine.n_iter_ - np.argmax(mine.validation_scores_) > 3


@pytest.mark.parametrize("early_stopping", [False, True])
@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("task", ["classes", "several values"])
def test_warm_start(task, solver, early_stopping):
    def run(estimator, x, y):
        for _ in range(3):
            estimator.fit(x, y)

    parameters = {**SOLVERS[solver], "warm_start": True, "max_iter": 8, "early_stopping": early_stopping}
    mine, _ = same_fit(task, parameters, run)
    if solver != "lbfgs":
        assert len(mine.loss_curve_) > mine.n_iter_


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("solver", ["sgd", "adam"])
@pytest.mark.parametrize("task", TASKS)
def test_partial_fit(task, solver, weighted):
    """Twenty calls on parts of the data, then a `fit` that begins anew, then one more call."""

    def run(estimator, x, y):
        known = {"classes": np.arange(4 if y.ndim == 2 else y.max() + 1)} if hasattr(estimator, "predict_proba") else {}
        weight = np.random.default_rng(1).uniform(0, 3, len(x))
        for part in np.array_split(np.arange(len(x)), EPOCHS):
            estimator.partial_fit(x[part], y[part], sample_weight=weight[part] if weighted else None, **known)

    def run_on(estimator, x, y):
        run(estimator, x, y)
        estimator.fit(x, y)
        estimator.partial_fit(x[:50], y[:50])

    same_fit(task, SOLVERS[solver], run)
    same_fit(task, {**SOLVERS[solver], "max_iter": 3}, run_on)


@pytest.mark.parametrize(
    "parameters",
    [
        {"learning_rate": "invscaling", "learning_rate_init": 0.5, "power_t": 0.3},
        {"learning_rate": "adaptive", "learning_rate_init": 0.3, "tol": 0.05, "n_iter_no_change": 2},
        {"learning_rate": "adaptive", "learning_rate_init": 0.3, "tol": 0.05, "n_iter_no_change": 2, "max_iter": 80},
        {"nesterovs_momentum": False, "learning_rate": "invscaling", "learning_rate_init": 0.5, "power_t": 0.2},
        {"momentum": 0.0, "learning_rate_init": 0.05},
        {"momentum": 1.0, "learning_rate_init": 1e-4},
        {"shuffle": False, "batch_size": 37},
        {"batch_size": 1, "max_iter": 3},
        {"batch_size": 230},
        {"early_stopping": True, "learning_rate": "adaptive", "learning_rate_init": 0.1, "n_iter_no_change": 1},
        {"n_iter_no_change": 2, "tol": 0.1},
    ],
    ids=lambda parameters: " ".join(f"{name}={value}" for name, value in parameters.items()),
)
@pytest.mark.parametrize("task", ["classes", "values"])
def test_sgd(task, parameters):
    same_fit(task, {"solver": "sgd", **parameters})


@pytest.mark.parametrize(
    "parameters",
    [
        {"beta_1": 0.0, "beta_2": 0.0},
        {"beta_1": 0.5, "beta_2": 0.6, "epsilon": 0.1},
        {"alpha": 0.0},
        {"alpha": 10.0},
        {"batch_size": 64, "shuffle": False},
        {"n_iter_no_change": np.inf, "tol": 0.0},
        {"tol": 10.0, "n_iter_no_change": 3},
        {"hidden_layer_sizes": ()},
        {"hidden_layer_sizes": 5},
        {"hidden_layer_sizes": [4, 5, 6]},
    ],
    ids=str,
)
@pytest.mark.parametrize("task", ["classes", "values"])
def test_adam(task, parameters):
    same_fit(task, {"solver": "adam", **parameters})


@pytest.mark.parametrize(
    "parameters", [{"max_fun": 7}, {"tol": 0.05}, {"alpha": 3.0, "hidden_layer_sizes": ()}], ids=str
)
@pytest.mark.parametrize("task", ["classes", "counts"])
def test_lbfgs(task, parameters):
    same_fit(task, {"solver": "lbfgs", "max_iter": 30, **parameters})


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("activation", ["identity", "logistic", "tanh", "relu"])
def test_activations(activation, solver):
    for task in ("classes", "values"):
        same_fit(task, {**SOLVERS[solver], "activation": activation})


@pytest.mark.parametrize("form", [sparse.csr_matrix, sparse.csc_matrix, sparse.csr_array, sparse.csc_array])
@pytest.mark.parametrize("solver", SOLVERS)
def test_sparse_input(form, solver):
    def run(estimator, x, y):
        x = np.where(x > 0, x, 0)
        estimator.fit(form(x), y)
        assert estimator.predict(form(x)).shape == (len(x),)

    same_fit("classes", {**SOLVERS[solver], "early_stopping": solver == "sgd"}, run)


@pytest.mark.parametrize("task", ["classes", "two classes", "labels"])
def test_the_loss_of_a_probability_that_is_zero_is_clipped_as_theirs(task):
    """Unscaled inputs: most probabilities are 0 or 1, and the log loss of a miss is −log eps, 36.

    To 1e-4 only: theirs takes log(1 − ŷ) of a ŷ that was rounded next to 1, ours takes it from z.
    """
    parameters = {"solver": "sgd", "learning_rate_init": 1e-9, "activation": "identity"}
    mine, reference, _, _ = fit_both(task, parameters, lambda estimator, x, y: estimator.fit(1e4 * x, y))
    np.testing.assert_allclose(mine.loss_curve_, reference.loss_curve_, rtol=1e-4)
    for a, b in zip(mine.coefs_, reference.coefs_):
        close(a, b)
    assert 1 < mine.loss_curve_[0] < 36.1 * mine.n_outputs_


def test_random_states_are_drawn_from_as_theirs_are():
    """An instance is shared and moves on; the next fit goes on from there."""

    def run(estimator, x, y):
        estimator.set_params(random_state=np.random.RandomState(5))
        estimator.fit(x, y).fit(x, y)

    same_fit("classes", {"solver": "adam", "early_stopping": True}, run)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("task", ["classes", "values"])
def test_warnings_are_theirs(task, solver):
    mine, reference, x, y = pair(task, **SOLVERS[solver], batch_size=1000)
    told = []
    for estimator in (mine, reference):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            estimator.fit(x, y)
        told.append([warning.category for warning in caught])
    assert told[0] == told[1]
    assert ConvergenceWarning in told[0]


@pytest.mark.parametrize("solver", SOLVERS)
def test_float32_stays_float32(solver):
    """And follows scikit-learn's float32 as far as that type allows (their L-BFGS moves on to float64)."""
    for task in ("classes", "values"):
        mine, reference, x, y = pair(task, **SOLVERS[solver])
        x = x.astype(np.float32)
        for estimator in (mine, reference):
            estimator.fit(x, y if task == "classes" else y.astype(np.float32))
        assert {array.dtype for array in (*mine.coefs_, *mine.intercepts_)} == {np.dtype(np.float32)}
        assert mine._fitted.net.precision == "float32"
        assert mine.loss_ == pytest.approx(reference.loss_, rel=1e-3)
        if task == "classes":
            assert mine.predict_proba(x).dtype == np.float32
        else:
            assert mine.predict(x).dtype == np.float32


@pytest.mark.parametrize("solver", ["sgd", "adam"])
def test_pickled_descents_go_on_where_they_were(solver):
    import pickle

    mine, reference, x, y = pair("classes", **SOLVERS[solver])
    for part in (slice(0, 100), slice(100, 230)):
        mine.partial_fit(x[part], y[part], classes=[0, 1, 2])
        reference.partial_fit(x[part], y[part], classes=[0, 1, 2])
        mine = pickle.loads(pickle.dumps(mine))
    mine.partial_fit(x, y)
    reference.partial_fit(x, y)
    for a, b in zip(mine.coefs_, reference.coefs_):
        close(a, b)
