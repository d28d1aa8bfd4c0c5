"""A float32 training step on the CPU against its bare GEMMs: what everything around the GEMMs costs.

    pytest benchmarks/bench_step.py

Prints the time of the step through pytest-benchmark, and from the same run its ratio to the bare GEMMs; fails where
that ratio is above 1.35.
"""

from __future__ import annotations

import numpy as np
import pytest
from timing import interleaved_ratio

from gpu_mlp import MLP, SGD, Adam, Trainer

SIZES, BATCH = (784, 1024, 1024, 10), 512
LIMIT = 1.35  # step over bare GEMMs
OPTIMIZERS = {"sgd": lambda: SGD(lr=1e-2), "adam": lambda: Adam(lr=1e-4)}


class BareGEMMs:
    """The GEMMs of one step and nothing else: three a layer, two in the first, into buffers of their own."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.h = [rng.normal(size=(BATCH, n)).astype(np.float32) for n in SIZES]
        self.W = [rng.normal(size=(n_out, n_in)).astype(np.float32) for n_in, n_out in zip(SIZES, SIZES[1:])]
        self.out = [np.empty_like(h) for h in self.h]
        self.gW = [np.empty_like(W) for W in self.W]

    def __call__(self) -> None:
        for l, W in enumerate(self.W):
            np.matmul(self.h[l], W.T, out=self.out[l + 1])
        for l in reversed(range(len(self.W))):
            if l:
                np.matmul(self.h[l + 1], self.W[l], out=self.out[l])
            np.matmul(self.h[l + 1].T, self.h[l], out=self.gW[l])


@pytest.mark.parametrize("rule", OPTIMIZERS)
def test_step_over_bare_gemms(benchmark, rule):
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(BATCH, SIZES[0])).astype(np.float32), rng.integers(0, SIZES[-1], BATCH)
    trainer = Trainer(MLP(SIZES, output="softmax"), "cross_entropy", OPTIMIZERS[rule]())

    def step():
        return trainer.step(x, y)

    figures = interleaved_ratio(step, BareGEMMs(rng))
    benchmark.extra_info.update({name: round(value, 5) for name, value in figures.items()})
    benchmark.pedantic(step, rounds=10, iterations=1, warmup_rounds=1)
    print(f"\n{rule}: step / bare GEMMs = {figures['ratio']:.3f} ({figures['floor'] * 1e3:.1f} ms of GEMMs)")
    assert figures["ratio"] <= LIMIT
