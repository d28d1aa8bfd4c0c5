"""One fit: its data, checked and on the device, its history, and the loop over epochs and minibatches.

Leans on `feeding` for the minibatches and on the passes of `network`; works a `Trainer`, which is one room above and
whose update every step is.
"""

from __future__ import annotations

import math
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray

from . import checks, data, metrics, schedules
from .failures import BrokenData, DeviceLost, Diverged
from .feeding import SPARE_BYTES, Feed, FromDisk, Parts, Resident, Single, Streamed
from .history import EarlyStopping, History
from .notices import say_once
from .ops.interface import Array, DeviceError, Slot
from .optimizers import LBFGS
from .progress import Progress
from .signals import interrupt_between_steps
from .streams import Stream

if TYPE_CHECKING:
    from .training import Trainer

LOOK_EVERY = 100  # steps; how often a device that has to be waited for is asked whether the cost is still finite
Callback = Callable[["Trainer", "dict[str, float]"], Any]


class Fit:
    """One call of `Trainer.fit`: its data, checked and on the device, its history, and the loop over the epochs."""

    def __init__(
        self,
        trainer: Trainer,
        dataset: Sequence[Any] | Stream,
        epochs: int,
        batch_size: int,
        validation: Sequence[Any] | Stream | float | None,
        shuffle: bool,
        callbacks: Sequence[Callback],
        early_stopping: EarlyStopping | None,
        names: Sequence[str] | None,
    ) -> None:
        self.trainer, self.net = trainer, trainer.net
        self.epochs = checks.integer("epochs", epochs, 1)
        self.stream = self._check_stream("data", dataset)
        if self.stream is None:
            self.x, self.y, self.w = self._check("data", dataset)
        self.validation = self._on_device(self._check_validation(validation))
        if self.stream is not None:
            self.ahead = self.stream.ahead()
            self.x, self.y, self.w = self.ahead.like  # of the first chunk: what all rows have in common
        self.n = len(self.x) if self.stream is None else self.stream.n
        self.batch_size = min(checks.integer("batch_size", batch_size, 1), self.n)
        full_batch = isinstance(trainer.optimizer, LBFGS)
        self.rows = self.net._chunk_rows(self.n) if full_batch else self.batch_size
        self.shuffle = checks.boolean("shuffle", shuffle)
        self.callbacks = list(callbacks)
        if not all(callable(callback) for callback in self.callbacks):
            raise TypeError("callbacks: every one must be callable as callback(trainer, row)")
        if early_stopping is not None and not isinstance(early_stopping, EarlyStopping):
            raise TypeError(f"early_stopping: expected an EarlyStopping, got {type(early_stopping).__name__}")
        self.early_stopping = early_stopping
        self.names = metrics.chosen(names, trainer.loss.name, self.net.sizes[-1], self.y.ndim == 1)
        self.history = History(self._monitor())
        self._best: NDArray[Any] | None = None
        self._good = self._remember(self.net._theta)

    def run(self, progress: bool) -> History:
        """Train to the end, whichever end it is, and give back what the run alone needed."""
        trainer = self.trainer
        shown = Progress(self.epochs, self.n, progress)
        trainer._recorder.clear()
        try:
            with trainer._tuned(self.rows), interrupt_between_steps() as interrupted:
                if isinstance(trainer.optimizer, LBFGS):
                    self.minimise(shown, interrupted)
                else:
                    self.descend(shown, interrupted)
        except DeviceError as error:
            raise self._rescued(error) from error
        except BrokenData as error:
            raise self._without_data(error) from error
        finally:
            shown.close()
            if self.stream is not None:
                self.ahead.close()
            trainer._recorder.clear()  # what it kept alive is free for other work
        if self.history.stopped == "interrupted":
            warnings.warn("training was interrupted; what was learned so far is kept", stacklevel=3)
        return self.history

    # --- what is trained on ---

    def _check_stream(self, argument: str, dataset: Any) -> Stream | None:
        """A data set on the disk, whose every piece is checked on its way in; None for anything else."""
        if not isinstance(dataset, Stream):
            return None
        if isinstance(self.trainer.optimizer, LBFGS):
            raise ValueError(
                f"{argument}: L-BFGS works on the whole data set, many times an iteration, and a stream would be read "
                "anew each time; use another optimizer, or arrays in memory"
            )
        return self.trainer._checked(dataset)

    def _check(self, argument: str, dataset: Any) -> Parts:
        if not isinstance(dataset, (tuple, list)) or len(dataset) not in (2, 3):
            raise TypeError(f"{argument}: expected (x, y) or (x, y, sample_weight), got {type(dataset).__name__}")
        x, y, *w = dataset
        try:
            x, y, weight, _ = self.net._check_host(x, y, w[0] if w else None, self.trainer.loss)
        except (TypeError, ValueError) as error:
            if argument == "data":
                raise
            raise type(error)(f"{argument}: {error}") from None
        if not len(x):
            raise ValueError(f"{argument}: no rows")
        return x, y, weight

    def _check_validation(self, validation: Any) -> Parts | Stream | None:
        if validation is None or isinstance(validation, (tuple, list)):
            return None if validation is None else self._check("validation", validation)
        if isinstance(validation, Stream):
            return self.trainer._checked(validation)
        fraction = checks.real("validation", validation, 0, 1, open_minimum=True, open_maximum=True)
        if self.stream is not None:
            self.stream, held_out = self.stream.split(fraction, self.trainer.seed)
            return held_out
        if len(self.x) < 2:
            raise ValueError(f"validation: {len(self.x)} rows cannot be split")
        ops, parts = self.net._ops, (self.x, self.y, self.w)
        stratify = ops.to_host(self.y) if self.y.ndim == 1 else None
        kept, held = data.split(len(self.x), fraction, self.trainer.seed, stratify)

        def taken(rows: NDArray[np.int64]) -> Parts:
            chosen = (None if a is None else a[ops.to_device(rows) if ops.owns(a) else rows] for a in parts)
            return cast(Parts, tuple(chosen))

        self.x, self.y, self.w = taken(kept)
        return taken(held)

    def _on_device(self, validation: Parts | Stream | None) -> Parts | Stream | None:
        """The validation part with its targets on the device; x goes there piece by piece."""
        if validation is None or isinstance(validation, Stream):
            return validation
        (x, y, w), ops = validation, self.net._ops
        return x, ops.to_device(y), None if w is None else ops.to_device(w)

    def _monitor(self) -> str:
        columns = ["cost"]
        if self.validation is not None:
            columns += ["validation_loss", *(f"validation_{name}" for name in self.names)]
        wanted = None if self.early_stopping is None else self.early_stopping.monitor
        if wanted is None:
            return "cost" if self.validation is None else "validation_loss"
        return checks.choice("monitor", wanted, columns)

    # --- minibatch descent ---

    def descend(self, progress: Progress, interrupted: threading.Event) -> None:
        """Every epoch: shuffled minibatches, an update for each, then validation."""
        trainer, ops = self.trainer, self.net._ops
        steps = -(-self.n // self.batch_size)
        schedule = trainer.schedule.over(trainer.rounds + steps * self.epochs, trainer.epoch + self.epochs)
        feed = self._feed()
        self._settle_validation()
        self.net._refresh()
        for _ in range(self.epochs):
            started = time.perf_counter()
            trainer.epoch += 1
            ops.write_state(trainer._state, {Slot.EPOCH_COST: 0.0})
            for cursor, rows in feed.epoch(self._order()):
                trainer._step(feed, rows, cursor, schedule)
                progress.advance(rows)
                if not ops.waits or trainer.rounds % LOOK_EVERY == 0:
                    self._refuse_divergence(feed)
                if interrupted.is_set():
                    break
            if interrupted.is_set():
                self._finish("interrupted")
                return
            self._refuse_divergence(feed)
            self._refuse_bad_weights()
            cost = ops.read_state(trainer._state, Slot.EPOCH_COST) / self.n
            rate = ops.read_state(trainer._state, Slot.LEARNING_RATE)
            reason = self._end_epoch(cost, rate, started, progress)
            if reason:
                self._finish(reason)
                return
        self._finish("completed")

    def _settle_validation(self) -> None:
        """Keep x of the validation part on the device too, where there is room left for it."""
        free = self.net._ops.free_bytes()
        if free is None or self.validation is None or isinstance(self.validation, Stream):
            return
        if self.validation[0].nbytes + SPARE_BYTES <= free:
            self.validation = self.net._ops.to_device(self.validation[0]), *self.validation[1:]

    def _order(self) -> Any:
        """The order of the rows in the epoch at hand, as the feed takes it; None: as they are stored."""
        epoch = self.trainer.epoch - 1
        if self.stream is not None:
            return self.stream.order(self.trainer.seed if self.shuffle else None, epoch)
        return data.epoch_order(self.n, self.trainer.seed, epoch) if self.shuffle else None

    def _feed(self) -> Resident | Streamed:
        """The data set on the device, or where it does not fit there a stream of it; or what reads it from the disk."""
        ops = self.net._ops
        if self.stream is not None:
            return FromDisk(ops, self.ahead, self.batch_size)
        parts = self.x, self.y, self.w
        free = ops.free_bytes()
        host_bytes = sum(part.nbytes for part in parts if part is not None and not ops.owns(part))
        if free is None or host_bytes == 0 or host_bytes + SPARE_BYTES <= free:
            try:
                moved = (part if part is None or not ops.waits else ops.to_device(part) for part in parts)
                return Resident(ops, *cast(Parts, tuple(moved)), self.batch_size)
            except ops.out_of_memory:
                pass  # what is free need not be in one piece
        moved_back = (None if part is None else ops.to_host(part) for part in parts)
        return Streamed(ops, *cast(Parts, tuple(moved_back)), self.batch_size)

    # --- L-BFGS ---

    def minimise(self, progress: Progress, interrupted: threading.Event) -> None:
        """SciPy's L-BFGS-B on J(θ) over the whole data set; an iteration counts as an epoch."""
        from scipy.optimize import minimize

        trainer, net = self.trainer, self.net
        rule = cast(LBFGS, trainer.optimizer)
        self.x, self.y, self.w = self._whole()
        started, reason = time.perf_counter(), ""

        def objective(theta: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
            self._recall(theta)
            cost = self._full_gradient()
            progress.advance(self.n)
            if not math.isfinite(cost):
                whole = Single(net._ops, self.x, self.y, self.w, False)
                work = trainer._lanes(self.rows)[0].work
                where = trainer._where_not_finite(whole, 0, self.n, trainer.rounds, work)
                self._fall_back()
                self.history.stopped = "diverged"
                raise Diverged(f"iteration {trainer.rounds + 1}: the cost is not finite{where}", self.history)
            return cost, net._ops.to_host(trainer._g).astype(np.float64)

        def end_iteration(intermediate_result: Any) -> None:
            nonlocal started, reason
            trainer.epoch += 1
            trainer.rounds += 1
            self._recall(intermediate_result.x)
            reason = self._end_epoch(float(intermediate_result.fun), 1.0, started, progress)
            started = time.perf_counter()
            if interrupted.is_set():
                reason = "interrupted"
            if reason:
                raise StopIteration

        options = {
            "maxcor": rule.history_size,
            "gtol": rule.tolerance_grad,
            "ftol": rule.tolerance_change,
            "maxiter": self.epochs,
            "maxfun": rule.max_eval,
        }
        start = net._ops.to_host(net._theta).astype(np.float64)
        result = minimize(objective, start, jac=True, method="L-BFGS-B", callback=end_iteration, options=options)
        self._recall(result.x)
        self._finish(reason or ("converged" if result.success else "completed"))

    def _whole(self) -> Parts:
        """The data set as every iteration takes it: on the device, but for an x that does not fit there."""
        ops = self.net._ops
        if ops.waits:
            say_once("L-BFGS reads J after every pass, so its steps are not recorded as a CUDA graph")
        y, w = ops.to_device(self.y), None if self.w is None else ops.to_device(self.w)
        free = ops.free_bytes()
        fits = free is not None and self.x.nbytes + SPARE_BYTES <= free
        return ops.to_device(self.x) if fits and not ops.owns(self.x) else self.x, y, w

    def _full_gradient(self) -> float:
        """J over the whole data set; its gradient, λ∇Ω included, in the trainer's gradient."""
        trainer, net, ops = self.trainer, self.net, self.net._ops
        state, g = trainer._state, trainer._g
        ops.write_state(state, {Slot.COST: 0.0})
        ops.total_weight(trainer.loss, self.y, self.w, state)
        net._differentiate(self.x, self.y, self.w, trainer.loss, trainer._lanes(self.rows))
        if trainer.regularizer is not None:
            ops.penalty(net._theta, trainer._penalised, trainer.regularizer, state)
            ops.add_penalty_gradient(net._theta, trainer._penalised, trainer.regularizer, g)
        return ops.read_state(state, Slot.COST)

    # --- the end of an epoch, the end of a run ---

    def _end_epoch(self, cost: float, rate: float, started: float, progress: Progress) -> str:
        """Validate, write the row, remember what is worth it; the reason to stop here, or an empty string."""
        trainer = self.trainer
        seconds = time.perf_counter() - started
        row: dict[str, float] = {
            "epoch": trainer.epoch, "step": trainer.rounds, "cost": cost, "learning_rate": rate,
        }  # fmt: skip
        row |= {"seconds": seconds, "samples_per_second": self.n / max(seconds, 1e-9)}
        if self.validation is not None:
            figures = trainer._evaluate(self.validation, self.names)
            row |= {f"validation_{name}": figure for name, figure in figures.items()}
        plateau = schedules.plateau_of(trainer.schedule)
        if plateau is not None:
            trainer.plateau.observe(plateau, row.get("validation_loss", cost))
        stopping = self.early_stopping
        better = self.history.append(row, 0.0 if stopping is None else stopping.min_delta)
        self._good = self._remember(trainer._model())
        if better and stopping is not None and stopping.restore_best:
            self._best = self._good
        progress.end_epoch({k: v for k, v in row.items() if k == "cost" or k.startswith("validation_")})
        answers = [callback(trainer, dict(row)) for callback in self.callbacks]  # each one is called
        self.net._refresh()  # a callback may have written to the weights
        if any(isinstance(answer, (bool, np.bool_)) and answer for answer in answers):
            return "callback"
        if stopping is not None and self.history.epochs_since_best >= stopping.patience:
            return "early stopping"
        return ""

    def _remember(self, theta: Array) -> NDArray[Any]:
        """A copy of a flat array of θ's size on the host."""
        return np.array(self.net._ops.to_host(theta))

    def _recall(self, theta: Array) -> None:
        net = self.net
        net._ops.copy(net._ops.to_device(theta, net._theta.dtype), net._theta)
        if net._shadow is not None:
            net._ops.copy(net._theta, net._shadow)

    def _fall_back(self) -> None:
        """Put the weights of the last good epoch back."""
        self._recall(self._good)
        if self.trainer._averaged is not None:
            self.net._ops.copy(self.net._theta, self.trainer._averaged)

    def _finish(self, reason: str) -> None:
        """Leave the network with its best weights, where they are wanted, or the averaged ones, where there are any."""
        self.history.stopped = reason
        if self._best is not None:
            self._recall(self._best)
            self.history.restored_best = True
            return
        if self.trainer._averaged is not None:
            self._recall(self.trainer._model())

    def _rescued(self, error: DeviceError) -> DeviceLost:
        """Save what a failed device cannot take away: the weights of the last whole epoch, now on the CPU."""
        self.net._move_to_host(self._good)
        self.history.stopped = "device lost"
        kept = "the network is on the CPU now, with the weights of the last whole epoch"
        return DeviceLost(f"epoch {self.trainer.epoch}: {error}; {kept}", self.history)

    def _without_data(self, error: BrokenData) -> BrokenData:
        """Keep what was learned up to the last whole epoch; what comes after it cannot be read."""
        self._recall(self._good)
        self.history.stopped = "data lost"
        kept = "the network has the weights of the last whole epoch"
        return BrokenData(f"epoch {self.trainer.epoch}: {error}; {kept}", self.history)

    def _refuse_divergence(self, feed: Feed) -> None:
        try:
            self.trainer._refuse_divergence(feed)
        except Diverged as error:
            self._fall_back()
            self.history.stopped = "diverged"
            raise Diverged(f"epoch {self.trainer.epoch}, {error}", self.history) from None

    def _refuse_bad_weights(self) -> None:
        try:
            self.trainer._refuse_bad_weights()
        except Diverged as error:
            self._fall_back()
            self.history.stopped = "diverged"
            message = f"epoch {self.trainer.epoch}: {error}; those before the epoch are kept"
            raise Diverged(message, self.history) from None
