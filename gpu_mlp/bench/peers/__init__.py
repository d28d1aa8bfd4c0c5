"""Everybody who takes part in a comparison, under one interface. Each imports its own library when it is made."""

from __future__ import annotations

from collections.abc import Sequence

from .contender import Contender, Unavailable
from .jax_peer import JAX
from .ours import Ours
from .sklearn_peer import ScikitLearn
from .torch_peers import TorchCompiled, TorchEager, TorchGraphs, TorchTuned

__all__ = ["CONTENDERS", "OURS", "PEERS", "Contender", "Unavailable", "named"]

OURS = Ours.name
PEERS: dict[str, type[Contender]] = {
    peer.name: peer for peer in (TorchEager, TorchCompiled, TorchTuned, TorchGraphs, JAX, ScikitLearn)
}
CONTENDERS: dict[str, type[Contender]] = {OURS: Ours, **PEERS}


def named(names: Sequence[str]) -> list[type[Contender]]:
    """The contenders with these names."""
    for name in names:
        if name not in CONTENDERS:
            raise ValueError(f"peers: expected any of {', '.join(PEERS)}, got {name!r}")
    return [CONTENDERS[name] for name in names]
