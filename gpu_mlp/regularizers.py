"""The penalties λΩ(θ): L1, L2 and their sum, on the weights or on all of θ (*Deep Learning*, section 7.1).

A leaf. Every penalty is the pair of numbers in l1·‖θ‖₁ + ½·l2·‖θ‖², so that the operations need to know no class.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from . import checks

Scope = Literal["weights", "all"]


@dataclass(frozen=True)
class ElasticNet:
    """λΩ(θ) = l1·‖θ‖₁ + l2·½‖θ‖², with the gradient l1·sign(θ) + l2·θ.

    ``on`` is "weights" (the W of every layer, the default: section 7.1 leaves biases alone) or "all" (biases too).
    """

    l1: float
    l2: float
    on: Scope = "weights"

    def __post_init__(self) -> None:
        object.__setattr__(self, "l1", checks.real("l1", self.l1, 0))
        object.__setattr__(self, "l2", checks.real("l2", self.l2, 0))
        checks.choice("on", self.on, ("weights", "all"))


class L2(ElasticNet):
    """λ·½‖θ‖²: weight decay, or ridge regression's penalty."""

    def __init__(self, lam: float, on: Scope = "weights") -> None:
        super().__init__(0.0, checks.real("lam", lam, 0), on)


class L1(ElasticNet):
    """λ·‖θ‖₁: favours weights that are exactly zero."""

    def __init__(self, lam: float, on: Scope = "weights") -> None:
        super().__init__(checks.real("lam", lam, 0), 0.0, on)


def check(regularizer: object) -> ElasticNet | None:
    """``regularizer`` if it is one (or None); otherwise a TypeError."""
    if regularizer is None or isinstance(regularizer, ElasticNet):
        return regularizer
    raise TypeError(f"regularizer: expected L1, L2, ElasticNet or None, got {type(regularizer).__name__}")
