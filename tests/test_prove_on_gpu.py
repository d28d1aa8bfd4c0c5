"""The script that proves things on a GPU: rehearsed whole without one, and what it makes of failures."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from argparse import Namespace
from importlib.util import find_spec
from pathlib import Path

import pytest
from cuda_on_cpu.fixtures import require_compiler

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
import prove_on_gpu
from proof_summary import summary

SCRIPT = [sys.executable, prove_on_gpu.__file__]
KERNELS = ("bias_activation", "activation_gradient", "bias_softmax", "softmax_gradient", "softmax_cross_entropy",
           "pointwise_loss", "gather", "update SGD", "update Adam", "update AdamW")  # fmt: skip

CLEAN = "========= COMPUTE-SANITIZER\n7 runs done\n========= ERROR SUMMARY: 0 errors\n"
OURS = """========= COMPUTE-SANITIZER
========= Invalid __global__ write of size 4 bytes
=========     at gather+0x150
=========     by thread (0,0,0) in block (0,0,0)
=========     Saved host backtrace up to driver entry point at kernel launch time
=========         Host Frame: update [0x1234] in libsomething.so
7 runs done
========= ERROR SUMMARY: 1 error
"""
RACE = """========= Error: Race reported between Write access at bias_softmax+0x70 and Read access at bias_softmax+0x90
7 runs done
========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)
"""
THEIRS = """========= Uninitialized __global__ memory read of size 16 bytes
=========     at void cutlass::Kernel<cutlass_80_wmma>(T1::Params)+0x8f0
7 runs done
========= ERROR SUMMARY: 1 error
"""


# Whether there is a GPU is not asked here: that would import CuPy, and its stand-in could not take its place any more.
without_cupy = pytest.mark.skipif(find_spec("cupy") is not None, reason="CuPy is there, and maybe a GPU to be tried")


def test_a_rehearsal_runs_every_part_and_claims_no_timing(tmp_path):
    require_compiler()
    result = subprocess.run([*SCRIPT, "--rehearse", "--out", str(tmp_path)], capture_output=True, text=True)
    assert result.returncode == 0, (
        result.stdout + result.stderr + "".join(p.read_text() for p in tmp_path.glob("*.log"))
    )
    records = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert {r["part"] for r in records} == {*prove_on_gpu.PARTS, "parts"}
    assert all(r["rehearsal"] for r in records)
    assert not any(r.get(key) for r in records for key in ("seconds", "wall", "bytes_per_second", "error"))
    timed = [r["name"] for r in records if r["part"] == "kernels"]
    assert all(any(name.startswith(kernel) for name in timed) for kernel in KERNELS)
    contenders = {r["name"] for r in records if r["part"] == "steps"}
    assert contenders == {"bare GEMMs", "graph off", "graph on", "PyTorch eager"}
    told = next(r for r in records if r["part"] == "tests")
    assert " passed" in told["last_line"]
    assert not told["failed"]
    page = (tmp_path / "summary.md").read_text()
    assert "A rehearsal" in page
    assert "| steps | done |" in page


@without_cupy
def test_what_fails_is_recorded_and_the_next_part_runs(tmp_path):
    arguments = Namespace(out=tmp_path, rehearse=False, commit=None)
    assert not prove_on_gpu.run_part("facts", arguments, 60)
    assert not prove_on_gpu.run_part("kernels", arguments, 60)
    records = prove_on_gpu.read(tmp_path)
    assert [r["part"] for r in records] == ["facts", "parts", "kernels", "parts"]
    assert [r["status"] for r in records if r["part"] == "parts"] == [1, 1]
    for record in records[::2]:
        assert "No module named 'cupy'" in record["error"]
        assert record["error"].strip() in summary(records)


@without_cupy
def test_without_a_gpu_nothing_is_claimed(tmp_path):
    result = subprocess.run([*SCRIPT, "--out", str(tmp_path / "none")], capture_output=True, text=True)
    assert result.returncode == 1
    assert "there is no GPU to prove anything on" in result.stderr
    assert not (tmp_path / "none").exists()


def test_a_part_whose_time_is_up_is_ended_and_its_records_stay(tmp_path):
    arguments = Namespace(out=tmp_path, rehearse=True, commit=None)
    started = time.monotonic()
    assert not prove_on_gpu.run_part("steps", arguments, 0.2)
    assert time.monotonic() - started < 10
    assert prove_on_gpu.read(tmp_path)[-1]["status"] == "out of time"
    assert "| steps | out of time |" in summary(prove_on_gpu.read(tmp_path))


def test_a_command_whose_time_is_up_may_say_how_far_it_came(tmp_path, monkeypatch):
    monkeypatch.setattr(prove_on_gpu, "SPARE_SECONDS", 4)
    code = "import time\nprint('begun', flush=True)\ntry: time.sleep(60)\nexcept KeyboardInterrupt: print('so far')"
    text, status, _ = prove_on_gpu.watched([sys.executable, "-c", code], time.monotonic() + 5.5, tmp_path / "log")
    assert (text.split("\n")[:2], status) == (["begun", "so far"], "out of time")


@pytest.mark.parametrize(
    ("text", "status", "clean", "ours"),
    [
        (CLEAN, 0, True, []),
        (OURS, 1, False, ["gather"]),
        (RACE, 1, False, ["bias_softmax"]),
        (THEIRS, 1, True, []),
        (CLEAN.replace("0 errors", "3 errors"), 1, False, []),  # of no kernel: of an API call, say
        ("========= COMPUTE-SANITIZER\n", "out of time", None, []),
    ],
    ids=["clean", "ours", "race", "theirs", "no kernel's", "cut off"],
)
def test_what_the_sanitizer_says_is_told_apart_by_whose_kernel_it_is(text, status, clean, ours):
    found = prove_on_gpu.verdict(text, status)
    assert found["clean"] is clean
    assert found["in_our_kernels"] == ours
    assert prove_on_gpu.wrong({"status": status, **found}) is (clean is not True)
