"""The parts of the benchmark suite that ask whether the GPU side is right: what they make of what tools say."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
import proof
import run as suite

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


def test_a_command_whose_time_is_up_may_say_how_far_it_came(tmp_path, monkeypatch):
    monkeypatch.setattr(proof, "SPARE_SECONDS", 4)
    code = "import time\nprint('begun', flush=True)\ntry: time.sleep(60)\nexcept KeyboardInterrupt: print('so far')"
    text, status, _ = proof.watched([sys.executable, "-c", code], time.monotonic() + 5.5, tmp_path / "log")
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
    found = proof.verdict(text, status)
    assert found["clean"] is clean
    assert found["in_our_kernels"] == ours
    assert suite.wrong({"status": status, **found}) is (clean is not True)
