"""Every kernel that the CUDA implementation can ask for, as compilation units, and their compilation without a GPU.

A unit is one NVRTC source with many variants of one kernel in it (all activations, all rules, …), each under a name of
its own: 300 units instead of some 10,000 modules. Used by the tests, and to write the table of registers:

    python benchmarks/kernel_units.py benchmarks/results/kernel_resources.csv
"""

from __future__ import annotations

import csv
import re
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from gpu_mlp import losses, optimizers
from gpu_mlp.activations import ACTIVATIONS
from gpu_mlp.ops import launch

ARCHITECTURES = (70, 75, 80, 86, 89, 90, 100, 120)
VECTOR = {"float64": 2, "float32": 4, "float16": 8, "bfloat16": 8}
READS = {"none": "0", "h": "1", "z": "2"}

KERNEL = re.compile(r'extern "C" __global__ void(?: __launch_bounds__\(\w+\))?\s+(\w+)\(')

Macros = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Unit:
    """A source file with variants of it: the ``shared`` macros, then each variant's own, kernels renamed by its tag."""

    file: str
    storage: str
    vec: int
    shared: Macros
    variants: tuple[tuple[str, Macros], ...]
    repeated: tuple[str, ...] = ()  # headers whose text depends on the variant's macros
    renamed: tuple[str, ...] = ()  # functions in those headers

    @property
    def name(self) -> str:
        """A short name for reports."""
        shared = "-".join(f"{macro.lower()}{value}" for macro, value in self.shared)
        return f"{self.file.removesuffix('.cu')}-{self.storage}-vec{self.vec}{'-' + shared if shared else ''}"

    def source(self) -> str:
        """The text that NVRTC gets."""
        headers = [name for name in (*launch.COMMON, *launch.HEADERS[self.file]) if name not in self.repeated]
        parts = [f"#define {launch.STORAGE[self.storage]}", f"#define VEC {self.vec}"]
        parts += [f"#define {macro} {value}" for macro, value in self.shared]
        parts += [launch.text(name) for name in headers]
        names = (*self.renamed, *KERNEL.findall(launch.text(self.file)))
        for tag, macros in self.variants:
            parts += [f"#define {macro} {value}" for macro, value in macros]
            parts += [f"#define {name} {name}_{tag}" for name in names]
            parts += [launch.text(name) for name in self.repeated] + [launch.text(self.file)]
            parts += [f"#undef {macro}" for macro, _ in macros] + [f"#undef {name}" for name in names]
        return "\n".join(parts)


def units() -> Iterator[Unit]:
    """Every unit, for every storage type."""
    for storage, vec in VECTOR.items():
        for length in (vec, 1):
            yield from _activation_units(storage, length)
            yield _loss_unit(storage, length)
        for logarithm in "01":
            yield Unit("softmax.cu", storage, 1, (("LOGARITHM", logarithm),), _flags("HAS_BIAS"))
        for labels in "01":
            for weighted in "01":
                shared = (("LABELS", labels), *_target("0", "1", weighted, "0.1"))
                yield Unit("cross_entropy.cu", storage, 1, shared, (("all", ()),))
        shared = (("LABELS", "1"), *_target("0", "1", "0", "0.0"), ("PROBABILITY_CLIP", "1e-7"))
        yield Unit("cross_entropy.cu", storage, 1, shared, (("all", ()),))
        yield Unit("flat.cu", storage, 1, (), (("all", ()),))
        yield Unit("muon.cu", storage, 1, (), _flags("HAS_SHADOW"))
        yield Unit("gather.cu", storage, 1, (), _gather_variants())
        yield _update_unit(storage)


def _flags(macro: str) -> tuple[tuple[str, Macros], ...]:
    return tuple((f"{macro.lower()}{value}", ((macro, value),)) for value in "01")


def _activation_units(storage: str, vec: int) -> Iterator[Unit]:
    elementwise = [f for f in ACTIVATIONS.values() if not f.rowwise]
    forward = tuple(
        (f.name, (("F", f"f_{f.name}"), ("KEEPS_Z", str(int(f.reads == "z"))), ("HAS_BIAS", "1"))) for f in elementwise
    )
    backward = tuple((f.name, (("DF", f"df_{f.name}"), ("READS", READS[f.reads]))) for f in elementwise)
    for dropout in "01":
        yield Unit("forward.cu", storage, vec, (("DROPOUT", dropout),), forward)
        yield Unit("backward.cu", storage, vec, (("DROPOUT", dropout), ("HAS_SUMS", "1")), backward)


def _target(signs: str, categorical: str, weights: str, smoothing: str) -> Macros:
    return (
        ("SIGNS", signs),
        ("CATEGORICAL", categorical),
        ("CLASS_WEIGHTS", weights),
        ("LABEL_SMOOTHING", smoothing),
    )


def _loss_unit(storage: str, vec: int) -> Unit:
    names = [*losses.LOSSES, *(f"{f}_{loss}" for f, loss in losses.FUSED if f in ("sigmoid", "exp"))]
    variants = []
    for name in names:
        own = (("VALUE", f"value_{name}"), ("SLOPE", f"slope_{name}"), ("DF", "df_tanh"), ("READS", "1"))
        variants.append((name, own))
    shared = (("LABELS", "0"), ("MEAN", "1"), ("DROPOUT", "0"), ("HAS_SUMS", "1"), *_target("0", "0", "0", "0.0"))
    return Unit("loss.cu", storage, vec, shared, tuple(variants))


def _gather_variants() -> tuple[tuple[str, Macros], ...]:
    pairs = {
        "cast": ("unsigned char", "T"),
        "copy": ("T", "T"),
        "labels": ("long long", "long long"),
        "widen": ("T", "double"),
        "half": ("Float16Source", "T"),
        "bfloat": ("BFloat16Source", "T"),
    }
    return tuple((tag, launch.gather_macros(a, b)) for tag, (a, b) in pairs.items())


def _update_unit(storage: str) -> Unit:
    rules: list[optimizers.Optimizer] = []
    for kind in optimizers.OPTIMIZERS.values():
        for options in ({}, {"momentum": 0.9}, {"amsgrad": True}, {"centered": True, "momentum": 0.9}):
            if kind.name not in ("lbfgs", "muon") and set(options) <= set(kind.__dataclass_fields__):
                rules.append(kind(**options))
    shadow = (("HAS_SHADOW", str(int(storage in ("float16", "bfloat16")))),)
    variants = tuple((f"{rule.name}{i}", (*launch.rule_macros(rule), *shadow)) for i, rule in enumerate(rules))
    return Unit(
        "update.cu", storage, VECTOR[storage if storage == "float64" else "float32"], (), variants,
        ("optimizers.cuh",), ("coefficients", "rule", "average", "average_square", "decay"),
    )  # fmt: skip


# --- compiling ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Resources:
    """What one kernel needs on one architecture: registers, and bytes of stack and spills, which should be 0."""

    kernel: str
    registers: int
    stack: int
    spills: int


def compile_unit(text: str, architecture: int) -> tuple[str, list[Resources]]:
    """NVRTC to machine code for sm_<architecture>: the compiler's complaints ("" if it has none) and the resources."""
    from cuda.bindings import nvrtc

    options = [b"--std=c++17", f"--gpu-architecture=sm_{architecture}".encode(), b"--ptxas-options=-v"]
    options += [f"-I{folder}".encode() for folder in include_folders()]
    _, program = nvrtc.nvrtcCreateProgram(text.encode(), b"unit.cu", 0, [], [])
    result = nvrtc.nvrtcCompileProgram(program, len(options), options)[0]
    _, size = nvrtc.nvrtcGetProgramLogSize(program)
    log = bytes(size + 2)  # written to in place; a single byte would be one that all of Python shares
    nvrtc.nvrtcGetProgramLog(program, log)
    nvrtc.nvrtcDestroyProgram(program)
    told = log.decode(errors="replace").strip("\0 \n")
    if result != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        return told or str(result), []
    return "", _resources(told)


def include_folders() -> list[Path]:
    """Where cuda_fp16.h is: in the wheel nvidia-cuda-runtime-cu12."""
    import importlib.util

    spec = importlib.util.find_spec("nvidia.cuda_runtime")
    if spec is None or not spec.submodule_search_locations:
        return []
    return [Path(location) / "include" for location in spec.submodule_search_locations]


def _resources(log: str) -> list[Resources]:
    found = []
    name = stack = spills = None
    for line in log.splitlines():
        if match := re.search(r"Compiling entry function '(\w+)'", line):
            name = match[1]
        elif match := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line):
            stack, spills = int(match[1]), int(match[2]) + int(match[3])
        elif (match := re.search(r"Used (\d+) registers", line)) and name is not None:
            found.append(Resources(name, int(match[1]), stack or 0, spills or 0))
            name = stack = spills = None
    return found


def _job(job: tuple[str, str, int]) -> tuple[str, int, str, list[Resources]]:
    unit, text, architecture = job
    return unit, architecture, *compile_unit(text, architecture)


def compile_all(architectures: tuple[int, ...] = ARCHITECTURES) -> Iterator[tuple[str, int, str, list[Resources]]]:
    """(unit, architecture, complaints, resources) of every unit on every architecture, on all processors."""
    jobs = [(unit.name, unit.source(), architecture) for unit in units() for architecture in architectures]
    with ProcessPoolExecutor() as pool:
        yield from pool.map(_job, jobs, chunksize=4)


def main(path: str) -> None:
    """Write the table; exit status 1 if anything does not compile."""
    rows, failed = [], False
    for unit, architecture, complaints, resources in compile_all():
        if complaints:
            failed = True
            print(f"{unit} sm_{architecture}: {complaints}", file=sys.stderr)
        rows += [(unit, r.kernel, f"sm_{architecture}", r.registers, r.stack, r.spills) for r in resources]
    with open(path, "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("unit", "kernel", "architecture", "registers", "stack_bytes", "spill_bytes"))
        writer.writerows(sorted(rows))
    sys.exit(failed)


if __name__ == "__main__":
    main(sys.argv[1])
