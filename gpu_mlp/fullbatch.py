"""L-BFGS: SciPy's on J(θ) of the whole data set, where an iteration counts as an epoch of a fit.

Leans on the passes of `network`; works a `Fit`, which is one room above, and its trainer.
"""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray

from . import divergence
from .failures import Diverged
from .feeding import SPARE_BYTES, Parts, Single
from .notices import say_once
from .ops.interface import Slot
from .optimizers import LBFGS
from .progress import Progress
from .signals import Interruption

if TYPE_CHECKING:
    from .fitting import Fit


def minimise(fit: Fit, progress: Progress, interrupted: Interruption) -> None:
    """SciPy's L-BFGS-B on J(θ) over the whole data set; an iteration counts as an epoch."""
    from scipy.optimize import minimize

    trainer, net = fit.trainer, fit.net
    rule = cast(LBFGS, trainer.optimizer)
    fit.x, fit.y, fit.w = _whole(fit)
    started, reason = time.perf_counter(), ""

    def objective(theta: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        fit.recall(theta)
        cost = _full_gradient(fit)
        progress.advance(fit.n)
        if not math.isfinite(cost):
            whole = Single(net._ops, fit.x, fit.y, fit.w, False)
            work = trainer._lanes(fit.rows_at_once)[0].work
            where = divergence.find(trainer, whole, 0, fit.n, trainer.rounds, work)
            fit.fall_back()
            fit.history.stopped = "diverged"
            raise Diverged(f"iteration {trainer.rounds + 1}: the cost is not finite{where}", fit.history)
        return cost, net._ops.to_host(trainer._update.g).astype(np.float64)

    def end_iteration(intermediate_result: Any) -> None:
        nonlocal started, reason
        trainer.epoch += 1
        trainer.rounds += 1
        fit.recall(intermediate_result.x)
        reason = fit.end_epoch(float(intermediate_result.fun), 1.0, started, progress)
        started = time.perf_counter()
        if fit.listen(interrupted, True)[0]:
            reason = "interrupted"
        if reason:
            raise StopIteration

    options = {
        "maxcor": rule.history_size,
        "gtol": rule.tolerance_grad,
        "ftol": rule.tolerance_change,
        "maxiter": fit.epochs,
        "maxfun": rule.max_eval,
    }
    start = net._ops.to_host(net._theta).astype(np.float64)
    result = minimize(objective, start, jac=True, method="L-BFGS-B", callback=end_iteration, options=options)
    fit.recall(result.x)
    fit.finish(reason or ("converged" if result.success else "completed"))


def _whole(fit: Fit) -> Parts:
    """The data set as every iteration takes it, or this rank's part: on the device, but for an x that is too large."""
    ops, own = fit.net._ops, fit.trainer.ranks.part(fit.n)
    x, y, w = fit.x[own], fit.y[own], None if fit.w is None else fit.w[own]
    if ops.waits:
        say_once("L-BFGS reads J after every pass, so its steps are not recorded as a CUDA graph")
    y, w = ops.to_device(y), None if w is None else ops.to_device(w)
    free = ops.free_bytes()
    fits = free is not None and x.nbytes + SPARE_BYTES <= free
    return ops.to_device(x) if fits and not ops.owns(x) else x, y, w


def _full_gradient(fit: Fit) -> float:
    """J over the whole data set; its gradient, λ∇Ω included, in the trainer's gradient."""
    trainer, net, ops = fit.trainer, fit.net, fit.net._ops
    state, update = trainer._state, trainer._update
    ops.write_state(state, {Slot.COST: 0.0})
    trainer._begin_weight(fit.y, fit.w, fit.n)
    lanes = trainer._lanes(fit.rows_at_once)
    update.begin(lanes, len(fit.x))
    net._differentiate(fit.x, fit.y, fit.w, trainer.loss, lanes)
    update.sum_up()
    if trainer.regularizer is not None:
        ops.penalty(net._theta, update.penalised, trainer.regularizer, state)
        ops.add_penalty_gradient(net._theta, update.penalised, trainer.regularizer, update.g)
    return ops.read_state(state, Slot.COST)
