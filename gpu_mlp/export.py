"""Networks, models and fitted estimators as ONNX graphs, with the preprocessing before them and the labels after them.

Leans on `network`, `model` and the package onnx (extra `onnx`), which is imported when something is exported. A graph
uses the operators of the default domain alone, opset 20, so that every runtime of that opset runs it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import activations, checks
from .model import Model
from .network import MLP
from .preprocessing import Labels, Preprocessor, TargetScaler
from .preprocessing.categories import Category

OPSET, IR_VERSION = 20, 10
LARGEST_FILE = 2**31 - 2**20  # a protobuf message stays below 2 GiB; larger weights go into a file beside it


def to_onnx(model: Any, path: str | os.PathLike[str] | None = None, dtype: str = "float32") -> Any:
    """``model`` as an ``onnx.ModelProto``, written to ``path`` where one is given.

    model: an `MLP`, a `Model` (its preprocessing and labels go along), or a fitted `MLPClassifier` or `MLPRegressor`.
    dtype: "float32" or "float64", what the network computes in; not every runtime has every operator in float64.

    Inputs: "x", (batch, n) of ``dtype``. A `Model` takes float64, and one that was fitted on a table with text columns
    an input of (batch, 1) a column, by its name. Outputs: "y_hat", (batch, n_L), for an `MLP`; "label" and, where the
    model has any, "probabilities", (batch, classes), or else "scores", for a classifier; "value", in the shape that
    `predict` gives, for a regressor. Where `Model.predict` refuses a row (a missing value, an unseen text), the
    outputs are NaN.

    Raises ImportError without onnx, TypeError for any other model, scikit-learn's NotFittedError for an unfitted one.
    """
    checks.choice("dtype", dtype, ("float32", "float64"))
    graph = _Graph(np.dtype(dtype))
    if isinstance(model, MLP):
        graph.output("y_hat", graph.network(model, graph.input("x", model.sizes[0])), (model.sizes[-1],))
    elif isinstance(model, Model):
        _export_model(graph, model)
    elif isinstance(getattr(type(model), "network", None), property):
        _export_estimator(graph, model)
    else:
        raise TypeError(f"model: expected an MLP, a Model or a fitted estimator, got {type(model).__name__}")
    made = graph.finish()
    if path is not None:
        _write(made, Path(path))
    return made


class _Graph:
    """A graph that is being put together; methods add nodes and return the name of what they compute."""

    def __init__(self, dtype: np.dtype) -> None:
        try:
            import onnx
        except ImportError:
            raise ImportError("exporting needs the package onnx: pip install 'gpu-mlp[onnx]'") from None
        self.onnx, self.dtype = onnx, dtype
        self._nodes: list[Any] = []
        self._constants: dict[str, Any] = {}
        self._inputs: list[Any] = []
        self._outputs: list[Any] = []
        self._count = 0

    def input(self, name: str, columns: int, dtype: Any = None) -> str:
        """A new input, (batch, columns), of the graph's type or another."""
        kind = self.onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype or self.dtype))
        self._inputs.append(self.onnx.helper.make_tensor_value_info(name, kind, ["batch", columns]))
        return name

    def output(self, name: str, value: str, shape: Sequence[int], dtype: Any = None) -> None:
        """Call ``value``, (batch, *shape), an output."""
        self._nodes.append(self.onnx.helper.make_node("Identity", [value], [name]))
        kind = self.onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype or self.dtype))
        self._outputs.append(self.onnx.helper.make_tensor_value_info(name, kind, ["batch", *shape]))

    def __call__(self, operator: str, *inputs: str, **attributes: Any) -> str:
        """A node with one output."""
        self._count += 1
        name = f"{operator.lower()}_{self._count}"
        self._nodes.append(self.onnx.helper.make_node(operator, list(inputs), [name], **attributes))
        return name

    def constant(self, value: Any, name: str = "", dtype: Any = None) -> str:
        """An initializer, of the graph's type unless another is given; text as strings."""
        array = np.asarray(value, object) if dtype is object else np.asarray(value, dtype or self.dtype)
        if not name:
            self._count += 1
            name = f"constant_{self._count}"
        self._constants[name] = self.onnx.numpy_helper.from_array(np.ascontiguousarray(array), name)
        return name

    def cast(self, value: str, dtype: Any) -> str:
        return self("Cast", value, to=self.onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype)))

    def network(self, net: MLP, h: str) -> str:
        """ŷ of ``h``: z = h Wᵀ + b, h = f(z), with the names of the weights as in a model file."""
        ops = net._ops
        for l, (W, b) in enumerate(zip(net.weights, net.biases)):
            weight = self.constant(ops.to_host(W), f"{2 * l}.weight")
            bias = self.constant(ops.to_host(b), f"{2 * l}.bias")
            h = ACTIVATIONS[net._f[l].name](self, self("Gemm", h, weight, bias, transB=1))
        return h

    def finish(self) -> Any:
        """The model, checked."""
        helper = self.onnx.helper
        graph = helper.make_graph(
            self._nodes, "gpu_mlp", self._inputs, self._outputs, initializer=list(self._constants.values())
        )
        opset = [helper.make_opsetid("", OPSET)]
        made = helper.make_model(graph, opset_imports=opset, ir_version=IR_VERSION, producer_name="gpu_mlp")
        if made.ByteSize() < LARGEST_FILE:
            self.onnx.checker.check_model(made, full_check=True)
        return made


# --- activations -------------------------------------------------------------------------------------------------

_F = Callable[[_Graph, str], str]


def _node(operator: str, **attributes: Any) -> _F:
    return lambda graph, z: graph(operator, z, **attributes)


def _times(f: _F) -> _F:
    """z · f(z)"""
    return lambda graph, z: graph("Mul", z, f(graph, z))


def _clip(low: float, high: float) -> _F:
    return lambda graph, z: graph("Clip", z, graph.constant(low), graph.constant(high))


def _relu_squared(graph: _Graph, z: str) -> str:
    h = graph("Relu", z)
    return graph("Mul", h, h)


_HARD_SIGMOID = _node("HardSigmoid", alpha=1 / 6, beta=0.5)
ACTIVATIONS: dict[str, _F] = {
    "identity": lambda graph, z: z,
    "relu": _node("Relu"),
    "leaky_relu": _node("LeakyRelu", alpha=activations.LEAKY_SLOPE),
    "elu": _node("Elu", alpha=1.0),
    "celu": _node("Elu", alpha=1.0),  # the same with a scale of 1, and Celu is defined for float32 alone
    "selu": _node("Selu", alpha=activations.SELU_ALPHA, gamma=activations.SELU_SCALE),
    "gelu": _node("Gelu"),
    "gelu_tanh": _node("Gelu", approximate="tanh"),
    "silu": _times(_node("Sigmoid")),
    "mish": _times(lambda graph, z: graph("Tanh", graph("Softplus", z))),
    "tanh": _node("Tanh"),
    "sigmoid": _node("Sigmoid"),
    "softplus": _node("Softplus"),
    "softsign": _node("Softsign"),
    "hardtanh": _clip(-1, 1),
    "hardsigmoid": _HARD_SIGMOID,
    "hardswish": _times(_HARD_SIGMOID),
    "relu6": _clip(0, 6),
    "relu_squared": _relu_squared,
    "sine": _node("Sin"),
    "exp": _node("Exp"),
    "softmax": _node("Softmax", axis=1),
    "log_softmax": _node("LogSoftmax", axis=1),
}


# --- estimators --------------------------------------------------------------------------------------------------


def _export_estimator(graph: _Graph, estimator: Any) -> None:
    net: MLP = estimator.network
    y_hat = graph.network(net, graph.input("x", net.sizes[0]))
    n = net.sizes[-1]
    if not hasattr(estimator, "classes_"):
        _output_values(graph, y_hat, n, 1 if n == 1 else 2, graph.dtype)
    elif net.output == "softmax":
        _output_label(graph, graph("ArgMax", y_hat, axis=1, keepdims=0), np.asarray(estimator.classes_))
        graph.output("probabilities", y_hat, (n,))
    else:
        chosen = graph.cast(graph("Greater", y_hat, graph.constant(0.5)), np.int64)
        if n > 1:  # multilabel: a 0 or 1 for every label
            graph.output("label", chosen, (n,), np.int64)
            graph.output("probabilities", y_hat, (n,))
            return
        _output_label(graph, _flat(graph, chosen), np.asarray(estimator.classes_))
        both = graph("Concat", graph("Sub", graph.constant(1.0), y_hat), y_hat, axis=1)
        graph.output("probabilities", both, (2,))


def _output_label(graph: _Graph, code: str, classes: NDArray[Any]) -> None:
    """The output "label": the class of every code, (batch,), as int64, float64, bool or text."""
    kind: Any = {"i": np.int64, "u": np.int64, "f": np.float64, "b": np.bool_}.get(classes.dtype.kind, object)
    if kind is object:
        classes = np.array([str(label) for label in classes.tolist()], object)
    graph.output("label", graph("Gather", graph.constant(classes, dtype=kind), code), (), kind)


def _output_values(graph: _Graph, y: str, n: int, ndim: int, dtype: Any) -> None:
    graph.output("value", _flat(graph, y) if ndim == 1 else y, () if ndim == 1 else (n,), dtype)


def _flat(graph: _Graph, column: str) -> str:
    """(batch, 1) -> (batch,)"""
    return graph("Squeeze", column, graph.constant([1], dtype=np.int64))


# --- models with their preprocessing -----------------------------------------------------------------------------


def _export_model(graph: _Graph, model: Model) -> None:
    net, n = model.net, model.net.sizes[-1]
    y_hat = graph.network(net, graph.cast(_prepare(graph, model.preprocessor), graph.dtype))
    if isinstance(model.target, TargetScaler):
        y = graph("Mul", graph.cast(y_hat, np.float64), graph.constant(model.target.scale, dtype=np.float64))
        y = graph("Add", y, graph.constant(model.target.mean, dtype=np.float64))
        _output_values(graph, y, n, model.target.ndim, np.float64)
        return
    assert isinstance(model.target, Labels)
    _output_label(graph, graph("ArgMax", y_hat, axis=1, keepdims=0), model.target.classes)
    if net.output in ("softmax", "log_softmax"):
        graph.output("probabilities", y_hat if net.output == "softmax" else graph("Exp", y_hat), (n,))
    else:
        graph.output("scores", y_hat, (n,))


def _prepare(graph: _Graph, preprocessor: Preprocessor) -> str:
    """The network's input, (batch, n_0) float64, from the raw columns: filled, standardised, one column a category."""
    if not preprocessor.categorical:
        return _numbers(graph, preprocessor, graph.input("x", preprocessor.n_features_in, np.float64))
    names = preprocessor.feature_names
    assert names is not None  # a table with text columns always has them
    texts = {category.column: category for category in preprocessor.categorical}
    inputs = [graph.input(name, 1, object if j in texts else np.float64) for j, name in enumerate(names)]
    numeric = [column for j, column in enumerate(inputs) if j not in texts]
    parts = [_numbers(graph, preprocessor, graph("Concat", *numeric, axis=1))] if numeric else []
    parts += [_one_hot(graph, inputs[j], category) for j, category in texts.items()]
    together = graph("Concat", *parts, axis=1)
    number_columns, first_columns = preprocessor.layout()
    places = [np.arange(preprocessor.n_features_out)[number_columns]]
    places += [first + np.arange(len(c.categories)) for first, c in zip(first_columns, preprocessor.categorical)]
    order = np.argsort(np.concatenate(places))  # the columns came numbers first
    return graph("Gather", together, graph.constant(order, dtype=np.int64), axis=1)


def _numbers(graph: _Graph, preprocessor: Preprocessor, x: str) -> str:
    """(x − mean) / scale in float64, with the missing values filled."""
    if preprocessor.fill is not None:
        x = graph("Where", graph("IsNaN", x), graph.constant(preprocessor.fill, dtype=np.float64), x)
    if not preprocessor.standardize:
        return x
    centred = graph("Sub", x, graph.constant(preprocessor.mean, dtype=np.float64))
    return graph("Div", centred, graph.constant(preprocessor.scale, dtype=np.float64))


def _one_hot(graph: _Graph, text: str, category: Category) -> str:
    """(batch, 1) text -> (batch, categories) float64; for an unseen text the fill, or NaN where there is none."""
    equal = graph("Equal", text, graph.constant([list(category.categories)], dtype=object))
    row = graph.cast(equal, np.float64)
    known = graph("ReduceMax", row, graph.constant([1], dtype=np.int64), keepdims=1)
    known = graph.cast(known, np.bool_)
    if category.fill is None:
        instead = np.full((1, len(category.categories)), np.nan)
    else:
        instead = np.array([[float(name == category.fill) for name in category.categories]])
    return graph("Where", known, row, graph.constant(instead, dtype=np.float64))


def _write(made: Any, path: Path) -> None:
    """Whole or not at all; weights beyond 2 GiB into ``path`` + ".data"."""
    import onnx

    if made.ByteSize() >= LARGEST_FILE:
        onnx.save_model(made, os.fspath(path), save_as_external_data=True, location=f"{path.name}.data")
        return
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        unfinished.write_bytes(made.SerializeToString())
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
