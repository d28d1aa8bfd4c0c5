"""Exported graphs against the network itself, run by onnx's reference evaluator and by onnxruntime."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from helpers import ROWWISE, activation, assert_close, blobs, waves

onnx = pytest.importorskip("onnx")
# ruff: noqa: E402  (what follows needs it)
from onnx.reference import ReferenceEvaluator

from gpu_mlp import MLP, Trainer
from gpu_mlp.activations import ACTIVATIONS
from gpu_mlp.export import to_onnx
from gpu_mlp.model import Model
from gpu_mlp.preprocessing import Labels, Preprocessor, TargetScaler

RUNNERS = ("reference", "onnxruntime")


def run(runner, made, inputs):
    """The outputs by name."""
    if runner == "reference":
        names = [output.name for output in made.graph.output]
        return dict(zip(names, ReferenceEvaluator(made).run(None, inputs)))
    ort = pytest.importorskip("onnxruntime")
    session = ort.InferenceSession(made.SerializeToString(), providers=["CPUExecutionProvider"])
    return dict(zip([output.name for output in session.get_outputs()], session.run(None, inputs)))


@pytest.fixture(params=RUNNERS)
def runner(request):
    return request.param


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_every_activation(name, runner):
    """As hidden layer, or as output where it works on rows; z beyond ±3 meets every branch."""
    sizes = [3, 5] if name in ROWWISE else [3, 31, 2]
    net = MLP(sizes, "relu" if name in ROWWISE else name, name if name in ROWWISE else "identity", seed=1)
    net.weights[0][...] *= 4
    x = np.random.default_rng(0).normal(size=(40, 3)).astype(np.float32)
    y_hat = run(runner, to_onnx(net), {"x": x})["y_hat"]
    assert y_hat.dtype == np.float32
    assert_close(y_hat, net.forward(x), 2e-6, scale=1.0)
    z = x @ net.weights[0].T + net.biases[0]
    assert z.min() < -3
    assert z.max() > 3
    h = activation(name, z.astype(np.float64))
    expected = h if name in ROWWISE else h @ net.weights[1].T + net.biases[1]
    assert_close(y_hat, expected, 5e-6, scale=1.0)


@pytest.mark.parametrize("precision", ["float64", "float32", "bfloat16"])
def test_a_network_of_any_precision_in_either_type(precision, runner, tmp_path):
    net = MLP([4, 9, 9, 3], ["tanh", "relu"], "softmax", precision=precision, seed=2)
    x = np.random.default_rng(0).normal(size=(20, 4))
    for dtype in ("float32", "float64"):
        path = tmp_path / "net.onnx"
        made = to_onnx(net, path, dtype)
        assert onnx.load(path) == made
        assert [entry.name for entry in tmp_path.iterdir()] == ["net.onnx"]
        y_hat = run(runner, made, {"x": x.astype(dtype)})["y_hat"]
        assert y_hat.dtype == dtype
        assert_close(y_hat, net.forward(x), {"float64": 1e-6, "float32": 1e-6, "bfloat16": 2e-2}[precision])
        if dtype == precision == "float64":
            assert_close(y_hat, net.forward(x), 1e-14)


def test_weights_are_named_as_in_a_model_file():
    net = MLP([4, 3, 2])
    stored = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in to_onnx(net).graph.initializer}
    for l in (0, 1):
        np.testing.assert_array_equal(stored[f"{2 * l}.weight"], net.weights[l])
        np.testing.assert_array_equal(stored[f"{2 * l}.bias"], net.biases[l])


def test_weights_beyond_a_message_go_into_a_file_beside_it(tmp_path, monkeypatch, runner):
    monkeypatch.setattr("gpu_mlp.export.LARGEST_FILE", 1000)
    net = MLP([40, 30, 2])
    to_onnx(net, tmp_path / "net.onnx")
    assert (tmp_path / "net.onnx.data").stat().st_size >= 4 * 40 * 30
    x = np.ones((3, 40), np.float32)
    if runner == "reference":
        y_hat = run(runner, onnx.load(tmp_path / "net.onnx"), {"x": x})["y_hat"]
    else:
        ort = pytest.importorskip("onnxruntime")
        (y_hat,) = ort.InferenceSession(tmp_path / "net.onnx").run(None, {"x": x})
    assert_close(y_hat, net.forward(x), 1e-6)


# --- estimators ---


@pytest.mark.parametrize("labels", [[3, 7, 11], ["a", "bb", "c"], [-1.0, 0.0, 2.0]], ids=str)
@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_a_classifier(labels, count, runner):
    estimators = pytest.importorskip("gpu_mlp.estimators", exc_type=ImportError)
    x, y = blobs(classes=count, spread=3.0)
    net = estimators.MLPClassifier((5,), max_iter=15, random_state=0).fit(x, np.array(labels)[y])
    found = run(runner, to_onnx(net), {"x": x.astype(np.float32)})
    assert len(set(found["label"].tolist())) == count
    np.testing.assert_array_equal(found["label"].astype(net.classes_.dtype), net.predict(x.astype(np.float32)))
    assert_close(found["probabilities"], net.predict_proba(x), 1e-5)


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_a_multilabel_classifier(runner):
    estimators = pytest.importorskip("gpu_mlp.estimators", exc_type=ImportError)
    x, y = blobs(spread=3.0)
    y = np.stack([y == 0, y > 0, y == 2], axis=1).astype(int)
    net = estimators.MLPClassifier((5,), max_iter=15, random_state=0).fit(x, y)
    found = run(runner, to_onnx(net), {"x": x.astype(np.float32)})
    np.testing.assert_array_equal(found["label"], net.predict(x))
    assert_close(found["probabilities"], net.predict_proba(x), 1e-5)


@pytest.mark.parametrize("outputs", [1, 2])
@pytest.mark.parametrize("loss", ["squared_error", "poisson"])
@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_a_regressor(loss, outputs, runner):
    estimators = pytest.importorskip("gpu_mlp.estimators", exc_type=ImportError)
    x, y = waves(outputs=outputs)
    net = estimators.MLPRegressor(loss, (5,), "silu", max_iter=5, random_state=0).fit(x, abs(y).squeeze())
    found = run(runner, to_onnx(net, dtype="float64"), {"x": x})["value"]
    assert found.shape == net.predict(x).shape
    assert_close(found, net.predict(x), 1e-12)


def test_an_unfitted_estimator_is_refused():
    estimators = pytest.importorskip("gpu_mlp.estimators", exc_type=ImportError)
    exceptions = pytest.importorskip("sklearn.exceptions")
    with pytest.raises(exceptions.NotFittedError):
        to_onnx(estimators.MLPClassifier())


# --- models with their preprocessing ---


def table(rng, n=90):
    """Numbers with gaps and far from 0, and two text columns between them."""
    columns = {
        "age": rng.normal(1e6, 2, n),
        "town": rng.choice(["Oslo", "Rome", "Bern"], n),
        "width": np.where(rng.uniform(size=n) < 0.2, np.nan, rng.normal(size=n)),
        "colour": rng.choice(["red", "green"], n),
    }
    return {name: column.astype(object) if column.dtype.kind == "U" else column for name, column in columns.items()}


def graph_inputs(columns):
    return {name: column[:, None] for name, column in columns.items()}


@pytest.mark.parametrize("loss", ["cross_entropy", "nll", "hinge"])
def test_a_model_of_a_table(loss, runner):
    """Missing numbers and unseen texts are filled as at the fit, and the columns come in their order."""
    rng = np.random.default_rng(0)
    columns = table(rng)
    y = np.where(columns["town"] == "Oslo", "cold", np.where(columns["colour"] == "red", "warm", "mild")).astype(object)
    output = {"cross_entropy": "softmax", "nll": "log_softmax", "hinge": "identity"}[loss]
    preprocessor, labels = Preprocessor.fit(columns, impute="median"), Labels.fit(y)
    net = MLP([preprocessor.n_features_out, 8, 3], "tanh", output, seed=0)
    model = Model(net, preprocessor, labels, loss)
    Trainer(net, loss, "adam").fit((model.inputs(columns), labels.encode(y)), epochs=30, batch_size=16, progress=False)
    columns["town"][:3] = "Nairobi"
    found = run(runner, to_onnx(model), graph_inputs(columns))
    assert set(found["label"]) == {"cold", "warm", "mild"}
    np.testing.assert_array_equal(found["label"].astype(object), model.predict(columns))
    y_hat = model.outputs(columns)
    if loss == "hinge":
        assert_close(found["scores"], y_hat, 1e-5)
    else:
        assert_close(found["probabilities"], model.probabilities(y_hat), 1e-5)


def test_what_a_model_refuses_is_nan(runner):
    columns = {**table(np.random.default_rng(0)), "width": np.zeros(90)}
    preprocessor = Preprocessor.fit(columns)
    net = MLP([preprocessor.n_features_out, 4, 1], seed=0)
    model = Model(net, preprocessor, TargetScaler.fit(np.array([1.0, 5.0])), "mse")
    columns["town"][2], columns["width"][5] = "Nairobi", np.nan
    with pytest.raises(ValueError, match="missing value"):
        model.predict(columns)
    value = run(runner, to_onnx(model), graph_inputs(columns))["value"]
    assert np.flatnonzero(np.isnan(value)).tolist() == [2, 5]
    assert value.dtype == np.float64
    kept = np.delete(np.arange(90), [2, 5])
    assert_close(value[kept], model.predict({name: column[kept] for name, column in columns.items()}), 1e-6)


@pytest.mark.parametrize("standardize", [True, False])
@pytest.mark.parametrize("ndim", [1, 2])
def test_a_model_of_a_matrix(standardize, ndim, runner):
    """Columns far from 0 are centred in float64, before they become float32."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(60, 3)) + ([1e7, -1e7, 0] if standardize else 0)
    y = rng.normal(5, 3, size=60 if ndim == 1 else (60, 2))
    preprocessor = Preprocessor.fit(x, standardize=standardize)
    net = MLP([3, 7, 1 if ndim == 1 else 2], "gelu", seed=0)
    model = Model(net, preprocessor, TargetScaler.fit(y), "mse")
    value = run(runner, to_onnx(model), {"x": x})["value"]
    assert value.shape == y.shape
    assert_close(value, model.predict(x), 1e-6)


# --- refusals ---


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ((3,), TypeError, "model: expected an MLP, a Model or a fitted estimator, got int"),
        ((MLP([2, 1]), None, "float16"), ValueError, "dtype: unknown name 'float16'"),
    ],
)
def test_refusals(arguments, kind, message):
    with pytest.raises(kind, match=message):
        to_onnx(*arguments)


def test_without_onnx_the_error_says_what_to_install():
    code = (
        "import sys\nsys.modules['onnx'] = None\nfrom gpu_mlp import MLP\nfrom gpu_mlp.export import to_onnx\n"
        "try:\n    to_onnx(MLP([2, 1]))\nexcept ImportError as error:\n    print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert "pip install 'gpu-mlp[onnx]'" in done.stdout
