"""Sweeps: the same trials however often they are stopped, hopeless ones cut short, and a best one that trains again."""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

from gpu_mlp import cli
from gpu_mlp.options import TrainOptions, merged
from gpu_mlp.runs import Run

optuna = pytest.importorskip("optuna")

from gpu_mlp.sweeps import Sweep, read_space  # noqa: E402

SPACE = """
data = "points.csv"
target = "kind"
epochs = 4
plots = false
[search]
hidden = ["4", [8, 4]]
lr = { low = 1e-4, high = 1e-1, log = true }
batch-size = { low = 8, high = 32 }
standardize = [true, false]
"""


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    with open("points.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["a", "b", "kind"])
        for k in range(120):
            a, b = rng.normal(size=2) + 3 * (k % 2)
            writer.writerow([a, b, ("cat", "dog")[k % 2]])
    Path("space.toml").write_text(SPACE)


def sweep(out="s", trials=None, text=None, **options):
    """A sweep over the space in ``text``, and after so many trials."""
    if text is not None:
        Path("space.toml").write_text(text)
    made = Sweep(*read_space("space.toml"), out, say=lambda line: None, **options)
    if trials is not None:
        assert made.run(trials)
    return made


def told(made):
    return [(trial.params, trial.value, trial.state.name) for trial in made.finished]


# --- trials ----------------------------------------------------------------------------------------------------------


def test_trials_are_within_the_space_and_the_best_is_the_lowest():
    made = sweep(trials=6)
    assert len(made.finished) == 6
    for trial in made.finished:
        assert set(trial.params) == {"hidden", "lr", "batch_size", "standardize"}
        assert trial.params["hidden"] in ("4", "8,4")
        assert 1e-4 <= trial.params["lr"] <= 1e-1
        assert trial.params["batch_size"] in range(8, 33)
        assert type(trial.params["batch_size"]) is int
        assert trial.params["standardize"] in (True, False)
    values = [trial.value for trial in made.finished if trial.state.name == "COMPLETE"]
    assert made.best.value == min(values)
    assert len(set(values)) > 1


def test_best_toml_trains_the_best_trial_again_to_the_digit():
    made = sweep(trials=4)
    chosen = merged("s/best.toml", {"progress": False, "out": "run"})
    assert {name: getattr(chosen, name) for name in made.best.params} == made.best.params
    assert (chosen.data, chosen.epochs) == ("points.csv", 4)
    assert Run(chosen).start().history.last["validation_loss"] == made.best.value


def test_with_patience_the_figure_is_that_of_the_weights_that_are_kept():
    made = sweep(trials=2, text=SPACE.replace("epochs = 4", "epochs = 12\npatience = 2").replace("1e-1", "1"))
    result = Run(merged("s/best.toml", {"progress": False, "out": "run"})).start()
    assert result.history.restored_best
    assert made.best.value == result.history.best["validation_loss"]


def test_a_metric_that_is_to_be_large():
    text = SPACE.replace("[search]", '[search]\nloss = ["cross_entropy", "hinge"]')
    made = sweep(trials=5, text=text, metric="validation_accuracy")
    assert made.best.value == max(trial.value or 0 for trial in made.finished)


def test_hopeless_trials_are_pruned():
    text = 'data = "points.csv"\ntarget = "kind"\nepochs = 8\n[search]\nlr = [0.01, 0.009, 0.008, 1e-9]\n'
    made = sweep(trials=10, text=text)
    pruned = [trial for trial in made.finished if trial.state.name == "PRUNED"]
    assert 1e-9 in {trial.params["lr"] for trial in pruned}
    assert all(len(trial.intermediate_values) < 8 for trial in pruned)
    assert made.best.params["lr"] in (0.01, 0.009, 0.008)
    whole = sweep("whole", 8, prune=False)
    assert all(len(trial.intermediate_values) == 8 for trial in whole.finished)


def test_a_trial_that_diverges_is_the_worst_and_not_the_end():
    said = []
    text = 'data = "points.csv"\ntarget = "b"\nepochs = 3\noptimizer = "sgd"\n[search]\nlr = [0.01, 1e30]\n'
    Path("space.toml").write_text(text)
    made = Sweep(*read_space("space.toml"), "s", say=said.append)
    assert made.run(6)
    assert any("diverged" in line for line in said)
    assert made.best.params["lr"] == 0.01
    assert {t.params["lr"] for t in made.finished if t.state.name == "PRUNED"} == {1e30}


def test_options_that_do_not_go_together_are_told_and_passed_over():
    said = []
    text = SPACE.replace("[search]", '[search]\noptimizer = ["adamw", "sgd"]\nmomentum = [0.9]')
    Path("space.toml").write_text(text.replace("epochs = 4", 'epochs = 4\noptimizer = "sgd"'))
    made = Sweep(*read_space("space.toml"), "s", say=said.append)
    assert made.run(6)
    assert any("cannot be trained (momentum: optimizer 'adamw' has none)" in line for line in said)
    assert len(made.finished) == 6
    assert made.best.params["optimizer"] == "sgd"


def test_a_sweep_of_which_nothing_can_be_trained_says_why():
    text = SPACE.replace("[search]", '[search]\nactivation = ["relux"]')
    with pytest.raises(ValueError, match=r"no trial could be trained; the last: activation: unknown name 'relux'"):
        sweep(trials=3, text=text)


# --- stopped and gone on with ----------------------------------------------------------------------------------------


def test_a_sweep_in_pieces_has_the_trials_of_one_in_a_piece():
    whole = sweep("whole", 12)  # more than the ten that are drawn without a look at earlier ones
    for trials in (2, 11, 12):
        pieces = sweep("pieces", trials)
        assert told(pieces) == told(whole)[:trials]
    assert told(sweep("pieces", 3)) == told(whole), "fewer than there are: nothing is to do"


def interrupting(monkeypatch, trial, how):
    """``how()`` is called at the second epoch of the trial of this number."""
    count, fit = [0], Run.fit

    def stop(trainer, row):
        if row["epoch"] == 2:
            how()

    def counted(self, callbacks, progress):
        count[0] += 1
        return fit(self, [*callbacks, *([stop] if count[0] == trial else [])], progress)

    monkeypatch.setattr(Run, "fit", counted)


@pytest.mark.skipif(os.name != "posix", reason="Ctrl-C is sent as a signal")
def test_ctrl_c_keeps_what_was_learned_and_the_trial_is_tried_again(monkeypatch, capsys):
    whole = sweep("whole", 5)
    with monkeypatch.context() as patch:
        interrupting(patch, 3, lambda: os.kill(os.getpid(), signal.SIGINT))
        assert cli.run(["sweep", "--config", "space.toml", "--trials", "5", "--out", "s"]) == 130
    output = capsys.readouterr()
    best = min(value for _, value, _ in told(whole)[:2])
    assert f"best validation loss: {best:.4f}" in output.out
    assert "the best of 2 trials" in output.err
    assert merged("s/best.toml", {}).lr in [params["lr"] for params, _, _ in told(whole)[:2]]
    assert cli.run(["sweep", "--config", "space.toml", "--trials", "5", "--out", "s"]) == 0
    assert told(sweep("s")) == told(whole)


@pytest.mark.skipif(os.name != "posix", reason="a process is killed")
def test_a_killed_trial_is_failed_and_tried_again():
    whole = sweep("whole", 4)
    code = """
        import os, signal
        from gpu_mlp.runs import Run
        from gpu_mlp.sweeps import Sweep, read_space
        fits, fit = [], Run.fit
        def kill(trainer, row):
            if len(fits) == 2 and row["epoch"] == 2:
                os.kill(os.getpid(), signal.SIGKILL)
        def counted(self, callbacks, progress):
            fits.append(1)
            return fit(self, [*callbacks, kill], progress)
        Run.fit = counted
        Sweep(*read_space("space.toml"), "s").run(4)
    """
    assert subprocess.run([sys.executable, "-c", textwrap.dedent(code)], timeout=120).returncode == -9
    left = sweep("s")
    assert len(left.finished) == 1
    assert left.run(4)
    assert told(left) == told(whole)
    failed = [trial for trial in left._study.trials if trial.state.name == "FAIL"]
    assert [trial.params for trial in failed] == [told(whole)[1][0]]


def test_two_sweeps_do_not_work_in_one_folder():
    fcntl = pytest.importorskip("fcntl")
    made = sweep("s", 1)
    with open("s/.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match="out: another sweep is at work in s"):
            made.run(2)
    assert made.run(2)


@pytest.mark.parametrize(
    ("old", "new"),
    [("epochs = 4", "epochs = 5"), ("1e-4", "1e-5"), ('["4",', '["5",'), ("[search]", "[search]\nl2=[1]")],
)
def test_another_space_needs_another_folder(old, new):
    sweep(trials=1)
    with pytest.raises(ValueError, match="out: s has the trials of another search; choose another folder"):
        sweep(text=SPACE.replace(old, new))
    with pytest.raises(ValueError, match="out: s has the trials of another search"):
        sweep(text=SPACE, metric="validation_accuracy")
    assert len(sweep(text=SPACE).finished) == 1


def test_a_file_that_is_no_sweep_s_is_refused_and_left_alone():
    Path("s").mkdir()
    Path("s/trials.db").write_text("mine")
    with pytest.raises(ValueError, match=r"out: s/trials\.db cannot be used"):
        sweep()
    assert Path("s/trials.db").read_text() == "mine"


# --- a space that cannot be ------------------------------------------------------------------------------------------

WRONG = {
    "": "has no table",
    "[search]": "has no table",
    "search = 3": "has no table",
    "[search]\nlearning_rate = [1]": r"search\.learning_rate: unknown option",
    "[search]\nhiden = ['1']": r"search\.hiden: unknown option; did you mean 'hidden'",
    "epoch = 3\n[search]\nlr = [1]": "unknown option 'epoch'; did you mean 'epochs'",
    "[search]\nlr = 0.1": r"search\.lr: expected a list of choices or \{low",
    "[search]\nlr = []": r"search\.lr: expected a list of choices",
    "[search]\nlr = ['high']": r"search\.lr: expected a number, got 'high'",
    "[search]\nbatch_size = [1.5]": r"search\.batch_size: expected an integer",
    "[search]\nlr = {low = 0.1}": r"search\.lr: expected low, high and perhaps log, got low",
    "[search]\nlr = {low = 0.1, high = 1, step = 3}": r"search\.lr: expected low, high and perhaps log",
    "[search]\nlr = {low = 1, high = 0.1}": r"search\.lr: expected low < high, got 1 and 0.1",
    "[search]\nlr = {low = 0, high = 1, log = true}": r"search\.lr: expected low < high and low > 0",
    "[search]\nlr = {low = '0', high = 1}": r"search\.lr\.low: expected a number",
    "[search]\nlr = {low = 0.1, high = inf}": r"search\.lr\.high: expected a finite number",
    "[search]\nlr = {low = 0.1, high = 1, log = 1}": r"search\.lr\.log: expected True or False",
    "[search]\nbatch_size = {low = 1.5, high = 3}": r"search\.batch_size\.low: expected an integer",
    "[search]\nhidden = {low = 1, high = 3}": r"search\.hidden: only numbers have ranges",
    "[search]\nseed = [0, 1]": r"search\.seed: cannot be searched",
    "[search]\ndata = ['a.csv', 'b.csv']": r"search\.data: cannot be searched",
    "out = 'x'\n[search]\nlr = [1]": "out: belongs on the command line",
    "validation = 0\n[search]\nlr = [1]": "validation: a sweep needs a part",
    "[search": "is not valid TOML",
}


@pytest.mark.parametrize("text", WRONG)
def test_a_wrong_space_is_refused_before_anything_is_done(text):
    with pytest.raises((ValueError, TypeError), match=WRONG[text]):
        sweep(text=text)
    assert not Path("s").exists()


def test_what_shows_only_with_the_data_is_refused_before_anything_is_written():
    with pytest.raises(FileNotFoundError, match=r"nowhere\.csv"):
        sweep(text=SPACE.replace("points.csv", "nowhere.csv"))
    with pytest.raises(ValueError, match=r"search\.loss: changes what validation_loss means"):
        sweep(text=SPACE.replace("[search]", "[search]\nloss = ['nll']"))
    assert not Path("s").exists()
    with pytest.raises(ValueError, match="metric: unknown name 'validation_rmse'"):
        sweep(trials=1, text=SPACE, metric="validation_rmse")


def test_the_command_refuses_in_one_line(capsys):
    for arguments, expected in (
        (["--config", "nowhere.toml"], "config: no file at nowhere.toml"),
        ([], "Missing option '--config'"),
        (["--config", "space.toml", "--trials", "0"], "trials: expected an integer of at least 1, got 0"),
    ):
        assert cli.run(["sweep", *arguments, "--out", "s"]) == 2
        error = capsys.readouterr().err.strip()
        assert expected in error
        assert "\n" not in error


def test_without_optuna_it_is_said_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ValueError, match=r"sweep: needs Optuna; pip install 'gpu-mlp\[sweep\]'"):
        Sweep(TrainOptions(), {}, "s")
