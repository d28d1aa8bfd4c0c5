"""What `import gpu_mlp` brings along and how long it takes, and that imports between the rooms run downwards only."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import gpu_mlp

PACKAGE = Path(gpu_mlp.__file__).parent
HEAVY = ("cupy", "typer", "click", "sklearn", "rich", "scipy", "matplotlib", "pandas", "pyarrow", "torch", "ml_dtypes",
         "safetensors", "threadpoolctl", "tensorboardX", "optuna", "mpi4py")  # fmt: skip

# The rooms from the ground up; a module may import from lower rows only. Leaves stand in row 0, and within row 0 they
# may lean on `checks` and on each other where the plan says so. What is not named here stands above all.
LEAVES = {
    "checks", "precision", "activations", "losses", "regularizers", "initializers", "optimizers", "schedules",
    "averaging", "history", "failures", "signals", "metrics", "progress", "tensorfile", "checkpoint", "logs", "notices",
    "parallel", "parallel.ranks", "preprocessing.values",
    "ops.blas", "ops.philox", "ops.choices", "ops.crew_kernels", "ops.formulas", "ops.numba_kernels",
    "ops.rules",
}  # fmt: skip
ROWS = [
    LEAVES,
    {"readers.untrusted", "preprocessing.moments", "preprocessing.states"},
    {"readers.rawdata", "preprocessing.columns", "preprocessing.targets"},
    {"readers.tabular", "readers.idx", "readers.numpy_files", "preprocessing.categories"},
    {"readers.csv_files", "readers.parquet_files", "preprocessing.preprocessor"},
    {"readers", "preprocessing", "ops.interface", "ops.sharing"},
    {"data", "shards", "ops.launch", "ops.exchange", "ops.job_parts"},
    {"ops.search", "ops.jobs", "ops.cuda_kernels"},
    {"ops.lt", "ops.crew"},
    {"tables", "ops.gemm", "ops.staging", "ops.epilogues", "ops.mpi", "ops.tape", "parallel.buckets"},
    {"folders", "ops.graphs", "ops.ways", "ops.beside", "ops.nccl"},
    {"streams"},
    {"ops.numpy_ops", "ops.cuda_ops", "ops.device"},
    {"ops.numba_ops"},
    {"ops", "ops.cuda"},
    {"workspace", "feeding", "planning"},
    {"network", "parallel.reduction"},
    {"divergence", "evaluation", "resuming", "updating"},
    {"fullbatch"},
    {"fitting", "gradcheck"},
    {"training"},
    {"solvers"},
    {"hyperparameters", "samples"},
    {"conversion"},
    {"estimator_base"},
]
TOP = len(ROWS)
LEANS = {  # of the leaves: what each may import of the package
    "losses": {"checks", "activations"},
    "optimizers": {"checks", "activations"},
    "ops.formulas": {"activations"},
    "ops.numba_kernels": {"ops.formulas", "ops.rules"},
    "ops.rules": {"optimizers", "ops.formulas"},
    "ops.philox": set(),
    "ops.choices": {"notices", "tensorfile"},
    "checks": set(),
    "failures": {"history"},
    "checkpoint": {"checks", "history", "tensorfile"},
    "logs": {"checks", "tensorfile"},
    "parallel.ranks": {"notices"},
}
CUPY = {"bench.device", "ops.beside", "ops.cuda", "ops.cuda_kernels", "ops.cuda_ops", "ops.device", "ops.epilogues",
        "ops.gemm", "ops.graphs", "ops.launch", "ops.lt", "ops.nccl", "ops.search", "ops.staging",
        "ops.ways"}  # fmt: skip
SKLEARN = {"bench.peers.sklearn_peer", "conversion", "estimator_base", "estimators", "hyperparameters", "samples"}
CLI = {"cli", "__main__"}


def modules():
    for path in sorted(PACKAGE.rglob("*.py")):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        name = name.removesuffix(".__init__")
        if name != "__init__":
            yield name, path


def row(name):
    return next((i for i, names in enumerate(ROWS) if name in names), TOP)


def executed(node):
    """Every node that may be run: all but what stands under ``if TYPE_CHECKING``."""
    yield node
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and isinstance(child.test, ast.Name) and child.test.id == "TYPE_CHECKING":
            continue
        yield from executed(child)


def imports(name, path):
    """Everything that a module imports, at any depth: as (module of the package or None, full name)."""
    package = ["gpu_mlp", *(name.split(".") if path.name == "__init__.py" else name.split(".")[:-1])]
    known = {n for n, _ in modules()}
    for node in executed(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            found = [f"{module}.{alias.name}" for alias in node.names]
        else:
            continue
        for full in found:
            parts = full.split(".")
            if parts[0] != "gpu_mlp":
                yield None, full
                continue
            inner = [".".join(parts[1:end]) for end in range(len(parts), 1, -1)]
            yield next((candidate for candidate in inner if candidate in known), ""), full


@pytest.mark.parametrize(("name", "path"), [*modules()], ids=lambda v: v if isinstance(v, str) else "")
def test_imports_run_downwards_only(name, path):
    for inner, full in imports(name, path):
        if inner is None:
            continue
        if inner == "":
            assert row(name) == TOP, f"{name} imports the package itself ({full})"
        elif name in LEAVES:
            assert inner in LEANS.get(name, {"checks"}), f"the leaf {name} imports {full}"
        elif row(name) < TOP:
            assert row(inner) < row(name), f"{name} imports {full}, a room that is not below it"
        else:
            assert inner not in CLI or name in CLI, f"{name} imports the command line"


@pytest.mark.parametrize(("name", "path"), [*modules()], ids=lambda v: v if isinstance(v, str) else "")
def test_other_libraries_stay_in_their_rooms(name, path):
    outside = {full.split(".")[0] for inner, full in imports(name, path) if inner is None}
    if name not in CUPY:
        assert not outside & {"cupy", "cupyx", "cupy_backends"}
    if name not in SKLEARN:
        assert "sklearn" not in outside
    if row(name) < TOP:
        assert not outside & {"typer", "click", "matplotlib"}
    if name in LEAVES - {"progress"}:
        assert not outside & {"rich"}


def test_the_walk_sees_imports_of_every_form(tmp_path):
    path = tmp_path / "some.py"
    path.write_text(
        "import cupy.cuda\nfrom . import checks\nfrom ..network import MLP\n"
        "def f():\n    from gpu_mlp.ops.philox import bits\n    import gpu_mlp\n"
        "if TYPE_CHECKING:\n    from ..training import Trainer\n"
    )
    found = set(imports("ops.some", path))
    assert {i for i, _ in found} == {None, "ops", "network", "ops.philox", ""}
    assert (None, "cupy.cuda") in found


def test_there_is_no_circle():
    """Each room can be imported first, in a process of its own."""
    code = "import importlib, sys; importlib.import_module('gpu_mlp.' + sys.argv[1])"
    for name in ("ops.interface", "losses", "fitting", "training"):
        subprocess.run([sys.executable, "-c", code, name], check=True, timeout=60)


IMPORT = """
import json, sys, time
import numpy, numpy.random, numpy.linalg, typing, dataclasses, pathlib
start = time.process_time()
import gpu_mlp
seconds = time.process_time() - start
print(json.dumps({"seconds": seconds, "modules": sorted({name.split(".")[0] for name in sys.modules})}))
"""


def fresh_import():
    done = subprocess.run([sys.executable, "-c", IMPORT], capture_output=True, text=True, timeout=60, check=True)
    assert done.stderr == ""
    return json.loads(done.stdout)


def test_import_brings_nothing_heavy_along():
    loaded = set(fresh_import()["modules"])
    assert "gpu_mlp" in loaded
    assert not loaded & set(HEAVY)
    assert any(importlib.util.find_spec(name) for name in HEAVY), "or the test would prove nothing"


def test_import_takes_under_three_tenths_of_a_second():
    """Processor time beyond NumPy's own; one of five will do, since other work on the machine only ever adds."""
    assert any(fresh_import()["seconds"] < 0.3 for _ in range(5))


def test_training_on_the_cpu_needs_neither_the_command_line_nor_plots():
    code = (
        "import sys, numpy as np\nfrom gpu_mlp import MLP, Trainer\n"
        "net = MLP([2, 3, 2], output='softmax')\n"
        "Trainer(net).fit((np.ones((8, 2)), np.zeros(8, int)), epochs=2, progress=False)\n"
        "print(' '.join({m.split('.')[0] for m in sys.modules} & {'typer', 'click', 'rich', 'sklearn', 'matplotlib',"
        " 'pandas', 'cupy', 'pyarrow', 'torch'}))"
    )
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True, env=environment
    )
    assert done.stdout.strip() == ""


def test_a_checkout_reads_its_own_kernels_whichever_copy_is_installed(tmp_path):
    folder = PACKAGE.parent
    if not (folder / "kernels").is_dir():
        pytest.skip("the package is installed, and this is no checkout of it")
    for name in ("gpu_mlp", "kernels"):
        shutil.copytree(folder / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "kernels" / "gather.cu").write_text("// another text\n")
    code = "from gpu_mlp.ops import launch; print(launch.text('gather.cu'), end='')"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    result = subprocess.run([sys.executable, "-c", code], env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert result.stdout == "// another text\n", result.stderr
