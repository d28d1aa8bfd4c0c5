"""Every kernel that the CUDA implementation can ask for, as compilation units, and their compilation without a GPU.

A unit is one source with many variants of one kernel in it (all activations, all rules, …), each under a name of its
own: a hundred units instead of some 1,000 modules. Used by the tests, and to write the table of registers:

    python benchmarks/kernel_units.py benchmarks/results/kernel_resources.csv
"""

from __future__ import annotations

import csv
import os
import re
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from kernel_compiler import ARCHITECTURES, Outcome, compile_text, global_accesses, missing

from gpu_mlp import losses, optimizers
from gpu_mlp.activations import ACTIVATIONS
from gpu_mlp.ops import launch

VECTOR = {"float64": 2, "float32": 4, "float16": 8, "bfloat16": 8}
PACKED = ("forward.cu", "backward.cu", "loss.cu", "update.cu", "gather.cu")  # those with units for packs
READS = {"none": "0", "h": "1", "z": "2"}
DISASSEMBLED = 90  # the architecture whose machine code is looked into

# A kernel in a source: from its first line to the brace at the beginning of a line that ends it.
KERNEL = re.compile(r'^extern "C" __global__ void(?: __launch_bounds__\([\w, ]+\))?\s+(\w+)\(.*?^}\n', re.M | re.S)

Macros = tuple[tuple[str, str], ...]


def kernel_names(file: str) -> list[str]:
    """The kernels in a source."""
    return [match[1] for match in KERNEL.finditer(launch.text(file))]


@dataclass(frozen=True)
class Unit:
    """A source file with variants of it: the ``shared`` macros, then each variant's own, kernels renamed by its tag.

    What mentions no macro of the variants is the same in all of them, and in the unit once, under its own name.
    """

    file: str
    storage: str
    vec: int
    shared: Macros
    variants: tuple[tuple[str, Macros], ...]
    repeated: tuple[str, ...] = ()  # headers whose text depends on the variant's macros
    renamed: tuple[str, ...] = ()  # functions in those headers
    only: str = ""  # the one kernel, by its name in the unit, to be left in

    @property
    def is_twin(self) -> bool:
        """Whether this is the scalar form of a unit that loads and stores packs."""
        return self.vec == 1 and self.file in PACKED

    @property
    def name(self) -> str:
        """A short name for reports."""
        shared = "-".join(f"{macro.lower()}{value}" for macro, value in self.shared)
        return f"{self.file.removesuffix('.cu')}-{self.storage}-vec{self.vec}{'-' + shared if shared else ''}"

    def source(self) -> str:
        """The text that the compiler gets."""
        headers = [name for name in launch.headers(self.file, self.storage) if name not in self.repeated]
        parts = [f"#define {launch.STORAGE[self.storage]}", f"#define VEC {self.vec}"]
        parts += [f"#define {macro} {value}" for macro, value in self.shared]
        parts += [launch.text(name) for name in headers]
        parts += [KERNEL.sub("", launch.text(self.file)), *self._kernel_texts(self._constant())]
        names = (*self.renamed, *self._varying())
        for tag, macros in self.variants:
            parts += [f"#define {macro} {value}" for macro, value in macros]
            parts += [f"#define {name} {name}_{tag}" for name in names]
            parts += [launch.text(name) for name in self.repeated]
            parts += self._kernel_texts(self._varying(), f"_{tag}")
            parts += [f"#undef {macro}" for macro, _ in macros] + [f"#undef {name}" for name in names]
        return "\n".join(parts)

    def kernels(self) -> list[str]:
        """The names of the kernels in the unit."""
        return self._constant() + [f"{name}_{tag}" for tag, _ in self.variants for name in self._varying()]

    def alone(self) -> Iterator[Unit]:
        """The unit with one of its kernels at a time."""
        for name in self.kernels():
            yield replace(self, only=name)

    def _varying(self) -> list[str]:
        """The kernels that mention what differs between the variants."""
        differing = {*self.renamed, *(macro for _, macros in self.variants for macro, _ in macros)}
        kernels = KERNEL.finditer(launch.text(self.file))
        return [match[1] for match in kernels if not differing.isdisjoint(re.findall(r"\w+", match[0]))]

    def _constant(self) -> list[str]:
        return [name for name in kernel_names(self.file) if name not in self._varying()]

    def _kernel_texts(self, names: list[str], suffix: str = "") -> list[str]:
        wanted = [name for name in names if self.only in ("", name + suffix)]
        return [match[0] for match in KERNEL.finditer(launch.text(self.file)) if match[1] in wanted]


def units() -> Iterator[Unit]:
    """Every unit, for every storage type."""
    for storage, vec in VECTOR.items():
        for length in (vec, 1):
            yield from _activation_units(storage, length)
            yield _loss_unit(storage, length)
        yield Unit("softmax.cu", storage, 1, (), _softmax_variants())
        yield _cross_entropy_unit(storage)
        yield _cross_entropy_unit(storage, (("PROBABILITY_CLIP", "1e-7"),))
        yield Unit("flat.cu", storage, 1, (), (("all", ()),))
        yield Unit("muon.cu", storage, 1, (), _flags("HAS_SHADOW"))
        yield from _gather_units(storage)
        for length in (VECTOR["float64" if storage == "float64" else "float32"], 1):
            yield _update_unit(storage, length)
            yield Unit("average.cu", storage, length, (), (("all", ()),))


def _flags(macro: str) -> tuple[tuple[str, Macros], ...]:
    return tuple((f"{macro.lower()}{value}", ((macro, value),)) for value in "01")


def _softmax_variants() -> tuple[tuple[str, Macros], ...]:
    return tuple(
        (f"{name}{bias}", (("LOGARITHM", logarithm), ("HAS_BIAS", bias)))
        for logarithm, name in (("0", "softmax"), ("1", "log_softmax"))
        for bias in "01"
    )


def _cross_entropy_unit(storage: str, shared: Macros = ()) -> Unit:
    variants = tuple(
        (f"{target}{weighted}", (("LABELS", labels), *_target("0", "1", weighted, "0.1")))
        for labels, target in (("0", "rows"), ("1", "labels"))
        for weighted in "01"
    )
    return Unit("cross_entropy.cu", storage, 1, shared, variants, ("target.cuh",), ("Y", "target", "row_share"))


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


def _gather_units(storage: str) -> Iterator[Unit]:
    """Casts from and to smaller, equal and larger types, and labels; scalar, and in packs that fit the larger type."""
    pairs = {
        "bytes": ("unsigned char", "T", 1),
        "floats": ("float", "T", 4),
        "doubles": ("double", "T", 8),
        "same": ("T", "T", 1),
        "labels": ("long long", "long long", 8),
        "halves": ("Float16Source", "T", 2),
        "bfloats": ("BFloat16Source", "T", 2),
        "widened": ("T", "double", 8),
    }
    own = {"float64": "double", "float32": "float"}.get(storage)
    for packed in (False, True):
        by_length: dict[int, list[tuple[str, Macros]]] = {}
        for tag, (a, b, size) in pairs.items():
            if own in (a, b):
                continue  # that is "same"
            length = 16 // max(size, 16 // VECTOR[storage]) if packed else 1
            by_length.setdefault(length, []).append((tag, launch.gather_macros(a, b)))
        for length, variants in by_length.items():
            yield Unit("gather.cu", storage, length, (), tuple(variants))


def _update_unit(storage: str, vec: int) -> Unit:
    rules: list[optimizers.Optimizer] = []
    for kind in optimizers.OPTIMIZERS.values():
        for options in ({}, {"momentum": 0.9}, {"amsgrad": True}, {"centered": True, "momentum": 0.9}):
            if kind.name not in ("lbfgs", "muon") and set(options) <= set(kind.__dataclass_fields__):
                rules.append(kind(**options))
    shadow = (("HAS_SHADOW", str(int(storage in ("float16", "bfloat16")))),)
    variants = tuple((f"{rule.name}{i}", (*launch.rule_macros(rule), *shadow)) for i, rule in enumerate(rules))
    functions = ("coefficients", "rule", "average", "average_square", "decay")
    return Unit("update.cu", storage, vec, (), variants, ("optimizers.cuh",), functions)


# --- compiling ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Compiled:
    """A unit on one architecture; ``accesses``: of global memory, by kernel, where the machine code was looked into."""

    unit: Unit
    architecture: int
    outcome: Outcome
    accesses: dict[str, dict[str, int]] | None = None


def compile_unit(unit: Unit, architectures: Iterable[int] = ARCHITECTURES, disassemble: bool = False) -> list[Compiled]:
    """A unit on each of the architectures; complaints begin with the kernels that they are about.

    A scalar twin goes through the front end for all of them, but to machine code for the oldest of each family alone,
    which is the strictest: what it takes, the later ones of the family take.
    """
    compiled, guilty = [], {}
    for architecture, outcome in compile_text(unit.source(), architectures, oldest_alone=unit.is_twin).items():
        accesses = None
        if told := outcome.complaints:
            if told not in guilty:
                guilty[told] = ", ".join(_guilty(unit, architecture))
            outcome = Outcome(f"{guilty[told]}: {told}")
        elif disassemble and architecture == DISASSEMBLED:
            accesses = {kernel: dict(counts) for kernel, counts in global_accesses(outcome.cubin).items()}
        compiled.append(Compiled(unit, architecture, replace(outcome, cubin=b""), accesses))
    return compiled


def _guilty(unit: Unit, architecture: int) -> list[str]:
    """The kernels that do not compile on an architecture."""
    alone = [(one.only, compile_text(one.source(), (architecture,))[architecture]) for one in unit.alone()]
    return [kernel for kernel, outcome in alone if outcome.complaints]


def compile_all(architectures: tuple[int, ...] = ARCHITECTURES, disassemble: bool = False) -> Iterator[Compiled]:
    """Every unit on every architecture, on all processors that this process may use."""
    every = list(units())
    with ProcessPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        futures = [
            pool.submit(compile_unit, unit, architectures, disassemble and unit.file in PACKED) for unit in every
        ]
        for future in futures:
            yield from future.result()


COLUMNS = ("unit", "kernel", *(f"sm_{architecture}" for architecture in ARCHITECTURES), "stack_bytes", "spill_bytes")


def table(compiled: Iterable[Compiled]) -> list[tuple[str | int, ...]]:
    """A row a kernel: its registers on each architecture that it is assembled for, and the most stack and spills, in
    bytes, on any."""
    found: dict[tuple[str, str], dict[int, tuple[int, int, int]]] = {}
    for one in compiled:
        for r in one.outcome.resources:
            found.setdefault((one.unit.name, r.kernel), {})[one.architecture] = (r.registers, r.stack, r.spills)
    rows = []
    for key, numbers in sorted(found.items()):
        registers = [numbers[architecture][0] if architecture in numbers else "" for architecture in ARCHITECTURES]
        rows.append((*key, *registers, max(n[1] for n in numbers.values()), max(n[2] for n in numbers.values())))
    return rows


def main(path: str) -> None:
    """Write the table; exit status 1 if anything does not compile, with no table written."""
    if told := missing():
        sys.exit(told)
    compiled = list(compile_all())
    failed = [one for one in compiled if one.outcome.complaints]
    for one in failed:
        print(f"{one.unit.name} sm_{one.architecture}: {one.outcome.complaints}", file=sys.stderr)
    if failed:
        sys.exit(1)
    with open(path, "w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([COLUMNS, *table(compiled)])


if __name__ == "__main__":
    main(sys.argv[1])
