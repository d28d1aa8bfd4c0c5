"""A model as a user has it: a network with the preprocessing of its inputs and the meaning of its outputs.

Leans on `network` and `preprocessing`; one safetensors file holds all three, so that raw rows in give labels or
values out.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import checks, metrics
from .network import MLP
from .preprocessing import Labels, Preprocessor, TargetScaler
from .readers import Columns
from .shards import Piece
from .streams import Stream

# What each loss of a command-line run makes of the output layer; the first of each task is its default.
OUTPUT_OF = {
    "classification": {"cross_entropy": "softmax", "nll": "log_softmax", "hinge": "identity"},
    "regression": {
        "mse": "identity",
        "half_mse": "identity",
        "mae": "identity",
        "huber": "identity",
        "log_cosh": "identity",
        "poisson": "exp",
    },
}
FIELDS = ("task", "loss", "preprocessor", "target", "data")  # of a model file's metadata
LONGEST_PATH = 4096


class Model:
    """``net`` behind ``preprocessor``, its outputs read through ``target`` (classes, or a scaled real target).

    ``data`` says where the training data came from, as JSON-able options of `data.load` and the split.
    """

    def __init__(
        self,
        net: MLP,
        preprocessor: Preprocessor,
        target: Labels | TargetScaler,
        loss: str,
        data: Mapping[str, Any] | None = None,
    ) -> None:
        self.net = net
        self.preprocessor = preprocessor
        self.target = target
        self.loss = loss
        self.data = dict(data or {})

    @property
    def task(self) -> str:
        """ "classification" or "regression"."""
        return "classification" if isinstance(self.target, Labels) else "regression"

    @property
    def dtype(self) -> str:
        """The type the network's inputs are prepared in."""
        return "float64" if self.net.precision == "float64" else "float32"

    def inputs(self, x: NDArray[Any] | Columns) -> NDArray[Any]:
        """Raw rows, a matrix or named columns, as the (n, n_0) matrix that the network takes."""
        return self.preprocessor.transform(x, self.dtype)

    def targets(self, y: NDArray[Any]) -> NDArray[Any]:
        """Raw targets as the network's: (n,) int64 labels or (n, n_L) reals."""
        return self.target.encode(y) if isinstance(self.target, Labels) else self.target.transform(y, self.dtype)

    def outputs(self, x: NDArray[Any] | Columns) -> NDArray[Any]:
        """ŷ of raw rows, (n, n_L), as the network gives it."""
        return self.net.forward(self.inputs(x))

    def read(self, y_hat: NDArray[Any]) -> NDArray[Any]:
        """What ŷ means: the label of the largest output, or the values in their own units."""
        if isinstance(self.target, Labels):
            return self.target.decode(y_hat.argmax(axis=1))
        return self.target.inverse(y_hat)

    def predict(self, x: NDArray[Any] | Columns) -> NDArray[Any]:
        """The label or the value of every raw row."""
        return self.read(self.outputs(x))

    def probabilities(self, y_hat: NDArray[Any]) -> NDArray[Any]:
        """The probability of every class, (n, classes), from ŷ."""
        if self.net.output not in ("softmax", "log_softmax"):
            raise ValueError(f"probabilities: a model trained with loss {self.loss!r} gives scores, not probabilities")
        return y_hat if self.net.output == "softmax" else np.exp(y_hat)

    def figures(self, y_hat: NDArray[Any], y: NDArray[Any]) -> dict[str, float]:
        """How good ŷ is against raw targets: accuracy, or RMSE and R² in the target's own units."""
        return self.judge([(y_hat, y)])

    def judge(self, batches: Iterable[tuple[NDArray[Any], NDArray[Any]]]) -> dict[str, float]:
        """The same figures over batches of (ŷ, raw targets)."""
        n_outputs = self.net.sizes[-1]
        chosen = [metrics.make(name, self.loss, n_outputs) for name in metrics.default(self.loss, n_outputs)]
        for y_hat, y in batches:
            if isinstance(self.target, Labels):
                read, true = y_hat, self.target.encode(y)
            else:
                read = np.asarray(self.target.inverse(y_hat)).reshape(len(y_hat), -1)
                true = np.asarray(y, np.float64).reshape(len(y), -1)
            for metric in chosen:
                metric.add(read, true, None)
        return {metric.name: metric.value() for metric in chosen}

    # --- rows that are read in pieces ---

    def prepared(self, stream: Stream) -> Stream:
        """A stream of raw rows as the network takes them, x and y."""

        def prepare(piece: Piece) -> Piece:
            return Piece(self.inputs(piece.x), None if piece.y is None else self.targets(piece.y), None)

        return stream.prepared(prepare)

    def batches(self, stream: Stream) -> Iterator[tuple[NDArray[Any], NDArray[Any] | None]]:
        """(ŷ, raw targets or None) of a stream of raw rows, piece by piece in the order of the files."""
        for piece in stream.prepared(lambda piece: Piece(self.inputs(piece.x), piece.y, None)).pieces():
            yield self.net.forward(piece.x), piece.y

    def labelled(self, stream: Stream) -> Iterator[tuple[NDArray[Any], NDArray[Any]]]:
        """(ŷ, raw targets) of a stream of raw rows, for `judge`."""
        for y_hat, y in self.batches(stream):
            if y is None:
                raise ValueError(f"target: {stream.source} has none; name it with --target")
            yield y_hat, y

    # --- files ---

    def describe(self) -> None:
        """Put into the network's metadata, which travel with it, all but the network that a prediction needs."""
        self.net.metadata = {
            "task": self.task,
            "loss": self.loss,
            "preprocessor": self.preprocessor.to_dict(),
            "target": self.target.to_dict(),
            "data": self.data,
        }

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write everything that a prediction needs to one safetensors file."""
        self.describe()
        return self.net.save(path)

    @classmethod
    def load(cls, path: str | os.PathLike[str], device: str = "auto") -> Model:
        """The model in a file that `save` wrote, or in the run folder that holds it."""
        path = Path(path)
        if path.is_dir():
            path = path / "model.safetensors"
        net = MLP.load(path, device)
        found = net.metadata
        if missing := [name for name in FIELDS if name not in found]:
            raise ValueError(f"model: {path} has a network but no {missing[0]!r}; use MLP.load for a bare network")
        try:
            return cls._described(net, found)
        except (TypeError, ValueError) as error:
            raise ValueError(f"model: {path} does not describe a model ({checks.brief(error)})") from None

    @classmethod
    def _described(cls, net: MLP, found: Mapping[str, Any]) -> Model:
        """The model that a file's metadata describe around its network; whatever does not fit is refused."""
        if odd := set(found) - set(FIELDS):
            raise ValueError(f"unknown fields {', '.join(sorted(odd))}")
        task = checks.choice("task", found["task"], OUTPUT_OF)
        loss = checks.choice("loss", found["loss"], OUTPUT_OF[task])
        if net.output != OUTPUT_OF[task][loss]:
            raise ValueError(f"loss {loss!r} on the output {net.output!r}, not {OUTPUT_OF[task][loss]!r}")
        preprocessor = Preprocessor.from_dict(found["preprocessor"])
        if preprocessor.n_features_out != net.sizes[0]:
            raise ValueError(f"it prepares {preprocessor.n_features_out} inputs for {net.sizes[0]}")
        target = (Labels if task == "classification" else TargetScaler).from_dict(found["target"])
        if len(target) != net.sizes[-1]:
            kind = "labels" if task == "classification" else "scales"
            raise ValueError(f"it has {len(target)} {kind} for {net.sizes[-1]} outputs")
        return cls(net, preprocessor, target, loss, _source(found["data"]))


def _source(found: Any) -> dict[str, Any]:
    """Where the training data came from, as a model file says it: known options, each of its type."""
    if not isinstance(found, dict):
        raise TypeError(f"data: expected an object, got {type(found).__name__}")
    for name, value in found.items():
        if name in ("data", "target", "folder"):
            if value is not None and not (isinstance(value, str) and len(value) <= LONGEST_PATH):
                raise TypeError(f"data.{name}: expected text of at most {LONGEST_PATH} characters, got {value!r}")
        elif name == "in_pieces":
            checks.boolean(f"data.{name}", value)
        elif name in ("test", "validation"):
            checks.real(f"data.{name}", value, 0, 1, open_maximum=True)
        elif name == "seed":
            checks.integer("data.seed", value, 0)
        else:
            raise ValueError(f"data: unknown option {name!r}")
    return found
