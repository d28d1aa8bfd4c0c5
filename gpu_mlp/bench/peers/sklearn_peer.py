"""scikit-learn's MLPClassifier, one batch at a time."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np

from ..tasks import Task, Weights
from .contender import Contender, Unavailable, library

ACTIVATIONS = {"identity": "identity", "relu": "relu", "tanh": "tanh", "sigmoid": "logistic"}


class ScikitLearn(Contender):
    """`partial_fit` on the whole batch, which is one update; in float32, without a penalty."""

    name = "scikit-learn"

    def __init__(self, task: Task) -> None:
        module = library("sklearn.neural_network", "scikit-learn")
        if task.device != "cpu":
            raise Unavailable("scikit-learn computes on the CPU")
        if task.activation not in ACTIVATIONS:
            raise Unavailable(f"scikit-learn has no {task.activation}")
        if task.optimizer not in ("sgd", "adam") or task.precision != "float32":
            raise Unavailable(f"not compared with {task.optimizer} in {task.precision}")
        if task.sizes[-1] < 3:
            raise Unavailable("it has one output for two classes")
        self.task, self.classes = task, np.arange(task.sizes[-1])
        # Its Adam adds eps to a root that is not corrected by sqrt(1 - beta_2^t) yet; this is how the first agree.
        eps = {"epsilon": 1e-8 * (1 - 0.999) ** 0.5} if task.optimizer == "adam" else {}
        self.net = module.MLPClassifier(
            hidden_layer_sizes=task.sizes[1:-1], activation=ACTIVATIONS[task.activation], solver=task.optimizer,
            alpha=0.0, batch_size=task.batch, learning_rate="constant", learning_rate_init=task.rule.lr,
            momentum=0.0, nesterovs_momentum=False, shuffle=False, random_state=0, **eps,
        )  # fmt: skip
        self._fresh = True

    def put(self, x: Any, y: Any) -> tuple[Any, Any]:
        return x, y

    def step(self, x: Any, y: Any) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a batch of fewer rows than 200, say
            if self._fresh:
                self._begin(x, y)
            self.net.partial_fit(x, y)
        return self.net.loss_

    def _begin(self, x: Any, y: Any) -> None:
        """Let it set itself up, which takes an update, and put the task's weights and fresh moments in place."""
        self.net.partial_fit(x, y, classes=self.classes)
        for (W, b), coef, intercept in zip(self.task.weights(), self.net.coefs_, self.net.intercepts_):
            coef[...], intercept[...] = W.T, b
        optimizer = self.net._optimizer
        for moment in [
            *getattr(optimizer, "ms", []),
            *getattr(optimizer, "vs", []),
            *getattr(optimizer, "velocities", []),
        ]:
            moment[...] = 0
        optimizer.t = 0
        self._fresh = False

    def parameters(self) -> Weights:
        return [(W.T.copy(), b.copy()) for W, b in zip(self.net.coefs_, self.net.intercepts_)]
