"""What a measurement was taken on and of: device, driver, clocks, versions, BLAS, commit. All of it goes with a run."""

from __future__ import annotations

import contextlib
import datetime
import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

PACKAGES = (
    "gpu-mlp", "numpy", "scipy", "scikit-learn", "torch", "jax", "jaxlib", "triton", "cupy-cuda12x", "cupy-cuda13x",
    "nvmath-python", "nvidia-cublas-cu12", "ml_dtypes", "threadpoolctl", "matplotlib",
)  # fmt: skip
QUERY = "name,driver_version,memory.total,clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,power.limit,temperature.gpu"
CODE = ("gpu_mlp", "kernels", "benchmarks", "pyproject.toml", ":!benchmarks/results", ":!benchmarks/*.md")


def cores() -> int:
    """The processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def facts(device: str, commit: str | None = None) -> dict[str, Any]:
    """All of it, as JSON can hold it. ``commit``: what is measured, where git cannot tell."""
    told = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        **source(commit),
        "processor": processor(),
        "processors": cores(),
        "memory_bytes": memory_bytes(),
        "processor_mhz": processor_mhz(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": versions(),
        "blas": blas(),
    }
    if device != "cuda":
        return {"device": told["processor"], **told}
    from . import device as gpu

    return {**told, **gpu.facts(), "nvidia_smi": nvidia_smi()}


def source(commit: str | None = None) -> dict[str, Any]:
    """What code is run: ``commit``, ``code`` (the last commit that changed code) and whether its files are ``clean``.

    ``code`` is what tells whether two runs measured the same. Outside a repository: the version of the package.
    """
    folder = Path(__file__).resolve().parents[2]
    if (folder / ".git").exists() and shutil.which("git"):
        with contextlib.suppress(subprocess.CalledProcessError):
            return {
                "commit": _git(folder, "rev-parse", "HEAD"),
                "code": _git(folder, "log", "-1", "--format=%H", "--", *CODE),
                "clean": not _git(folder, "status", "--porcelain", "--", *CODE),
            }
    return {"commit": commit, "code": commit or f"gpu-mlp {_version('gpu-mlp')}", "clean": None}


def _git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def processor() -> str:
    """The CPU's name."""
    with contextlib.suppress(OSError):
        if found := re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text()):
            return found[1].strip()
    return platform.processor() or platform.machine()


def processor_mhz() -> list[float]:
    """The clock of every processor at this moment, where the system tells."""
    with contextlib.suppress(OSError):
        return [round(float(m)) for m in re.findall(r"cpu MHz\s*:\s*([\d.]+)", Path("/proc/cpuinfo").read_text())]
    return []


def memory_bytes() -> int | None:
    """The machine's memory."""
    with contextlib.suppress(ValueError, OSError, AttributeError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return None


def free_bytes() -> int | None:
    """The machine's memory that programs can still take."""
    with contextlib.suppress(OSError):
        if found := re.search(r"MemAvailable:\s*(\d+) kB", Path("/proc/meminfo").read_text()):
            return 1024 * int(found[1])
    return None


class Bystanders:
    """How many processors others have kept busy since it was made: the share of a measurement that is not its own."""

    def __init__(self) -> None:
        self._busy, self._own, self._when = _busy_seconds(), _own_seconds(), time.monotonic()

    def processors(self) -> float | None:
        """The mean number of processors; time that a virtual machine's host took away counts; None if it is unknown."""
        now, elapsed = _busy_seconds(), time.monotonic() - self._when
        if now is None or self._busy is None or elapsed <= 0:
            return None
        return round(max(0.0, now - self._busy - (_own_seconds() - self._own)) / elapsed, 3)


def _busy_seconds() -> float | None:
    """Seconds that the machine's processors have worked: user, nice, system, interrupts and steal."""
    with contextlib.suppress(OSError, ValueError):
        ticks = [int(word) for word in Path("/proc/stat").read_text().split("\n")[0].split()[1:9]]
        return (sum(ticks) - ticks[3] - ticks[4]) / os.sysconf("SC_CLK_TCK")
    return None


def _own_seconds() -> float:
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def versions() -> dict[str, str]:
    """Of every package that matters to a figure and is installed."""
    return {name: version for name in PACKAGES if (version := _version(name))}


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def blas() -> list[dict[str, Any]]:
    """The libraries that NumPy's and SciPy's GEMMs run in, with their threads."""
    import numpy  # noqa: F401  (loads its BLAS, which is looked for below)
    from threadpoolctl import threadpool_info

    kept = ("internal_api", "version", "num_threads", "threading_layer", "architecture")
    return [{key: pool.get(key) for key in kept} for pool in threadpool_info() if pool["user_api"] == "blas"]


def nvidia_smi() -> dict[str, str]:
    """What nvidia-smi says of the device, its clocks at this moment among it; empty without it."""
    if not shutil.which("nvidia-smi"):
        return {}
    command = ["nvidia-smi", f"--query-gpu={QUERY}", "--format=csv,noheader", "--id=0"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout
    except (OSError, subprocess.SubprocessError):
        return {}
    return dict(zip(QUERY.split(","), (value.strip() for value in answer.strip().split(","))))
