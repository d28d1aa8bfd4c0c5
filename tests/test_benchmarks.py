"""The benchmark suite: rehearsed whole, on the CPU and on a stand-in for a GPU; its records, tables and arithmetic."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
import time
from argparse import Namespace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from cuda_on_cpu.fixtures import require_compiler

from gpu_mlp import cli
from gpu_mlp.bench import accuracy, floor, machine, quick, records, timing
from gpu_mlp.bench.peers import OURS
from gpu_mlp.bench.records import Records
from gpu_mlp.bench.tasks import Task

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
import breakdown
import plans
import report
import run as suite
import scaling
import tables

SCRIPT = [sys.executable, suite.__file__]
CUDA_PARTS, CPU_PARTS = (set(suite.PARTS[device]) for device in ("cuda", "cpu"))
KERNELS = ("bias_activation", "activation_gradient", "bias_softmax", "softmax_gradient", "softmax_cross_entropy",
           "pointwise_loss", "gather", "update SGD", "update Adam", "update AdamW", "average", "gradient_norm",
           "penalty")  # fmt: skip
TIMES = ("seconds", "wall", "bytes_per_second", "contenders", "over_ours", "over_floor", "floor", "share_of_copy")


# --- rehearsals ------------------------------------------------------------------------------------------------------


def rehearsed(folder, device, *options):
    command = [*SCRIPT, "--rehearse", "--device", device, "--out", str(folder), *options]
    result = subprocess.run(command, capture_output=True, text=True)
    logs = "".join(log.read_text() for log in (folder / "logs").glob("*.log"))
    assert result.returncode == 0, result.stdout + result.stderr + logs + (folder / "results.jsonl").read_text()
    found = records.read(folder)
    assert all(record["rehearsal"] for record in found)
    assert not any(record.get(key) for record in found for key in ("error", *TIMES))
    return found


def test_a_rehearsal_on_the_cpu_runs_every_part_and_claims_no_timing(tmp_path):
    parts = CPU_PARTS - {"estimators"}
    found = rehearsed(tmp_path, "cpu", "--peers", "none", "--parts", ",".join(parts))
    assert {r["part"] for r in found} == {*parts, "parts", "run"}
    header = found[0]
    assert header["commit"] or header["code"].startswith("gpu-mlp")
    assert header["versions"]["numpy"] == np.__version__
    assert header["blas"]
    assert header["processors"] == machine.cores()
    assert header["command"].startswith("benchmarks/run.py --rehearse")
    assert {r["axis"] for r in found if r["part"] == "scaling"} == {"width", "depth", "batch"}
    again = subprocess.run([sys.executable, report.__file__, str(tmp_path)], capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert "A rehearsal" in again.stdout
    assert "| steps | done |" in again.stdout


def test_a_rehearsal_of_a_gpu_runs_every_part_and_claims_no_timing(tmp_path):
    require_compiler()
    found = rehearsed(tmp_path, "cuda", "--peers", "none")
    assert {r["part"] for r in found} == {*CUDA_PARTS, "parts", "run"}
    timed = [r["kernel"] for r in found if r["part"] == "kernels"]
    assert all(any(name.startswith(kernel) for name in timed) for kernel in KERNELS)
    told = next(r for r in found if r["part"] == "tests")
    assert " passed" in told["last_line"]
    assert not told["failed"]
    page = tables.summary(tables.Results(found))
    assert "A rehearsal" in page
    assert "| steps | done |" in page


def test_a_rehearsal_with_a_peer(tmp_path):
    found = rehearsed(tmp_path, "cpu", "--peers", "scikit-learn", "--parts", "overhead,memory")
    assert {r["part"] for r in found} == {"run", "parts", "overhead", "memory"}
    assert not any(r.get(key) for r in found for key in ("wrong", "failed", "absent"))


def test_the_two_minute_cut_in_a_rehearsal(tmp_path):
    found = quick.run("cpu", 100, "scikit-learn", tmp_path, lambda line: None, rehearsal=True)
    assert [r["part"] for r in found] == ["steps", "steps", "accuracy"]
    assert found == records.current(records.read(tmp_path))


# --- what goes wrong -------------------------------------------------------------------------------------------------


def arguments(folder, **changes):
    (folder / "logs").mkdir(exist_ok=True)
    given = {"out": folder, "logs": folder / "logs", "rehearse": False, "commit": None, "device": "cuda",
             "again": False, "run": 0, "peers": "none", "command": "test"}  # fmt: skip
    return Namespace(**(given | changes))


# Whether there is a GPU is not asked here: that would import CuPy, and its stand-in could not take its place any more.
without_cupy = pytest.mark.skipif(find_spec("cupy") is not None, reason="CuPy is there, and maybe a GPU to be tried")


@without_cupy
def test_what_fails_is_recorded_and_the_next_part_runs(tmp_path):
    records.begin(tmp_path, False, {"code": "x", "device": "y"})
    assert not suite.run_part("kernels", arguments(tmp_path), 60)
    assert not suite.run_part("overhead", arguments(tmp_path), 60)
    found = records.read(tmp_path)[1:]
    assert [r["part"] for r in found] == ["kernels", "parts", "overhead", "overhead", "parts"]
    assert [r["status"] for r in found if r["part"] == "parts"] == [1, 1]
    assert "CuPy is not installed" in found[0]["error"]
    assert all("CuPy is not installed" in record["failed"][OURS] for record in found[2:4])
    assert found[0]["error"].strip() in tables.summary(tables.Results(records.read(tmp_path)))


@without_cupy
def test_without_a_gpu_nothing_is_claimed(tmp_path):
    command = [*SCRIPT, "--device", "cuda", "--out", str(tmp_path / "none")]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 1
    assert "there is no GPU to measure" in result.stderr
    assert not (tmp_path / "none").exists()


def test_a_part_whose_time_is_up_is_ended_and_its_records_stay(tmp_path):
    started = time.monotonic()
    records.begin(tmp_path, True, {"code": "x", "device": "y"})
    assert not suite.run_part("steps", arguments(tmp_path, rehearse=True, device="cpu"), 0.2)
    assert time.monotonic() - started < 10
    assert records.read(tmp_path)[-1]["status"] == "out of time"
    assert "| steps | out of time |" in tables.summary(tables.Results(records.read(tmp_path)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--parts", "steps,sleep"], "--parts: sleep: not among those of this device, kernels"),
        (["--parts", "sanitizer"], "--parts: sanitizer: not among those of this device"),
        (["--peers", "keras"], "--peers: keras: not among PyTorch eager"),
    ],
)
def test_options_that_mean_nothing(options, message, capsys):
    with pytest.raises(SystemExit):
        suite.parse(["--device", "cpu", *options])
    assert message in capsys.readouterr().err


def test_what_counts_as_wrong():
    assert suite.wrong({"error": "…"})
    assert suite.wrong({"wrong": {OURS: "off"}})
    assert suite.wrong({"failed": {OURS: "off"}})
    assert suite.wrong({"clean": None, "status": 0})
    assert not suite.wrong({"wrong": {"JAX jit": "off"}, "failed": {}, "absent": {"scikit-learn": "not installed"}})


# --- records ---------------------------------------------------------------------------------------------------------


def test_a_run_goes_on_where_the_last_one_of_the_same_code_stopped(tmp_path):
    header = {"code": "a", "clean": True, "device": "d"}
    first = Records(tmp_path, "steps", records.begin(tmp_path, False, header))
    first.add("one", value=1)
    first.add("two", error="it broke")
    first.add("three", cut="no time")
    second = Records(tmp_path, "steps", records.begin(tmp_path, False, header))
    assert [second.done(name) for name in ("one", "two", "three", "four")] == [True, False, False, False]
    assert not Records(tmp_path, "steps", 1, again=True).done("one")
    other = Records(tmp_path, "steps", records.begin(tmp_path, False, header | {"code": "b"}))
    assert not other.done("one")


def test_records_of_other_code_or_of_a_rehearsal_are_not_put_together(tmp_path):
    header = {"code": "a", "clean": True, "device": "d"}
    for rehearsal, told in ((False, header), (False, header | {"code": "b"}), (True, header), (False, header)):
        number = records.begin(tmp_path, rehearsal, told)
        Records(tmp_path, "steps", number, rehearsal).add(f"of {number}", value=number)
    assert [r["name"] for r in records.current(records.read(tmp_path))] == ["of 0", "of 3"]


def test_a_failure_does_not_take_the_place_of_a_measurement(tmp_path):
    kept = Records(tmp_path, "steps", records.begin(tmp_path, False, {"code": "a"}))
    for figures in ({"value": 1}, {"error": "it broke"}, {"cut": "no time"}):
        kept.add("one", **figures)
    assert [r["value"] for r in records.current(records.read(tmp_path))] == [1]
    kept.add("one", value=2)
    assert [r["value"] for r in records.current(records.read(tmp_path))] == [2]


def test_a_line_that_was_cut_off_costs_itself_alone(tmp_path):
    kept = Records(tmp_path, "steps", records.begin(tmp_path, False, {"code": "a"}))
    with open(tmp_path / records.FILE, "a") as file:
        file.write('{"part": "steps", "na')
    kept.add("one", value=1)
    assert [r.get("value") for r in records.read(tmp_path)] == [None, 1]


def test_a_figure_that_is_no_number_is_not_written(tmp_path):
    kept = Records(tmp_path, "steps", records.begin(tmp_path, False, {"code": "a"}))
    with pytest.raises(ValueError, match="JSON"):
        kept.add("one", value=float("nan"))
    assert len(records.read(tmp_path)) == 1


# --- arithmetic ------------------------------------------------------------------------------------------------------


def test_ratios_are_taken_within_a_round():
    told = timing.ratios([1.0, 20.0, 3.0], [1.0, 10.0, 1.0])
    assert (told["median"], told["samples"]) == (2.0, 3)
    assert timing.spread([3.0, 1.0, 2.0])["q90"] == 3.0


def test_the_floor_takes_the_best_setting_of_every_product():
    rounds = [
        {"1": [1.0, 5.0], "2": [2.0, 3.0]},
        {"1": [1.0, 9.0], "2": [0.5, 4.0]},
        {"1": [1.1, 5.0], "2": [2.0, 3.0]},
    ]
    base, chosen = floor.best(rounds)
    assert chosen == ["1", "2"]
    assert base == [4.0, 5.0, 4.1]


def test_the_floor_has_the_products_of_a_step():
    task = Task((8, 5, 3), 4)
    kinds = [(kind, l) for kind, l, _ in floor.products(task)]
    assert kinds == [("fprop", 0), ("fprop", 1), ("dgrad", 1), ("wgrad", 1), ("wgrad", 0)]
    assert sum(flop for *_, flop in floor.products(task)) == task.flop == 2 * 4 * (2 * 40 + 3 * 15)
    found = floor.OnCPU(task).sample(2, lambda: None)
    assert set(found) == {"1 thread", *(f"{n} threads" for n in floor.thread_settings() if n > 1)}
    assert all(len(times) == len(kinds) and min(times) > 0 for times in found.values())


def test_time_goes_to_what_a_thread_is_in_and_is_divided_among_threads():
    marks = [
        (1.0, 1, "activation"), (2.0, 1, "GEMMs"), (4.0, 1, None), (5.0, 1, None),  # the innermost counts
        (6.0, 1, "loss"), (6.0, 2, "update"), (8.0, 2, None), (9.0, 1, None),
    ]  # fmt: skip
    found = breakdown.divided(marks, 0.0, 10.0)
    assert found == {"GEMMs": 2.0, "activation": 2.0, "loss": 2.0, "update": 1.0, "host": 3.0}


def test_a_step_that_is_watched_adds_up_and_is_left_as_it_was():
    task, product = Task((64, 48, 5), 256, "gelu", "adam"), np.matmul
    parts, traced, plain = breakdown.of_step(task, 0.02)
    assert sum(parts.values()) == pytest.approx(traced)
    assert all(share > 0 for share in parts.values())
    assert plain > 0
    assert np.matmul is product
    assert threading.active_count() < 50


def test_what_is_too_much_is_cut_with_its_reason(monkeypatch):
    task = Task((1000, 1000, 16), 100)
    assert scaling.too_much(task, None) is None
    assert "the limit is 4 s" in scaling.too_much(task, task.flop / 5)
    monkeypatch.setattr(scaling.steps, "free_bytes", lambda device: 1000)
    assert "GiB may be taken" in scaling.too_much(task, None)


def test_a_task_that_is_too_large_to_be_checked_is_checked_smaller():
    large = Task((16384, 16384, 16384, 16), 32768)
    small = large.for_check()
    assert small.flop <= 1e11
    assert (small.activation, len(small.sizes)) == (large.activation, 4)
    assert Task((8, 5, 3), 4).for_check() == Task((8, 5, 3), 4)
    assert all(task.for_check().sizes == task.sizes for task in plans.steps("cpu", False))


def test_data_that_no_network_can_learn():
    x, y = Task((3, 2, 4), 7).data()
    assert (x.shape, y.shape, x.dtype) == ((7, 3), (7,), np.float32)
    assert np.array_equal(x[:3], x[4:])
    assert (y[:3] != y[4:]).all()


def test_accuracy_is_the_share_of_the_rows():
    parameters = [(np.eye(2), np.zeros(2)), (np.array([[1.0, 0], [0, 1]]), np.array([0, 0.5]))]
    x = np.array([[1.0, 0], [0, 1], [0.4, 0], [-1, -1]])
    assert accuracy.accuracy(parameters, x, np.array([0, 1, 0, 1])) == 0.75


# --- tables ----------------------------------------------------------------------------------------------------------


def measured(name, over, **over_ours):
    spread = {"median": 0.002, "q10": 0.001, "q25": 0.001, "q75": 0.003, "q90": 0.003, "samples": 3}
    told = {key: {**spread, "median": value} for key, value in over_ours.items()}
    task = Task((8, 8, 4), 16).as_json()
    return {
        "part": "steps", "name": name, "run": 0, "task": task, "absent": {}, "wrong": {}, "failed": {},
        "bystanders": 0.0, "contenders": {key: {"wall": spread, "host": spread} for key in (OURS, *told)},
        "over_floor": {OURS: {**spread, "median": over}}, "over_ours": told,
    }  # fmt: skip


def results(*of):
    header = {"part": "run", "name": "0", "run": 0, "rehearsal": False, "device": "Some CPU", "processors": 2,
              "code": "abc", "clean": True, "date": "2026-01-01T00:00:00"}  # fmt: skip
    return tables.Results([header, *of])


def test_the_tables_say_who_is_faster_and_where():
    found = results(measured("one · relu", 1.1, **{"JAX jit": 0.5}), measured("two · relu", 1.6, **{"JAX jit": 2.0}))
    text = tables.steps(found)
    assert "| one | relu | sgd | float32 | 2 | 1.10 | **0.50** |" in text
    assert "| 2.00 |" in text
    lost = tables.losses(found)
    assert "In 1 of 2 rows" in lost
    assert "JAX jit 0.50" in lost
    goals = tables.goals(found)
    assert "| 2 of 2 rows |" not in goals
    assert "| 1 of 2 rows | 1.60 |" in goals
    assert "faster in 1, at most 10 % behind in 1 of 2" in goals


def test_a_row_that_was_disturbed_is_marked():
    found = results({**measured("one · relu", 1.1), "bystanders": 0.8})
    assert "2 †" in tables.steps(found)
    assert "not to be relied on" in tables.steps(found)


def test_the_tables_in_the_readmes_are_what_the_stored_results_give():
    stored = report.stored()
    assert stored, "no results are stored"
    for page in report.PAGES_WITH_TABLES:
        text = page.read_text(encoding="utf-8")
        assert report.MARKED.search(text), f"{page} has no table"
        assert report.filled(text, stored, page.parent) == text, f"{page}: run python benchmarks/report.py"


def test_a_figure_written_by_hand_is_found(tmp_path):
    page = tmp_path / "README.md"
    stored = {"cpu": results(measured("one · relu", 1.1, **{"JAX jit": 0.5}))}
    page.write_text("# Title\n\n<!-- results: steps -->\n<!-- end of results -->\n\nmore\n")
    assert report.write(stored, [page]) == [page]
    assert report.write(stored, [page], check=True) == []
    text = page.read_text()
    assert "Some CPU, 2 processors" in text
    assert text.endswith("more\n")
    page.write_text(text.replace("1.10", "1.01"))
    assert report.write(stored, [page], check=True) == [page]
    page.write_text("<!-- results: nonsense -->\n<!-- end of results -->")
    with pytest.raises(ValueError, match="nonsense"):
        report.write(stored, [page])


def test_pictures_are_drawn_from_records(tmp_path):
    pytest.importorskip("matplotlib")
    steps = measured("one · relu", 1.3, **{"JAX jit": 0.5, "scikit-learn": 3.0})
    seconds = {"GEMMs": 0.6, "activation": 0.2, "loss": 0.1, "update": 0.05, "host": 0.05}
    told = {"part": "breakdown", "name": "one · relu", "run": 0, "task": steps["task"], "seconds": seconds,
            "traced": 1.0, "untraced": 0.9}  # fmt: skip
    points = [
        {**steps, "part": "scaling", "name": f"{axis} {n}", "axis": axis, "value": n, "floor": {"median": 1e-3 * n}}
        for axis in ("width", "depth")
        for n in (1, 4)
    ]
    import plots

    drawn = plots.draw(tmp_path, results(steps, told, *points))
    assert [path.name for path in drawn] == ["scaling.png", "breakdown.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in drawn)
    assert plots.draw(tmp_path, results(steps)) == []


# --- gpu-mlp bench ---------------------------------------------------------------------------------------------------


def test_the_command_prints_a_table_and_says_what_was_cut(capsys, tmp_path):
    status = cli.run(
        ["bench", "--device", "cpu", "--seconds", "0.5", "--peers", "scikit-learn", "--out", str(tmp_path)]
    )
    out = capsys.readouterr().out
    assert status == 0
    assert "64-32-10 at 32" in out
    assert re.search(r"at 1024.*: the time was up before its turn", out)
    lines = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert lines[0]["versions"]
    ratio = lines[1]["over_ours"]["scikit-learn"]["median"]
    assert f"{ratio:.2f}" in out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--peers", "keras"], "peers: expected usual, all, none or any of PyTorch eager"),
        (["--seconds", "0"], "seconds: "),
        (["--device", "tpu"], "device: "),
    ],
)
def test_the_command_refuses(words, said, capsys):
    assert cli.run(["bench", "--device", "cpu", *words]) == 2
    assert said in capsys.readouterr().err


def test_remarks_tell_all_that_is_missing_from_the_table():
    found = [
        {
            **measured("one · relu", 1.1),
            "absent": {"JAX jit": "JAX is not installed"},
            "wrong": {"scikit-learn": "off by 1"},
        },
        {"part": "steps", "name": "two", "cut": "no time"},
        {"part": "steps", "name": "three", "error": "Traceback\nMemoryError: no room"},
    ]
    told = "\n".join(quick.remarks(found))
    for words in ("JAX is not installed", "scikit-learn is not timed", "two: no time", "three: MemoryError: no room"):
        assert words in told
    assert quick.wrong(found)
    assert not quick.wrong(found[:2])


# --- GEMMs on a GPU --------------------------------------------------------------------------------------------------


@pytest.fixture
def clocked_gpu(emulated_gpu, monkeypatch):
    """An emulated GPU on which all work takes a second: its events know no time."""
    from gpu_mlp.bench import device

    def on_device(work, samples, warm_ups=5):
        work()
        return [1.0] * samples

    monkeypatch.setattr(device, "on_device", on_device)


@pytest.mark.parametrize("precision", ["bfloat16", "tf32"])
def test_every_algorithm_that_cublaslt_proposes_is_checked_and_timed(clocked_gpu, precision):
    import gemms

    found = gemms.on_gpu(plans.Product(6, 8, 5), precision, rehearsal=False)
    for told in found.values():
        assert told["best"].endswith(" of 3")
        assert set(told["seconds"]) == {"gpu_mlp", "cublasLt"}
        assert told["share_of_best"]["median"] == 1.0


def test_an_algorithm_that_computes_something_else_is_not_timed(clocked_gpu, monkeypatch):
    import gemms

    monkeypatch.setattr(gemms.Algorithms, "run", lambda self, i: self._arrays[2].fill(i))
    with pytest.raises(ArithmeticError, match="a product is off by"):
        gemms.on_gpu(plans.Product(6, 8, 5), "tf32", rehearsal=False)


def test_without_cublaslt_a_product_is_timed_alone(clocked_gpu, monkeypatch):
    import gemms

    from gpu_mlp.ops import gemm

    monkeypatch.setattr(gemm.binding(), "lt", None)
    found = gemms.on_gpu(plans.Product(6, 8, 5), "tf32", rehearsal=False)
    assert all("nvmath-python" in told["best"] and "share_of_best" not in told for told in found.values())
    assert all(told["seconds"]["gpu_mlp"]["median"] == 1.0 for told in found.values())
