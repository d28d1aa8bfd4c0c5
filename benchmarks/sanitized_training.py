"""A small training with everything in it, for compute-sanitizer to watch:

    compute-sanitizer --tool memcheck --error-exitcode 1 python benchmarks/sanitized_training.py

Every array gets an allocation of its own, not a piece of CuPy's pool, so that running off one is seen. It is small
because the tools slow it down a hundredfold.
"""

from __future__ import annotations

import sys
import warnings

import numpy as np
from rehearsal import rehearse

from gpu_mlp import MLP, SGD, Adam, AdamW, ElasticNet, Huber, Muon, Trainer

RUNS = (
    {
        "optimizer": Adam(amsgrad=True),
        "clip_norm": 0.5,
        "accumulate": 2,
        "regularizer": ElasticNet(1e-3, 1e-2, on="all"),
    },
    {"optimizer": SGD(0.05), "activation": "relu"},
    {"optimizer": SGD(0.05, momentum=0.9, nesterov=True), "activation": ["softmax", "tanh"], "dropout": 0.0},
    {"optimizer": AdamW(), "precision": "bfloat16", "streamed": True},
    {"optimizer": Adam(), "precision": "float16", "activation": "silu"},
    {"optimizer": Muon(), "precision": "tf32", "graph": False},
    {"optimizer": AdamW(), "precision": "float64", "output": "identity", "loss": Huber(0.5)},
)


def train(activation="gelu", output="softmax", dropout=0.25, precision="float32", loss=None, streamed=False, **options):
    """Two epochs of three minibatches, the last of them shorter, with sample weights and validation."""
    from gpu_mlp.ops.cuda_ops import CudaOperations

    rng = np.random.default_rng(0)
    x, weight = rng.normal(size=(37, 13)), rng.uniform(0.5, 1, 37)
    y = rng.integers(0, 5, 37) if output == "softmax" else rng.normal(size=(37, 5))
    net = MLP([13, 31, 16, 5], activation, output, dropout=dropout, precision=precision, device="cuda")
    trainer = Trainer(net, loss, **options)
    free = CudaOperations.free_bytes
    CudaOperations.free_bytes = (lambda self: 0) if streamed else free
    try:
        history = trainer.fit((x, y, weight), epochs=2, batch_size=16, validation=(x, y), progress=False)
    finally:
        CudaOperations.free_bytes = free
    cost, g = net.cost_and_gradients(x, y, trainer.loss)
    if not (np.isfinite(history["cost"]).all() and np.isfinite(cost) and np.isfinite(g.theta).all()):
        raise SystemExit(f"{precision}: a cost or a gradient is not finite")


def main() -> None:
    """Run them all; what is said about graphs that cannot be recorded is no matter here."""
    import cupy

    cupy.cuda.set_allocator(None)
    warnings.simplefilter("ignore", RuntimeWarning)
    for options in RUNS:
        train(**options)
    cupy.cuda.Device().synchronize()
    print(f"{len(RUNS)} runs done")


if __name__ == "__main__":
    if "--rehearse" in sys.argv:
        rehearse()
    main()
