"""The average of the weights over the updates, which is often a better model than the last of them.

A leaf. The rule holds hyperparameters and no state: the average is a flat array of θ's size that the trainer owns.
"""

from __future__ import annotations

from dataclasses import dataclass

from . import checks


@dataclass(frozen=True)
class EMA:
    """Exponential moving average: θ̄ ← d θ̄ + (1 − d) θ after every update (after Polyak and Juditsky, 1992).

    The first update sets θ̄ = θ, as torch.optim.swa_utils.AveragedModel does, so that the initial weights have no share
    in it. With ``warmup`` the decay of update t is d = min(decay, t / (9 + t)), as in TensorFlow's
    ExponentialMovingAverage and Diffusers' EMAModel: early on, when θ moves fast, the average forgets faster, and a run
    shorter than 1 / (1 − decay) updates has one too. Without it, d = decay as in torch's get_ema_multi_avg_fn.
    """

    decay: float = 0.999
    warmup: bool = True

    def __post_init__(self) -> None:
        checks.real("decay", self.decay, 0, 1, open_maximum=True)
        checks.boolean("warmup", self.warmup)

    def decay_at(self, t: int) -> float:
        """d of update ``t``, counted from 1; 0 for the first."""
        if t <= 1:
            return 0.0
        return min(self.decay, t / (9 + t)) if self.warmup else self.decay


def check(average: EMA | None) -> EMA | None:
    """``average`` if it is a rule or None; a TypeError for anything else."""
    if average is not None and not isinstance(average, EMA):
        raise TypeError(f"average: expected an EMA or None, got {average!r} ({type(average).__name__})")
    return average
