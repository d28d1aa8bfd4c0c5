"""One fit: its data, checked and on the device, its history, and the loop over epochs and minibatches.

Leans on `feeding` for the minibatches and on the passes of `network`; works a `Trainer`, which is one room above and
whose update every step is.
"""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray

from . import checkpoint, checks, data, divergence, evaluation, metrics, resuming, schedules
from .checkpoint import Checkpoints, Folder
from .failures import BrokenData, DeviceLost, Diverged, Terminated
from .feeding import SPARE_BYTES, Feed, FromDisk, Parts, Resident, Streamed
from .fullbatch import minimise
from .history import EarlyStopping, History
from .ops.interface import Array, DeviceError, Slot
from .optimizers import LBFGS
from .parallel.ranks import Share
from .progress import Progress
from .schedules import Schedule
from .signals import Interruption, interrupt_between_steps
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
        checkpoints: Checkpoints | str | os.PathLike[str] | None,
        resume: bool | str | os.PathLike[str],
    ) -> None:
        self.trainer, self.net = trainer, trainer.net
        self.epochs = checks.integer("epochs", epochs, 1)
        self.stream = self._check_stream("data", dataset)
        if self.stream is None:
            self.x, self.y, self.w = self._check("data", dataset)
        self.validation = self._on_device(self._check_validation(validation))
        self.held_out = validation if isinstance(validation, (int, float)) else None  # as a fraction
        self.ranks = trainer.ranks
        if self.stream is not None:
            share = Share(self.ranks, min(checks.integer("batch_size", batch_size, 1), self.stream.n), self.stream.n)
            self.ahead = self.stream.ahead(share if self.ranks.size > 1 else None)
            self.x, self.y, self.w = self.ahead.like  # of the first chunk: what all rows have in common
        self.n = len(self.x) if self.stream is None else self.stream.n
        self.batch_size = min(checks.integer("batch_size", batch_size, 1), self.n)
        self.shuffle = checks.boolean("shuffle", shuffle)
        self.callbacks = list(callbacks)
        if not all(callable(callback) for callback in self.callbacks):
            raise TypeError("callbacks: every one must be callable as callback(trainer, row)")
        if early_stopping is not None and not isinstance(early_stopping, EarlyStopping):
            raise TypeError(f"early_stopping: expected an EarlyStopping, got {type(early_stopping).__name__}")
        if not self.ranks.first:
            self.callbacks = [call for call in self.callbacks if not getattr(call, "first_rank_only", False)]
        self.early_stopping = early_stopping
        self.names = metrics.chosen(names, trainer.loss.name, self.net.sizes[-1], self.y.ndim == 1)
        self.history = History(self._monitor())
        self.began = (trainer.rounds, trainer.epoch)  # steps and epochs of earlier fits
        self.cursor = 0  # rows of the epoch at hand that were trained on
        self.seconds = 0.0  # that the epoch at hand took before the run was resumed
        self.best: NDArray[Any] | None = None  # the best weights so far, where they are to be put back
        self.good = self.remember(self.net._theta)  # the weights of the last good epoch
        self._keeper = self._check_keeper(checkpoints, resume)
        self._resume = resume

    def _check_keeper(
        self, checkpoints: Checkpoints | str | os.PathLike[str] | None, resume: bool | str | os.PathLike[str]
    ) -> Folder | None:
        policy = checkpoint.check(checkpoints)
        if not isinstance(resume, (bool, str, os.PathLike)):
            raise TypeError(f"resume: expected True, False or a path, got {type(resume).__name__}")
        if policy is None and resume is True:
            raise ValueError("resume: True goes on from the folder of checkpoints, and none is given; name it")
        if isinstance(self.trainer.optimizer, LBFGS) and (policy is not None or resume):
            raise ValueError(
                "checkpoints: L-BFGS can have none: SciPy keeps its curvature pairs to itself, so that a run that is "
                "resumed could not go on as it would have"
            )
        return None if policy is None else Folder(policy, monitor=self.history.monitor)

    def run(self, progress: bool) -> History:
        """Train to the end, whichever end it is, and give back what the run alone needed."""
        trainer = self.trainer
        trainer._recorder.clear()
        shown: Progress | None = None
        try:
            reason = self._begin()
            told = progress and self.ranks.first
            shown = Progress(self.epochs, self.n, told, epoch=self.epochs_done, rows=self.rows_done)
            tuned = trainer._tuned(self.rows_at_once)
            with tuned, interrupt_between_steps(terminate=self._keeper is not None) as interrupted:
                if reason:
                    self.finish(reason)
                elif isinstance(trainer.optimizer, LBFGS):
                    minimise(self, shown, interrupted)
                else:
                    self.descend(shown, interrupted)
        except DeviceError as error:
            raise self._rescued(error) from error
        except BrokenData as error:
            raise self._without_data(error) from error
        finally:
            if shown is not None:
                shown.close()
            if self._keeper is not None:
                self._keeper.close()
            if self.stream is not None:
                self.ahead.close()
            trainer._recorder.clear()  # what it kept alive is free for other work
        if self.history.stopped == "terminated":
            raise Terminated(self.history)
        if self.history.stopped == "interrupted" and self.ranks.first:
            warnings.warn("training was interrupted; what was learned so far is kept", stacklevel=3)
        return self.history

    @property
    def rows_at_once(self) -> int:
        """The rows of a batch, or of a part of the data set where the whole of it is the batch."""
        full_batch = isinstance(self.trainer.optimizer, LBFGS)
        return self.net._chunk_rows(self.ranks.most(self.n)) if full_batch else self.batch_size

    @property
    def epochs_done(self) -> int:
        """Whole epochs of this fit."""
        return self.trainer.epoch - self.began[1] - (self.cursor > 0)

    @property
    def rows_done(self) -> int:
        """Rows trained on in this fit."""
        return self.epochs_done * self.n + self.cursor

    def schedule(self, epochs: int, began: tuple[int, int]) -> Schedule:
        """The schedule of this fit, were it one of so many epochs that began after so many steps and epochs."""
        steps = -(-self.n // self.batch_size)
        return self.trainer.schedule.over(began[0] + steps * epochs, began[1] + epochs)

    # --- checkpoints ---

    def _begin(self) -> str:
        """Open the folder of checkpoints, and take up the run in it where that is wanted; the reason why it is over
        already, or an empty string."""
        keeper, resume = self._keeper, self._resume
        if keeper is None and resume is False and self.ranks.size == 1:
            return ""
        self.recipe = resuming.recipe_of_fit(self)
        self.trainer._share({**self.recipe, "epochs": self.epochs, "monitor": self.history.monitor})
        if keeper is not None:
            self.ranks.on_first(lambda: self._open(keeper))
        reason = ""
        if resume is not False:
            where = Path(keeper.path if keeper is not None and resume is True else resume)  # type: ignore[arg-type]
            reason = self._take_up(where)
        if keeper is not None:
            keeper.begin(self.trainer.rounds, self.trainer.epoch)
        return reason

    def _open(self, keeper: Folder) -> None:
        """Open the folder of checkpoints, which must be empty or the run's own."""
        keeper.open()
        if keeper.paths and self._resume is False:
            raise ValueError(
                f"checkpoints: {keeper.path} holds those of another run; resume=True goes on from the last of "
                f"them, or name another folder"
            )

    def _take_up(self, where: Path) -> str:
        """Go on from the newest checkpoint at ``where``; the reason why that run is over, or an empty string."""
        read = self.ranks.on_first(lambda: checkpoint.newest(where, lambda header: resuming.fits_fit(self, header)))
        found = resuming.shared(self.trainer, read)
        if found is None and self._resume is not True:
            raise FileNotFoundError(f"resume: there is no checkpoint in {where}")
        reason = "" if found is None else resuming.restore_fit(self, found)
        for callback in self.callbacks:
            rewind = getattr(callback, "rewind", None)
            if callable(rewind):
                rewind(self.trainer.rounds)
        return reason

    def _checkpoint(self, feed: Feed, started: float, reason: str = "") -> None:
        """Write a checkpoint of the run as it stands, unless it is not finite, which raises Diverged."""
        keeper, trainer = self._keeper, self.trainer
        if keeper is None or self._on_first(keeper.has(trainer.rounds, reason)):
            return
        self._refuse_divergence(feed)
        self._refuse_bad_weights()
        found = resuming.snapshot_fit(self, time.perf_counter() - started, reason)
        done = self.began[1] + self.epochs_done
        self.ranks.on_first(lambda: keeper.write(found, done))
        if not self.ranks.first:
            keeper.begin(trainer.rounds, done)

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
        return evaluation.checked(self.net, self.trainer.loss, dataset)

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
            return evaluation.checked(self.net, self.trainer.loss, validation)
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

    def descend(self, progress: Progress, interrupted: Interruption) -> None:
        """Every epoch: shuffled minibatches, an update for each, then validation."""
        trainer, ops = self.trainer, self.net._ops
        schedule = self.schedule(self.epochs, self.began)
        feed = self._feed()
        self._settle_validation()
        self.net._refresh()
        reason = ""
        while not reason:
            started = time.perf_counter() - self.seconds
            if self.cursor == 0:
                trainer.epoch += 1
                ops.write_state(trainer._state, {Slot.EPOCH_COST: 0.0})
            if self._work_through_epoch(feed, schedule, started, progress, interrupted):
                reason = "terminated" if interrupted.terminated else "interrupted"
            else:
                self._refuse_divergence(feed)
                self._refuse_bad_weights()
                cost = ops.read_state(trainer._state, Slot.EPOCH_COST) / self.n
                rate = ops.read_state(trainer._state, Slot.LEARNING_RATE)
                self.cursor, self.seconds = 0, 0.0
                reason = self.end_epoch(cost, rate, started, progress)
                if not reason and self.epochs_done >= self.epochs:
                    reason = "completed"
            if reason or self._on_first(self._due()):
                self._checkpoint(feed, started, reason)
        self.finish(reason)

    def _work_through_epoch(
        self,
        feed: Resident | Streamed,
        schedule: Schedule,
        started: float,
        progress: Progress,
        interrupted: Interruption,
    ) -> bool:
        """The updates of the epoch at hand that are still to be done; whether an interruption has ended them."""
        trainer, ops = self.trainer, self.net._ops
        for cursor, rows in feed.epoch(self._order(), self.cursor):
            trainer._step(feed, rows, cursor, schedule)
            self.cursor = cursor + rows
            progress.advance(rows)
            looks = not ops.waits or trainer.rounds % LOOK_EVERY == 0
            if looks:
                self._refuse_divergence(feed)
            ends, due = self.listen(interrupted, looks or self.cursor >= self.n)
            if ends:
                return True
            if due and self.cursor < self.n:
                self._checkpoint(feed, started)
        return False

    def listen(self, interrupted: Interruption, looks: bool) -> tuple[bool, bool]:
        """Whether to end after the step at hand, and whether a checkpoint is due: the same on all ranks.

        They ask each other where ``looks`` says so, since that may mean waiting for a device: a signal waits too.
        """
        due = self._due()
        if self.ranks.size == 1:
            return interrupted.is_set(), due
        timed = self._keeper is not None and self._keeper.timed
        if not looks:
            return False, due and not timed
        said = [interrupted.is_set(), interrupted.terminated, due and self.ranks.first]
        found = self.ranks.sum(np.array(said, np.float64))
        if found[0]:
            interrupted.set()
        interrupted.terminated = bool(found[1])
        return bool(found[0]), bool(found[2]) if timed else due

    def _on_first(self, said: bool) -> bool:
        """What the first rank says."""
        return bool(self.ranks.sum(np.array([float(said and self.ranks.first)]))[0])

    def _due(self) -> bool:
        """Whether a checkpoint is due."""
        return self._keeper is not None and self._keeper.due(self.trainer.rounds, self.began[1] + self.epochs_done)

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
            return FromDisk(ops, self.ahead, self.batch_size, self.ranks)
        parts = self.x, self.y, self.w
        free = ops.free_bytes()
        host_bytes = sum(part.nbytes for part in parts if part is not None and not ops.owns(part))
        if free is None or host_bytes == 0 or host_bytes + SPARE_BYTES <= free:
            try:
                moved = (part if part is None or not ops.waits else ops.to_device(part) for part in parts)
                return Resident(ops, *cast(Parts, tuple(moved)), self.batch_size, self.ranks)
            except ops.out_of_memory:
                pass  # what is free need not be in one piece
        moved_back = (None if part is None else ops.to_host(part) for part in parts)
        return Streamed(ops, *cast(Parts, tuple(moved_back)), self.batch_size, self.ranks)

    # --- the end of an epoch, the end of a run ---

    def end_epoch(self, cost: float, rate: float, started: float, progress: Progress) -> str:
        """Validate, write the row, remember what is worth it; the reason to stop here, or an empty string."""
        trainer = self.trainer
        seconds = time.perf_counter() - started
        row: dict[str, float] = {
            "epoch": trainer.epoch, "step": trainer.rounds, "cost": cost, "learning_rate": rate,
        }  # fmt: skip
        row |= {"seconds": seconds, "samples_per_second": self.n / max(seconds, 1e-9)}
        if self.validation is not None:
            figures = trainer._evaluate(self.validation, self.names, self.ranks)
            row |= {f"validation_{name}": figure for name, figure in figures.items()}
        plateau = schedules.plateau_of(trainer.schedule)
        if plateau is not None:
            trainer.plateau.observe(plateau, row.get("validation_loss", cost))
        stopping = self.early_stopping
        better = self.history.append(row, 0.0 if stopping is None else stopping.min_delta)
        self.good = self.remember(trainer._model())
        if better and stopping is not None and stopping.restore_best:
            self.best = self.good
        progress.end_epoch({k: v for k, v in row.items() if k == "cost" or k.startswith("validation_")})
        answers = [callback(trainer, dict(row)) for callback in self.callbacks]  # each one is called
        self.net._refresh()  # a callback may have written to the weights
        ends = any(isinstance(answer, (bool, np.bool_)) and answer for answer in answers)
        if self.ranks.sum(np.array([float(ends)]))[0]:
            return "callback"
        if stopping is not None and self.history.epochs_since_best >= stopping.patience:
            return "early stopping"
        return ""

    def remember(self, theta: Array) -> NDArray[Any]:
        """A copy of a flat array of θ's size on the host."""
        return np.array(self.net._ops.to_host(theta))

    def recall(self, theta: Array) -> None:
        net = self.net
        net._ops.copy(net._ops.to_device(theta, net._theta.dtype), net._theta)
        if net._shadow is not None:
            net._ops.copy(net._theta, net._shadow)

    def fall_back(self) -> None:
        """Put the weights of the last good epoch back."""
        self.recall(self.good)
        if self.trainer._averaged is not None:
            self.net._ops.copy(self.net._theta, self.trainer._averaged)

    def finish(self, reason: str) -> None:
        """Leave the network with its best weights, where they are wanted, or the averaged ones, where there are any."""
        self.history.stopped = reason
        if self.best is not None:
            self.recall(self.best)
            self.history.restored_best = True
            return
        if self.trainer._averaged is not None:
            self.recall(self.trainer._model())

    def _rescued(self, error: DeviceError) -> DeviceLost:
        """Save what a failed device cannot take away: the weights of the last whole epoch, now on the CPU."""
        self.net._move_to_host(self.good)
        self.history.stopped = "device lost"
        kept = "the network is on the CPU now, with the weights of the last whole epoch"
        return DeviceLost(f"epoch {self.trainer.epoch}: {error}; {kept}", self.history)

    def _without_data(self, error: BrokenData) -> BrokenData:
        """Keep what was learned up to the last whole epoch; what comes after it cannot be read."""
        self.fall_back()
        self.history.stopped = "data lost"
        kept = "the network has the weights of the last whole epoch"
        return BrokenData(f"epoch {self.trainer.epoch}: {error}; {kept}", self.history)

    def _refuse_divergence(self, feed: Feed) -> None:
        try:
            divergence.refuse_step(self.trainer, feed)
        except Diverged as error:
            self.fall_back()
            self.history.stopped = "diverged"
            raise Diverged(f"epoch {self.trainer.epoch}, {error}", self.history) from None

    def _refuse_bad_weights(self) -> None:
        try:
            divergence.refuse_weights(self.net)
        except Diverged as error:
            self.fall_back()
            self.history.stopped = "diverged"
            message = f"epoch {self.trainer.epoch}: {error}; those before the epoch are kept"
            raise Diverged(message, self.history) from None
