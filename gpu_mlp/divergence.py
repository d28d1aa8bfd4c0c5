"""What is said when a number of a step is not finite: whether the input was to blame, or which layer came first.

Leans on the passes of `network`, which a minibatch goes through once more to find the layer; works a `Trainer`, which
is one room above.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from . import checks
from .failures import Diverged
from .feeding import Feed
from .network import MLP
from .ops.interface import Array, Slot
from .workspace import Workspace

if TYPE_CHECKING:
    from .training import Trainer

ADVICE = "a lower learning rate or clip_norm helps in most cases"


def refuse_input(trainer: Trainer, x: Array) -> None:
    """Raise ValueError if it was x, (batch, n_0), that made a step's cost not finite; it counts as none then."""
    ops = trainer.net._ops
    if ops.read_state(trainer._state, Slot.BAD_ROUND) and not ops.all_finite(x):
        ops.write_state(trainer._state, {Slot.BAD_ROUND: 0.0})
        trainer.rounds -= 1
        checks.finite("x", x)


def refuse_step(trainer: Trainer, feed: Feed) -> None:
    """Raise Diverged if a step's cost or gradient norm was not finite; nothing has been updated since then."""
    ops = trainer.net._ops
    bad = int(ops.read_state(trainer._state, Slot.BAD_ROUND))
    if not bad:
        return
    ops.write_state(trainer._state, {Slot.BAD_ROUND: 0.0})
    found = feed.again(trainer.rounds - bad)
    if found is None:
        what = "the cost or the gradient is not finite"
    else:
        where = find(trainer, feed, *found, bad - 1)
        where = next(filter(None, trainer.ranks.texts(where)), "")
        what = f"the {'cost' if where else 'gradient'} is not finite{where}"
    raise Diverged(f"step {bad}: {what}; the last good weights are kept ({ADVICE})")


def refuse_weights(net: MLP) -> None:
    """Raise Diverged if a gradient that nothing measured took weights out of the finite numbers."""
    if net._ops.all_finite(net._theta):
        return
    for l, parts in enumerate(zip(net.layout.weights(net._theta), net.layout.biases(net._theta))):
        if not all(map(net._ops.all_finite, parts)):
            raise Diverged(f"the weights of layer {l} are not finite ({ADVICE})")


def find(trainer: Trainer, feed: Feed, cursor: int, rows: int, round: int, work: Workspace | None = None) -> str:
    """Which layer's values leave the finite numbers first on a minibatch, worked through once more."""
    net, ops, state = trainer.net, trainer.net._ops, trainer._state
    own = trainer.ranks.part(rows)
    ops.begin_step(0.0, round, cursor + own.start, state)
    x, y, w = feed.fetch(own.stop - own.start, state)
    trainer._begin_cost(y, w, rows)
    rows = own.stop - own.start
    work = work or trainer._lanes(rows)[0].work
    for start in range(0, rows, work.rows):
        part = work.first(min(work.rows, rows - start))
        part.h[0] = net._input(x[start : start + part.rows])
        net._forward(part, net.fuses(trainer.loss), trainer._dropout(own.start + start), state)
        for l, h in enumerate(part.h[1:]):
            if not ops.all_finite(h):
                return f", first in layer {l}"
        chosen = slice(start, start + part.rows)
        net._add_loss(part, trainer.loss, y[chosen], None if w is None else w[chosen], state)
    return "" if math.isfinite(ops.read_state(state, Slot.COST)) else ", first in the loss"
