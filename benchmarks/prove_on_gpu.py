"""All that has to be seen on a GPU, in one call: is it right, is it clean, how fast is it?

    python benchmarks/prove_on_gpu.py                              # everything, in nine minutes
    python benchmarks/prove_on_gpu.py --parts kernels,steps --seconds 300
    python benchmarks/prove_on_gpu.py --out somewhere --commit "$(git rev-parse HEAD)"
    python benchmarks/prove_on_gpu.py --rehearse                   # without a GPU: does this script itself run?

The parts, in this order, each in a process of its own with its share of the time that is left:

    facts      the device, its driver and clocks, and the version of everything
    tests      pytest -m gpu: comparisons with the CPU, same bits, flat memory, large arrays
    sanitizer  memcheck, racecheck (shared memory only), initcheck and synccheck over a small training
    kernels    every streaming kernel's share of the rate of a device-to-device copy
    steps      whole training steps over their bare GEMMs, and over PyTorch eager

Into the folder --out (by default benchmarks/results/<date>-<device>/) go results.jsonl, a record a line as soon as
there is one, summary.md, written anew after every part, and a log of every part. A part that fails or runs out of time
leaves its records and its log, and the next one runs; a further run into the same folder adds to what is there. Exit
status: 0 if every part was done and nothing was found wrong.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib.metadata
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]  # this checkout is put to the proof, installed or not
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(HERE.parent), os.environ.get("PYTHONPATH")]))
from proof_summary import summary  # noqa: E402
from rehearsal import TESTS, rehearse  # noqa: E402

# By part: its share of the seconds, as it takes on a recent GPU.
PARTS = {"facts": 30, "tests": 230, "sanitizer": 140, "kernels": 45, "steps": 95}
TOOLS = {  # of compute-sanitizer, with their own options; cuBLAS and CuPy probe for symbols that are not there
    "memcheck": ("--report-api-errors", "no"),
    "racecheck": (),
    "initcheck": (),
    "synccheck": (),
}
PACKAGES = ("cupy-cuda12x", "cupy-cuda13x", "nvmath-python", "numpy", "ml_dtypes", "torch", "jax", "triton", "pytest")
QUERY = "name,driver_version,memory.total,clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,power.limit,temperature.gpu"
SPARE_SECONDS = 5  # in which a part writes down that its time is up, before its process is ended


class Records:
    """The records of one part, each on disk before the next is made."""

    def __init__(self, folder: Path, part: str, rehearsal: bool) -> None:
        self.folder, self.part, self.rehearsal = folder, part, rehearsal

    def add(self, name: str, **figures: Any) -> None:
        record = {"part": self.part, "name": name, **({"rehearsal": True} if self.rehearsal else {}), **figures}
        with open(self.folder / "results.jsonl", "a") as file:
            file.write(json.dumps(record) + "\n")
        print(json.dumps(record), flush=True)

    @contextlib.contextmanager
    def attempt(self, name: str) -> Iterator[None]:
        """Record what goes wrong here, and go on behind it."""
        try:
            yield
        except Exception:
            self.add(name, error=traceback.format_exc())


# --- the parts: each gets its records, the end of its time, and the arguments ----------------------------------------


def facts(records: Records, deadline: float, arguments: argparse.Namespace) -> None:
    """What the numbers were taken on."""
    import cupy

    from gpu_mlp.ops import gemm

    properties = cupy.cuda.runtime.getDeviceProperties(0)
    free, total = cupy.cuda.runtime.memGetInfo()
    records.add(
        "device",
        device=properties["name"].decode(),
        compute_capability=str(cupy.cuda.Device().compute_capability),
        multiprocessors=int(properties["multiProcessorCount"]),
        cache_bytes=int(cupy.cuda.Device().attributes["L2CacheSize"]),
        memory_bytes=int(total),
        memory_free_bytes=int(free),
        driver_api=cupy.cuda.runtime.driverGetVersion(),
        cuda_runtime=cupy.cuda.runtime.runtimeGetVersion(),
        graphs=bool(gemm.binding().in_graphs),
    )
    versions = {"python": platform.python_version(), "cupy": cupy.__version__}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    records.add("versions", **versions)
    records.add("source", **source(arguments.commit), processor=platform.machine(), processors=os.cpu_count())
    with records.attempt("nvidia-smi"):
        records.add("nvidia-smi", **nvidia_smi())


def source(commit: str | None) -> dict[str, Any]:
    """The commit that was run, and whether files differ from it; unknown outside a repository."""
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        found = subprocess.run(["git", "rev-parse", "HEAD"], cwd=HERE, capture_output=True, text=True, check=True)
        changes = subprocess.run(["git", "status", "--porcelain"], cwd=HERE, capture_output=True, text=True, check=True)
        return {"commit": commit or found.stdout.strip(), "changed_files": len(changes.stdout.splitlines())}
    return {"commit": commit or "unknown", "changed_files": None}


def nvidia_smi() -> dict[str, str]:
    """What nvidia-smi says of the device, clocks at rest among it; empty without it."""
    if not shutil.which("nvidia-smi"):
        return {}
    command = ["nvidia-smi", f"--query-gpu={QUERY}", "--format=csv,noheader", "--id=0"]
    answer = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout
    return dict(zip(QUERY.split(","), (value.strip() for value in answer.strip().split(","))))


def tests(records: Records, deadline: float, arguments: argparse.Namespace) -> None:
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


def sanitizer(records: Records, deadline: float, arguments: argparse.Namespace) -> None:
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


def kernels(records: Records, deadline: float, arguments: argparse.Namespace) -> None:
    """The streaming kernels' bandwidth."""
    import gpu_kernels

    sizes = {"size": 1 << 16, "samples": 2} if arguments.rehearse else {}
    gpu_kernels.measure(records, **sizes)


def steps(records: Records, deadline: float, arguments: argparse.Namespace) -> None:
    """Whole training steps."""
    import gpu_steps

    tiny = {"widths": (8,), "batches": (4,), "precisions": ("bfloat16",), "rounds": 2, "repeats": 1}
    gpu_steps.measure(records, **(tiny if arguments.rehearse else {}))


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


def log_of(arguments: argparse.Namespace) -> Path:
    """What a part prints."""
    return arguments.out / f"{arguments.part}.log"


def run_part(part: str, arguments: argparse.Namespace, seconds: float) -> bool:
    """A part in a process of its own, so that neither a crash nor a lost device reaches the next."""
    records, started = Records(arguments.out, "parts", arguments.rehearse), time.monotonic()
    command = [sys.executable, __file__, "--part", part, "--out", str(arguments.out), "--seconds", str(seconds)]
    command += ["--rehearse"] * arguments.rehearse
    command += ["--commit", arguments.commit] if arguments.commit else []
    with open(arguments.out / f"{part}.log", "ab") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            status: int | str = process.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # the part, and what it has started
            process.wait()
            status = "out of time"
    records.add(part, status=status, seconds=None if arguments.rehearse else time.monotonic() - started)
    return status == 0


def child(arguments: argparse.Namespace) -> None:
    """The process of one part; exit status 1 if something in it failed, with the traceback among the records."""
    if arguments.rehearse:
        rehearse()
    records, before = Records(arguments.out, arguments.part, arguments.rehearse), len(read(arguments.out))
    with records.attempt("part"):
        globals()[arguments.part](records, time.monotonic() + arguments.seconds, arguments)
    sys.exit(any(map(wrong, read(arguments.out)[before:])))


def wrong(record: dict[str, Any]) -> bool:
    """Whether a record tells of something that went wrong."""
    if "clean" in record:
        return record["clean"] is not True
    return "error" in record or record.get("status", 0) != 0


def read(folder: Path) -> list[dict[str, Any]]:
    """All records so far."""
    file = folder / "results.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def device_name() -> str:
    """The device's name as a folder may be called."""
    import cupy

    name = cupy.cuda.runtime.getDeviceProperties(0)["name"].decode()
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="the folder of the results")
    parser.add_argument("--parts", default=",".join(PARTS), help="which, with commas between them")
    parser.add_argument("--seconds", type=float, default=540, help="for all parts together")
    parser.add_argument("--commit", help="what was run, where git cannot tell")
    parser.add_argument("--rehearse", action="store_true", help="tiny sizes on a stand-in for CuPy; claims no timing")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if unknown := set(arguments.parts.split(",")) - set(PARTS):
        parser.error(f"--parts: {', '.join(sorted(unknown))}: not among {', '.join(PARTS)}")
    return arguments


def main() -> None:
    """Run the parts one after the other."""
    arguments = parse()
    if arguments.part:
        child(arguments)
    from gpu_mlp.ops import cuda_obstacle

    if not arguments.rehearse and cuda_obstacle():
        sys.exit(f"there is no GPU to prove anything on: {cuda_obstacle()}")
    if arguments.out is None:
        name = "rehearsal" if arguments.rehearse else device_name()
        arguments.out = HERE / "results" / f"{datetime.date.today():%Y-%m-%d}-{name}"
    arguments.out = arguments.out.resolve()
    arguments.out.mkdir(parents=True, exist_ok=True)
    chosen, well = [part for part in PARTS if part in arguments.parts.split(",")], True
    end = time.monotonic() + arguments.seconds
    for position, part in enumerate(chosen):
        share = PARTS[part] / sum(PARTS[later] for later in chosen[position:])
        well &= run_part(part, arguments, max(1.0, (end - time.monotonic()) * share))
        (arguments.out / "summary.md").write_text(summary(read(arguments.out)))
    print((arguments.out / "summary.md").read_text())
    sys.exit(not well)


if __name__ == "__main__":
    main()
