"""The network: parameters, forward pass, cost and backward pass (*Deep Learning*, algorithms 6.3 and 6.4).

The whole algorithm is `MLP._forward` and `MLP._backward`; everything they call is an operation of `ops/interface.py`.

Layers are counted from 0: layer l maps h[l], (batch, n_l), to h[l + 1], (batch, n_{l+1}), through W[l], (n_{l+1},
n_l), and b[l], (n_{l+1},). Arrays are C-order with the batch first; read column by column that is the book's one
sample a column.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import activations, checks, initializers, losses, ops, regularizers, tensorfile
from . import precision as precisions
from .losses import Loss
from .ops.interface import Array, Dropout, Layout, Slot
from .regularizers import ElasticNet
from .tensorfile import Expected
from .workspace import Lane, Sink, Workspace

CHUNK_ROWS = 8192  # a pass that no minibatch limits takes at most so many rows,
CHUNK_BYTES = 256 << 20  # and at most as many as fit such buffers
FILE = tensorfile.Format("model", "a network", 1)
_INIT_STREAM = 0  # which of the seed's independent streams the initial weights are drawn from


class Gradients:
    """∂J/∂θ: ``theta`` is flat, ``weights[l]`` and ``biases[l]`` are its views; ``input`` is ∂J/∂x, (batch, n_0)."""

    def __init__(self, theta: Array, layout: Layout, input: Array | None = None) -> None:
        self.theta = theta
        self.weights = layout.weights(theta)
        self.biases = layout.biases(theta)
        self.input = input


class MLP:
    """A fully connected network: z = W h + b, h = f(z), layer after layer.

    sizes: the widths n_0, n_1, …, n_L (input, hidden layers, output).
    activation: the hidden layers' f, one name or one a layer; output: the last layer's. Names:
    `activations.ACTIVATIONS`.
    dropout: the rate at which the hidden layers' h is dropped while training, one number in [0, 1) or one a layer.
    init: "auto" (what each layer's activation asks for), a name of `initializers.INITIALIZERS`, or a callable
    ``(rng, (n_out, n_in)) -> array``; biases start at 0.
    precision: float64, float32, tf32, bfloat16 or float16 (`precision.PRECISIONS`); device: "auto", "cpu" or "cuda".
    seed: where the initial weights, shuffles and dropout masks come from; None draws one (read it from ``net.seed``).

    Raises ValueError or TypeError that names the argument.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        activation: str | Sequence[str] = "relu",
        output: str = "identity",
        dropout: float | Sequence[float] = 0.0,
        init: str | initializers.Initializer = "auto",
        precision: str = "float32",
        device: str = "auto",
        seed: int | None = 0,
    ) -> None:
        self.sizes = _check_sizes(sizes)
        hidden = len(self.sizes) - 2
        names = _one_each("activation", activation, hidden, str)
        self._f = [activations.get(name, "activation") for name in names] + [activations.get(output, "output")]
        self.dropout = _check_dropout(_one_each("dropout", dropout, hidden, (int, float)), self._f)
        self._precision = precisions.get(precision)
        self._ops = ops.make(device, self._precision)
        self.seed = secrets.randbits(63) if seed is None else checks.integer("seed", seed, 0, 2**64 - 1)
        self.metadata: dict[str, Any] = {}  # JSON-able; travels in the model file
        self._allocate()
        self._draw_weights(init)

    # --- what it is ---

    @property
    def activation(self) -> tuple[str, ...]:
        """The name of every hidden layer's activation."""
        return tuple(f.name for f in self._f[:-1])

    @property
    def output(self) -> str:
        """The name of the output activation."""
        return self._f[-1].name

    @property
    def precision(self) -> str:
        """The name of the precision."""
        return self._precision.name

    @property
    def device(self) -> str:
        """Where the network lives: "cpu" or "cuda"."""
        return self._ops.device

    @property
    def n_parameters(self) -> int:
        """The number of weights and biases."""
        return sum(n_out * (n_in + 1) for n_in, n_out in zip(self.sizes, self.sizes[1:]))

    @property
    def theta(self) -> Array:
        """All parameters as one flat array: a view, so assigning into it changes the network.

        Every W, then every b, each starting at a multiple of 256 bytes; the gaps are zeros and have to stay so.
        """
        self._exposed = True
        return self._theta

    @property
    def weights(self) -> tuple[Array, ...]:
        """W of every layer, (n_{l+1}, n_l), as views: ``net.weights[0][...] = W`` changes the network."""
        return tuple(self.layout.weights(self.theta))

    @property
    def biases(self) -> tuple[Array, ...]:
        """b of every layer, (n_{l+1},), as views."""
        return tuple(self.layout.biases(self.theta))

    def __repr__(self) -> str:
        hidden = f", activation={list(self.activation)}" if self.activation else ""
        where = f"precision={self.precision!r}, device={self.device!r}"
        return f"MLP({list(self.sizes)}{hidden}, output={self.output!r}, {where})"

    # --- the algorithm ---

    def _forward(self, work: Workspace, from_z: bool, dropout: Sequence[Dropout | None], state: Array) -> None:
        """Algorithm 6.3 on the input in ``work.h[0]``; with ``from_z`` the last layer stops at z, in ``work.h[L]``."""
        h, z, auxiliary = work.h, work.z, work.auxiliary
        for l, f in enumerate(self._f):
            if from_z and l == len(self._f) - 1:
                f = activations.IDENTITY
            self._ops.affine_activation(
                h[l], self._W[l], self._b[l], f, h[l + 1], z[l], dropout[l], state, auxiliary[l]
            )

    def _backward(
        self,
        work: Workspace,
        loss: Loss,
        from_z: bool,
        dropout: Sequence[Dropout | None],
        y: Array,
        sample_weight: Array | None,
        gb: Sequence[Array],
        sink: Sink,
        accumulate: bool,
        state: Array,
        gx: Array | None,
    ) -> None:
        """Algorithm 6.4: the cost into the state, every gb, and every layer's (gz, h) to ``sink``, output layer first.

        The sink stores gW = gzᵀ h or applies it at once; it is called when W is no longer needed. ``gx`` takes ∂L/∂x.
        With ``accumulate`` the cost and every gradient are added to what stands there.
        """
        h, z, f = work.h, work.z, self._f
        last = len(f) - 1
        gz = work.gz(last)
        self._ops.loss_and_gradient(
            loss, f[last], from_z, h[last + 1], z[last], y, sample_weight, gz, gb[last], accumulate, state
        )
        for l in range(last, 0, -1):
            below = work.gz(l - 1)
            saved = {"h": h[l], "z": z[l - 1], "none": None}[f[l - 1].reads]
            with self._ops.independent():  # neither gradient reads what the other writes
                self._ops.input_gradient(
                    gz, self._W[l], f[l - 1], saved, dropout[l - 1], below, gb[l - 1], accumulate, state,
                    work.auxiliary[l - 1],
                )  # fmt: skip
                sink(l, gz, h[l], accumulate)
            gz = below
        if gx is not None:
            self._ops.input_gradient(gz, self._W[0], activations.IDENTITY, None, None, gx, None, False, state)
        sink(0, gz, h[0], accumulate)

    def _differentiate(
        self,
        x: Array,
        y: Array,
        sample_weight: Array | None,
        loss: Loss,
        lanes: Sequence[Lane],
        dropout: Callable[[int], Sequence[Dropout | None]] | None = None,
        gx: Array | None = None,
    ) -> None:
        """Both passes over a whole batch, in micro-batches that the lanes take in turn and whose gradients add up.

        The cost and the gradient are in the first lane then. ``dropout(first_row)`` gives the masks of a micro-batch.
        `_begin` has been called; an empty batch is one empty pass.
        """
        from_z = self.fuses(loss)
        starts = range(0, max(1, len(x)), lanes[0].work.rows)
        lanes = lanes[: len(starts)]

        def work_through(i: int) -> None:
            lane, mine = lanes[i], starts[i :: len(lanes)]
            for start in mine:
                rows = slice(start, min(start + lane.work.rows, len(x)))
                part = lane.work.first(rows.stop - rows.start)
                masks = self._no_dropout if dropout is None else dropout(start)
                part.h[0] = self._input(x[rows])
                self._forward(part, from_z, masks, lane.state)
                self._backward(
                    part, loss, from_z, masks, y[rows], None if sample_weight is None else sample_weight[rows],
                    lane.gb, lane.sink, start > mine[0], lane.state, None if gx is None else gx[rows],
                )  # fmt: skip
                part.h[0] = None  # it is the caller's

        self._ops.side_by_side(work_through, [lane.state for lane in lanes], [lane.g for lane in lanes])

    def _passes(self, lanes: Sequence[Lane], rows: int) -> int:
        """How often `_differentiate` calls the first lane's sink for a layer; 0 where other lanes run beside it."""
        passes = -(-max(1, rows) // lanes[0].work.rows)
        return passes if min(passes, len(lanes)) == 1 else 0

    # --- what it computes for a user ---

    def forward(self, x: Any) -> Array:
        """ŷ, (batch, n_L), for x, (batch, n_0), without dropout; float64 at precision float64, else float32.

        From x on the host (what NumPy takes) a NumPy array; from x on the GPU (a CuPy array, or anything with
        ``__cuda_array_interface__`` or DLPack, which is not copied) a CuPy array.
        """
        x = self._check_x(x)
        y_hat = self._ops.empty((len(x), self.sizes[-1]), self._precision.master_dtype)
        for rows, work in self._predict(x, from_z=False):
            self._ops.copy(work.h[-1], y_hat[rows])
        return self._like(x, y_hat)

    def cost(
        self,
        x: Any,
        y: Any,
        loss: str | Loss = "mse",
        regularizer: ElasticNet | None = None,
        sample_weight: Any = None,
    ) -> float:
        """J = L(ŷ, y) + λΩ(θ), without dropout.

        x: (batch, n_0); y: (batch, n_L), or (batch,) class labels where the loss takes them. L is the mean over the
        batch, or Σ wᵢLᵢ / Σ wᵢ with ``sample_weight``, (batch,); over an empty batch it is 0.
        """
        x, y, w, loss = self._check_batch(x, y, sample_weight, loss)
        regularizer = regularizers.check(regularizer)
        self._begin(loss, y, w)
        for rows, work in self._predict(x, self.fuses(loss)):
            self._add_loss(work, loss, y[rows], None if w is None else w[rows])
        self._penalise(regularizer)
        return self._ops.read_state(self._state, Slot.COST)

    def cost_and_gradients(
        self,
        x: Any,
        y: Any,
        loss: str | Loss = "mse",
        regularizer: ElasticNet | None = None,
        sample_weight: Any = None,
    ) -> tuple[float, Gradients]:
        """J and its gradient with respect to every W, b and x, without dropout; arguments as in `cost`.

        The gradients are NumPy arrays, or CuPy arrays where x is on the GPU.
        """
        x, y, w, loss = self._check_batch(x, y, sample_weight, loss)
        regularizer = regularizers.check(regularizer)
        master = self._precision.master_dtype
        g = Gradients(self._ops.zeros(self.layout.size, master), self.layout, self._ops.zeros(x.shape, master))
        self._refresh()
        self._begin(loss, y, w)
        work = Workspace(self._ops, self.sizes, self._f, self.fuses(loss), self._chunk_rows(len(x)))
        lane = Lane(work, g.theta, g.biases, self._store(g.weights), self._state)
        with self._ops.tuned_for(self._largest_gemm(work.rows)):
            self._differentiate(x, y, w, loss, [lane], gx=g.input)
        self._penalise(regularizer, g.theta)
        g = Gradients(self._like(x, g.theta), self.layout, self._like(x, g.input))
        return self._ops.read_state(self._state, Slot.COST), g

    def fuses(self, loss: Loss) -> bool:
        """Whether the output activation and ``loss`` are a pair that is computed from z."""
        return (self.output, loss.name) in losses.FUSED

    # --- files ---

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the network to a safetensors file, whole or not at all.

        The tensors are named "0.weight", "0.bias", "2.weight", …: the state dict of a ``torch.nn.Sequential`` of
        Linear layers and activations in turn. ``metadata`` goes with them.
        """
        tensors = {name: self._ops.to_host(block) for name, block in _tensors(self.layout, self._theta).items()}
        return tensorfile.write(path, tensors, {"network": self._options(), "metadata": self.metadata}, FILE)

    @classmethod
    def load(cls, path: str | os.PathLike[str], device: str = "auto", precision: str | None = None) -> MLP:
        """The network in a file that `save` wrote, on ``device``, at its own precision or at another.

        Raises FileNotFoundError, or ValueError for a file that is not such a model.
        """
        ops.make(device, precisions.get(precision or "float32"))  # a wrong argument is refused before the file is read
        with tensorfile.opened(path, FILE) as file:
            try:
                options, metadata = _described(file.header)
                file.expect(_expected(options["sizes"]))  # before any array of that size is made
                net = cls(**{**options, "precision": precision or options["precision"]}, init=_no_init, device=device)
            except (KeyError, TypeError, ValueError) as error:
                raise file.refusal(error) from None
            blocks = _tensors(net.layout, net._theta)
            for name, tensor in file.arrays():
                checks.fits(f"model: {path}: tensor {name}", tensor, net._precision.storage_dtype)
                net._ops.copy(net._ops.to_device(tensor, net._theta.dtype), blocks[name])
        net._exposed = True
        net._refresh()
        net._exposed = False
        net.metadata = metadata
        return net

    def __getstate__(self) -> dict[str, Any]:
        """What a pickle or a deep copy takes along: the options, θ on the host, and the metadata."""
        return {
            "options": {**self._options(), "device": self.device},
            "theta": np.array(self._ops.to_host(self._theta)),
            "metadata": self.metadata,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state["options"], init=_no_init)  # type: ignore[misc]
        self.theta[...] = self._ops.to_device(state["theta"])
        self.metadata = state["metadata"]

    # --- inside ---

    def _options(self) -> dict[str, Any]:
        """What this network was made with, as JSON-able arguments; the weights are beside it."""
        return {
            "sizes": self.sizes,
            "activation": self.activation,
            "output": self.output,
            "dropout": self.dropout,
            "precision": self.precision,
            "seed": self.seed,
        }

    def _allocate(self) -> None:
        """θ, the copy that the GEMMs read (θ itself where the types agree), their views, and the state."""
        master, storage = self._precision.master_dtype, self._precision.storage_dtype
        self.layout = Layout(self.sizes, master.itemsize)
        self._theta = self._ops.zeros(self.layout.size, master)
        self._shadow = self._ops.zeros(self.layout.size, storage) if self._precision.has_shadow else None
        compute = self._theta if self._shadow is None else self._shadow
        self._W, self._b = self.layout.weights(compute), self.layout.biases(compute)
        self._state = self._new_state()
        self._exposed = False
        self._no_dropout: list[Dropout | None] = [None] * len(self._f)

    def _new_state(self) -> Array:
        state = self._ops.zeros(len(Slot), np.float64)
        self._ops.write_state(state, {Slot.LOSS_SCALE: 1.0})
        return state

    def _draw_weights(self, init: str | initializers.Initializer) -> None:
        rng = np.random.default_rng([self.seed, _INIT_STREAM])
        for W, f in zip(self.layout.weights(self._theta), self._f):
            drawn = np.asarray(initializers.get(init, f.init)(rng, W.shape))
            if drawn.shape != W.shape:
                raise ValueError(f"init: expected an array of shape {W.shape}, got {drawn.shape}")
            self._ops.copy(self._ops.to_device(drawn, self._theta.dtype), W)
        self._exposed = True
        self._refresh()
        self._exposed = False

    def _refresh(self) -> None:
        """Bring the GEMMs' copy of θ up to date with what a user may have written through a view."""
        if self._exposed and self._shadow is not None:
            self._ops.copy(self._theta, self._shadow)

    @contextmanager
    def _holding(self, theta: Array) -> Iterator[None]:
        """Within it the network's parameters are those in ``theta``, a flat array like its own on the same device."""
        own = self._theta
        self._hold(theta)
        try:
            yield
        finally:
            self._hold(own)

    def _hold(self, theta: Array) -> None:
        self._theta = theta
        if self._shadow is None:
            self._W, self._b = self.layout.weights(theta), self.layout.biases(theta)
        else:
            self._ops.copy(theta, self._shadow)

    def _predict(self, x: NDArray[Any], from_z: bool) -> Iterator[tuple[slice, Workspace]]:
        """The forward pass over x, chunk by chunk: the rows of each, and the workspace that holds their h[L]."""
        self._refresh()
        work = Workspace(self._ops, self.sizes, self._f, from_z, self._chunk_rows(len(x)))
        for start in range(0, len(x), work.rows):
            rows = slice(start, min(start + work.rows, len(x)))
            part = work.first(rows.stop - rows.start)
            part.h[0] = self._input(x[rows])
            with self._ops.tuned_for(self._largest_gemm(part.rows)):
                self._forward(part, from_z, self._no_dropout, self._state)
            yield rows, part

    def _largest_gemm(self, rows: int) -> int:
        """The operations, additions and multiplications, of the largest GEMM of a pass over ``rows`` rows."""
        return 2 * rows * max(n_in * n_out for n_in, n_out in zip(self.sizes, self.sizes[1:]))

    def _like(self, x: Array, result: Array) -> Array:
        """A result where the input came from: on the device, or on the host."""
        return result if self._ops.owns(x) else self._ops.to_host(result)

    def _move_to_host(self, theta: NDArray[Any]) -> None:
        """Leave a device that has failed: go on with NumPy, from this copy of θ."""
        self._ops = ops.make("cpu", self._precision)
        self._allocate()
        self._theta[...] = theta
        self._exposed = True
        self._refresh()

    def _chunk_rows(self, n: int) -> int:
        per_row = (2 * sum(self.sizes) + 2 * max(self.sizes)) * self._precision.storage_dtype.itemsize
        return max(1, min(n, CHUNK_ROWS, max(64, CHUNK_BYTES // per_row)))

    def _input(self, x: Array) -> Array:
        """A block of x, which has been checked, on the device and in the storage type."""
        return self._ops.to_device(x, self._precision.storage_dtype)

    def _check_batch(
        self, x: Any, y: Any, sample_weight: Any, loss: str | Loss, look: bool = True
    ) -> tuple[Array, Array, Array | None, Loss]:
        """The four arguments of a cost, checked as in `_check_host`; y and weights on the device."""
        x, y, w, loss = self._check_host(x, y, sample_weight, loss, look)
        return x, self._ops.to_device(y), None if w is None else self._ops.to_device(w), loss

    def _check_host(
        self, x: Any, y: Any, sample_weight: Any, loss: str | Loss, look: bool = True
    ) -> tuple[Array, Array, Array | None, Loss]:
        """The four arguments of a cost, checked against the network and each other, each still where it was.

        Labels come as int64, other targets in the master type, weights as float64. Without ``look`` the values of what
        is on the device are not looked at, which would mean waiting, nor those of x where the operations watch it.
        """
        loss = losses.get(loss)
        loss.check_output(self.output, self.sizes[-1])
        x = self._check_x(x, look)
        y = self._check_y(y, loss, len(x), look)
        if sample_weight is not None and self._ops.owns(sample_weight):
            if look:
                checks.sample_weight(self._ops.to_host(self._ops.to_device(sample_weight)), len(x))
            return x, y, self._ops.to_device(sample_weight, np.float64), loss
        return x, y, checks.sample_weight(sample_weight, len(x)), loss

    def _check_x(self, x: Any, look: bool = True) -> Array:
        storage = self._precision.storage_dtype
        if self._ops.owns(x):
            x = self._ops.to_device(x)
            checks.shape("x", x, self.sizes[0])
            if look and not self._ops.all_finite(x, storage):
                raise ValueError(f"x: an entry is not finite, or too large for {storage.name}")
            return x
        checks.on_host("x", x)
        x = checks.matrix("x", x, self.sizes[0], look or not self._ops.watches)
        checks.fits("x", x, storage)
        return x

    def _check_y(self, y: Any, loss: Loss, rows: int, look: bool) -> Array:
        if self._ops.owns(y):
            y = self._ops.to_device(y)
            if look:
                self._check_y(self._ops.to_host(y), loss, rows, look)
            else:
                checks.target_shape("y", y, rows, self.sizes[-1], loss.takes_labels)
            return self._ops.to_device(y, np.int64 if y.ndim == 1 else self._precision.master_dtype)
        checks.on_host("y", y)
        checks.unmasked("y", y)
        y = np.asarray(y)
        if y.ndim == 0 or len(y) != rows:
            raise ValueError(f"y: expected {rows} rows, as many as x has, got shape {y.shape}")
        y = loss.check_targets(y, self.sizes[-1])
        if y.ndim > 1:
            checks.fits("y", y, self._precision.master_dtype)
        return np.ascontiguousarray(y, np.int64 if y.ndim == 1 else self._precision.master_dtype)

    def _begin(self, loss: Loss, y: Array, sample_weight: Array | None) -> None:
        self._ops.write_state(self._state, {Slot.COST: 0.0})
        self._ops.total_weight(loss, y, sample_weight, self._state)

    def _add_loss(
        self, work: Workspace, loss: Loss, y: Array, sample_weight: Array | None, state: Array | None = None
    ) -> None:
        """Add a chunk's share of L to the COST of a state, the network's own by default."""
        last = len(self._f) - 1
        self._ops.loss_and_gradient(
            loss, self._f[last], self.fuses(loss), work.h[-1], work.z[last], y, sample_weight,
            work.gz(last), None, False, self._state if state is None else state,
        )  # fmt: skip

    def _penalise(self, regularizer: ElasticNet | None, g: Array | None = None) -> None:
        """Add λΩ to the cost and λ∇Ω to the gradient."""
        if regularizer is None:
            return
        n = self.layout.penalised(regularizer)
        self._ops.penalty(self._theta, n, regularizer, self._state)
        if g is not None:
            self._ops.add_penalty_gradient(self._theta, n, regularizer, g)

    def _store(self, gW: Sequence[Array]) -> Sink:
        """The sink that keeps every gW."""

        def sink(l: int, gz: Array, h: Array, accumulate: bool) -> None:
            self._ops.weight_gradient(gz, h, gW[l], accumulate)

        return sink


def _check_sizes(sizes: Any) -> tuple[int, ...]:
    if isinstance(sizes, (str, bytes)) or not isinstance(sizes, Sequence | np.ndarray):
        raise TypeError(f"sizes: expected a list of widths such as [784, 128, 10], got {sizes!r}")
    if len(sizes) < 2:
        raise ValueError(f"sizes: expected at least an input and an output width, got {list(sizes)}")
    return tuple(checks.integer("sizes", n, 1) for n in sizes)


def _one_each(argument: str, value: Any, hidden: int, kind: Any) -> list[Any]:
    """``value`` for every hidden layer, or the list itself where it has one a layer."""
    if isinstance(value, kind):
        return [value] * hidden
    if isinstance(value, (str, bytes)) or not isinstance(value, Sequence | np.ndarray):
        raise TypeError(f"{argument}: expected one value or a list of {hidden}, one a hidden layer, got {value!r}")
    if len(value) != hidden:
        raise ValueError(f"{argument}: expected one value or {hidden}, one a hidden layer, got {len(value)}: {value!r}")
    return list(value)


def _check_dropout(rates: list[Any], f: list[activations.Activation]) -> tuple[float, ...]:
    checked = tuple(checks.real("dropout", rate, 0, 1, open_maximum=True) for rate in rates)
    for rate, activation in zip(checked, f):
        if rate and activation.rowwise:
            raise ValueError(f"dropout: not on a {activation.name} layer, whose entries belong together; use 0 there")
    return checked


def _tensors(layout: Layout, theta: Array) -> dict[str, Array]:
    """The blocks of θ by their names in a model file: those of a ``torch.nn.Sequential``, activations between."""
    weights = {f"{2 * l}.weight": W for l, W in enumerate(layout.weights(theta))}
    return weights | {f"{2 * l}.bias": b for l, b in enumerate(layout.biases(theta))}


def _described(header: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """The network's options and the metadata in a model file's header, as far as `MLP` itself does not check them."""
    options, metadata = header["network"], header["metadata"]
    if not isinstance(options, dict) or not isinstance(metadata, dict):
        raise TypeError("its header is not an object")
    known = {"sizes", "activation", "output", "dropout", "precision", "seed"}
    if odd := known ^ set(options):
        raise ValueError(f"{', '.join(sorted(odd))}: missing or unknown")
    checks.integer("seed", options["seed"], 0, 2**64 - 1)  # where None would draw one
    precisions.get(options["precision"])
    return options, metadata


def _expected(sizes: Any) -> dict[str, Expected]:
    """The tensors of a network of these sizes."""
    expected = {}
    for l, (n_in, n_out) in enumerate(zip(_check_sizes(sizes), sizes[1:])):
        expected[f"{2 * l}.weight"], expected[f"{2 * l}.bias"] = Expected((n_out, n_in)), Expected((n_out,))
    return expected


def _no_init(rng: np.random.Generator, shape: tuple[int, int]) -> NDArray[np.float64]:
    return np.broadcast_to(np.float64(0), shape)
