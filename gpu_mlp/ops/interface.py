"""The seam: every operation that training needs, with its formula, its shapes and what it writes.

Two implementations have exactly these signatures, `numpy_ops` and `cuda_ops`. An operation writes into the arrays it is
given, allocates nothing in steady state and does not wait for the device: what changes from step to step (learning
rate, step number, loss scale, dropout round) and what comes back (cost, norm) lives in a small array, the *state*.
"""

from __future__ import annotations

import abc
import copy
import enum
import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

from ..activations import Activation
from ..averaging import EMA
from ..losses import Loss
from ..optimizers import SGD, Optimizer
from ..precision import Precision
from ..regularizers import ElasticNet

Array = Any  # numpy.ndarray or cupy.ndarray
CLIP_EPS = 1e-6  # added to the norm that clips, as in torch.nn.utils.clip_grad_norm_
ALIGNMENT = 256  # bytes; the start of every W and b, for 128-bit loads and cuBLAS


class Slot(enum.IntEnum):
    """What stands where in the state, a float64 array of ``len(Slot)`` numbers."""

    LEARNING_RATE = 0
    STEP = 1  # updates applied so far
    ROUND = 2  # steps begun so far, skipped ones included; the dropout masks follow it
    LOSS_SCALE = 3
    GOOD_STEPS = 4  # updates since the loss scale last changed
    TOTAL_WEIGHT = 5  # Σ w over the whole batch, which L is divided by
    COST = 6  # J of the batch so far
    GRADIENT_NORM = 7  # ‖∂J/∂θ‖₂ of this step where it is measured, before clipping; else 0
    EPOCH_COST = 8  # Σ J · rows over the steps since it was last set to 0
    SKIPPED = 9  # steps skipped since the loss-scaled gradient was not finite
    BAD_ROUND = 10  # the first round whose cost or norm was not finite, counted from 1; 0 while there is none
    CURSOR = 11  # where in the epoch's order of rows the minibatch begins


class Layout:
    """Where each W and b lies in the flat θ: W of every layer, then b of every layer, each start aligned.

    With the weights in front, "the weights only" is a prefix of θ: ``n_weights`` long, of ``size`` in all. The gaps
    between the segments hold zeros, and every update rule leaves them zero.
    """

    def __init__(self, sizes: Sequence[int], itemsize: int) -> None:
        self.itemsize, self.unit = itemsize, ALIGNMENT // itemsize
        shapes = [(n_out, n_in) for n_in, n_out in zip(sizes, sizes[1:])]
        self._weights, self.n_weights = self._place(0, shapes)
        self._biases, self.size = self._place(self.n_weights, [(n_out,) for n_out, _ in shapes])

    def _place(self, offset: int, shapes: Sequence[tuple[int, ...]]) -> tuple[list[tuple[slice, tuple[int, ...]]], int]:
        placed = []
        for shape in shapes:
            length = math.prod(shape)
            placed.append((slice(offset, offset + length), shape))
            offset += -(-length // self.unit) * self.unit
        return placed, offset

    @property
    def spans(self) -> list[slice]:
        """Where W of every layer lies, up to the next one's start."""
        starts = [segment.start for segment, _ in self._weights]
        return [slice(start, stop) for start, stop in zip(starts, [*starts[1:], self.n_weights])]

    def within(self, part: slice) -> Layout:
        """The layout of θ[part], which begins and ends with some W or lies behind all of them: its W, and no b."""
        inner = copy.copy(self)
        inner._weights = [
            (slice(segment.start - part.start, segment.stop - part.start), shape)
            for segment, shape in self._weights
            if part.start <= segment.start < part.stop
        ]
        inner._biases, inner.size = [], part.stop - part.start
        inner.n_weights = max(0, min(self.n_weights, part.stop) - part.start)
        return inner

    def weights(self, flat: Array) -> list[Array]:
        """W of every layer, (n_l, n_{l-1}) each, as views of an array of θ's size."""
        return [flat[segment].reshape(shape) for segment, shape in self._weights]

    def biases(self, flat: Array, first: int = 0) -> list[Array]:
        """b of every layer, (n_l,) each, as views of an array of θ's size, or of one that begins at θ[first]."""
        return [flat[segment.start - first : segment.stop - first] for segment, _ in self._biases]

    def penalised(self, regularizer: ElasticNet) -> int:
        """The length of the prefix of θ that a regularizer covers."""
        return self.n_weights if regularizer.on == "weights" else self.size


@dataclass(frozen=True)
class Dropout:
    """Inverted dropout of one layer's h: an entry is kept with probability keep and then divided by it.

    The bit pattern is Philox of (seed, layer, round, row, column), see `philox.py`; ``first_row`` is the number of the
    first row within the whole batch, so that micro-batches draw what the whole batch would.
    """

    rate: float
    seed: int
    layer: int
    first_row: int = 0


class DeviceError(RuntimeError):
    """The device refused or failed an operation; the message names it and the arrays it was for."""


class Recorder:
    """Runs work that is the same every time for the same key; an implementation may record it and replay that.

    The work only queues operations on arrays that stay where they are: what changes is in the state.
    """

    replays = False  # whether work is replayed as it is, so that all its arrays have to stay where they are

    def run(self, key: Hashable, work: Callable[[], None], moving: Sequence[Array] = ()) -> None:
        """Do the work. moving: arrays that it reads and that lie elsewhere the next time; none where it is replayed."""
        work()

    def clear(self) -> None:
        """Forget every recording, and what it kept alive."""


class Staging(abc.ABC):
    """A buffer on the host and its twin on the device, filled beside the computation.

    In turn: wait until ``host`` is `free`, write to it, `send` it; then `receive` it, queue what reads ``device``, and
    `release` it.
    """

    host: NDArray[Any]
    device: Array

    @abc.abstractmethod
    def free(self) -> None:
        """Wait until what was last sent has left ``host``."""

    @abc.abstractmethod
    def send(self, rows: int) -> None:
        """Begin to copy the first rows to ``device``, as soon as nothing reads it any more."""

    @abc.abstractmethod
    def receive(self) -> None:
        """Let what is queued from now on see what was sent."""

    @abc.abstractmethod
    def release(self) -> None:
        """Nothing that is queued from now on reads ``device`` before it is received again."""


class Operations(abc.ABC):
    """The operations of one device at one precision. Shapes: see the book's names in `network.py`."""

    device: str
    precision: Precision
    waits: bool  # whether reading the state waits for the device
    watches = False  # whether `watch` sees what is not finite, so that nobody has to look before a step
    out_of_memory: type[Exception] = MemoryError  # what is raised where an array cannot be allocated

    # --- arrays ---

    @abc.abstractmethod
    def empty(self, shape: int | Sequence[int], dtype: Any) -> Array:
        """A new array with arbitrary contents."""

    @abc.abstractmethod
    def zeros(self, shape: int | Sequence[int], dtype: Any) -> Array:
        """A new array of zeros."""

    @abc.abstractmethod
    def to_device(self, array: Any, dtype: Any = None) -> Array:
        """``array`` on this device and in this dtype, C-order; the array itself where it is that already.

        Takes what NumPy takes, and what is in the device's memory and says so through DLPack or
        ``__cuda_array_interface__``, which is not copied.
        """

    @abc.abstractmethod
    def owns(self, array: Any) -> bool:
        """Whether ``array`` is in this device's memory already and not NumPy's."""

    @abc.abstractmethod
    def to_host(self, array: Array) -> Any:
        """``array`` as a NumPy array. Waits for the device."""

    @abc.abstractmethod
    def copy(self, source: Array, out: Array) -> None:
        """out ← source, which may be on the host, cast to out's dtype."""

    @abc.abstractmethod
    def all_finite(self, array: Array, dtype: Any = None) -> bool:
        """Whether no entry is a NaN, infinite, or too large for ``dtype``. Waits for the device."""

    @abc.abstractmethod
    def free_bytes(self) -> int | None:
        """How much memory arrays can still take; None where it is not known."""

    @abc.abstractmethod
    def recorder(self, wanted: bool | None = None) -> Recorder:
        """A recorder; with ``wanted`` False one that replays nothing."""

    def auxiliary(self, f: Activation, rows: int, n: int) -> Any:
        """What a hidden layer's forward pass may leave for its backward pass beside h and z; None where it is nothing.

        Its `affine_activation` and the `input_gradient` that goes through its f take it; ``first(rows)`` is the like
        for fewer rows. `planning` counts a bit an entry for relu, and rows padded to 16 bytes.
        """
        return None

    @abc.abstractmethod
    def staging(self, shape: Sequence[int], dtype: Any) -> Staging:
        """A pair of buffers for data that is larger than the device's memory."""

    @abc.abstractmethod
    def exchange(self, ranks: Any, g: Array, buckets: Sequence[Any], wire: str, scatter: bool) -> Any:
        """What sums the flat gradient ``g`` over the ranks of a job; an `exchange.Exchange`, with its arguments."""

    @abc.abstractmethod
    def write_state(self, state: Array, values: Mapping[Slot, float]) -> None:
        """Set numbers of the state, without waiting."""

    @abc.abstractmethod
    def read_state(self, state: Array, slot: Slot) -> float:
        """A number of the state. Waits for the device."""

    @abc.abstractmethod
    def snapshot_state(self, state: Array, slot: Slot) -> Any:
        """A number of the state as it stands now in the queue of work; ``float()`` of it waits."""

    @abc.abstractmethod
    def lanes(self, rows: int, sizes: Sequence[int]) -> tuple[int, int]:
        """How a batch of ``rows`` goes through layers of these ``sizes`` fastest: (lanes, rows of a micro-batch).

        Each lane works through micro-batches of its own, beside the others where there is more than one.
        """

    @abc.abstractmethod
    def tuned_for(self, flop: int, lanes: int = 1) -> AbstractContextManager[None]:
        """A context for passes in so many lanes whose largest GEMM has ``flop`` operations.

        An implementation may prepare for them; it changes no result but by rounding.
        """

    @abc.abstractmethod
    def side_by_side(self, work: Callable[[int], None], states: Sequence[Array], g: Sequence[Array]) -> None:
        """work(i) for every lane i, then g[0] += Σ g[i] and COST of states[0] += Σ COST, over the other lanes in turn.

        Every lane begins with the first one's state, and the others with a COST of 0. work(i) writes to g[i] and
        states[i], and to nothing of another lane's. states: one a lane; g: one a lane, (n,) each.
        """

    @abc.abstractmethod
    def gather(
        self, source: Array, rows: Array | None, out: Array, state: Array | None = None, scale: float = 1.0
    ) -> None:
        """out[i] ← scale · source[rows[first + i]], cast to out's dtype; without ``rows``, source[first + i].

        source: (n, …); rows: (≥ first + batch,) int64; out: (batch, …). first is CURSOR, or 0 without ``state``. An
        ``out`` of integers (labels) is not scaled.
        """

    # --- forward ---

    @abc.abstractmethod
    def affine_activation(
        self,
        h_in: Array,
        W: Array,
        b: Array,
        f: Activation,
        h: Array,
        z: Array | None,
        dropout: Dropout | None,
        state: Array,
        auxiliary: Any = None,
    ) -> None:
        """z = h_in Wᵀ + b, h = f(z), then dropout on h (algorithm 6.3).

        h_in: (batch, n_in); W: (n_out, n_in); b: (n_out,). Writes h: (batch, n_out), and z: (batch, n_out) where it is
        given (f′ reads it then), and ``auxiliary`` where it is. Dropout reads ROUND.
        """

    @abc.abstractmethod
    def activate(self, f: Activation, z: Array, h: Array) -> None:
        """h = f(z), both (batch, n); ``h`` may be ``z`` itself."""

    def watch(self, x: Array, state: Array) -> None:
        """COST ← NaN where a number of x is not finite, so that the step is not applied. x: (batch, n_0)."""
        raise NotImplementedError

    @abc.abstractmethod
    def total_weight(self, loss: Loss, y: Array, sample_weight: Array | None, state: Array) -> None:
        """TOTAL_WEIGHT ← Σ wᵢ over the batch, with wᵢ the sample's weight times its class's, where it has any.

        Lᵢ has its class's weight in it already, so the sum in `loss_and_gradient` takes the sample's weight alone.
        """

    @abc.abstractmethod
    def loss_and_gradient(
        self,
        loss: Loss,
        f: Activation,
        from_z: bool,
        h: Array,
        z: Array | None,
        y: Array,
        sample_weight: Array | None,
        gz: Array,
        gb: Array | None,
        accumulate: bool,
        state: Array,
    ) -> None:
        """COST += Σ wᵢ Lᵢ / TOTAL_WEIGHT; gz = LOSS_SCALE · ∂/∂z of that; gb = Σ_batch gz.

        With ``from_z`` h holds z of the output layer, and (f, loss) is one of the fused pairs; without, h = ŷ and gz is
        gh through f′. Writes gz: (batch, n_L), and gb: (n_L,) where it is given (adds to it with ``accumulate``).
        A TOTAL_WEIGHT of 0 gives cost and gradient 0.
        """

    # --- backward ---

    def independent(self) -> AbstractContextManager[None]:
        """A context for one `input_gradient` and then one `weight_gradient` of the same gz: they may run side by side.

        What is queued after either of them sees its results, as ever.
        """
        return nullcontext()

    @abc.abstractmethod
    def input_gradient(
        self,
        gz: Array,
        W: Array,
        f: Activation,
        saved: Array | None,
        dropout: Dropout | None,
        gz_in: Array,
        gb: Array | None,
        accumulate: bool,
        state: Array,
        auxiliary: Any = None,
    ) -> None:
        """gh = gz W, gz_in = gh ⊙ f′ (through the dropout mask), gb = Σ_batch gz_in (algorithm 6.4).

        gz: (batch, n_out); W: (n_out, n_in); saved: (batch, n_in), what f′ of the layer below reads; auxiliary: what
        that layer's forward pass was given. Writes gz_in: (batch, n_in) and, where it is given, gb: (n_in,) (adds to it
        with ``accumulate``). With f = identity and no gb, gz_in is the gradient with respect to the input, gh.
        """

    @abc.abstractmethod
    def weight_gradient(self, gz: Array, h_in: Array, gW: Array, accumulate: bool) -> None:
        """gW = gzᵀ h_in (or += with ``accumulate``). gz: (batch, n_out); h_in: (batch, n_in); gW: (n_out, n_in)."""

    @abc.abstractmethod
    def descend(
        self,
        W: Array,
        gz: Array,
        h_in: Array,
        optimizer: SGD,
        regularizer: ElasticNet | None,
        shadow: Array | None,
        state: Array,
    ) -> None:
        """W ← W − η (gzᵀ h_in + λ∇Ω(W) + weight_decay · W): plain SGD without a stored gradient; shadow ← W.

        ``regularizer`` is the one on this W, or None. Reads LEARNING_RATE. A COST that is not finite, or a BAD_ROUND,
        leaves W as it is; gz and h_in may then hold anything afterwards.
        """

    # --- update ---

    @abc.abstractmethod
    def penalty(self, theta: Array, n: int, regularizer: ElasticNet, state: Array) -> None:
        """COST += λΩ(θ[:n])."""

    @abc.abstractmethod
    def add_penalty_gradient(self, theta: Array, n: int, regularizer: ElasticNet, g: Array) -> None:
        """g[:n] += λ∇Ω(θ[:n])."""

    @abc.abstractmethod
    def gradient_norm(
        self,
        theta: Array,
        g: Array,
        n: int,
        regularizer: ElasticNet | None,
        state: Array,
        parts: Sequence[slice] | None = None,
    ) -> None:
        """GRADIENT_NORM ← ‖g / LOSS_SCALE + λ∇Ω(θ[:n])‖₂, over all of θ, or over these parts of it."""

    @abc.abstractmethod
    def update(
        self,
        theta: Array,
        g: Array,
        moments: Sequence[Array],
        optimizer: Optimizer,
        layout: Layout,
        n: int,
        regularizer: ElasticNet | None,
        clip_norm: float | None,
        shadow: Array | None,
        state: Array,
    ) -> None:
        """One update of all of ``theta``: unscale, add λ∇Ω(θ[:n]), clip by GRADIENT_NORM, apply the rule, shadow ← θ.

        theta, g, each moment, shadow: (layout.size,), or for a rule that sees no matrices any part of them. Reads
        LEARNING_RATE, STEP, LOSS_SCALE, COST and GRADIENT_NORM. A COST or GRADIENT_NORM that is not finite, or a
        BAD_ROUND, leaves everything as it is, so that the last good θ is kept until the host looks.
        """

    def hides_update(self, rows: int, size: int) -> bool:
        """Whether the update of ``size`` parameters is better done `aside`, under the gradients of lower layers."""
        return False

    def aside(self) -> AbstractContextManager[None]:
        """A context for work that may run beside all that follows, up to `join`; it sees all that came before."""
        return nullcontext()

    def join(self) -> None:
        """What is queued from now on sees what was done `aside`."""
        return

    @abc.abstractmethod
    def average(self, theta: Array, averaged: Array, rule: EMA, state: Array) -> None:
        """averaged ← averaged + (1 − d)(θ − averaged), with d = ``rule.decay_at(t)`` and t = STEP + 1.

        theta, averaged: (n,). At t = 1 averaged ← θ, whatever stood there. Comes after the update and before
        `finish_step`; a step that was not applied leaves the average as it is.
        """

    @abc.abstractmethod
    def begin_step(self, learning_rate: float, round: int, cursor: int, state: Array) -> None:
        """Set LEARNING_RATE, ROUND and CURSOR, and COST and GRADIENT_NORM to 0: all that a step takes from the host."""

    @abc.abstractmethod
    def finish_step(self, rows: int, state: Array) -> None:
        """Count the step: EPOCH_COST += rows · COST, STEP += 1 where it was applied, and BAD_ROUND or the loss scale
        moves.

        With loss scaling a norm that is not finite halves the scale and counts in SKIPPED; without, or where the
        scale is below its minimum already, it is a bad round.
        """
