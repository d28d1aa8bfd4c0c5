"""From a gradient to new weights: where a step's gradient goes, its sum over ranks, and the optimizer's rule.

Leans on the operations for the rule and on `parallel.reduction` for the sums; works a `Trainer`, which is one room
above, and looks at its settings in every step, since a callback may exchange them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

from .ops.interface import Array, Layout, Slot
from .optimizers import LBFGS, SGD, Muon
from .parallel import Parallel
from .parallel.ranks import MPIRanks
from .parallel.reduction import Reduction
from .workspace import Lane, Sink

if TYPE_CHECKING:
    from .training import Trainer


class Update:
    """The gradient of a trainer's steps, and what the optimizer keeps from one step to the next.

    at_once: whether each layer's gradient is applied as soon as it is there, and none is stored but the biases'.
    g: the gradient, flat, of all of θ or of what is stored; gb: the views of it that are the biases'; sink: what takes
    a layer's gz and h in the backward pass; moments: the optimizer's, by name, each like g or this rank's slice of it;
    reduction: the sums over ranks, None where there is one alone; penalised: how many numbers, the first of θ, a
    penalty is on.
    """

    def __init__(self, trainer: Trainer, at_once: bool) -> None:
        net, ops = trainer.net, trainer.net._ops
        self._trainer, self._net = trainer, net
        self._W = net.layout.weights(net._theta)
        self._early: list[int] = []
        self.penalised = 0 if trainer.regularizer is None else net.layout.penalised(trainer.regularizer)
        self.allocate(at_once)
        kept = net.layout.size if self.reduction is None else self.reduction.size
        self.moments = {name: ops.zeros(kept, net._precision.master_dtype) for name in trainer.optimizer.moments}
        for name, moment in self.moments.items():
            moment[...] = trainer.optimizer.initial(name)

    def allocate(self, at_once: bool) -> None:
        """Make room for the whole gradient, or where it is applied ``at_once`` for the biases' alone."""
        net, ops = self._net, self._net._ops
        self.at_once = at_once
        first = net.layout.n_weights if at_once else 0
        self.g = ops.zeros(net.layout.size - first, net._precision.master_dtype)
        self.gb = net.layout.biases(self.g, first)
        if at_once:
            self.sink: Sink = self._descend
        else:
            self._stores, self.sink = net._store(net.layout.weights(self.g)), self._store
        self.reduction: Reduction | None = None
        ranks, options = self._trainer.ranks, self._trainer.parallel
        if isinstance(ranks, MPIRanks):
            options = options if isinstance(options, Parallel) else Parallel()
            self.reduction = Reduction(ops, ranks, net.layout, self.g, self._trainer.optimizer, options)
            self.sink = self.reduction.watched(self.sink)

    # --- a step ---

    def begin(self, lanes: Sequence[Lane], rows: int) -> None:
        """Before the backward pass of a batch of which this rank has ``rows`` rows."""
        self._early = self._early_layers(rows)
        if self.reduction is not None:
            self.reduction.begin(self._net._passes(lanes, rows))

    def sum_up(self) -> None:
        """After the backward pass: have the gradient and the cost of all ranks."""
        if self.reduction is not None:
            self.reduction.finish(self._trainer._state)

    def apply(self) -> None:
        """Hand the gradient to the optimizer: all of it, or what the backward pass has left."""
        if self.reduction is not None and self.reduction.sharded:
            self._apply_slices(self.reduction)
        elif self._early:
            self._net._ops.join()
            self._apply_rest()
        else:
            self._apply_stored()

    def _apply_stored(self) -> None:
        """Everything; or the biases alone, where the weights have had theirs."""
        net, trainer = self._net, self._trainer
        part = slice(net.layout.n_weights if self.at_once else 0, net.layout.size)
        if self._needs_norm:
            n = self._penalised_of(part)
            net._ops.gradient_norm(net._theta[part], self.g, n, trainer.regularizer, trainer._state)
        self._apply_part(part, self.g, list(self.moments.values()), net.layout)

    def _apply_part(self, part: slice, g: Array, moments: list[Array], layout: Layout) -> None:
        """Hand the gradient of a part of θ to the optimizer, with the moments of that part and its layout."""
        net, trainer = self._net, self._trainer
        net._ops.update(
            net._theta[part], g, moments, trainer.optimizer, layout, self._penalised_of(part), trainer.regularizer,
            trainer.clip_norm, None if net._shadow is None else net._shadow[part], trainer._state,
        )  # fmt: skip

    def _penalised_of(self, part: slice) -> int:
        """How many numbers of a part of θ, its first, a penalty is on."""
        return max(0, min(self.penalised, part.stop) - part.start)

    @property
    def _needs_norm(self) -> bool:
        return self._trainer.clip_norm is not None or self._net._precision.loss_scaled

    # --- layer by layer, within the backward pass ---

    def _early_layers(self, rows: int) -> list[int]:
        """The layers whose W is updated as soon as its gradient is there, under the products of the layers below.

        The bits are those of one update at the end: the rule sees one element at a time, and COST, which it looks at,
        stands before the backward pass. What needs the whole gradient first cannot be done so.
        """
        net, trainer = self._net, self._trainer
        whole = self.reduction is not None or self._needs_norm or isinstance(trainer.optimizer, (Muon, LBFGS))
        if whole or self.at_once or trainer.accumulate > 1:
            return []
        sizes = [span.stop - span.start for span in net.layout.spans]
        return [l for l, size in enumerate(sizes) if l and net._ops.hides_update(rows, size)]  # below 0 is nothing

    def _store(self, l: int, gz: Array, h: Array, accumulate: bool) -> None:
        """The sink that keeps gW, and applies it where the layer is to be updated early."""
        self._stores(l, gz, h, accumulate)
        if l in self._early:
            with self._net._ops.aside():
                self._apply_early(self._net.layout.spans[l])

    def _apply_rest(self) -> None:
        """Update what lies between the layers that have been updated early, and behind them."""
        start = 0
        for span in [*(self._net.layout.spans[l] for l in self._early), slice(self._net.layout.size, None)]:
            if span.start > start:
                self._apply_early(slice(start, span.start))
            start = span.stop

    def _apply_early(self, part: slice) -> None:
        """Update a part of θ before, or after, the others."""
        moments = [moment[part] for moment in self.moments.values()]
        self._apply_part(part, self.g[part], moments, self._net.layout)

    def _descend(self, l: int, gz: Array, h: Array, accumulate: bool) -> None:
        """The sink that applies a layer's gradient at once."""
        net, trainer = self._net, self._trainer
        shadow, rule = None if net._shadow is None else net._W[l], cast(SGD, trainer.optimizer)
        net._ops.descend(self._W[l], gz, h, rule, trainer.regularizer, shadow, trainer._state)

    # --- a rank's slices of θ ---

    def _apply_slices(self, reduction: Reduction) -> None:
        """Hand the optimizer what this rank has of the gradient, and send θ on to the other ranks."""
        net, ops, trainer, state = self._net, self._net._ops, self._trainer, self._trainer._state
        theta, shadow = net._theta, net._shadow
        if self._needs_norm:
            parts = [part for part, _ in reduction.mine]
            ops.gradient_norm(theta, self.g, self.penalised, trainer.regularizer, state, parts)
            reduction.exchange.sum_state(state, Slot.GRADIENT_NORM, squares=True)
        for part, kept in reduction.mine:
            moments = [moment[kept] for moment in self.moments.values()]
            self._apply_part(part, self.g[part], moments, net.layout.within(part))
        reduction.exchange.gather(theta)
        if shadow is not None and trainer.ranks.size > 1:
            ops.copy(theta, shadow)

    def whole_moment(self, moment: Array) -> Array:
        """A moment of all of θ; where ranks have slices of it the first one has it then, and the others nothing."""
        if self.reduction is None or not self.reduction.sharded:
            return moment
        return self.reduction.whole(self._net._ops, moment, self._net.layout.size)

    def take_moment(self, name: str, whole: Array) -> None:
        """A moment of this rank ← that of all of θ."""
        if self.reduction is None:
            self._net._ops.copy(whole, self.moments[name])
        else:
            self.reduction.take(self._net._ops, whole, self.moments[name])
