"""What a machine has to compute with, and what is in a model file: the facts behind `gpu-mlp info`."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import subprocess
from pathlib import Path

from . import activations
from .losses import FUSED
from .model import Model
from .ops import cuda_obstacle, numba_obstacle
from .planning import plan_memory

OPTIONAL = ("cupy-cuda12x", "numba", "ml_dtypes", "matplotlib", "pyarrow", "scikit-learn", "torch")


def describe_machine() -> dict[str, str]:
    """Versions, processor, BLAS and GPU, each as a line of text."""
    facts = {"gpu_mlp": _version("gpu-mlp"), "Python": f"{platform.python_version()} on {platform.platform()}"}
    facts |= {name: _version(name) for name in ("numpy", "scipy")}
    facts["BLAS"] = _blas()
    facts["processors"] = (
        f"{len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()} usable"
    )
    facts["optional"] = ", ".join(f"{name} {_version(name)}" for name in OPTIONAL)
    facts["NVIDIA driver"] = _driver()
    facts["device='cpu'"] = f"NumPy alone: {numba_obstacle()}" if numba_obstacle() else "steps compiled by Numba"
    obstacle = cuda_obstacle()
    if obstacle:
        return {**facts, "device='cuda'": f"not usable: {obstacle}", "device='auto'": "means cpu"}
    from .ops.device import describe

    return {
        **facts,
        **describe(),
        "device='cuda'": "usable: a kernel was compiled and ran",
        "device='auto'": "means cuda",
    }


def describe_plan(
    sizes: str, batch_size: int, activation: str, output: str, precision: str, optimizer: str, accumulate: int
) -> dict[str, str]:
    """The device memory of a training step, part by part; sizes: "784,4096,10"."""
    try:
        widths = [int(size) for size in sizes.split(",")]
    except ValueError:
        raise ValueError(f"plan: expected widths such as 784,4096,10, got {sizes!r}") from None
    if len(widths) < 2 or min(widths) < 1:
        raise ValueError(f"plan: expected at least an input and an output width, all positive, got {sizes!r}")
    names = [activation] * (len(widths) - 2) + [output]
    activations.get(activation, "activation"), activations.get(output, "output")
    fused = any(output == of for of, _ in FUSED)
    plan = plan_memory(widths, names, precision, optimizer, batch_size, fused, accumulate)
    rows = f"{batch_size} rows" if accumulate == 1 else f"{batch_size} rows in {accumulate} micro-batches"
    return {"a step of": f"{rows}, {' → '.join(map(str, widths))}, {precision}, {optimizer}", **plan.lines()}


def describe_model(path: Path) -> dict[str, str]:
    """The network, its inputs, its target and where its data came from."""
    model = Model.load(path, device="cpu")
    net = model.net
    facts = {
        "network": " → ".join(map(str, net.sizes)),
        "parameters": f"{net.n_parameters:,}",
        "activations": ", ".join([*net.activation, net.output]),
        "dropout": ", ".join(f"{rate:g}" for rate in net.dropout) or "none",
        "precision": net.precision,
        "seed": str(net.seed),
        "task": f"{model.task}, loss {model.loss}",
        "inputs": f"{model.preprocessor.n_features_in} columns",
        "trained on": str(model.data.get("data", "unknown")),
    }
    if model.task == "classification":
        labels = [str(label) for label in model.target.decode(range(net.sizes[-1]))]  # type: ignore[union-attr]
        facts["classes"] = ", ".join(labels[:20]) + (f", … ({len(labels)})" if len(labels) > 20 else "")
    return facts


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _blas() -> str:
    """The library that NumPy's GEMMs run in, and its threads."""
    if importlib.util.find_spec("threadpoolctl") is None:
        import numpy as np

        blas = np.show_config(mode="dicts")["Build Dependencies"]["blas"]
        return f"{blas['name']} {blas['version']}"
    from threadpoolctl import threadpool_info

    pools = [pool for pool in threadpool_info() if pool["user_api"] == "blas"]
    return "; ".join(
        sorted({f"{pool['internal_api']} {pool['version']}, {pool['num_threads']} threads" for pool in pools})
    )


def _driver() -> str:
    """What the driver says of the GPUs of this machine."""
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    try:
        found = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True)
    except FileNotFoundError:
        return "none found (no nvidia-smi)"
    except (OSError, subprocess.SubprocessError):
        return "none that the driver can reach (nvidia-smi failed)"
    return "; ".join(line.strip() for line in found.stdout.splitlines() if line.strip()) or "none"
