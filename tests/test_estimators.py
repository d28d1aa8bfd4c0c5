"""MLPClassifier and MLPRegressor as scikit-learn's tools and users meet them; test_solvers compares the fits."""

from __future__ import annotations

import copy
import inspect
import pickle
import subprocess
import sys
import warnings

import numpy as np
import pytest
from helpers import PRECISIONS, assert_close, blobs, waves
from scipy import sparse

sklearn = pytest.importorskip("sklearn")
# ruff: noqa: E402  (what follows needs it)
from cuda_on_cpu.fixtures import emulated_gpu  # noqa: F401
from sklearn import neural_network as theirs
from sklearn.base import clone
from sklearn.calibration import CalibratedClassifierCV
from sklearn.compose import ColumnTransformer, make_column_selector
from sklearn.ensemble import VotingClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, cross_val_predict, cross_validate
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder, StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

import gpu_mlp
from gpu_mlp import SGD, AdamW, Cosine, MLPClassifier, MLPRegressor, Muon, StepDecay, optimizers
from gpu_mlp.hyperparameters import HIDDEN

pytestmark = pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
VERSION = tuple(int(part) for part in sklearn.__version__.split(".")[:2])
PAIRS = {"MLPClassifier": (MLPClassifier, theirs.MLPClassifier), "MLPRegressor": (MLPRegressor, theirs.MLPRegressor)}


@parametrize_with_checks([MLPClassifier(max_iter=100), MLPRegressor(max_iter=100)])
@pytest.mark.filterwarnings("ignore")
def test_scikit_learns_checks(estimator, check):
    check(estimator)


def fitted(kind=MLPClassifier, seed=0, **parameters):
    """A small fit and its data."""
    x, y = blobs(seed=seed) if kind is MLPClassifier else waves(seed=seed, outputs=1)
    y = y if kind is MLPClassifier else y.ravel()
    return kind(**{"hidden_layer_sizes": (9,), "max_iter": 30, "random_state": 0, **parameters}).fit(x, y), x, y


# --- the interface ---


@pytest.mark.parametrize("name", PAIRS)
def test_the_parameters_are_theirs_and_then_ours(name):
    ours, reference = (inspect.signature(kind.__init__).parameters for kind in PAIRS[name])
    shared = list(reference)
    assert list(ours)[: len(shared)] == shared
    for parameter in shared:
        assert ours[parameter].default == reference[parameter].default
        assert ours[parameter].kind == reference[parameter].kind
    added = list(ours)[len(shared) :]
    assert added
    assert all(ours[parameter].kind is inspect.Parameter.KEYWORD_ONLY for parameter in added)


@pytest.mark.parametrize("name", PAIRS)
def test_the_methods_take_what_theirs_take(name):
    ours, reference = PAIRS[name]
    for method in ("fit", "partial_fit", "predict", "predict_proba", "predict_log_proba", "score", "set_fit_request"):
        if hasattr(reference, method):
            assert list(inspect.signature(getattr(ours, method)).parameters) == list(
                inspect.signature(getattr(reference, method)).parameters
            )


def test_importing_the_package_leaves_scikit_learn_alone():
    code = (
        "import sys, gpu_mlp\nassert 'sklearn' not in sys.modules and 'MLPClassifier' in dir(gpu_mlp)\n"
        "from gpu_mlp import *\nassert 'sklearn' not in sys.modules\n"
        "from gpu_mlp import MLPRegressor\nassert 'sklearn' in sys.modules\n"
        "try:\n    gpu_mlp.MLPClasifier\nexcept AttributeError as error:\n    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert "no attribute 'MLPClasifier'" in done.stdout


def test_without_scikit_learn_the_error_says_what_to_install():
    code = (
        "import sys\nsys.modules['sklearn'] = sys.modules['sklearn.base'] = None\n"
        "try:\n    from gpu_mlp import MLPClassifier\nexcept ImportError as error:\n    print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert "pip install 'gpu-mlp[sklearn]'" in done.stdout


# --- tables in ---


def test_pandas_names_are_kept():
    pandas = pytest.importorskip("pandas")
    x, y = blobs()
    table = pandas.DataFrame(x, columns=[f"column {i}" for i in range(x.shape[1])])
    net = MLPClassifier((5,), max_iter=5, random_state=0).fit(table, pandas.Series(np.array(["a", "b", "c"])[y]))
    assert net.feature_names_in_.tolist() == table.columns.tolist()
    assert set(net.predict(table)) <= {"a", "b", "c"}
    with pytest.raises(ValueError, match="feature names should match"):
        net.predict(table.rename(columns={"column 0": "other"}))


def test_polars_names_are_kept():
    polars = pytest.importorskip("polars")
    x, y = waves(outputs=2)
    table = polars.DataFrame(x, schema=[f"column {i}" for i in range(x.shape[1])])
    net = MLPRegressor(hidden_layer_sizes=(5,), max_iter=5, random_state=0).fit(table, polars.DataFrame(y))
    if hasattr(theirs.MLPRegressor(max_iter=1).fit(table, y), "feature_names_in_"):
        assert net.feature_names_in_.tolist() == table.columns
    else:
        assert VERSION < (1, 9)
    assert_close(net.predict(table), MLPRegressor(**net.get_params()).fit(x, y).predict(x), 1e-12)


@pytest.mark.parametrize("kind", [MLPClassifier, MLPRegressor])
def test_predictions_of_sparse_rows_are_those_of_dense_ones(kind, monkeypatch):
    net, x, _ = fitted(kind)
    monkeypatch.setattr("gpu_mlp.network.CHUNK_ROWS", 50)  # 240 or 200 rows: several chunks, the last one short
    for form in (sparse.csr_matrix, sparse.csc_array):
        np.testing.assert_array_equal(net.predict(form(x)), net.predict(x))


# --- in scikit-learn's tools ---


def test_in_a_pipeline_with_a_column_transformer():
    pandas = pytest.importorskip("pandas")
    rng = np.random.default_rng(0)
    table = pandas.DataFrame({"age": rng.normal(50, 20, 300), "town": rng.choice(["Bern", "Oslo", "Rome"], 300)})
    y = np.where((table.age > 50) ^ (table.town == "Oslo"), "yes", "no")
    columns = ColumnTransformer(
        [
            ("numbers", StandardScaler(), make_column_selector(dtype_include="number")),
            ("names", OneHotEncoder(), ["town"]),
        ]
    )
    net = make_pipeline(columns, MLPClassifier((16,), solver="lbfgs", max_iter=200, random_state=0)).fit(table, y)
    assert net.score(table, y) > 0.95
    assert net[-1].n_features_in_ == 4


def test_in_a_grid_search_on_two_processes():
    x, y = blobs()
    search = GridSearchCV(
        make_pipeline(StandardScaler(), MLPClassifier(max_iter=20, random_state=0)),
        {"mlpclassifier__hidden_layer_sizes": [(3,), (20,)], "mlpclassifier__solver": ["lbfgs", Muon(lr=0.02)]},
        n_jobs=2,
        cv=3,
        error_score="raise",
    ).fit(x, y)
    assert search.best_score_ > 0.9
    assert np.isfinite(search.cv_results_["mean_test_score"]).all()
    assert search.predict(x).shape == y.shape


def test_in_cross_validation():
    x, y = waves()
    net = MLPRegressor(hidden_layer_sizes=(20,), solver="lbfgs", max_iter=200, random_state=0)
    y_hat = cross_val_predict(net, x, y, cv=3)
    assert y_hat.shape == y.shape
    assert np.mean((y_hat - y) ** 2) < 0.1 * y.var()


def test_in_a_vote_and_in_calibration():
    x, y = blobs(spread=1.5)
    net = MLPClassifier((8,), max_iter=60, learning_rate_init=0.02, random_state=0)
    vote = VotingClassifier([("net", net), ("linear", LogisticRegression())], voting="soft").fit(x, y)
    assert vote.score(x, y) > 0.8
    calibrated = CalibratedClassifierCV(net, cv=2).fit(x, y)
    assert_close(calibrated.predict_proba(x).sum(axis=1), np.ones(len(x)), 1e-12)
    assert calibrated.score(x, y) > 0.8


@pytest.mark.skipif(VERSION < (1, 9), reason="pipelines of earlier versions ask for more")
def test_metadata_is_routed():
    """A sample weight reaches the fit and the score through a pipeline: rows without one are ignored."""
    x, y = blobs(classes=2)
    wrong = np.where(np.arange(len(y)) % 3 == 0, 1 - y, y)
    weight = np.where(np.arange(len(y)) % 3 == 0, 0.0, 1.0)
    with sklearn.config_context(enable_metadata_routing=True):
        net = MLPClassifier((8,), solver="lbfgs", max_iter=50, random_state=0)
        net.set_fit_request(sample_weight=True).set_score_request(sample_weight=True)
        pipeline = make_pipeline(StandardScaler().set_fit_request(sample_weight=False), net)
        pipeline.fit(x, wrong, sample_weight=weight)
        assert pipeline.score(x, wrong, sample_weight=weight) == 1
        scores = cross_validate(pipeline, x, wrong, params={"sample_weight": weight}, cv=3)["test_score"]
    assert min(scores) > 0.95


def test_cloning_and_display():
    net = MLPClassifier((5,), solver=AdamW(lr=0.01), schedule=Cosine(), callbacks=(print,), random_state=1)
    copied = clone(net)
    assert repr(copied) == repr(net)
    assert copied.get_params() == net.get_params()
    assert "MLPClassifier" in net._repr_html_()


# --- pickling, copying, and what may be assigned ---


@pytest.mark.parametrize("kind", [MLPClassifier, MLPRegressor])
@pytest.mark.parametrize("duplicate", [lambda net: pickle.loads(pickle.dumps(net)), copy.deepcopy])
def test_a_pickled_estimator_predicts_the_same(kind, duplicate):
    net, x, _ = fitted(kind)
    twin = duplicate(net)
    np.testing.assert_array_equal(twin.predict(x), net.predict(x))
    before = net.predict(x)
    twin.coefs_[0][...] = 0  # views of its own network, and of no other
    np.testing.assert_array_equal(net.predict(x), before)
    assert not np.array_equal(twin.predict(x), before)


def test_an_unfitted_estimator_can_be_pickled():
    with pytest.raises(sklearn.exceptions.NotFittedError):
        pickle.loads(pickle.dumps(MLPClassifier())).predict([[0.0]])


def test_coefficients_can_be_assigned():
    """Item by item, as whole lists, and as lists of other shapes, such as pruned ones."""
    net, x, _ = fitted(activation="tanh")
    W, b = [np.array(W) for W in net.coefs_], [np.array(b) for b in net.intercepts_]

    def expected(W, b):
        z = np.tanh(x @ W[0] + b[0]) @ W[1] + b[1]
        e = np.exp(z - z.max(axis=1, keepdims=True))
        return e / e.sum(axis=1, keepdims=True)

    assert_close(net.predict_proba(x), expected(W, b), 1e-12)
    net.coefs_[0] = W[0] = W[0] / 2
    assert_close(net.predict_proba(x), expected(W, b), 1e-12)
    W[0] *= 3  # what was assigned is still read
    assert_close(net.predict_proba(x), expected(W, b), 1e-12)
    net.coefs_, net.intercepts_ = [W[0][:, :4], W[1][:4]], [b[0][:4], b[1]]
    assert_close(net.predict_proba(x), expected(net.coefs_, net.intercepts_), 1e-12)
    twin = pickle.loads(pickle.dumps(net))
    assert_close(twin.predict_proba(x), net.predict_proba(x), 1e-12)


# --- bad input ---

BAD = [
    {"hidden_layer_sizes": -1}, {"hidden_layer_sizes": (3, 0)}, {"activation": "ghost"}, {"solver": "hadoken"},
    {"alpha": -1}, {"batch_size": 0}, {"batch_size": "all"}, {"learning_rate": "converging"},
    {"learning_rate_init": 0.0}, {"power_t": -1}, {"max_iter": 0}, {"shuffle": "true"}, {"random_state": "seed"},
    {"tol": -1}, {"verbose": "loud"}, {"warm_start": "yes"}, {"momentum": 2}, {"nesterovs_momentum": "no"},
    {"early_stopping": "yes"}, {"validation_fraction": 1.0}, {"beta_1": 1.0}, {"beta_2": -0.5}, {"epsilon": 0.0},
    {"n_iter_no_change": -1}, {"max_fun": 0}, {"early_stopping": True, "validation_fraction": 0.001},
]  # fmt: skip


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("parameters", [*BAD, {"loss": "log"}], ids=str)
def test_a_bad_parameter_is_refused_as_theirs_is(parameters, name):
    if "loss" in parameters and name == "MLPClassifier":
        pytest.skip("the classifier has no loss to choose")
    x, y = blobs()
    refusals = []
    for kind in PAIRS[name]:
        with pytest.raises((ValueError, TypeError)) as refusal:
            kind(**parameters).fit(x, y)
        refusals.append(refusal)
    ours, reference = refusals
    assert ours.type is reference.type
    assert list(parameters)[-1] in str(ours.value)
    if "must be" in str(reference.value) and not {"activation", "solver"} & set(parameters):
        assert sorted(str(ours.value)) == sorted(str(reference.value)), "but for the order of the names in a set"


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize(
    "damage",
    [
        lambda x, y: (x[:, 0], y),
        lambda x, y: (x[:-1], y),
        lambda x, y: (x[:0], y[:0]),
        lambda x, y: (np.where(x == x[3, 2], np.nan, x), y),
        lambda x, y: (np.where(x == x[3, 2], np.inf, x), y),
        lambda x, y: (np.full(x.shape, "word"), y),
        lambda x, y: (x + 1j, y),
        lambda x, y: (x, None),
        lambda x, y: (x, np.where(np.arange(len(y)) == 5, np.nan, y)),
    ],
    ids=["one dimension", "a row short", "no rows", "nan", "inf", "words", "complex", "no y", "nan in y"],
)
def test_bad_data_is_refused_as_theirs_is(damage, name):
    refusals = []
    for kind in PAIRS[name]:
        with pytest.raises((ValueError, TypeError)) as refusal:
            kind(max_iter=2).fit(*damage(*blobs()))
        refusals.append(refusal)
    assert refusals[0].type is refusals[1].type
    assert str(refusals[0].value).replace("gpu_mlp", "") == str(refusals[1].value)


def test_partial_fit_refuses_what_theirs_refuses():
    x, y = blobs()
    for kind in PAIRS["MLPClassifier"]:
        with pytest.raises(AttributeError):
            kind(solver="lbfgs").partial_fit  # noqa: B018
        with pytest.raises(ValueError, match="classes"):
            kind().partial_fit(x, y)
        with pytest.raises(ValueError, match="classes"):
            kind().partial_fit(x, y, classes=[0, 1])
        with pytest.raises(ValueError, match="early_stopping"):
            kind(early_stopping=True).partial_fit(x, y, classes=[0, 1, 2])
        with pytest.raises(ValueError, match="classes"):
            kind(warm_start=True, max_iter=2).fit(x, y).fit(x, y % 2)
        with pytest.raises(ValueError if VERSION >= (1, 9) else ZeroDivisionError):
            kind().fit(x, y, sample_weight=np.zeros(len(x)))
        with pytest.raises(ZeroDivisionError):
            kind(batch_size=1).fit(x, y, sample_weight=np.arange(len(x)) % 2)
    with pytest.raises(AttributeError, match="partial_fit"):
        MLPRegressor(solver="lbfgs").partial_fit  # noqa: B018


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_weights_that_leave_the_finite_numbers_are_refused_as_theirs_are(name):
    x, y = blobs()
    for kind in PAIRS[name]:
        with pytest.raises(ValueError, match="Solver produced non-finite parameter weights"):
            kind(solver="sgd", learning_rate_init=1e200, activation="identity", max_iter=30).fit(x * 1e50, y)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"activation": "softmax"}, "'activation' parameter of MLPClassifier must be a str among"),
        ({"solver": 3}, "'solver' parameter"),
        ({"device": "tpu"}, "'device' parameter"),
        ({"precision": "float8"}, "'precision' parameter"),
        ({"dropout": 1.0}, "'dropout' parameter"),
        ({"dropout": [0.1, 0.2]}, "dropout: expected one value or 1"),
        ({"class_weight": "even"}, "'class_weight' parameter"),
        ({"schedule": "sine"}, "'schedule' parameter"),
        ({"schedule": "cosine", "solver": "sgd", "learning_rate": "adaptive"}, "schedule: learning_rate='adaptive'"),
        ({"clip_norm": 0.0}, "'clip_norm' parameter"),
        ({"clip_norm": 1.0, "solver": "lbfgs"}, "clip_norm: L-BFGS"),
        ({"schedule": "cosine", "solver": "lbfgs"}, "schedule: L-BFGS"),
        ({"dropout": 0.5, "solver": "lbfgs"}, "dropout: L-BFGS"),
        ({"precision": "float16", "solver": "lbfgs"}, "precision: L-BFGS"),
        ({"callbacks": "print"}, "'callbacks' parameter"),
        ({"callbacks": ["print"]}, "callbacks: every one must be callable"),
        ({"progress": "bar"}, "'progress' parameter"),
    ],
)
def test_a_bad_parameter_of_ours_is_refused_by_name(parameters, message):
    x, y = blobs()
    with pytest.raises((ValueError, TypeError), match=message.replace("(", r"\(")):
        MLPClassifier(**parameters).fit(x, y)


def test_negative_counts_and_balanced_parts_are_refused():
    x, y = blobs()
    with pytest.raises(ValueError, match="y >= 0"):
        MLPRegressor(loss="poisson").fit(x, y - 1)
    with pytest.raises(ValueError, match="class_weight: 'balanced'"):
        MLPClassifier(class_weight="balanced").partial_fit(x, y, classes=[0, 1, 2])


# --- beyond scikit-learn ---


@pytest.mark.parametrize("activation", HIDDEN)
def test_every_activation_learns(activation):
    net, x, y = fitted(activation=activation, learning_rate_init=0.02, max_iter=40)
    assert net.score(x, y) > 0.9
    assert net.loss_curve_[-1] < net.loss_curve_[0]


RATES = {"lion": 0.01, "muon": 0.02, "adadelta": 5.0, "sgd": 0.05}


@pytest.mark.parametrize("instance", [False, True])
@pytest.mark.parametrize("solver", [name for name in optimizers.OPTIMIZERS if name != "lbfgs"])
def test_every_optimizer_learns_by_name_and_as_an_instance(solver, instance):
    rate = RATES.get(solver, 0.02)
    chosen = optimizers.OPTIMIZERS[solver](lr=rate) if instance else solver
    net, x, y = fitted(solver=chosen, learning_rate_init=7.0 if instance else rate, max_iter=60)
    assert net.score(x, y) > 0.9
    clone(net).fit(x, y)


def test_an_instance_of_l_bfgs_has_its_own_limits():
    net, x, y = fitted(solver=optimizers.LBFGS(max_eval=3))
    assert net.n_iter_ <= 3
    assert net.score(x, y) > 0.5
    with pytest.raises(AttributeError, match="partial_fit"):
        net.partial_fit(x, y)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_precision_learns(precision):
    net, x, y = fitted(precision=precision, learning_rate_init=0.02, max_iter=40)
    assert net.score(x, y) > 0.9
    assert net._fitted.net.precision == precision
    assert net.coefs_[0].dtype == (np.float64 if precision == "float64" else np.float32)
    twin = pickle.loads(pickle.dumps(net))
    np.testing.assert_array_equal(twin.predict_proba(x), net.predict_proba(x))
    net.coefs_[1][...] = 0  # the 16-bit copy follows what is written to the view
    net.intercepts_[1][...] = 0
    assert_close(net.predict_proba(x), np.full((len(x), 3), 1 / 3), 1e-2)


def test_dropout_regularises_and_does_not_touch_predictions():
    plain, x, _ = fitted()
    dropped, _, _ = fitted(dropout=0.5)
    assert dropped.loss_ > plain.loss_
    np.testing.assert_array_equal(dropped.predict_proba(x), dropped.predict_proba(x))
    np.testing.assert_array_equal(fitted(dropout=[0.5])[0].coefs_[0], dropped.coefs_[0])
    assert not np.array_equal(fitted(dropout=0.5, random_state=1)[0].coefs_[0], dropped.coefs_[0])


def test_class_weight_is_a_sample_weight():
    x, y = blobs()
    weight = np.array([1.0, 5.0, 0.5])
    own = np.random.default_rng(0).uniform(0, 1, len(y))
    a = MLPClassifier((4,), max_iter=5, random_state=0, class_weight=dict(enumerate(weight))).fit(x, y, own)
    b = MLPClassifier((4,), max_iter=5, random_state=0).fit(x, y, own * weight[y])
    np.testing.assert_array_equal(a.coefs_[0], b.coefs_[0])
    keep = (y != 2) | (np.arange(len(y)) % 9 == 0)
    balanced = MLPClassifier((4,), max_iter=5, random_state=0, class_weight="balanced").fit(x[keep], y[keep])
    counted = len(y[keep]) / (3 * np.bincount(y[keep]))
    b.fit(x[keep], y[keep], counted[y[keep]])
    assert_close(balanced.coefs_[0], b.coefs_[0], 1e-8)


def test_schedules_set_the_rate():
    """A step decay to 0 after the first epoch of 2 updates: what follows changes nothing."""
    once, _, _ = fitted(max_iter=1, solver=SGD(lr=0.1))
    stopped, _, _ = fitted(max_iter=9, solver=SGD(lr=0.1), schedule=StepDecay(2, gamma=0.0))
    np.testing.assert_array_equal(once.coefs_[0], stopped.coefs_[0])
    for name in ("constant", "inverse_scaling", "cosine", "one_cycle", "on_plateau"):
        net, x, y = fitted(schedule=name, learning_rate_init=0.02)
        assert net.score(x, y) > 0.9


def test_clip_norm_bounds_the_first_step():
    """Plain SGD of rate 1 clipped to a norm of 1e-3: θ moves by no more, and nearly by that."""
    x, y = waves(outputs=1)
    start = MLPRegressor(hidden_layer_sizes=(4,), solver=SGD(lr=1e-300), max_iter=1, random_state=0).fit(x, y.ravel())
    options = {"batch_size": len(x), "max_iter": 1, "random_state": 0, "clip_norm": 1e-3}
    moved = MLPRegressor(hidden_layer_sizes=(4,), solver=SGD(lr=1.0), **options).fit(x, y.ravel())
    change = [np.ravel(a - b) for a, b in zip(start.coefs_ + start.intercepts_, moved.coefs_ + moved.intercepts_)]
    assert np.linalg.norm(np.concatenate(change)) == pytest.approx(1e-3, rel=1e-2)


@pytest.mark.parametrize("solver", ["adam", "lbfgs"])
def test_callbacks_see_every_epoch_and_may_end_the_fit(solver):
    rows = []

    def watch(estimator, row):
        assert estimator.coefs_[0].shape == (6, 9)
        rows.append(row)
        return len(rows) == 4

    net, _, _ = fitted(solver=solver, callbacks=[watch], early_stopping=True)
    assert [row["epoch"] for row in rows] == [1, 2, 3, 4]
    assert net.n_iter_ == 4
    assert ("validation_score" in rows[0]) == (solver == "adam")
    if solver == "adam":
        assert [row["loss"] for row in rows] == net.loss_curve_
        assert [row["validation_score"] for row in rows] == net.validation_scores_


def test_progress_is_shown_only_when_asked_for(capfd):
    fitted(max_iter=2)
    assert capfd.readouterr() == ("", "")
    fitted(max_iter=2, progress=True)
    shown = capfd.readouterr()
    assert "loss" in shown.out + shown.err


@pytest.mark.parametrize("solver", ["adam", "lbfgs", "sgd"])
def test_verbose_tells_of_every_iteration(solver, capsys):
    net, _, _ = fitted(solver=solver, verbose=True, max_iter=3)
    told = capsys.readouterr().out.splitlines()
    assert told[0].startswith("Iteration 1, loss = ")
    assert len(told) == net.n_iter_ == 3
    fitted(solver=solver, verbose=True, max_iter=60, early_stopping=True, n_iter_no_change=1, tol=1.0)
    if solver != "lbfgs":
        told = capsys.readouterr().out
        assert "Validation score: " in told
        assert "did not improve more than tol=1.000000 for 1 epochs. Stopping." in told


def test_a_batch_larger_than_the_data_is_warned_of_where_fit_was_called():
    x, y = np.arange(12.0).reshape(6, 2), np.arange(6) % 2
    with pytest.warns(UserWarning, match="batch_size: 7 is more than the 6 samples") as told:
        MLPClassifier((3,), batch_size=7, max_iter=1000, tol=1.0, random_state=0).fit(x, y)
    assert told[0].filename == __file__


def test_ctrl_c_keeps_what_was_learned():
    import signal

    def interrupt(estimator, row):
        if row["epoch"] == 3:
            signal.raise_signal(signal.SIGINT)

    x, y = blobs()
    net = MLPClassifier((4,), max_iter=50, random_state=0, callbacks=[interrupt])
    with pytest.warns(UserWarning, match="interrupted"):
        net.fit(x, y)
    assert net.n_iter_ == 3
    assert net.predict(x).shape == y.shape


# --- to and from scikit-learn ---


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("task", ["one", "several"])
def test_conversion_both_ways(name, task):
    kind, reference = PAIRS[name]
    x, y = (
        blobs(classes=2 if task == "one" else 3) if name == "MLPClassifier" else waves(outputs=1 + (task == "several"))
    )
    y = y.ravel() if y.shape[-1] == 1 else y
    early = kind is MLPClassifier
    net = kind(hidden_layer_sizes=(7, 5), activation="tanh", max_iter=20, random_state=0, early_stopping=early).fit(
        x, y
    )
    there = net.to_sklearn()
    assert type(there) is reference
    back = kind.from_sklearn(there)
    for other in (there, back):
        assert_close(other.predict(x), net.predict(x), 1e-14)
        assert other.loss_curve_ == net.loss_curve_
        assert other.score(x, y) == pytest.approx(net.score(x, y), rel=1e-12)
    if not early:
        assert_close(back.partial_fit(x, y).coefs_[0], there.partial_fit(x, y).coefs_[0], 1e-12)
    own = reference(hidden_layer_sizes=(7,), activation="logistic", max_iter=5, random_state=1).fit(
        x.astype(np.float32), y
    )
    ours = kind.from_sklearn(own, progress=False)
    assert ours.coefs_[0].dtype == np.float32
    assert_close(ours.predict(x[:9].astype(np.float32)), own.predict(x[:9].astype(np.float32)), 1e-5)
    own.coefs_[0][...] = 0
    assert ours.coefs_[0].any(), "a copy, not a view of theirs"


def test_conversion_of_what_is_not_fitted_and_of_what_they_lack():
    assert MLPClassifier(alpha=0.5).to_sklearn().get_params()["alpha"] == 0.5
    assert MLPRegressor.from_sklearn(theirs.MLPRegressor(alpha=0.5), device="cpu").get_params()["device"] == "cpu"
    assert MLPClassifier(activation="sigmoid").to_sklearn().activation == "logistic"
    with pytest.raises(ValueError, match="activation: scikit-learn has none called 'gelu'"):
        MLPClassifier(activation="gelu").to_sklearn()
    with pytest.warns(UserWarning, match="dropout, solver"):
        assert MLPClassifier(dropout=0.5, solver="lion").to_sklearn().solver == "adam"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        MLPClassifier(device="cpu", progress=True).to_sklearn()
    with pytest.raises(TypeError, match="expected scikit-learn's MLPClassifier"):
        MLPClassifier.from_sklearn(theirs.MLPRegressor())


# --- on the kernels, and in files ---


@pytest.mark.parametrize(
    ("kind", "parameters"),
    [
        (MLPClassifier, {"solver": "adam", "alpha": 0.1}),
        (MLPClassifier, {"solver": "sgd", "learning_rate": "invscaling", "learning_rate_init": 0.3, "power_t": 0.3}),
        (MLPClassifier, {"solver": "lbfgs", "max_iter": 3}),
        (MLPClassifier, {"solver": "adam", "early_stopping": True, "dropout": 0.3, "clip_norm": 0.5}),
        (MLPRegressor, {"solver": "adam"}),
        (MLPRegressor, {"solver": "sgd", "loss": "poisson"}),
    ],
    ids=str,
)
@pytest.mark.usefixtures("emulated_gpu")
def test_the_kernels_fit_what_numpy_fits(kind, parameters):
    """The estimators on device="cuda", with the kernels run on the CPU: the same weights, losses and predictions."""
    x, y = blobs(n=60) if kind is MLPClassifier else waves(n=60, outputs=2)
    y = abs(y) if parameters.get("loss") == "poisson" else y
    weight = np.random.default_rng(0).uniform(0.5, 1, len(x))
    options = {"hidden_layer_sizes": (5,), "max_iter": 3, "batch_size": 25, "random_state": 0, **parameters}
    cpu, gpu = (kind(device=device, **options).fit(x, y, weight) for device in ("cpu", "cuda"))
    assert gpu._fitted.net.device == "cuda"
    for a, b in zip(cpu.coefs_ + cpu.intercepts_, gpu.coefs_ + gpu.intercepts_):
        assert isinstance(b, np.ndarray)
        assert_close(b, a, 1e-9)
    assert gpu.loss_ == pytest.approx(cpu.loss_, rel=1e-9)
    assert_close(gpu.predict(x), cpu.predict(x), 1e-9)
    with pytest.raises(ValueError, match="read-only"):
        gpu.coefs_[0][...] = 0  # a copy: the change would be lost
    gpu.coefs_[0] = np.zeros_like(gpu.coefs_[0])
    cpu.coefs_[0] = np.zeros_like(cpu.coefs_[0])
    assert_close(gpu.predict(x), cpu.predict(x), 1e-9)
    if parameters["solver"] != "lbfgs" and not parameters.get("early_stopping"):
        twin = pickle.loads(pickle.dumps(gpu))
        for net in (cpu, gpu, twin):
            net.partial_fit(x, y, weight)
        assert_close(gpu.coefs_[1], cpu.coefs_[1], 1e-9)
        assert_close(twin.coefs_[1], gpu.coefs_[1], 1e-14)


@pytest.mark.parametrize("kind", [MLPClassifier, MLPRegressor])
@pytest.mark.parametrize("solver", ["adam", "lbfgs"])
def test_arrays_on_the_gpu_are_fitted_where_they_are(kind, solver, emulated_gpu):  # noqa: F811
    import cupy

    x, y = blobs(n=60) if kind is MLPClassifier else waves(n=60, outputs=1)
    y = y.ravel()
    weight = np.random.default_rng(0).uniform(0.5, 1, len(x))
    options = {"hidden_layer_sizes": (5,), "max_iter": 3, "batch_size": 25, "random_state": 0, "solver": solver}
    options["early_stopping"] = True
    host = kind(device="cuda", **options).fit(x, y, weight)
    X, Y, W = (cupy.asarray(a) for a in (x, y, weight))
    net = kind(device="cuda", **options).fit(X, Y, W)
    for a, b in zip(host.coefs_, net.coefs_):
        assert_close(b, a, 1e-12)
    assert net.n_features_in_ == x.shape[1]
    assert net.score(X, Y, W) == pytest.approx(host.score(x, y, weight), rel=1e-12)
    raw = net.predict_proba(X) if kind is MLPClassifier else net.predict(X)
    assert isinstance(raw, cupy.ndarray)
    assert_close(cupy.asnumpy(raw), host.predict_proba(x) if kind is MLPClassifier else host.predict(x), 1e-12)
    assert isinstance(net.predict(x), np.ndarray)
    with pytest.raises(ValueError, match="features"):
        net.predict(X[:, :2])
    with pytest.raises(ValueError, match="contains NaN or infinity"):
        net.predict(cupy.asarray(np.full_like(x, np.nan)))
    with pytest.raises(TypeError, match="X: is on a GPU and the network on the CPU"):
        kind(device="cpu", **options).fit(X, Y)
    with pytest.raises(ValueError, match="inconsistent numbers of samples"):
        kind(device="cuda", **options).fit(X, Y[:-1])


def test_the_saved_network_is_a_state_dict(tmp_path):
    torch = pytest.importorskip("torch")
    from safetensors.torch import load_file

    net, x, _ = fitted(activation="gelu", hidden_layer_sizes=(9, 4))
    path = net.network.save(tmp_path / "model.safetensors")
    module = torch.nn.Sequential(
        torch.nn.Linear(6, 9), torch.nn.GELU(), torch.nn.Linear(9, 4), torch.nn.GELU(), torch.nn.Linear(4, 3),
        torch.nn.Softmax(dim=1),
    ).double()  # fmt: skip
    module.load_state_dict(load_file(path), strict=True)
    with torch.no_grad():
        assert_close(module(torch.from_numpy(x)).numpy(), net.predict_proba(x), 1e-12)
    assert_close(gpu_mlp.MLP.load(path).forward(x), net.predict_proba(x), 1e-12)
