"""This library as a contender."""

from __future__ import annotations

from typing import Any

from ... import Trainer
from ..tasks import Task, Weights
from .contender import Contender


class Ours(Contender):
    """`Trainer.step`; on a GPU as a CUDA graph where cuBLAS can be captured."""

    name = "gpu_mlp"

    def __init__(self, task: Task) -> None:
        self.net = task.network()
        self.ops = self.net._ops
        self.trainer = Trainer(self.net, "cross_entropy", task.rule)

    def put(self, x: Any, y: Any) -> tuple[Any, Any]:
        return self.ops.to_device(x), self.ops.to_device(y)

    def step(self, x: Any, y: Any) -> Any:
        return self.trainer.step(x, y)

    def wait(self) -> None:
        if self.net.device == "cuda":
            from .. import device

            device.wait()

    def parameters(self) -> Weights:
        host = self.ops.to_host
        return [(host(W).copy(), host(b).copy()) for W, b in zip(self.net.weights, self.net.biases)]

    def device_bytes(self) -> int | None:
        if self.net.device != "cuda":
            return None
        from .. import device

        return device.taken_bytes()
