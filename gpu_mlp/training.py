"""The trainer: one update of a network by an optimizer, and the state that updates move along.

Leans on `network` for the passes and on `updating` for what becomes of the gradient. One update is `Trainer._step`; a
run of them, which `Trainer.fit` starts, is in `fitting`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, cast

import numpy as np

from . import (
    averaging,
    checkpoint,
    checks,
    divergence,
    evaluation,
    losses,
    optimizers,
    regularizers,
    resuming,
    schedules,
)
from . import metrics as merits
from . import parallel as parallels
from .averaging import EMA
from .checkpoint import Checkpoints
from .failures import DeviceLost as DeviceLost
from .failures import Diverged as Diverged
from .failures import Terminated as Terminated
from .feeding import Feed, Parts, Single
from .fitting import LOOK_EVERY, Callback, Fit
from .history import EarlyStopping, History
from .losses import Loss
from .network import MLP
from .notices import say_once
from .ops.interface import Array, Dropout, Recorder, Slot
from .optimizers import LBFGS, SGD, Optimizer
from .parallel import Parallel, ranks
from .parallel.ranks import Ranks
from .planning import Plan, plan_memory
from .precision import INITIAL_LOSS_SCALE
from .regularizers import ElasticNet
from .schedules import PlateauState, Schedule
from .streams import Stream
from .updating import Update
from .workspace import Lane, Workspace


class Trainer:
    """Trains ``net`` to lower J = L + λΩ.

    loss: a name or a `losses.Loss`; None takes the output activation's own (softmax: cross_entropy, identity: mse, …).
    optimizer: a name or an `optimizers.Optimizer`; regularizer: L1, L2 or ElasticNet.
    schedule: a name or a `schedules.Schedule`; None keeps the optimizer's learning rate.
    clip_norm: the gradient is scaled down to this global norm where it is longer.
    accumulate: a batch goes through the network in this many micro-batches, one after the other, for the same update
    with a fraction of the memory.
    apply_at_once: apply each layer's gradient as soon as it is ready and store none; only plain SGD can. None means
    whenever that is possible.
    graph: record the steps of each batch shape and replay them: on a GPU as a CUDA graph, on a CPU with Numba as a list
    of compiled jobs. None means where possible. The bits are those of a step that is not recorded.
    seed: of the shuffles; None takes the network's.
    average: keep a moving average of the weights, `EMA()`. Validation and `evaluate` then look at the averaged weights,
    and a `fit` leaves them in the network at its end, as Keras and Lightning do; so a model that is saved has them. The
    cost is of the weights that are trained. In a loop of one's own over `step`, see `averaged_weights`.

    parallel: whether the processes that mpiexec or srun started train together: True, or `Parallel` with options; None
    means where the program was started so with mpi4py, False never. Every rank is given the same batches and data, and
    works on its part of each; the update is that of one rank, up to the order of sums. The ranks have to make the same
    calls of `step`, `fit`, `save` and `restore`; the first one writes what there is to write.

    A trainer goes on where it stopped: a second `fit` continues moments, averages, step number and shuffles.
    """

    def __init__(
        self,
        net: MLP,
        loss: str | Loss | None = None,
        optimizer: str | Optimizer = "adam",
        regularizer: ElasticNet | None = None,
        schedule: str | Schedule | None = None,
        clip_norm: float | None = None,
        accumulate: int = 1,
        apply_at_once: bool | None = None,
        graph: bool | None = None,
        seed: int | None = None,
        average: EMA | None = None,
        parallel: Parallel | bool | None = None,
    ) -> None:
        if not isinstance(net, MLP):
            raise TypeError(f"net: expected an MLP, got {type(net).__name__}")
        self.net = net
        self.loss = losses.get(losses.DEFAULT_LOSS.get(net.output, "mse") if loss is None else loss)
        self.loss.check_output(net.output, net.sizes[-1])
        self.optimizer = optimizers.get(optimizer)
        self.regularizer = regularizers.check(regularizer)
        self.schedule = schedules.get(schedule)
        self.clip_norm = None if clip_norm is None else checks.real("clip_norm", clip_norm, 0, open_minimum=True)
        self.accumulate = checks.integer("accumulate", accumulate, 1)
        self._given_accumulate = self.accumulate  # it grows where memory is short
        self.average = averaging.check(average)
        self.parallel = parallels.check(parallel)
        self.ranks = ranks.join(None if parallel is None else parallel is not False)
        self.seed = net.seed if seed is None else checks.integer("seed", seed, 0, 2**64 - 1)
        at_once = self._can_apply_at_once(apply_at_once)
        self._may_store = apply_at_once is None
        self.graph = None if graph is None else checks.boolean("graph", graph)
        self.epoch = 0  # epochs begun, over all fits
        self.rounds = 0  # steps begun, over all fits
        self.plateau = PlateauState()
        self._works: list[Workspace] = []
        self._lanes_for: dict[int, list[Lane]] = {}  # by this rank's rows of a batch
        self._handed: Single | None = None
        self._recipe: tuple[Any, ...] = ()
        self._agreed = False  # whether the ranks have seen that they were started alike
        self._check_full_batch()
        self._allocate(at_once)

    # --- one update ---

    def step(self, x: Any, y: Any, sample_weight: Any = None) -> Any:
        """One update on one batch; the cost J before it, whose ``float()`` waits for the device.

        x: (batch, n_0); y and sample_weight as in `MLP.cost`. Raises ValueError or TypeError for bad input; the values
        of arrays that are on the GPU already are not looked at, which would mean waiting for it. Raises Diverged where
        the cost is not finite: at once on the CPU, on a GPU within 100 steps, and until then nothing is updated.
        """
        if isinstance(self.optimizer, LBFGS):
            raise ValueError("optimizer: L-BFGS works on the whole data set; use fit, not step")
        ops = self.net._ops
        whole, y, w, _ = self.net._check_batch(x, y, sample_weight, self.loss, look=False)
        self._agree()
        self.net._refresh()
        rows, own = len(whole), self.ranks.part(len(whole))
        x, y, w = whole[own], y[own], None if w is None else w[own]
        feed = self._single(x, y, w)
        with self._tuned(rows):
            feed.put(x, y, w)
            self._step(feed, rows, 0, self.schedule)
        if not ops.waits or self.rounds % LOOK_EVERY == 0:
            if ops.watches:
                divergence.refuse_input(self, whole)
            divergence.refuse_step(self, feed)
        if self.rounds % LOOK_EVERY == 0:  # until then the next cost tells
            divergence.refuse_weights(self.net)
        return ops.snapshot_state(self._state, Slot.COST)

    def _single(self, x: Array, y: Array, w: Array | None) -> Single:
        """The feed that `step` hands its batches to."""
        if self._handed is None or not self._handed.takes(x, y, w):
            self._recorder.clear()
            self._handed = Single(self.net._ops, x, y, w, self._recorder.replays)
        return self._handed

    def _step(self, feed: Feed, rows: int, cursor: int, schedule: Schedule) -> None:
        """One update on the minibatch that ``feed`` has ready: all of it is recorded but for a few numbers.

        rows: of the whole minibatch, of which ``feed`` has this rank's part.
        """
        self._forget_other_recipes()
        first = cursor + self.ranks.part(rows).start
        self.net._ops.begin_step(self._scheduled_rate(schedule), self.rounds, first, self._state)
        self._recorder.run((rows, feed.key), lambda: self._work_through(feed, rows), feed.moving)
        self.rounds += 1

    def _work_through(self, feed: Feed, rows: int) -> None:
        """The passes over every micro-batch of a minibatch, then the rule. Queues operations, and looks at none."""
        net, ops, state = self.net, self.net._ops, self._state
        own = self.ranks.part(rows)
        x, y, w = feed.fetch(own.stop - own.start, state)
        lanes = self._lanes(own.stop - own.start)
        if ops.watches and isinstance(feed, Single):  # what else feeds a step has been looked at
            ops.watch(x, state)
        self._begin_cost(y, w, rows)
        self._update.begin(lanes, own.stop - own.start)
        net._differentiate(x, y, w, self.loss, lanes, lambda first: self._dropout(own.start + first))
        self._update.sum_up()
        self._update.apply()
        self._average()
        ops.finish_step(rows, state)

    def _begin_cost(self, y: Array, w: Array | None, rows: int) -> None:
        """What a batch's L is divided by, and λΩ(θ) in its cost; of ``rows`` rows this rank has y and w of its own."""
        net = self.net
        self._begin_weight(y, w, rows)
        if self.regularizer is not None and self.ranks.first:  # it is in the sum of the ranks' costs once
            net._ops.penalty(net._theta, self._update.penalised, self.regularizer, self._state)

    def _begin_weight(self, y: Array, w: Array | None, rows: int) -> None:
        """What a batch's L is divided by."""
        ops, state, reduction = self.net._ops, self._state, self._update.reduction
        if reduction is None:
            ops.total_weight(self.loss, y, w, state)
        elif w is None and getattr(self.loss, "class_weight", None) is None:
            ops.write_state(state, {Slot.TOTAL_WEIGHT: rows})
        else:
            ops.total_weight(self.loss, y, w, state)
            reduction.exchange.sum_state(state, Slot.TOTAL_WEIGHT)

    def _average(self) -> None:
        """Move the average of the weights on."""
        if self.average is not None:
            self.net._ops.average(self.net._theta, self._averaged, self.average, self._state)

    @contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """Within it the network has its averaged weights: ``with trainer.averaged_weights(): net.save(path)``.

        Without averaging, and before the first update, nothing changes. What is assigned to the weights within it goes
        to the average.
        """
        model = self._model()
        if model is self.net._theta:
            yield
            return
        with self.net._holding(model):
            yield

    def _model(self) -> Array:
        """The weights that the model has: the averaged ones where there are any, else θ. Waits for the device."""
        averages = self._averaged is not None and self.net._ops.read_state(self._state, Slot.STEP)
        return self._averaged if averages else self.net._theta

    def _scheduled_rate(self, schedule: Schedule) -> float:
        """The learning rate of the step at hand."""
        return self.plateau_rate(schedule.at(self.optimizer.lr, self.rounds, max(0, self.epoch - 1)))

    def plateau_rate(self, rate: float) -> float:
        """``rate`` after the cuts that a plateau schedule has made."""
        plateau = schedules.plateau_of(self.schedule)
        return rate if plateau is None else self.plateau.reduce(plateau, rate)

    # --- one run ---

    def fit(
        self,
        data: Sequence[Any] | Stream,
        epochs: int = 20,
        batch_size: int = 128,
        validation: Sequence[Any] | Stream | float | None = None,
        progress: bool = True,
        shuffle: bool = True,
        callbacks: Sequence[Callback] = (),
        early_stopping: EarlyStopping | None = None,
        metrics: Sequence[str] | None = None,
        checkpoints: Checkpoints | str | os.PathLike[str] | None = None,
        resume: bool | str | os.PathLike[str] = False,
    ) -> History:
        """Train for ``epochs`` passes over the data and return what happened.

        data: (x, y) or (x, y, sample_weight). batch_size: rows of one update; the last of an epoch may have fewer.
        validation: the like of ``data``, or the fraction of the data to hold out (stratified where y are labels).
        callbacks: each is called as ``callback(trainer, row)`` after an epoch, and ends the run by returning True.
        metrics: names from accuracy, top_K_accuracy, rmse, r2, worked out on the validation part.
        checkpoints: `Checkpoints`, or their folder alone: what a run that is killed can be resumed from.
        resume: True goes on from the newest checkpoint in that folder, in the middle of an epoch if it is of one, to
        the very bits that the run would have reached; in an empty folder it begins anew. A path names a checkpoint, or
        a folder of them. The trainer, the data and the arguments have to be those of the run that is resumed; another
        device is taken with a warning, and more epochs where the schedule does not span the run. A callback that has a
        method ``rewind`` is told as ``rewind(step)`` how many steps were done.

        Ctrl-C ends the run after the step at hand, with a warning; a second one interrupts at once. With checkpoints
        SIGTERM ends it too, after a last one, and raises Terminated: a SystemExit of status 143. A cost that is not
        finite raises Diverged; the network then holds the weights from the end of the last good epoch. A GPU that fails
        raises DeviceLost; the network then holds those weights on the CPU. Where weights are averaged, these are the
        averaged ones, at every end.

        x, y and the weights may lie on the GPU (CuPy arrays, or anything with ``__cuda_array_interface__`` or DLPack):
        they are used where they are. From the host, a data set that fits the GPU's memory is copied there; a larger one
        streams through it, in the same order.

        A `Stream` is a data set on the disk, larger than memory: its rows are shuffled by chunks and within a buffer,
        and a fraction of it that is held out is held out by chunks (`Stream.split`). BrokenData where a file cannot be
        read on; the network then holds the weights from the end of the last whole epoch.
        """
        fit = Fit(
            self, data, epochs, batch_size, validation, shuffle, callbacks, early_stopping, metrics, checkpoints, resume
        )
        return fit.run(checks.boolean("progress", progress))

    def evaluate(
        self, x: Any, y: Any = None, sample_weight: Any = None, metrics: Sequence[str] | None = None
    ) -> dict[str, float]:
        """The loss L (without λΩ) and the metrics on data, as {"loss": …, "accuracy": …}; arguments as in `fit`.

        x may be a `Stream`, which has its own targets and weights: it is read piece by piece. Where there is an average
        of the weights, these are the figures of the averaged weights. Any rank may call it, and does all of it.
        """
        if isinstance(x, Stream):
            if y is not None or sample_weight is not None:
                raise ValueError("y, sample_weight: a stream has its own; give it alone")
            stream = evaluation.checked(self.net, self.loss, x)
            labels = stream.piece(0).y.ndim == 1  # type: ignore[union-attr]  # it has been checked
            names = merits.chosen(metrics, self.loss.name, self.net.sizes[-1], labels)
            return self._evaluate(stream, names, ranks.ALONE)
        x, y, w, _ = self.net._check_batch(x, y, sample_weight, self.loss)
        names = merits.chosen(metrics, self.loss.name, self.net.sizes[-1], y.ndim == 1)
        return self._evaluate((x, y, w), names, ranks.ALONE)

    def _evaluate(self, dataset: Parts | Stream, names: Sequence[str], among: Ranks) -> dict[str, float]:
        """L and the metrics of the model, averaged weights and all, on data that have been checked."""
        with self.averaged_weights():
            return evaluation.evaluate(self.net, self.loss, dataset, names, among)

    # --- files ---

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the weights and all else that further steps depend on to a safetensors file, whole or not at all.

        For a loop of one's own over `step`; `fit` writes its own. Raises Diverged where the weights are not finite.
        """
        if self._handed is not None:
            divergence.refuse_step(self, self._handed)
        divergence.refuse_weights(self.net)
        found = resuming.snapshot(self)
        self.ranks.on_first(lambda: checkpoint.write(path, found))
        return Path(path)

    def restore(self, path: str | os.PathLike[str]) -> None:
        """Go on from a file that `save` wrote, or from a checkpoint of a `fit`; later steps give the same bits.

        FileNotFoundError where there is no file, ValueError where it is damaged or of a trainer with another network,
        optimizer, … than this one; nothing is changed then.
        """
        found = self.ranks.on_first(lambda: checkpoint.read(path, lambda header: resuming.fits(self, header)))
        resuming.restore(self, cast(checkpoint.Snapshot, resuming.shared(self, found)))

    # --- inside ---

    def _can_apply_at_once(self, wanted: bool | None) -> bool:
        obstacles = {
            "the optimizer is not plain SGD": not (isinstance(self.optimizer, SGD) and self.optimizer.plain),
            "clip_norm needs the whole gradient first": self.clip_norm is not None,
            "accumulate needs a stored gradient": self.accumulate > 1,
            "ranks that train together sum the gradient up first": self.ranks is not ranks.ALONE,
            "float16's loss scaling needs the whole gradient first": self.net._precision.loss_scaled,
        }
        reasons = [reason for reason, stands in obstacles.items() if stands]
        if wanted and reasons:
            raise ValueError(f"apply_at_once: not possible: {'; '.join(reasons)}")
        return not reasons if wanted is None else wanted

    def _check_full_batch(self) -> None:
        """L-BFGS needs a deterministic J, and takes its own steps."""
        if not isinstance(self.optimizer, LBFGS):
            return
        given = {
            "dropout": any(self.net.dropout),
            "clip_norm": self.clip_norm is not None,
            "average": self.average is not None,
            "parallel.shard_optimizer": isinstance(self.parallel, Parallel) and self.parallel.shard_optimizer,
        }
        for argument, value in given.items():
            if value:
                raise ValueError(f"{argument}: L-BFGS minimises J itself, so it can have none")
        if not isinstance(self.schedule, schedules.Constant):
            raise ValueError("schedule: L-BFGS finds its step by line search, so it can have none")
        if self.net._precision.has_shadow:
            raise ValueError(f"precision: L-BFGS needs float64, float32 or tf32, not {self.net.precision!r}")

    def _allocate(self, at_once: bool) -> None:
        """The state, the gradient and the moments, and what records steps."""
        net, ops = self.net, self.net._ops
        self._state = net._new_state()
        if net._precision.loss_scaled:
            ops.write_state(self._state, {Slot.LOSS_SCALE: INITIAL_LOSS_SCALE})
        self._update = Update(self, at_once)
        master = net._precision.master_dtype
        self._averaged = None if self.average is None else ops.zeros(net.layout.size, master)
        self._recorder: Recorder = ops.recorder(self.graph)

    @property
    def apply_at_once(self) -> bool:
        """Whether each layer's gradient is applied as soon as it is there, and none is stored."""
        return self._update.at_once

    @property
    def moments(self) -> dict[str, Array]:
        """The optimizer's moments by name, each flat like θ, or this rank's slice of it."""
        return self._update.moments

    def _agree(self) -> None:
        """What `_share` does, before the first of the steps in a loop of one's own."""
        if not self._agreed:
            self._share(resuming.recipe(self))

    def _share(self, recipe: Mapping[str, Any]) -> None:
        """Give every rank the first one's weights; ValueError that names the differences where a ``recipe`` is another.

        Weights that were drawn or loaded alike are the same already, but for machines of several kinds.
        """
        self._agreed = True
        if self.ranks.size == 1:
            return
        first, *others = map(json.loads, self.ranks.texts(json.dumps(recipe)))
        for rank, other in enumerate(others, 1):
            if found := resuming.differences(first, other, "", ("is", "on rank 0 and", f"on rank {rank}")):
                raise ValueError(f"parallel: the ranks were not started alike: {'; '.join(found)}")
        net, ops = self.net, self.net._ops
        theta = np.array(ops.to_host(net._theta))
        self.ranks.broadcast(theta)
        ops.copy(theta, net._theta)
        if net._shadow is not None:
            ops.copy(net._theta, net._shadow)

    def _lanes(self, rows: int) -> list[Lane]:
        """What ``rows`` rows are worked through with; in more micro-batches if memory is short."""
        if rows not in self._lanes_for:
            self._lanes_for[rows] = self._make_lanes(rows)
        return self._lanes_for[rows]

    def _tuned(self, rows: int) -> AbstractContextManager[None]:
        """A context for steps on batches of ``rows`` rows, of which this rank has its part."""
        own = self.ranks.part(rows)
        lanes = self._lanes(own.stop - own.start)
        return self.net._ops.tuned_for(self.net._largest_gemm(lanes[0].work.rows), len(lanes))

    def _make_lanes(self, rows: int) -> list[Lane]:
        net, given = self.net, self.accumulate
        count, micro = self._cut(rows)
        while len(self._works) < count or self._works[0].rows < micro:
            self._forget_lanes()
            self._recorder.clear()
            works = [self._room_for(micro) for _ in range(count)]
            if None in works:
                self._cut_smaller(rows)
                count, micro = self._cut(rows)
            else:
                self._works = cast("list[Workspace]", works)
        if self.accumulate != given:
            say_once(
                f"a step of {rows} rows does not fit the device's memory; it is cut into {self.accumulate} "
                f"micro-batches, which give the same update ({self._plan(rows).summary()})"
            )
        if count > 1 and self.apply_at_once:
            self._update.allocate(at_once=False)  # several lanes need gradients that are added up
        update = self._update
        lanes = [Lane(self._works[0].first(micro), update.g, update.gb, update.sink, self._state)]
        for work in self._works[1:count]:
            g = net._ops.zeros(net.layout.size, net._precision.master_dtype)
            sink = net._store(net.layout.weights(g))
            lanes.append(Lane(work.first(micro), g, net.layout.biases(g), sink, net._new_state()))
        return lanes

    def _cut(self, rows: int) -> tuple[int, int]:
        """How many lanes a batch of ``rows`` rows is dealt out to, and the rows of a micro-batch."""
        micro = -(-max(1, rows) // self.accumulate)
        if self.apply_at_once and not self._may_store:
            return 1, micro
        return self.net._ops.lanes(micro, self.net.sizes)

    def _room_for(self, rows: int) -> Workspace | None:
        """The buffers of a micro-batch, or None where there is no memory for them."""
        net = self.net
        try:
            return Workspace(net._ops, net.sizes, net._f, net.fuses(self.loss), rows)
        except net._ops.out_of_memory:
            return None  # and with the error goes what had been allocated

    def _cut_smaller(self, rows: int) -> None:
        """Twice as many micro-batches; MemoryError where that is not possible."""
        plan = self._plan(rows)
        if self._cut(rows)[1] == 1 or (self.apply_at_once and not self._may_store):
            raise MemoryError(f"a step of {rows} rows does not fit the device's memory: {plan.summary()}") from None
        if self.apply_at_once:
            try:
                self._update.allocate(at_once=False)  # micro-batches need a gradient to add up in
            except self.net._ops.out_of_memory:
                raise MemoryError(f"the gradient does not fit the device's memory: {plan.summary()}") from None
        self.accumulate *= 2

    def _cut_as(self, accumulate: int, apply_at_once: bool) -> None:
        """Cut batches into so many micro-batches, as another trainer of the same recipe has come to do."""
        if apply_at_once != self.apply_at_once:
            self._update.allocate(apply_at_once)
        self.accumulate = accumulate
        self._forget_lanes()
        self._recorder.clear()

    def _forget_lanes(self) -> None:
        self._works = []
        self._lanes_for.clear()

    def plan(self, batch_size: int) -> Plan:
        """What a step on ``batch_size`` rows needs of each rank's device's memory, the data set apart."""
        return self._plan(self.ranks.most(checks.integer("batch_size", batch_size, 1)))

    def _plan(self, rows: int) -> Plan:
        """The plan of this rank's ``rows`` rows."""
        reduction = self._update.reduction
        sharded = reduction is not None and reduction.sharded
        return plan_memory(
            self.net.sizes,
            [f.name for f in self.net._f],
            self.net.precision,
            self.optimizer,
            max(1, rows),
            fused=self.net.fuses(self.loss),
            accumulate=self.accumulate,
            stores_gradient=not self.apply_at_once,
            layer_gradient=self.regularizer is not None and self.regularizer.l1 > 0,
            averaged=self.average is not None,
            sharers=self.ranks.size if sharded else 1,
        )

    def _forget_other_recipes(self) -> None:
        """Drop what was recorded when something that a recording has in it was exchanged, by a callback say."""
        recipe = (
            self.loss, self.optimizer, self.regularizer, self.clip_norm, self.accumulate, self.apply_at_once,
            self.average, self.net.dropout,
        )  # fmt: skip
        if any(new is not old for new, old in zip(recipe, self._recipe)):
            self._recorder.clear()
        self._recipe = recipe

    def _dropout(self, first_row: int) -> list[Dropout | None]:
        """The masks of every layer for the micro-batch that begins at ``first_row``; the output layer has none."""
        rates = (*self.net.dropout, 0.0)
        return [Dropout(rate, self.net.seed, l, first_row) if rate else None for l, rate in enumerate(rates)]
