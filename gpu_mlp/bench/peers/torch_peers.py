"""PyTorch: eager, compiled in two ways, and as a CUDA graph.

Each at its best: all processors, fused or compiled optimizers, gradients set to None, TF32 and autocast where the
precision asks for them, the batch on the device.
"""

from __future__ import annotations

import logging
import sys
from typing import Any

import numpy as np

from .. import machine
from ..tasks import Task, Weights
from .contender import PRECISIONS, Contender, Unavailable, library

ACTIVATIONS = {
    "identity": "Identity", "relu": "ReLU", "leaky_relu": "LeakyReLU", "elu": "ELU", "selu": "SELU", "celu": "CELU",
    "gelu": "GELU", "gelu_tanh": "GELU", "silu": "SiLU", "mish": "Mish", "tanh": "Tanh", "sigmoid": "Sigmoid",
    "softplus": "Softplus", "softsign": "Softsign", "hardtanh": "Hardtanh", "hardsigmoid": "Hardsigmoid",
    "hardswish": "Hardswish", "relu6": "ReLU6",
}  # fmt: skip
OPTIONS = {"gelu_tanh": {"approximate": "tanh"}}
OPTIMIZERS = {
    "sgd": "SGD", "momentum": "SGD", "adam": "Adam", "adamw": "AdamW", "nadam": "NAdam", "radam": "RAdam",
    "adamax": "Adamax", "adagrad": "Adagrad", "adadelta": "Adadelta", "rmsprop": "RMSprop",
}  # fmt: skip
FUSED = ("SGD", "Adam", "AdamW", "Adagrad")  # in one pass; the others have one an operation over all parameters


class TorchEager(Contender):
    """PyTorch without a compiler, with its fused optimizer."""

    name = "PyTorch eager"

    def __init__(self, task: Task) -> None:
        self.torch = torch = library("torch", "PyTorch")
        self.device = task.peers_device
        if self.device == "cuda" and not torch.cuda.is_available():
            raise Unavailable("this PyTorch finds no GPU")
        if task.activation not in ACTIVATIONS:
            raise Unavailable(f"no {task.activation} here")
        if task.optimizer not in OPTIMIZERS:
            raise Unavailable(f"no {task.optimizer} here")
        if task.precision not in PRECISIONS[task.device]:
            raise Unavailable(f"not compared in {task.precision} on {task.device}")
        torch.set_num_threads(machine.cores())
        torch.set_float32_matmul_precision("high" if task.precision == "tf32" else "highest")
        self.task = task
        self.model = self._model().to(self.device)
        self.optimizer = self._optimizer()
        self._compute_loss: Any = self._loss
        self._update: Any = self.optimizer.step

    def _model(self) -> Any:
        nn, modules = self.torch.nn, []
        for l, (W, b) in enumerate(self.task.weights()):
            linear = nn.utils.skip_init(nn.Linear, W.shape[1], W.shape[0])
            linear.weight.data, linear.bias.data = self.torch.from_numpy(W), self.torch.from_numpy(b)
            modules.append(linear)
            if l < len(self.task.layers) - 1:
                name = self.task.activation
                modules.append(getattr(nn, ACTIVATIONS[name])(**OPTIONS.get(name, {})))
        return nn.Sequential(*modules)

    def _optimizer(self, **how: Any) -> Any:
        rule, name = self.task.rule, OPTIMIZERS[self.task.optimizer]
        how = how or {"fused" if name in FUSED else "foreach": True}
        given = {key: getattr(rule, key) for key in ("lr", "momentum", "weight_decay") if hasattr(rule, key)}
        return getattr(self.torch.optim, name)(self.model.parameters(), **given, **how)

    def _loss(self, x: Any, y: Any) -> Any:
        with self.torch.autocast(self.device, self.torch.bfloat16, enabled=self.task.precision == "bfloat16"):
            return self.torch.nn.functional.cross_entropy(self.model(x), y)

    def put(self, x: Any, y: Any) -> tuple[Any, Any]:
        from_numpy = self.torch.from_numpy
        return from_numpy(np.ascontiguousarray(x)).to(self.device), from_numpy(y).to(self.device)

    def step(self, x: Any, y: Any) -> Any:
        self.optimizer.zero_grad(set_to_none=True)
        loss = self._compute_loss(x, y)
        loss.backward()
        self._update()
        return loss.detach()

    def wait(self) -> None:
        if self.device == "cuda":
            self.torch.cuda.synchronize()

    def parameters(self) -> Weights:
        self.wait()
        linears = [module for module in self.model if hasattr(module, "weight")]
        return [(self._host(linear.weight), self._host(linear.bias)) for linear in linears]

    @staticmethod
    def _host(parameter: Any) -> Any:
        return parameter.detach().cpu().numpy().copy()

    @classmethod
    def forget(cls) -> None:
        if "torch" in sys.modules:
            sys.modules["torch"]._dynamo.reset()

    def device_bytes(self) -> int | None:
        return self.torch.cuda.max_memory_allocated() if self.device == "cuda" else None


class TorchCompiled(TorchEager):
    """torch.compile of forward and backward pass, and of the optimizer's step."""

    name = "torch.compile"
    mode: str | None = None

    def __init__(self, task: Task) -> None:
        super().__init__(task)
        logging.getLogger("torch").setLevel(logging.ERROR)  # what it notes on the way is of no use here
        self._compute_loss = self.torch.compile(self._loss, mode=self.mode, dynamic=False)
        self.optimizer = self._optimizer(foreach=True)
        self._update = self.torch.compile(self.optimizer.step, mode=self.mode)


class TorchTuned(TorchCompiled):
    """torch.compile in the mode max-autotune: its GEMMs are chosen by trying; on a GPU in CUDA graphs."""

    name = "torch.compile max-autotune"
    mode = "max-autotune"


class TorchGraphs(TorchEager):
    """The whole eager step, captured once as a CUDA graph and replayed."""

    name = "PyTorch CUDA graphs"

    def __init__(self, task: Task) -> None:
        if task.device != "cuda":
            raise Unavailable("CUDA graphs are for GPUs")
        if task.optimizer not in ("sgd", "adam", "adamw"):
            raise Unavailable(f"not captured with {task.optimizer}")
        super().__init__(task)
        if not self.torch.cuda.is_available():
            raise Unavailable("this PyTorch finds no GPU")
        if task.optimizer == "sgd":
            return
        self.optimizer = self._optimizer(fused=True, capturable=True)
        self._update = self.optimizer.step

    _graph: Any = None

    def step(self, x: Any, y: Any) -> Any:
        if self._graph is None:
            self._capture(x, y)
        if x is not self._x:
            self._x.copy_(x), self._y.copy_(y)
        self._graph.replay()
        return self._captured_loss

    def number(self, loss: Any) -> float:
        self.wait()
        return float(loss)

    def _capture(self, x: Any, y: Any) -> None:
        """Warm up on copies of parameters and moments, as PyTorch's notes on CUDA graphs have it, then capture."""
        torch = self.torch
        before = [p.detach().clone() for p in self.model.parameters()]
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                super().step(x, y)
        torch.cuda.current_stream().wait_stream(side)
        with torch.no_grad():
            for p, saved in zip(self.model.parameters(), before):
                p.copy_(saved)
            for state in self.optimizer.state.values():
                for value in state.values():
                    value.zero_()
        self._x, self._y = x, y
        self._graph = torch.cuda.CUDAGraph()
        self.optimizer.zero_grad(set_to_none=True)
        with torch.cuda.graph(self._graph):
            self._captured_loss = super().step(x, y)
