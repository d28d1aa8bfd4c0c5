"""JAX: the whole step under jit, its parameters and moments donated."""

from __future__ import annotations

import functools
import os
from typing import Any

import numpy as np

from ..tasks import Task, Weights
from .contender import PRECISIONS, Contender, Unavailable, library

_SAME = ("identity", "relu", "relu6", "leaky_relu", "elu", "selu", "celu", "gelu", "silu", "mish", "tanh", "sigmoid",
         "softplus")  # fmt: skip
ACTIVATIONS = {
    **dict(zip(_SAME, _SAME)),
    **{"gelu_tanh": "gelu", "softsign": "soft_sign", "hardtanh": "hard_tanh", "hardsigmoid": "hard_sigmoid"},
    "hardswish": "hard_swish",
}
OPTIONS = {"gelu": {"approximate": False}}
OPTIMIZERS = ("sgd", "adam", "adamw")  # JAX has none of its own; these are written out below


class JAX(Contender):
    """value_and_grad and the update in one compiled function, which writes over what it is given."""

    name = "JAX jit"

    def __init__(self, task: Task) -> None:
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # it would take most of a GPU for itself
        self.jax = jax = library("jax", "JAX")
        self.task = task
        self.device = self._device()
        if task.precision not in PRECISIONS[task.device]:
            raise Unavailable(f"not compared in {task.precision} on {task.device}")
        if task.optimizer not in OPTIMIZERS:
            raise Unavailable(f"no {task.optimizer} here")
        if task.activation not in ACTIVATIONS:
            raise Unavailable(f"no {task.activation} here")
        f = getattr(jax.nn, ACTIVATIONS[task.activation])
        self.f: Any = functools.partial(f, **OPTIONS.get(task.activation, {}))
        self.theta = jax.device_put([(jax.numpy.asarray(W), jax.numpy.asarray(b)) for W, b in task.weights()],
                                    self.device)  # fmt: skip
        zeros = jax.tree.map(jax.numpy.zeros_like, self.theta)
        self.moments: Any = () if task.optimizer == "sgd" else (zeros, jax.tree.map(jax.numpy.zeros_like, zeros))
        self.count = jax.device_put(jax.numpy.float32(0), self.device)
        self._jitted = jax.jit(self._step, donate_argnums=(0, 1, 2))

    def _device(self) -> Any:
        try:
            return self.jax.devices("gpu" if self.task.peers_device == "cuda" else "cpu")[0]
        except RuntimeError:
            raise Unavailable("this JAX finds no GPU") from None

    def _loss(self, theta: Any, x: Any, y: Any) -> Any:
        jnp, low = self.jax.numpy, self.task.precision == "bfloat16"
        precision = {"float32": "highest", "tf32": "tensorfloat32"}.get(self.task.precision, "default")
        with self.jax.default_matmul_precision(precision):
            h = x.astype(jnp.bfloat16) if low else x
            for l, (W, b) in enumerate(theta):
                W, b = (W.astype(h.dtype), b.astype(h.dtype)) if low else (W, b)
                z = h @ W.T + b
                h = self.f(z) if l < len(theta) - 1 else z
            log_p = self.jax.nn.log_softmax(h.astype(jnp.float32))
            return -jnp.take_along_axis(log_p, y[:, None], 1).mean()

    def _step(self, theta: Any, moments: Any, count: Any, x: Any, y: Any) -> Any:
        loss, g = self.jax.value_and_grad(self._loss)(theta, x, y)
        theta, moments = self._update(theta, moments, count + 1, g)
        return theta, moments, count + 1, loss

    def _update(self, theta: Any, moments: Any, t: Any, g: Any) -> Any:
        jnp, tree, rule = self.jax.numpy, self.jax.tree, self.task.rule
        if self.task.optimizer == "sgd":
            return tree.map(lambda p, d: p - rule.lr * d, theta, g), moments
        beta1, beta2 = rule.betas  # type: ignore[attr-defined]
        decay = rule.weight_decay if self.task.optimizer == "adamw" else 0.0  # type: ignore[attr-defined]
        m = tree.map(lambda m, d: beta1 * m + (1 - beta1) * d, moments[0], g)
        v = tree.map(lambda v, d: beta2 * v + (1 - beta2) * d * d, moments[1], g)
        rate, scale = rule.lr / (1 - beta1**t), jnp.sqrt(1 - beta2**t)
        eps = rule.eps  # type: ignore[attr-defined]

        def rule_of(p: Any, m: Any, v: Any) -> Any:
            return p * (1 - rule.lr * decay) - rate * m / (jnp.sqrt(v) / scale + eps)

        return tree.map(rule_of, theta, m, v), (m, v)

    def put(self, x: Any, y: Any) -> tuple[Any, Any]:
        return self.jax.device_put(x, self.device), self.jax.device_put(y.astype(np.int32), self.device)

    def step(self, x: Any, y: Any) -> Any:
        self.theta, self.moments, self.count, loss = self._jitted(self.theta, self.moments, self.count, x, y)
        return loss

    def wait(self) -> None:
        self.jax.block_until_ready(self.theta)

    def parameters(self) -> Weights:
        return [(np.array(W), np.array(b)) for W, b in self.theta]

    def device_bytes(self) -> int | None:
        if self.task.peers_device != "cuda":
            return None
        return int((self.device.memory_stats() or {}).get("peak_bytes_in_use", 0)) or None
