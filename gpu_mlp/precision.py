"""The five precisions: which types store, multiply and accumulate, and how float16 gradients are scaled.

A leaf: imports NumPy alone (and ml_dtypes where bfloat16 is asked for).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from . import checks


@dataclass(frozen=True)
class Precision:
    """The types of one precision.

    ``storage`` holds h, gz and the copy of W that the GEMMs read; ``master`` holds θ, its gradient and the
    optimizer's moments, and is the type of every sum and norm. Sums of 16-bit values therefore run in float32.
    """

    name: str
    storage: str
    master: str
    loss_scaled: bool = False  # dynamic loss scaling: small float16 gradients would round to zero
    reduced_gemm: bool = False  # TF32: the GEMM may round its inputs to 10 mantissa bits

    @property
    def storage_dtype(self) -> np.dtype:
        """The dtype of activations and of the weights that the GEMMs read."""
        if self.storage == "bfloat16":
            return np.dtype(_bfloat16())
        return np.dtype(self.storage)

    @property
    def master_dtype(self) -> np.dtype:
        """The dtype of θ, the gradient and the moments."""
        return np.dtype(self.master)

    @property
    def has_shadow(self) -> bool:
        """Whether the GEMMs read a copy of θ in a smaller type."""
        return self.storage != self.master


PRECISIONS = {
    p.name: p
    for p in (
        Precision("float64", "float64", "float64"),
        Precision("float32", "float32", "float32"),
        Precision("tf32", "float32", "float32", reduced_gemm=True),
        Precision("bfloat16", "bfloat16", "float32"),
        Precision("float16", "float16", "float32", loss_scaled=True),
    )
}

# Dynamic loss scaling (Micikevicius et al., Mixed Precision Training, 2018; the constants are PyTorch's GradScaler's).
INITIAL_LOSS_SCALE = 65536.0
LOSS_SCALE_GROWTH = 2.0
LOSS_SCALE_BACKOFF = 0.5
LOSS_SCALE_INTERVAL = 2000
LOSS_SCALE_MINIMUM = 2.0**-14  # a gradient that does not fit even at this scale is not finite, whatever the scale


def get(name: str | Precision) -> Precision:
    """The precision called ``name``."""
    if isinstance(name, Precision):
        return name
    precision = PRECISIONS[checks.choice("precision", name, PRECISIONS)]
    precision.storage_dtype  # noqa: B018  (bfloat16 without ml_dtypes is refused here, before any work)
    return precision


def _bfloat16() -> type:
    try:
        import ml_dtypes
    except ImportError:
        raise ValueError(
            "precision: 'bfloat16' needs the package ml_dtypes, which is not installed: pip install ml_dtypes"
        ) from None
    return ml_dtypes.bfloat16
