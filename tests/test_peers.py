"""Every peer of the benchmarks computes what the reference computes; one that does not is never timed."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
import plans

from gpu_mlp.bench import peers, steps, tasks
from gpu_mlp.bench.peers import (
    OURS,
    Contender,
    Ours,
    ScikitLearn,
    TorchCompiled,
    TorchEager,
    TorchGraphs,
    Unavailable,
    jax_peer,
    torch_peers,
)
from gpu_mlp.bench.tasks import Task

TASK = Task((9, 12, 7, 4), 10, "relu", "adam")
INSTALLED = {"PyTorch eager": "torch", "JAX jit": "jax", "scikit-learn": "sklearn", OURS: "numpy"}


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
@pytest.mark.parametrize("activation", ["relu", "gelu", "tanh"])
@pytest.mark.parametrize("name", INSTALLED)
def test_first_updates_are_the_references(name, activation, optimizer):
    pytest.importorskip(INSTALLED[name])
    task = Task((9, 12, 7, 4), 10, activation, optimizer)
    if name == "scikit-learn" and (activation == "gelu" or optimizer == "adamw"):
        with pytest.raises(Unavailable, match=activation if activation == "gelu" else optimizer):
            ScikitLearn(task)
        return
    verdict = steps.check(task, peers.CONTENDERS[name](task), tasks.expected(task))
    assert verdict["right"], verdict["detail"]


@pytest.mark.parametrize("task", plans.variety("cpu", False), ids=lambda task: f"{task.activation}-{task.optimizer}")
@pytest.mark.parametrize("name", ["PyTorch eager", "JAX jit"])
def test_every_activation_and_optimizer_is_the_references_or_not_there(name, task):
    pytest.importorskip(INSTALLED[name])
    task = dataclasses.replace(task, sizes=TASK.sizes, batch=TASK.batch)
    peer = jax_peer if name == "JAX jit" else torch_peers
    rules, shapes = peer.OPTIMIZERS, peer.ACTIVATIONS
    if task.activation not in shapes or task.optimizer not in rules:
        assert task.activation in ("sine", "relu_squared") or task.optimizer not in ("sgd", "adam", "adamw")
        with pytest.raises(Unavailable, match=task.activation if task.activation not in shapes else task.optimizer):
            peers.CONTENDERS[name](task)
        return
    verdict = steps.check(task, peers.CONTENDERS[name](task), tasks.expected(task))
    assert verdict["right"], verdict["detail"]


@pytest.mark.parametrize("name", ["PyTorch eager", "JAX jit"])
@pytest.mark.parametrize("precision", ["tf32", "bfloat16"])
def test_the_precisions_of_a_gpu_are_rehearsed_on_the_cpu(name, precision):
    pytest.importorskip(INSTALLED[name])
    task = Task((9, 12, 7, 4), 10, "gelu", "adamw", precision, "cuda", rehearsal=True)
    verdict = steps.check(task, peers.CONTENDERS[name](task), tasks.expected(task))
    assert verdict["right"], verdict["detail"]


def test_peers_go_on_being_right_batch_after_batch():
    """Each new batch counts, not the one that came first."""
    x, y = TASK.data()
    ends = []
    for name, module in INSTALLED.items():
        with contextlib.suppress(ImportError):
            __import__(module)
            contender = peers.CONTENDERS[name](TASK)
            for k in range(4):
                contender.step(*contender.put(np.ascontiguousarray(x[::-1]) * (1 + k), y[::-1].copy()))
            ends.append(np.concatenate([W.ravel() for W, _ in contender.parameters()]))
    assert len(ends) >= 2, "scikit-learn is part of the test extra"
    for end in ends[1:]:
        assert np.linalg.norm(end - ends[0]) < 1e-3 * np.linalg.norm(ends[0])


def test_compiled_is_the_eager_step_compiled(monkeypatch):
    """With a compiler that hands the function back: what is compiled is the loss and the optimizer's step."""
    torch = pytest.importorskip("torch")
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda f, **how: compiled.append((f.__name__, how["mode"])) or f)
    for peer, mode in ((TorchCompiled, None), (peers.TorchTuned, "max-autotune")):
        compiled.clear()
        verdict = steps.check(TASK, peer(TASK), tasks.expected(TASK))
        assert verdict["right"], verdict["detail"]
        assert compiled == [("_loss", mode), ("step", mode)]


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_the_step_as_a_cuda_graph_on_a_stand_in(monkeypatch, optimizer):
    """A capture computes nothing, a replay does the whole step; and the three warm-up steps leave no trace."""
    torch = pytest.importorskip("torch")
    contender = None

    class Graph:
        replays = 0

        def replay(self):
            type(self).replays += 1
            loss = TorchEager.step(contender, contender._x, contender._y)
            contender._captured_loss.copy_(loss)

    @contextlib.contextmanager
    def capture(graph):
        kept = [p.detach().clone() for p in contender.model.parameters()]
        moments = {key: {k: v.clone() for k, v in state.items()} for key, state in contender.optimizer.state.items()}
        yield
        with torch.no_grad():
            for p, before in zip(contender.model.parameters(), kept):
                p.copy_(before)
            for key, state in moments.items():
                for name, value in state.items():
                    contender.optimizer.state[key][name].copy_(value)

    class Stream:
        def wait_stream(self, other):
            pass

    fake = {"Stream": Stream, "CUDAGraph": Graph, "graph": capture, "current_stream": Stream,
            "stream": lambda s: contextlib.nullcontext(), "is_available": lambda: True}  # fmt: skip
    for name, value in fake.items():
        monkeypatch.setattr(torch.cuda, name, value)
    task = Task((9, 12, 7, 4), 10, "gelu", optimizer, device="cuda", rehearsal=True)
    # an optimizer that can be captured insists on parameters that are on a GPU
    monkeypatch.setattr(TorchEager, "_optimizer", _without_capturable(TorchEager._optimizer))
    contender = TorchGraphs(task)
    verdict = steps.check(task, contender, tasks.expected(task))
    assert verdict["right"], verdict["detail"]
    assert Graph.replays == tasks.CHECK_STEPS
    with pytest.raises(Unavailable, match="for GPUs"):
        TorchGraphs(TASK)


def _without_capturable(function):
    return lambda self, **how: function(self, **{k: v for k, v in how.items() if k != "capturable"})


# --- who is not right is not timed -----------------------------------------------------------------------------------


class TooFast(Ours):
    """Claims to train and does less: its learning rate is off by a tenth."""

    name = "too fast"

    def __init__(self, task):
        super().__init__(Task(**{**task.__dict__, "lr": task.rule.lr * 1.1}))


class Lazy(Ours):
    """Trains nothing."""

    name = "lazy"

    def step(self, x, y):
        return self.net.cost(x, y, "cross_entropy")


class NotANumber(Ours):
    """Right in its parameters, but its loss is none."""

    name = "not a number"

    def number(self, loss):
        return float("nan")


class Broken(Ours):
    name = "broken"

    def step(self, x, y):
        raise RuntimeError("no such kernel")


class Missing(Contender):
    name = "missing"

    def __init__(self, task):
        raise Unavailable("it is not installed")

    put = step = parameters = None


@pytest.fixture
def crowd(monkeypatch):
    for peer in (TooFast, Lazy, NotANumber, Broken, Missing):
        monkeypatch.setitem(peers.CONTENDERS, peer.name, peer)


def test_no_ratio_to_a_peer_whose_result_is_wrong(crowd):
    names = (OURS, "too fast", "lazy", "not a number", "broken", "missing", "scikit-learn")
    record = steps.measure(TASK, names, seconds=0.0, rounds=(2, 2))
    assert set(record["wrong"]) == {"too fast", "lazy", "not a number"}
    assert set(record["failed"]) == {"broken"}
    assert "no such kernel" in record["failed"]["broken"]
    assert record["absent"] == {"missing": "it is not installed"}
    assert set(record["contenders"]) == set(record["over_floor"]) == {OURS, "scikit-learn"}
    assert set(record["over_ours"]) == {"scikit-learn"}
    assert not steps.faulty(record)


def test_nothing_is_compared_with_this_library_where_it_is_wrong(monkeypatch):
    monkeypatch.setitem(peers.CONTENDERS, OURS, Lazy)
    record = steps.measure(TASK, (OURS, "scikit-learn"), seconds=0.0, rounds=(1, 1))
    record["wrong"][OURS] = record["wrong"].pop("lazy")
    assert "over_ours" not in record
    assert steps.faulty(record)


def test_a_judge_sees_a_wrong_shape_and_a_missing_loss():
    reference = tasks.expected(TASK)
    assert tasks.judge(TASK, reference, reference.losses, reference.after)["right"]
    turned = [(W.T, b) for W, b in reference.after]
    assert not tasks.judge(TASK, reference, reference.losses, turned)["right"]
    assert not tasks.judge(TASK, reference, reference.losses[:2], reference.after)["right"]
    nan = [(W * np.nan, b) for W, b in reference.after]
    assert not tasks.judge(TASK, reference, reference.losses, nan)["right"]


def test_peers_are_named_in_errors():
    with pytest.raises(ValueError, match=r"peers: expected any of PyTorch eager, .*got 'keras'"):
        peers.named(["keras"])
