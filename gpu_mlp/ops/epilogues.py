"""Which epilogues of cublasLt stand for a layer's activation and for its gradient, and what they leave for each other.

Three activations have one: identity (a bias alone), relu, and gelu in the tanh form. relu's gradient reads a mask of a
bit an entry, which the forward epilogue writes; gelu's reads z, which is kept anyway. A sum over the batch comes out
in the type of the result, so that float32 results alone may sum gb there; for 16-bit ones our kernel sums in float32,
with one more read of gz. A weight gradient's epilogue (BGRADB) could do that in float32 too. It is not used: behind a
kernel that applies f′ the sums are free, and behind an epilogue gb would have to wait for a product that plain SGD,
which applies gW at once, does not have.

Leans on `lt` for the epilogues' numbers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import cupy
import numpy as np

from ..activations import Activation
from . import lt

# Of f: alone, and keeping for the backward pass what its gradient reads.
FORWARD: dict[str, tuple[int, int | None]] = {
    "identity": (lt.BIAS, None),
    "relu": (lt.RELU_BIAS, lt.RELU_AUX_BIAS),
    "gelu_tanh": (lt.GELU_BIAS, lt.GELU_AUX_BIAS),
}
GRADIENT = {"relu": lt.DRELU, "gelu_tanh": lt.DGELU}
GRADIENT_AND_SUMS = {"relu": lt.DRELU_BGRAD, "gelu_tanh": lt.DGELU_BGRAD}


@dataclass
class Mask:
    """Where relu's z was above 0: a bit an entry, and whether the forward pass has written them this time."""

    bits: Any  # (rows, bytes of a row) uint8
    written: bool = False

    @classmethod
    def empty(cls, rows: int, n: int) -> Mask:
        """Room for (rows, n) entries; a row is padded to what cublasLt wants."""
        return cls(cupy.empty((rows, -(-n // lt.MASK_BITS) * lt.MASK_BITS // 8), np.uint8))

    def first(self, rows: int) -> Mask:
        """The same memory for fewer rows."""
        return Mask(self.bits[:rows])


def forward(f: Activation, z: Any, mask: Mask | None) -> tuple[int, Any] | None:
    """The epilogue of h = f(z), and the array that it keeps beside h; None where there is none."""
    if f.name not in FORWARD:
        return None
    alone, keeping = FORWARD[f.name]
    if f.name == "relu" and z is not None:  # nothing reads it, and no epilogue writes it
        return None
    kept = z if mask is None else mask.bits
    if kept is None:
        return alone, None
    return None if keeping is None else (keeping, kept)


def gradient(f: Activation, saved: Any, mask: Mask | None) -> Any:
    """What the gradient's epilogue of f reads; None where there is none, or nothing was left for it."""
    if f.name not in GRADIENT:
        return None
    if f.name == "relu":
        return mask.bits if mask is not None and mask.written else None
    return saved
