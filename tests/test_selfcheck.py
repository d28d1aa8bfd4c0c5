"""The checks behind `gpu-mlp check`: all pass on a sound library, each fails on the fault it is there to find."""

from __future__ import annotations

import dataclasses
import sys

import numpy as np
import pytest

from gpu_mlp import selfcheck
from gpu_mlp.activations import ACTIVATIONS
from gpu_mlp.cli import run
from gpu_mlp.losses import LOSSES
from gpu_mlp.network import MLP
from gpu_mlp.precision import PRECISIONS


@pytest.fixture
def few(monkeypatch):
    """A handful of table rows, so that a run of all checks takes no time."""
    hidden = {name: ACTIVATIONS[name] for name in ("relu", "tanh", "softmax", "exp")}
    monkeypatch.setattr(selfcheck, "ACTIVATIONS", hidden)
    monkeypatch.setattr(selfcheck, "LOSSES", {name: LOSSES[name] for name in ("mae", "poisson", "cross_entropy")})
    monkeypatch.setattr(selfcheck, "PRECISIONS", ("float64", "float32", "float16"))


def _failures(device="cpu", seed=0):
    return [row.name for row in selfcheck.run_checks(device, seed) if not row.ok]


# --- all is well ----------------------------------------------------------------------------------------------------


def test_the_command_checks_every_row_of_every_table_and_passes(capsys):
    assert run(["check"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for name in ACTIVATIONS:
        assert any(line.startswith(f"ok    gradient, hidden {name}: max error ") for line in lines), name
    for name in LOSSES:
        assert any(line.startswith(f"ok    gradient, {name} behind ") for line in lines), name
    for name in PRECISIONS:
        assert any(line.startswith(f"ok    precision {name}: ") for line in lines), name
    assert any(line.startswith("ok    same seed, same bits: ") for line in lines)
    assert any(line.startswith("ok    save and load: ") for line in lines)
    assert lines[-1] == f"{len(lines) - 1} of {len(lines) - 1} checks passed"


@pytest.mark.usefixtures("few")
def test_another_seed_passes_too():
    assert _failures(seed=1) == []


def test_no_seed_gives_a_false_alarm_for_the_steepest_activation(monkeypatch):
    """exp of exp: where J gets large, its rounding alone is more than finite differences may be off by."""
    monkeypatch.setattr(selfcheck, "ACTIVATIONS", {name: ACTIVATIONS[name] for name in ("exp", "softmax")})
    monkeypatch.setattr(selfcheck, "LOSSES", {"cross_entropy": LOSSES["cross_entropy"]})
    monkeypatch.setattr(selfcheck, "PRECISIONS", ())
    assert {seed: _failures(seed=seed) for seed in range(10)} == {seed: [] for seed in range(10)}


@pytest.mark.usefixtures("few")
def test_a_precision_that_a_machine_lacks_is_said_to_be_missing_and_fails_nothing(monkeypatch):
    monkeypatch.setattr(selfcheck, "PRECISIONS", ("float32", "bfloat16"))
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)  # what Python itself uses for "not to be imported"
    rows = {row.name: row for row in selfcheck.run_checks("cpu", 0)}
    assert rows["precision bfloat16"].detail.startswith("not available (")
    assert "ml_dtypes" in rows["precision bfloat16"].detail
    assert all(row.ok for row in rows.values())


# --- each fault is found --------------------------------------------------------------------------------------------


def _scaled(function, factor):
    """A derivative that is off by a factor."""

    def wrong(g, s, t):
        function(g, s, t)
        np.multiply(g, factor, out=g)

    return wrong


@pytest.mark.usefixtures("few")
@pytest.mark.parametrize("name", ["relu", "tanh", "softmax"])
def test_a_wrong_derivative_fails_its_own_row_and_the_command(monkeypatch, capsys, name):
    monkeypatch.setenv("GPU_MLP_NUMBA", "0")  # a compiled pass does not read the table
    row = ACTIVATIONS[name]
    monkeypatch.setitem(ACTIVATIONS, name, dataclasses.replace(row, df=_scaled(row.df, 1.01)))
    assert run(["check"]) == 1
    lines = capsys.readouterr().out.splitlines()
    failed = [line for line in lines if line.startswith("FAIL")]
    assert any(line.startswith(f"FAIL  gradient, hidden {name}: ") for line in failed)
    passed = [line for line in lines if line.startswith("ok  ")]
    assert any("hidden exp" in line for line in passed)  # the others go on, and are right
    assert lines[-1] == f"{len(passed)} of {len(passed) + len(failed)} checks passed"


@pytest.mark.usefixtures("few")
@pytest.mark.parametrize("name", ["mae", "poisson"])
def test_a_wrong_gradient_of_a_loss_fails_its_row(monkeypatch, name):
    right = LOSSES[name].rows

    def wrong(self, y_hat, y, g, t):
        value = right(self, y_hat, y, g, t)
        np.multiply(g, 0.99, out=g)
        return value

    monkeypatch.setattr(LOSSES[name], "rows", wrong)
    assert [row.split(" behind")[0] for row in _failures()] == [f"gradient, {name}"]


@pytest.mark.usefixtures("few")
@pytest.mark.parametrize(("precision", "factor"), [("float32", 1 + 1e-4), ("float16", 1.1), ("float32", np.nan)])
def test_a_gradient_that_is_off_in_one_precision_fails_that_row(monkeypatch, precision, factor):
    right = MLP.cost_and_gradients

    def wrong(self, *arguments, **options):
        cost, g = right(self, *arguments, **options)
        if self.precision == precision:
            g.theta[...] *= factor
        return cost, g

    monkeypatch.setattr(MLP, "cost_and_gradients", wrong)
    assert _failures() == [f"precision {precision}"]


@pytest.mark.usefixtures("few")
def test_a_run_that_does_not_repeat_is_found(monkeypatch):
    calls = []
    right = selfcheck.Trainer.fit

    def restless(self, *arguments, **options):
        history = right(self, *arguments, **options)
        calls.append(None)
        self.net.weights[0][0, 0] += len(calls) * 1e-6
        return history

    monkeypatch.setattr(selfcheck.Trainer, "fit", restless)
    assert _failures() == ["same seed, same bits"]


@pytest.mark.usefixtures("few")
def test_a_file_that_loses_a_bit_is_found(monkeypatch):
    right = MLP.load

    def lossy(path, device="auto"):
        net = right(path, device)
        net.biases[-1][0] = 1e-30
        return net

    monkeypatch.setattr(MLP, "load", lossy)
    assert _failures() == ["save and load"]


# --- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--device", "cuda"], "device: "),
        (["--device", "gpu"], "did you mean 'cpu'?"),
        (["--seed", "-1"], "seed: "),
    ],
)
def test_a_bad_option_is_refused_before_any_check(capsys, arguments, said):
    assert run(["check", *arguments]) == 2
    found = capsys.readouterr()
    assert found.out == ""
    assert found.err.startswith("gpu-mlp: ")
    assert found.err.count("\n") == 1
    assert said in found.err
