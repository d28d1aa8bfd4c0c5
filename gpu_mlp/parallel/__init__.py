"""Training on many processes: one a GPU, or one a share of a machine's cores, each with its part of every batch.

What a user may choose is here. `ranks` knows the processes and speaks for small numbers on the host, `buckets` cuts the
gradient, `reduction` sends it over the ranks while lower layers are still in the backward pass; how numbers travel is
an implementation's own, `ops.mpi` or `ops.nccl`.
"""

from __future__ import annotations

from dataclasses import dataclass

from .. import checks

BUCKET_BYTES = 4 << 20  # of gradient that goes out at once; measured by benchmarks/parallel.py
WIRES = ("full", "bfloat16")


@dataclass(frozen=True)
class Parallel:
    """How ranks share a training, for ``Trainer(..., parallel=Parallel(...))``.

    shard_optimizer: each rank keeps the moments of its own slices of θ alone, updates those, and receives the rest
    (ZeRO stage 1). The same numbers; the moments' memory is divided by the number of ranks.
    wire: "full" sends gradients as they are, "bfloat16" rounded to half of float32's bytes or a quarter of float64's.
    bucket_bytes: gradients of neighbouring layers are sent together until they are so large.
    """

    shard_optimizer: bool = False
    wire: str = "full"
    bucket_bytes: int = BUCKET_BYTES

    def __post_init__(self) -> None:
        checks.boolean("shard_optimizer", self.shard_optimizer)
        checks.choice("wire", self.wire, WIRES)
        checks.integer("bucket_bytes", self.bucket_bytes, 1)


MODES = {"auto": None, "on": True, "off": False}


def named(mode: str, shard_optimizer: bool, wire: str) -> Parallel | bool | None:
    """What a trainer takes, from words: "auto" (where the program was started so), "on" or "off"."""
    checks.choice("parallel", mode, MODES)
    options = Parallel(shard_optimizer, wire)
    if mode == "off" and options != Parallel():
        raise ValueError("parallel: off, so that shard_optimizer and wire have no meaning; leave them out")
    return options if mode == "on" else MODES[mode] if options == Parallel() else options


def check(parallel: Parallel | bool | None) -> Parallel | bool | None:
    """``parallel`` as a trainer takes it: options, True, False, or None."""
    if parallel is None or isinstance(parallel, (bool, Parallel)):
        return parallel
    raise TypeError(f"parallel: expected Parallel, True, False or None, got {type(parallel).__name__}")
