"""The parts of the suite that ask whether the GPU side is right and clean: its tests, and compute-sanitizer's tools."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

from rehearsal import TESTS

from gpu_mlp.bench.records import Records

HERE = Path(__file__).resolve().parent
TOOLS = {  # of compute-sanitizer, with their own options; cuBLAS and CuPy probe for symbols that are not there
    "memcheck": ("--report-api-errors", "no"),
    "racecheck": (),
    "initcheck": (),
    "synccheck": (),
}
SPARE_SECONDS = 5  # in which a part writes down that its time is up, before its process is ended


def tests(records: Records, deadline: float, arguments: Namespace) -> None:
    """The tests that are marked gpu; in a rehearsal a few of them, on the stand-in."""
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider", "--durations=10"]
    command += ["--continue-on-collection-errors", "-o", "console_output_style=count"]
    environment = {"REQUIRE_GPU": "1", "PYTHONUNBUFFERED": "1"}
    if arguments.rehearse:
        command += ["-p", "cuda_on_cpu.as_cupy", "tests/test_cuda.py", "-k", "fused_pairs"]
        environment["PYTHONPATH"] = os.pathsep.join([str(TESTS), os.environ["PYTHONPATH"]])
    text, status, seconds = watched(command, deadline, log_of(arguments), environment)
    lines = text.splitlines()
    ended = [line for line in lines if re.search(r"\d+ (passed|failed|error|skipped)", line)]
    records.add(
        "pytest",
        status=status,
        last_line=ended[-1].strip("= ") if ended else "",
        failed=[line for line in lines if line.startswith(("FAILED ", "ERROR "))],
        skipped=[line for line in lines if line.startswith("SKIPPED ")],
        tail=lines[-40:] if status else [],
        seconds=None if arguments.rehearse else seconds,
    )


def sanitizer(records: Records, deadline: float, arguments: Namespace) -> None:
    """The four tools over one small training; in a rehearsal the training alone."""
    binary = sanitizer_binary()
    program = [sys.executable, str(HERE / "sanitized_training.py")]
    if arguments.rehearse:
        text, status, _ = watched([*program, "--rehearse"], deadline, log_of(arguments))
        records.add("training alone", status=status, tail=text.splitlines()[-20:] if status else [])
        return
    if binary is None:
        raise FileNotFoundError("compute-sanitizer is neither on the PATH nor in the CUDA toolkit's folders")
    # Once without a tool: what the kernels are compiled to lies in CuPy's cache then, and no tool has to wait for that.
    _, status, seconds = watched(program, deadline, log_of(arguments))
    records.add("training alone", status=status, seconds=seconds)
    for position, (tool, options) in enumerate(TOOLS.items()):
        share = time.monotonic() + (deadline - time.monotonic()) / (len(TOOLS) - position)
        command = [binary, "--tool", tool, "--error-exitcode", "1", "--print-limit", "40", *options, *program]
        text, status, seconds = watched(command, share, log_of(arguments))
        records.add(tool, status=status, seconds=seconds, **verdict(text, status))


def sanitizer_binary() -> str | None:
    """Where compute-sanitizer is."""
    roots = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    roots += ["/usr/local/cuda", *map(str, sorted(Path("/usr/local").glob("cuda-*"), reverse=True))]
    folders = [os.path.join(root, folder) for root in roots for folder in ("bin", "compute-sanitizer")]
    return shutil.which("compute-sanitizer", path=os.pathsep.join([os.environ.get("PATH", ""), *folders]))


def verdict(text: str, status: int | str) -> dict[str, Any]:
    """What a tool found, told apart by whose kernels it was found in.

    ``clean``: the training ended, and nothing was found in our kernels; None where the tool did not come to its end.
    """
    summaries = [line.strip("= ") for line in text.splitlines() if "SUMMARY" in line]
    lines = [line for line in text.splitlines() if line.startswith("=====") and "Host Frame" not in line]
    places = {place for line in lines for place in re.findall(r"\bat (?:void )?([A-Za-z_][\w:]*)", line)}
    ours, others = sorted(places & our_kernels()), sorted(places - our_kernels())
    ended = bool(summaries) and "runs done" in text
    return {
        "clean": (not ours and (status == 0 or bool(others))) if ended else None,
        "summaries": summaries,
        "in_our_kernels": ours,
        "in_other_kernels": others,
        "tail": text.splitlines()[-40:] if status else [],
    }


def our_kernels() -> set[str]:
    """The names of the package's kernels."""
    from kernel_units import KERNEL

    from gpu_mlp.ops import launch

    return {name for file in launch.HEADERS for name in KERNEL.findall(launch.text(file))}


# --- processes -------------------------------------------------------------------------------------------------------


def watched(
    command: list[str], deadline: float, log: Path, environment: dict[str, str] | None = None
) -> tuple[str, int | str, float]:
    """Run a command until ``deadline``: its output, its exit status or "out of time", and its seconds.

    What it prints goes to the end of ``log`` at once. One whose time is up is interrupted first, so that it can say how
    far it came.
    """
    started, before = time.monotonic(), log.stat().st_size if log.exists() else 0
    with open(log, "ab") as file:
        process = subprocess.Popen(
            command, cwd=HERE.parent, env={**os.environ, **(environment or {})}, stdout=file, stderr=subprocess.STDOUT
        )
        try:
            status: int | str = process.wait(max(1.0, deadline - SPARE_SECONDS - time.monotonic()))
        except subprocess.TimeoutExpired:
            status = "out of time"
            _end(process)
    text = log.read_bytes()[before:].decode(errors="replace")
    return text, status, time.monotonic() - started


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a process of ours: by Ctrl-C, and if it does not listen, for good."""
    process.send_signal(signal.SIGINT)
    try:
        process.wait(SPARE_SECONDS - 2)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def log_of(arguments: Namespace) -> Path:
    """What a part prints."""
    return arguments.out / "logs" / f"{arguments.part}.log"
