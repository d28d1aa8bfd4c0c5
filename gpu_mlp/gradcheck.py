"""Finite differences: checks every gradient of a network against its cost alone, entry by entry.

Leans on the network for J, and on the tables for where f′ and ∂L/∂ŷ jump: a difference across a kink says nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import checks, losses, regularizers
from .activations import IDENTITY
from .losses import MAE, Hinge, Loss
from .network import MLP
from .regularizers import ElasticNet

Sides = Callable[[], NDArray[Any]]


@dataclass(frozen=True)
class GradcheckRow:
    """What was found for one W, one b or the input.

    Of ``size`` entries ``checked`` were compared, and ``skipped`` were not since their interval holds a kink.
    ``max_gradient`` is the largest |gradient| of those compared (of an array of zeros a check proves little); an
    entry is right where |difference − gradient| ≤ atol + rtol · |difference|. ``ok`` says that all of them are, and
    that no more than half were skipped.
    """

    name: str
    size: int
    checked: int
    skipped: int
    max_gradient: float
    max_abs_error: float
    max_rel_error: float
    ok: bool


@dataclass(frozen=True)
class GradcheckReport:
    """The rows of a gradient check: every W, every b, then the input; ``str()`` of it is a table."""

    rows: tuple[GradcheckRow, ...]
    cost: float
    eps: float
    atol: float
    rtol: float

    @property
    def ok(self) -> bool:
        """Whether J is finite and every row is right."""
        return bool(np.isfinite(self.cost)) and all(row.ok for row in self.rows)

    @property
    def checked(self) -> int:
        """How many entries were compared."""
        return sum(row.checked for row in self.rows)

    @property
    def skipped(self) -> int:
        """How many entries were left out since they lie at a kink."""
        return sum(row.skipped for row in self.rows)

    def __str__(self) -> str:
        lines = [
            f"gradient check {'passed' if self.ok else 'FAILED'}: J = {self.cost:.6g}, "
            f"eps {self.eps:g}, atol {self.atol:g}, rtol {self.rtol:g}",
            f"{'':8}{'size':>9}{'checked':>9}{'at a kink':>11}{'max |g|':>11}{'max abs err':>13}{'max rel err':>13}",
        ]
        for row in self.rows:
            lines.append(
                f"{row.name:8}{row.size:9d}{row.checked:9d}{row.skipped:11d}{row.max_gradient:11.2e}"
                f"{row.max_abs_error:13.2e}{row.max_rel_error:13.2e}  {_verdict(row)}"
            )
        return "\n".join(lines)


def gradcheck(
    net: MLP,
    x: Any,
    y: Any,
    loss: str | Loss,
    regularizer: ElasticNet | None = None,
    sample_weight: Any = None,
    eps: float = 1e-6,
    atol: float = 1e-5,
    rtol: float = 1e-3,
    max_entries: int | None = None,
    seed: int = 0,
) -> GradcheckReport:
    """Compare ∂J/∂W, ∂J/∂b and ∂J/∂x with central differences, (J(θ + eps·e) − J(θ − eps·e)) / 2eps.

    net: at precision float64; its θ moves while the check runs and is put back exactly, whatever happens.
    x, y, loss, regularizer, sample_weight: as in `MLP.cost`.
    max_entries: compare so many entries of each array, drawn at random with ``seed``; None means all of them.

    An entry is skipped, and counted, where within ± eps of it some unit crosses a kink of its activation, of the loss
    (mae, hinge) or of an L1 penalty. Raises ValueError for another precision, and what `MLP.cost` raises.
    """
    net = _check_network(net)
    loss, regularizer = losses.get(loss), regularizers.check(regularizer)
    checks.real("eps", eps, 0, open_minimum=True)
    checks.real("atol", atol, 0)
    checks.real("rtol", rtol, 0)
    if max_entries is not None:
        checks.integer("max_entries", max_entries, 1)
    rng = np.random.default_rng(checks.integer("seed", seed, 0))
    x = np.array(checks.matrix("x", x, net.sizes[0]), np.float64, order="C")  # a copy: its entries are moved too

    with np.errstate(all="ignore"):  # what is not finite is reported, not warned of
        cost, g = net.cost_and_gradients(x, y, loss, regularizer, sample_weight)
        sides = _sides(net, x, loss.check_targets(np.asarray(y), net.sizes[-1]), loss)
        rows = []
        for name, array, gradient, near_l1 in _segments(net, x, g, regularizer, eps):
            flat, analytic = array.reshape(-1), np.asarray(net._ops.to_host(gradient)).reshape(-1)
            chosen = _choose(flat.size, max_entries, rng)
            numeric = [
                None if near_l1(float(flat[i])) else _difference(
                    lambda: net.cost(x, y, loss, regularizer, sample_weight), sides, flat, i, eps
                )
                for i in chosen
            ]  # fmt: skip
            rows.append(_row(name, flat.size, numeric, analytic[chosen], atol, rtol))
    return GradcheckReport(tuple(rows), cost, eps, atol, rtol)


def _check_network(net: Any) -> MLP:
    if not isinstance(net, MLP):
        raise TypeError(f"net: expected an MLP, got {type(net).__name__}")
    if net.precision != "float64":
        raise ValueError(
            f"net: finite differences need more digits than precision {net.precision!r} has; "
            "build or load the network with precision='float64'"
        )
    return net


def _segments(net: MLP, x: Any, g: Any, regularizer: ElasticNet | None, eps: float) -> list[tuple[Any, ...]]:
    """Name, array, gradient, and whether a value of that array lies at the kink of an L1 penalty, for every array."""
    l1 = regularizer is not None and regularizer.l1 > 0

    def near(value: float) -> bool:
        return abs(value) <= eps

    def never(value: float) -> bool:
        return False

    on_weights = near if l1 else never
    on_biases = near if l1 and regularizer is not None and regularizer.on == "all" else never
    return [
        *((f"W[{l}]", W, gW, on_weights) for l, (W, gW) in enumerate(zip(net.weights, g.weights))),
        *((f"b[{l}]", b, gb, on_biases) for l, (b, gb) in enumerate(zip(net.biases, g.biases))),
        ("input", x, g.input, never),
    ]


def _choose(size: int, max_entries: int | None, rng: np.random.Generator) -> NDArray[np.int64]:
    if max_entries is None or max_entries >= size:
        return np.arange(size)
    return np.sort(rng.choice(size, max_entries, replace=False))


def _difference(cost: Callable[[], float], sides: Sides, flat: Any, i: int, eps: float) -> float | None:
    """The central difference of J along entry ``i``, or None where a kink lies between."""
    value = float(flat[i])
    here = sides()
    ends: list[tuple[float, float]] = []
    try:
        for end in (value + eps, value - eps):
            flat[i] = end
            if not np.array_equal(sides(), here, equal_nan=True):
                return None
            ends.append((end, cost()))
    finally:
        flat[i] = value
    (above, high), (below, low) = ends
    width = above - below  # 2 eps, but for the rounding of value ± eps
    return (high - low) / width if width else float("nan")


def _sides(net: MLP, x: NDArray[np.float64], y: NDArray[Any], loss: Loss) -> Sides:
    """A function that says on which side of every kink the units stand for the x and θ of that moment.

    The signs of z − kink in every layer, and of what the loss takes the absolute value or the positive part of.
    """
    ops, smooth = net._ops, not any(f.kinks for f in net._f) and not isinstance(loss, (MAE, Hinge))
    buffers = [ops.empty((len(x), n), np.float64) for n in net.sizes[1:]]

    def sides() -> NDArray[Any]:
        found = [np.zeros(0)]
        if smooth:
            return found[0]
        h = ops.to_device(x, np.float64)
        for f, W, b, z in zip(net._f, net._W, net._b, buffers):
            ops.affine_activation(h, W, b, IDENTITY, z, None, None, net._state)
            found += [np.sign(ops.to_host(z) - kink).ravel() for kink in f.kinks]
            ops.activate(f, z, z)
            h = z
        y_hat = ops.to_host(h)
        if isinstance(loss, MAE):
            found.append(np.sign(y_hat - y).ravel())
        if isinstance(loss, Hinge):
            found.append(np.sign(1 - _signs(y, y_hat.shape[1]) * y_hat).ravel())
        return np.concatenate(found)

    return sides


def _signs(y: NDArray[Any], n: int) -> NDArray[Any]:
    """The −1 and +1 of hinge targets, (batch, n), from such rows or from labels."""
    return np.where(np.arange(n) == y[:, None], 1, -1) if y.ndim == 1 else y


def _row(
    name: str, size: int, numeric: list[float | None], analytic: NDArray[Any], atol: float, rtol: float
) -> GradcheckRow:
    pairs = [(d, a) for d, a in zip(numeric, analytic) if d is not None]
    d, a = np.array(pairs, np.float64).reshape(-1, 2).T
    error = np.abs(d - a)
    largest = np.maximum(np.abs(d), np.abs(a))
    right = np.isfinite(d) & np.isfinite(a) & (error <= atol + rtol * np.abs(d))
    skipped = len(numeric) - len(pairs)
    return GradcheckRow(
        name=name,
        size=size,
        checked=len(pairs),
        skipped=skipped,
        max_gradient=float(np.max(np.abs(a), initial=0)),
        max_abs_error=float(np.max(error, initial=0)),
        max_rel_error=float(np.max(np.where(largest == 0, 0, error / largest), initial=0)),
        ok=bool(right.all()) and 2 * skipped <= len(numeric),
    )


def _verdict(row: GradcheckRow) -> str:
    if row.ok:
        return "ok"
    return "FAILED: too many at a kink" if 2 * row.skipped > row.checked + row.skipped else "FAILED"
