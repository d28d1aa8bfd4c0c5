"""scikit-learn's way of fitting an MLP, on this library's passes and update rules.

Leans on `training` for the state of a descent and on `ops` for the arithmetic; imports no scikit-learn. What differs
from `Trainer.fit` is written down here and nowhere else: what J is (`Objective`), how the learning rate moves (`Rate`),
and that the rows may be sparse (`Rows`, `Unpacked`).
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import checks
from .feeding import SPARE_BYTES, Buffers, Resident, Streamed
from .losses import BinaryCrossEntropy, CrossEntropy, HalfMSE, Loss, Poisson
from .network import MLP
from .ops.interface import Array, Operations, Slot
from .optimizers import LBFGS, SGD, Optimizer
from .regularizers import L2
from .schedules import PlateauState, Schedule, plateau_of
from .training import Trainer


@dataclass(frozen=True)
class Objective:
    """scikit-learn's J of a batch of weight s = Σ wᵢ: Σ wᵢLᵢ / s + ½ (alpha / s) ‖W‖², over the weights alone.

    Its gradient is that of losses *summed* over the outputs, whatever the value says, which `loss` averages over them:

    gradient_factor: ∂J/∂θ is this many times the gradient of the mean of ``loss`` (n_L, or 1 where they agree).
    value_divisor: that many times ``loss`` is this many times the value (n_L for the squared error, which is a mean).
    """

    loss: Loss
    alpha: float
    gradient_factor: int
    value_divisor: int

    def penalty(self, total: float) -> L2 | None:
        """The λΩ whose gradient belongs to a batch of weight ``total``."""
        return _l2(self.alpha / total) if self.alpha and total > 0 else None

    def penalty_value(self, total: float) -> L2 | None:
        """The λΩ that the state's COST, which is ``value_divisor`` times J, takes."""
        return _l2(self.alpha * self.value_divisor / total) if self.alpha and total > 0 else None

    def constant(self, y: NDArray[Any], weight: NDArray[Any] | None) -> float:
        """What J has beside `loss`: Σ_j of the mean of y log y − y for Poisson's deviance, else 0."""
        if self.loss.name != "poisson" or not len(y):
            return 0.0
        y = np.asarray(y, np.float64)
        terms = y * np.log(np.where(y > 0, y, 1)) - y
        return float(np.average(terms, weights=weight, axis=0).sum())


_l2 = functools.lru_cache(maxsize=8)(L2)  # most batches are of one size


def objective(task_loss: str, output: str, n_outputs: int, alpha: float, dtype: Any) -> Objective:
    """The objective of scikit-learn's loss ``task_loss`` on an ``output`` activation of ``n_outputs``, in ``dtype``."""
    clip = float(np.finfo(dtype).eps)
    if task_loss == "squared_error":
        return Objective(HalfMSE(), alpha, n_outputs, n_outputs)
    if task_loss == "poisson":
        return Objective(Poisson(), alpha, n_outputs, 1)
    if output == "softmax":
        return Objective(CrossEntropy(clip=clip), alpha, 1, 1)
    return Objective(BinaryCrossEntropy(clip=clip), alpha, n_outputs, 1)


class Rows:
    """The training rows: x dense or a SciPy CSR matrix that is unpacked batch by batch, its targets and its weights.

    x: (n, n_0), on the host or on the network's device; y: (n,) int64 labels or (n, n_L); weight: (n,) or None, of any
    sign.
    """

    def __init__(self, net: MLP, x: Any, y: NDArray[Any], weight: NDArray[Any] | None) -> None:
        self._net, ops = net, net._ops
        self.sparse = hasattr(x, "toarray")
        if ops.owns(x):
            if not ops.all_finite(x, net._precision.storage_dtype):
                raise ValueError(f"X: an entry is too large for {net._precision.storage_dtype.name}")
        elif not self.sparse:
            checks.fits("X", x, net._precision.storage_dtype)
            x = np.ascontiguousarray(x)
        self._x = x
        self._y = np.ascontiguousarray(y, np.int64 if y.ndim == 1 else net._precision.master_dtype)
        self._weight = weight
        self.y = ops.to_device(self._y)
        self.weight = None if weight is None else ops.to_device(weight, np.float64)

    def __len__(self) -> int:
        return int(self._x.shape[0])

    def __getitem__(self, rows: slice) -> NDArray[Any]:
        """A dense block of x."""
        return self._x[rows].toarray() if self.sparse else self._x[rows]

    @property
    def weighted(self) -> bool:
        """Whether the rows have weights."""
        return self._weight is not None

    def total(self, rows: Any = slice(None)) -> float:
        """Σ wᵢ of some rows; ZeroDivisionError, as NumPy's weighted average has it, where they weigh nothing."""
        if self._weight is None:
            return float(len(self._y[rows]))
        total = float(self._weight[rows].sum())
        if total == 0:
            raise ZeroDivisionError("sample_weight: the weights of a batch sum to zero, so its mean loss is undefined")
        return total

    def constant(self, objective: Objective, rows: Any = slice(None)) -> float:
        """The objective's constant over some rows."""
        return objective.constant(self._y[rows], None if self._weight is None else self._weight[rows])

    def feed(self, batch_size: int) -> Resident | Streamed | Unpacked:
        """What brings the minibatches to the operations: x on the device, or where it does not fit there a stream."""
        ops = self._net._ops
        if self.sparse:
            return Unpacked(ops, self._x, self.y, self.weight, batch_size)
        x = self.whole()
        if ops.waits and x is self._x and not ops.owns(x):
            weight = None if self._weight is None else np.asarray(self._weight, np.float64)
            return Streamed(ops, x, self._y, weight, batch_size)
        return Resident(ops, x, self.y, self.weight, batch_size)

    def whole(self) -> Any:
        """What can be sliced for blocks of x: x on the device, or where it does not fit there as it is."""
        ops = self._net._ops
        free = ops.free_bytes()
        if self.sparse or not ops.waits or ops.owns(self._x):
            return self if self.sparse else self._x
        if free is not None and self._x.nbytes + SPARE_BYTES > free:
            return self._x
        try:
            return ops.to_device(self._x)
        except ops.out_of_memory:
            return self._x  # what is free need not be in one piece


class Unpacked:
    """A feed, as in `feeding`, of a sparse x: every minibatch is unpacked here and copied to where it is worked on."""

    key, moving = None, ()

    def __init__(self, ops: Operations, x: Any, y: Array, weight: Array | None, batch_size: int) -> None:
        self._ops, self._x, self._rest, self._batch_size = ops, x, (y, weight), batch_size
        self._buffers = Buffers(ops, batch_size, x, y, weight)

    def epoch(self, order: NDArray[np.int64] | None) -> Iterator[tuple[int, int]]:
        """(cursor, rows) of every minibatch of an epoch in this order of the rows; None: as they are stored."""
        ops, n = self._ops, self._x.shape[0]
        for cursor in range(0, n, self._batch_size):
            rows: Any = slice(cursor, min(cursor + self._batch_size, n))
            count = rows.stop - rows.start
            rows = rows if order is None else order[rows]
            x, *rest = self._buffers.first(count)
            ops.copy(ops.to_device(self._x[rows].toarray()), x)
            here = rows if order is None else ops.to_device(rows)
            for source, out in zip(self._rest, rest):
                if source is not None and out is not None:
                    ops.copy(source[here], out)
            yield cursor, count

    def fetch(self, rows: int, state: Array) -> tuple[Array, Array, Array | None]:
        """The minibatch at hand."""
        return self._buffers.first(rows)


class Rate:
    """The learning rate of scikit-learn's stochastic solvers, which moves between epochs only.

    kind: "constant", "invscaling" (η = lr / (t + 1)^power_t after t samples) or "adaptive" (a fifth each time the loss
    stays, until 1e-6).
    """

    def __init__(self, lr: float, kind: str, power_t: float) -> None:
        self.lr, self.kind, self.power_t = lr, kind, power_t
        self.now = float(lr)

    def end_epoch(self, samples: int) -> None:
        """Move after an epoch; ``samples`` counts those seen in all."""
        if self.kind == "invscaling":
            self.now = self.lr / (samples + 1) ** self.power_t

    def stop_or_cut(self) -> bool:
        """What follows from a loss that has stayed: True to stop, or False after a cut."""
        if self.kind != "adaptive" or self.now <= 1e-6:
            return True
        self.now /= 5
        return False


class Descent(Trainer):
    """Minibatch updates of ``net`` on an `Objective`; moments, step number and learning rate outlive a fit.

    The rate comes from ``rate``, or from ``schedule`` where there is one.
    """

    def __init__(
        self,
        net: MLP,
        objective: Objective,
        optimizer: Optimizer,
        rate: Rate,
        schedule: Schedule | None,
        clip_norm: float | None,
    ) -> None:
        super().__init__(net, objective.loss, optimizer, L2(objective.alpha), schedule, clip_norm)
        self.objective = objective
        self.rate = rate
        self.scheduled = schedule is not None
        self._set = rate.now  # the rate that the momentum was last expressed in
        self._total = 0.0  # the weight of the minibatch at hand

    def run_epoch(
        self, rows: Rows, feed: Any, order: NDArray[np.int64] | None, after_batch: Callable[[int], bool]
    ) -> float:
        """One pass over the rows in ``order``: the mean over them of J of their batch, each before its update.

        ``after_batch(rows)`` is called after every update, and ends the epoch by returning True.
        """
        ops, constant, seen = self.net._ops, 0.0, 0
        self._follow_rate()
        self.epoch += 1
        ops.write_state(self._state, {Slot.EPOCH_COST: 0.0})
        for cursor, n in feed.epoch(order):
            batch: Any = slice(cursor, cursor + n)
            batch = batch if order is None else order[batch]
            self._update_on(feed, n, cursor, rows.total(batch), rows.weighted)
            constant += n * rows.constant(self.objective, batch)
            seen += n
            if after_batch(n):
                break
        return (ops.read_state(self._state, Slot.EPOCH_COST) / self.objective.value_divisor + constant) / seen

    def end_fit(self) -> None:
        """Forget what was recorded: the next fit has buffers of its own."""
        self._recorder.clear()

    def bad_step(self) -> int:
        """The first update whose cost was not finite, counted from 1, or 0; the weights are those from before it."""
        return int(self.net._ops.read_state(self._state, Slot.BAD_ROUND))

    def _update_on(self, feed: Any, rows: int, cursor: int, total: float, weighted: bool) -> None:
        """One update on the minibatch, of weight ``total``, that ``feed`` has ready."""
        ops = self.net._ops
        lr = self._scheduled_rate(self.schedule) if self.scheduled else self.rate.now
        ops.begin_step(lr, self.rounds, cursor, self._state)
        ops.write_state(self._state, {Slot.TOTAL_WEIGHT: total / self.objective.gradient_factor})
        self.regularizer, self._total = self.objective.penalty(total), total
        if weighted:  # every batch has a penalty of its own, which a recording would have in it
            self._work_through(feed, rows)
        else:
            self._recorder.run((rows, feed.key), lambda: self._work_through(feed, rows), feed.moving)
        self.rounds += 1

    def _begin_cost(self, y: Array, w: Array | None, rows: int) -> None:
        """λΩ(θ) as scikit-learn counts it; what L is divided by is in the state already."""
        penalty = self.objective.penalty_value(self._total)
        if penalty is not None:
            self.net._ops.penalty(self.net._theta, self._update.penalised, penalty, self._state)

    def _follow_rate(self) -> None:
        """Express the momentum in the rate that now holds.

        scikit-learn's velocity has the rate of each step in it: v ← μ v − η g. The m of `SGD` has not, so that v is
        −η m; where η moves, m is scaled so that v stays.
        """
        if self._set != self.rate.now and isinstance(self.optimizer, SGD):
            for moment in self.moments.values():
                moment *= self._set / self.rate.now
        self._set = self.rate.now

    # --- pickling: what the moments, the step number and the rate were ---

    def __getstate__(self) -> dict[str, Any]:
        ops = self.net._ops
        arguments = (
            self.net, self.objective, self.optimizer, self.rate, self.schedule if self.scheduled else None,
            self.clip_norm,
        )  # fmt: skip
        kept = {name: getattr(self, name) for name in ("epoch", "rounds", "plateau", "_set")}
        moments = {name: np.array(ops.to_host(moment)) for name, moment in self.moments.items()}
        return {"arguments": arguments, "kept": kept, "moments": moments, "state": np.array(ops.to_host(self._state))}

    def __setstate__(self, saved: dict[str, Any]) -> None:
        self.__init__(*saved["arguments"])  # type: ignore[misc]
        for name, value in saved["kept"].items():
            setattr(self, name, value)
        ops = self.net._ops
        for name, moment in saved["moments"].items():
            ops.copy(ops.to_device(moment), self.moments[name])
        ops.copy(ops.to_device(saved["state"]), self._state)


def minimise(
    net: MLP,
    objective: Objective,
    rows: Rows,
    rule: LBFGS,
    max_iter: int,
    after_iteration: Callable[[float], bool],
) -> Any:
    """SciPy's L-BFGS-B on J of the whole set; the network holds the result's θ, and J is ``result.fun``.

    ``after_iteration(J)`` ends the run by returning True.
    """
    from scipy.optimize import minimize

    full = _FullBatch(net, objective, rows, rule)

    def callback(intermediate_result: Any) -> None:
        if after_iteration(float(intermediate_result.fun)):
            raise StopIteration

    start = np.asarray(net._ops.to_host(net._theta), np.float64)
    options = {
        "maxcor": rule.history_size,
        "gtol": rule.tolerance_grad,
        "ftol": rule.tolerance_change,
        "maxiter": max_iter,
        "maxfun": rule.max_eval,
    }
    with full.tuned():
        result = minimize(full, start, jac=True, method="L-BFGS-B", callback=callback, options=options)
    full.put(result.x)
    return result


class _FullBatch:
    """J(θ) and its gradient over the whole set, for an optimizer that works on host vectors of float64."""

    def __init__(self, net: MLP, objective: Objective, rows: Rows, rule: LBFGS) -> None:
        self._net, self._objective, self._rows = net, objective, rows
        self._trainer = Trainer(net, objective.loss, rule, L2(objective.alpha), parallel=False)
        self._total = rows.total()
        self._constant = rows.constant(objective)
        self._x = rows.whole()
        self._chunk = net._chunk_rows(len(rows))
        self._lanes = self._trainer._lanes(self._chunk)

    def tuned(self) -> AbstractContextManager[None]:
        """A context for evaluations."""
        return self._trainer._tuned(self._chunk)

    def put(self, theta: NDArray[np.float64]) -> None:
        """Make ``theta`` the network's, rounded to its type."""
        net = self._net
        with np.errstate(over="ignore"):
            net._ops.copy(net._ops.to_device(theta, net._theta.dtype), net._theta)

    def __call__(self, theta: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        self.put(theta)
        net, ops, trainer, objective = self._net, self._net._ops, self._trainer, self._objective
        state = trainer._state
        ops.write_state(state, {Slot.COST: 0.0, Slot.TOTAL_WEIGHT: self._total / objective.gradient_factor})
        net._differentiate(self._x, self._rows.y, self._rows.weight, objective.loss, self._lanes)
        value, gradient = objective.penalty_value(self._total), objective.penalty(self._total)
        if value is not None and gradient is not None:
            ops.penalty(net._theta, trainer._update.penalised, value, state)
            ops.add_penalty_gradient(net._theta, trainer._update.penalised, gradient, trainer._update.g)
        cost = ops.read_state(state, Slot.COST) / objective.value_divisor + self._constant
        return cost, np.array(ops.to_host(trainer._update.g), np.float64)


class Fitted:
    """A network and the arrays that an estimator shows of it: `coefs` are W transposed, (n_in, n_out), as scikit-learn
    has them, and `intercepts` b.

    On the CPU they are views, so writing into one changes the network; from a GPU they are copies that refuse to be
    written to.
    """

    def __init__(self, net: MLP) -> None:
        self.net = net
        self.descent: Descent | None = None
        self.best: NDArray[Any] | None = None  # θ with the best validation score, where it is not the present θ
        self.show()

    def show(self) -> None:
        """Make `coefs` and `intercepts` anew from the network."""
        net, ops = self.net, self.net._ops
        self.coefs = [ops.to_host(W).T for W in net.weights]
        self.intercepts = [ops.to_host(b) for b in net.biases]
        if ops.waits:
            for array in (*self.coefs, *self.intercepts):
                array.flags.writeable = False

    def take(self, coefs: list[Any], intercepts: list[Any]) -> None:
        """Load what somebody has put in the place of the arrays shown; a network of another shape is made anew."""
        shown = (*self.coefs, *self.intercepts)
        given = (*coefs, *intercepts)
        if len(shown) == len(given) and all(a is b for a, b in zip(shown, given)):
            return
        sizes = (len(coefs[0]), *(len(b) for b in intercepts))
        if sizes != self.net.sizes:
            old, hidden = self.net, len(sizes) - 2
            names = (old.activation or ("relu",))[:1] * hidden
            self.net = network(sizes, names, old.output, 0.0, old.precision, old.device)
            self.descent = None
            self.show()
        load(self.net, coefs, intercepts)

    def theta(self) -> NDArray[Any]:
        """A copy of θ on the host."""
        return np.array(self.net._ops.to_host(self.net._theta))

    def put(self, theta: NDArray[Any]) -> None:
        """Make ``theta`` the network's."""
        net = self.net
        net._ops.copy(net._ops.to_device(theta), net._theta)
        refresh(net)

    def forward(self, x: Any) -> NDArray[Any]:
        """ŷ, (n, n_L), for a dense x, where that is, or for a CSR x, unpacked chunk by chunk."""
        net = self.net
        if not hasattr(x, "toarray"):
            return net.forward(x)
        y_hat = np.empty((x.shape[0], net.sizes[-1]), net._precision.master_dtype)
        step = net._chunk_rows(x.shape[0])
        for start in range(0, x.shape[0], max(1, step)):
            y_hat[start : start + step] = net.forward(x[start : start + step].toarray())
        return y_hat

    def __getstate__(self) -> dict[str, Any]:
        return {"net": self.net, "descent": self.descent, "best": self.best}

    def __setstate__(self, saved: dict[str, Any]) -> None:
        self.net, self.descent, self.best = saved["net"], saved["descent"], saved["best"]
        self.show()


def network(sizes: Any, activation: Any, output: str, dropout: Any, precision: str, device: str, seed: int = 0) -> MLP:
    """A network whose weights are still zeros."""
    return MLP(
        list(sizes), activation, output, dropout, lambda rng, shape: np.zeros(shape), precision, device, seed
    )  # fmt: skip


def load(net: MLP, coefs: list[Any], intercepts: list[Any]) -> None:
    """W ← coefᵀ, b ← intercept, layer by layer."""
    ops, dtype = net._ops, net._theta.dtype
    arrays = zip(net.layout.weights(net._theta), net.layout.biases(net._theta), coefs, intercepts, strict=True)
    for W, b, coef, intercept in arrays:
        ops.copy(ops.to_device(np.asarray(coef).T, dtype), W)
        ops.copy(ops.to_device(np.asarray(intercept), dtype), b)
    refresh(net)


def refresh(net: MLP) -> None:
    """Bring the 16-bit copy of θ, where there is one, up to date."""
    if net._shadow is not None:
        net._ops.copy(net._theta, net._shadow)


def draw_weights(
    random: np.random.RandomState, sizes: tuple[int, ...], squashing: bool
) -> Iterator[tuple[NDArray[np.float64], NDArray[np.float64]]]:
    """Every layer's (coef, intercept) as scikit-learn draws them: uniform within √(6 / (n_in + n_out)), biases too.

    With ``squashing``, the logistic sigmoid, it is √(2 / (n_in + n_out)) (Glorot and Bengio, 2010).
    """
    for n_in, n_out in zip(sizes, sizes[1:]):
        bound = math.sqrt((2 if squashing else 6) / (n_in + n_out))
        yield random.uniform(-bound, bound, (n_in, n_out)), random.uniform(-bound, bound, n_out)


def reorder(order: NDArray[np.int64], random: np.random.RandomState) -> NDArray[np.int64]:
    """The last epoch's order shuffled once more, with scikit-learn's draws."""
    shuffled = np.arange(len(order))
    random.shuffle(shuffled)
    return order[shuffled]


def observe_plateau(descent: Descent, watched: float) -> None:
    """Tell a plateau schedule the loss of one more epoch."""
    plateau = plateau_of(descent.schedule)
    if plateau is not None:
        descent.plateau = descent.plateau or PlateauState()
        descent.plateau.observe(plateau, watched)


def at_most(batch_size: int, n: int) -> int:
    """``batch_size``, with a warning where it is more than the ``n`` rows there are and becomes that."""
    if batch_size > n:
        warnings.warn(f"batch_size: {batch_size} is more than the {n} samples; it is clipped to them", stacklevel=6)
    return min(batch_size, n)
