"""Every kernel to machine code for every architecture, without a GPU: it compiles, nothing spills, and the streaming
kernels load and store whole packs.

`benchmarks/kernel_units.py` says what every kernel is and writes the table of registers; `kernel_compiler.py` compiles.
"""

from __future__ import annotations

import csv
import os
import re
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
import kernel_compiler
import kernel_units
from kernel_compiler import ARCHITECTURES, compile_as_cupy, compile_text, families, front_end
from kernel_units import Unit, compile_unit, units

from gpu_mlp.activations import ACTIVATIONS
from gpu_mlp.losses import LOSSES
from gpu_mlp.ops import launch
from gpu_mlp.optimizers import OPTIMIZERS

BENCHMARKS = Path(kernel_units.__file__).parent
FLAT = Unit("flat.cu", "bfloat16", 1, (), (("all", ()),))


def required(told):
    """Skip where something is not installed, and say what; under CI=true that is a failure."""
    if told is not None:
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(told)


@pytest.fixture(scope="module")
def compiler():
    required(kernel_compiler.missing())


@pytest.fixture(scope="module")
def disassembler(compiler):
    package, name = kernel_compiler.NVDISASM
    found = kernel_compiler.tool(package, name)
    required(None if found else f"looking into machine code needs: pip install {package}")


@pytest.fixture(scope="module")
def compiled(compiler):
    """Everything, once."""
    return list(kernel_units.compile_all(disassemble=kernel_compiler.tool(*kernel_compiler.NVDISASM) is not None))


# --- what there is to compile ---------------------------------------------------------------------------------------


def test_every_source_is_registered_and_has_units():
    sources = {path.name for path in (BENCHMARKS.parent / "kernels").glob("*.cu")}
    assert sources == set(launch.HEADERS)
    assert sources == {unit.file for unit in units()}


def test_every_header_is_in_front_of_some_source():
    headers = {path.name for path in (BENCHMARKS.parent / "kernels").glob("*.cuh")}
    assert headers == {
        name for file in launch.HEADERS for storage in launch.STORAGE for name in launch.headers(file, storage)
    }


def test_every_kernel_of_a_source_is_found():
    """The pattern that finds kernels finds as many as there are, and each is in a unit for every storage type."""
    for file in launch.HEADERS:
        names = kernel_units.kernel_names(file)
        assert len(names) == launch.text(file).count("__global__")
        for storage in launch.STORAGE:
            of_storage = [kernel for unit in units() if (unit.file, unit.storage) == (file, storage)
                          for kernel in unit.kernels()]  # fmt: skip
            assert [name for name in names if not any(k == name or k.startswith(f"{name}_") for k in of_storage)] == []


@pytest.mark.parametrize("storage", launch.STORAGE)
def test_every_activation_loss_and_rule_is_there(storage):
    kernels = {kernel for unit in units() if unit.storage == storage for kernel in unit.kernels()}
    elementwise = [f.name for f in ACTIVATIONS.values() if not f.rowwise]
    assert {
        f"{kernel}_{name}" for name in elementwise for kernel in ("bias_activation", "activation_gradient")
    } <= kernels
    assert {f"pointwise_loss_{name}" for name in LOSSES} <= kernels
    rules = {re.sub(r"\d+$", "", kernel) for kernel in kernels}
    assert {f"update_{name}" for name in OPTIMIZERS if name not in ("lbfgs", "muon")} <= rules
    assert "muon_direction" in kernels


def test_names_are_unique():
    keys = [(unit.name, kernel) for unit in units() for kernel in unit.kernels()]
    assert len(keys) == len(set(keys))


# --- the gate -------------------------------------------------------------------------------------------------------


def test_everything_compiles_on_every_architecture(compiled):
    assert [
        (one.unit.name, one.architecture, one.outcome.complaints) for one in compiled if one.outcome.complaints
    ] == []
    done = {(one.unit.name, one.architecture): {r.kernel for r in one.outcome.resources} for one in compiled}
    assert done == {(unit.name, arch): set(unit.kernels()) for unit in units() for arch in assembled_for(unit)}


def assembled_for(unit):
    """Every architecture; for the scalar twin of a packed unit, the oldest of each family."""
    return [family[0] for family in families(unit.source())] if unit.is_twin else ARCHITECTURES


def test_nothing_spills_and_nothing_needs_a_stack(compiled):
    found = [
        (one.unit.name, one.architecture, resource)
        for one in compiled
        for resource in one.outcome.resources
        if one.architecture >= 80 and (resource.stack or resource.spills)
    ]
    assert found == []


def test_a_spill_is_seen(compiler):
    """An array that is indexed at run time needs a stack frame; a hundred live numbers in 32 registers spill."""
    text = """
    extern "C" __global__ void framed(float* x, int n, int m) {
        float a[64];
        for (int i = 0; i < 64; ++i) a[i] = x[i];
        for (int i = 0; i < n; ++i) a[i * m % 64] += a[(i + n) % 64];
        x[0] = a[m];
    }
    extern "C" __global__ void __launch_bounds__(1024, 2) spilled(float* x) {
        float a[100];
        for (int i = 0; i < 100; ++i) a[i] = x[i * 7];
        for (int k = 0; k < 9; ++k) for (int i = 0; i < 100; ++i) a[i] = a[i] * a[(i * 37 + 11) % 100] + x[k];
        for (int i = 0; i < 100; ++i) x[i] = a[i];
    }"""
    resources = {r.kernel: r for r in compile_text(text, (90,))[90].resources}
    assert resources["framed"].stack > 0
    assert resources["spilled"].spills > 0


# --- the gate can fail ----------------------------------------------------------------------------------------------


def broken(monkeypatch, replacement):
    """flat.cu with the first line of finish_sum's body replaced."""
    text = launch.text("flat.cu")
    start = text.index("{", text.index("finish_sum(")) + 1
    changed = f"{text[:start]}\n{replacement}\n{text[start:]}"
    original = launch.text
    monkeypatch.setattr(kernel_units.launch, "text", lambda name: changed if name == "flat.cu" else original(name))


def complaints():
    return {one.architecture: one.outcome.complaints for one in compile_unit(FLAT) if one.outcome.complaints}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_what_one_architecture_does_not_take_is_reported_for_it_alone(compiler, monkeypatch, architecture):
    broken(monkeypatch, f"#if __CUDA_ARCH__ == {architecture}0\n#error not for this one\n#endif")
    found = complaints()
    assert list(found) == [architecture]
    assert found[architecture].startswith("finish_sum: ")
    assert "not for this one" in found[architecture]


@pytest.mark.parametrize(
    ("instruction", "refused"),
    [
        ('asm("{.reg .b16 t; cvt.rn.bf16.f32 t, 0f3F800000;}");', [70, 75]),
        ('asm volatile("barrier.cluster.arrive;");', [70, 75, 80, 86, 89]),
        ('asm volatile("no.such.instruction;");', list(ARCHITECTURES)),
    ],
)
def test_an_instruction_is_reported_where_it_does_not_exist(compiler, monkeypatch, instruction, refused):
    broken(monkeypatch, instruction)
    found = complaints()
    assert list(found) == refused
    assert all(told.startswith("finish_sum: ") for told in found.values())


def test_a_missing_name_is_reported(compiler, monkeypatch):
    broken(monkeypatch, "int x = missing;")
    assert list(complaints()) == list(ARCHITECTURES)


def test_a_source_without_a_unit_is_reported(monkeypatch):
    monkeypatch.setitem(launch.HEADERS, "new.cu", ())
    with pytest.raises(AssertionError):
        test_every_source_is_registered_and_has_units()


# --- what the gate's shortcut rests on ------------------------------------------------------------------------------


def test_families_follow_what_a_text_asks():
    assert families("no question") == [[70, 75, 80, 86, 89, 90], [100, 120]]
    assert families("__CUDA_ARCH__ >= 800") == [[70, 75], [80, 86, 89, 90], [100, 120]]
    assert families("__CUDA_ARCH__ == 860") == [[70, 75, 80, 89, 90], [86], [100, 120]]
    assert families("__CUDA_ARCH__ < 900 __CUDA_ARCH__ != 1200") == [[70, 75, 80, 86, 89], [90], [100], [120]]
    assert families("__CUDA_ARCH__ / 100 == 8") == [[architecture] for architecture in ARCHITECTURES]
    assert families("__CUDA_ARCH_FEAT_SM90_ALL") == [[architecture] for architecture in ARCHITECTURES]


def samples():
    """A unit of each storage type in which its conversions, math functions and shared memory come up."""
    return [unit for unit in units() if unit.file == "softmax.cu"]


@pytest.mark.parametrize("unit", samples(), ids=lambda unit: unit.storage)
def test_the_front_end_does_the_same_within_a_family(compiler, unit):
    text = unit.source()
    for family in families(text):
        made = {re.sub(rb"(?m)^\.target.*$", b"", front_end(text, architecture)[1]) for architecture in family}
        assert len(made) == 1


@pytest.mark.parametrize("unit", samples(), ids=lambda unit: unit.storage)
def test_machine_code_is_what_cupy_gets_from_nvrtc(compiler, unit):
    """The same registers, stack and spills as NVRTC alone comes to, with CuPy's flags, on every architecture."""
    text = replace(unit, variants=unit.variants[:1]).source()
    ours = {architecture: set(outcome.resources) for architecture, outcome in compile_text(text).items()}
    assert ours == {architecture: set(compile_as_cupy(text, architecture).resources) for architecture in ARCHITECTURES}


# --- the committed table --------------------------------------------------------------------------------------------


def test_the_committed_table_names_the_kernels_that_there_are():
    """Not the numbers, which change with the compiler; to write it anew: see benchmarks/kernel_units.py."""
    with open(BENCHMARKS / "results" / "kernel_resources.csv", newline="") as file:
        header, *rows = csv.reader(file)
    assert tuple(header) == kernel_units.COLUMNS
    assert [(unit, kernel) for unit, kernel, *_ in rows] == sorted(
        (unit.name, kernel) for unit in units() for kernel in unit.kernels()
    )


# --- packs ----------------------------------------------------------------------------------------------------------


# Kernels of packed sources that do not stream, and why they may access less than a pack at a time.
NOT_STREAMING = {
    "finish_column_sums": "adds up partial sums, a column a thread; neighbouring threads have neighbouring columns",
    "prepare_update": "one thread",
    "prepare_descent": "one thread",
    "disarm": "stores only after a cost that is not finite",
}
BITS = {"unsigned char": 8, "Float16Source": 16, "BFloat16Source": 16, "float": 32, "double": 64, "long long": 64}


@dataclass(frozen=True)
class Packs:
    """How a streaming kernel may access global memory: ``whole`` lists the accesses that it must have, of 16 bytes but
    for the narrower side of a cast; ``besides`` the narrower ones, with the largest count and what they are.
    """

    whole: dict[str, int]
    besides: dict[str, tuple[float, str]]

    def complaints(self, found):
        """What is wrong with the accesses that were found, counts by instruction."""
        wrong = [f"{op}: {found.get(op, 0)}, fewer than {n}" for op, n in self.whole.items() if found.get(op, 0) < n]
        for op, count in found.items():
            most = self.besides.get(op, (0, ""))[0] + (float("inf") if op in self.whole else 0)
            if not op.endswith(".128") and count > most:
                wrong.append(f"{op}: {count}, more than {most}")
        return wrong


def packs(unit, macros, kernel):
    """The rule for a streaming kernel of a unit; None for one that does not stream."""
    s_bits = 64 if unit.storage == "float64" else 32
    t_bits = {"float64": 64, "float32": 32}.get(unit.storage, 16)
    if kernel in ("bias_activation", "activation_gradient"):
        return Packs({"LDG.128": 1, "STG.128": 1}, {"LDG.64": (2, "the round in the state, for dropout")})
    if kernel == "pointwise_loss":
        besides = {"LDG.64": (4, "the loss scale, the total weight and a row's sample weight in the state")}
        besides[f"LDG.{s_bits}"] = (float("inf"), "the target: one row of it may begin anywhere, or it is a label")
        besides["STG.64"] = (1, "the block's part of the cost")
        return Packs({"LDG.128": 2, "STG.128": 2}, besides)
    if kernel == "update":
        moments = int(macros["MOMENTS"])
        whole = {"LDG.128": 2 + moments, "STG.128": 1 + moments}
        if t_bits == 16:
            whole["STG.64"] = 1  # the 16-bit copy of four float32 parameters
        return Packs(whole, {"LDG.64": (8, "what prepare_update left, read once")})
    if kernel == "gather":
        widths = [BITS.get(macros[side], t_bits) * unit.vec for side in ("FROM", "TO")]
        assert max(widths) == 128
        return Packs(
            {f"LDG.{widths[0]}": 1, f"STG.{widths[1]}": 1}, {"LDG.64": (2, "the row's number, and the cursor")}
        )
    assert kernel in NOT_STREAMING, kernel
    return None


def stray_accesses(one):
    """The complaints about a compiled unit, by kernel, and how many streaming kernels it has."""
    wrong, streaming = {}, 0
    for kernel, found in one.accesses.items():
        name = max((n for n in kernel_units.kernel_names(one.unit.file) if kernel.startswith(n)), key=len)
        macros = next((dict(macros) for tag, macros in one.unit.variants if kernel == f"{name}_{tag}"), {})
        rule = packs(one.unit, macros, name)
        streaming += rule is not None
        if rule is not None and (told := rule.complaints(found)):
            wrong[kernel] = told
    return wrong, streaming


def test_streaming_kernels_load_and_store_packs(compiled, disassembler):
    """In the machine code for Hopper. The other sources (rows of softmax, norms, penalties, Muon) have no packs."""
    looked = [one for one in compiled if one.accesses is not None]
    assert {one.unit.name for one in looked} == {
        u.name for u in units() if u.file in kernel_units.PACKED and not u.is_twin
    }
    assert {one.unit.name: wrong for one in looked if (wrong := stray_accesses(one)[0])} == {}


@pytest.mark.parametrize("file", kernel_units.PACKED)
def test_a_scalar_twin_is_seen(disassembler, file):
    """The scalar form of every streaming kernel breaks the rule of its packed form."""
    for unit in units():
        if unit.file == file and unit.is_twin and ("DROPOUT", "1") not in unit.shared:
            twin = replace(unit, variants=unit.variants[:1])
            (one,) = compile_unit(twin, (kernel_units.DISASSEMBLED,), disassemble=True)
            wrong, streaming = scalar_complaints(one)
            assert len(wrong) == streaming > 0


def scalar_complaints(one):
    """`stray_accesses`, with the rule of the packed form."""
    packed = next(u for u in units() if (u.file, u.storage) == (one.unit.file, one.unit.storage) and not u.is_twin
                  and set(one.unit.variants) <= set(u.variants))  # fmt: skip
    return stray_accesses(replace(one, unit=replace(packed, variants=one.unit.variants)))
