"""Kernel text to machine code without a GPU, for every architecture, with the flags that CuPy compiles with.

CuPy has NVRTC do it all: the front end, from text to PTX, then the assembler, from PTX to machine code. Here the two
run apart, the front end as NVRTC and the assembler as ptxas, so that architectures for which the front end does the
same share what it makes (see `families`); that halves the time. A test holds the result against NVRTC's own.

NVRTC comes with the package nvidia-cuda-nvrtc-cu12 (and cuda-bindings to call it), ptxas with nvidia-cuda-nvcc-cu12,
the disassembler with nvidia-cuda-nvdisasm, CUDA's headers with nvidia-cuda-runtime-cu12; none of them needs a driver.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import operator
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from gpu_mlp.ops import launch

ARCHITECTURES = (70, 75, 80, 86, 89, 90, 100, 120)
# What CuPy adds to the options of a RawModule (cupy/cuda/compiler.py); its include folders are `include_folders`.
CUPY_OPTIONS = ("-ftz=true", "--device-as-default-execution-space")
NEW_OPTIMISER = 100  # from here on NVRTC 12.8 and later optimise with another version of LLVM

PTXAS = ("nvidia-cuda-nvcc-cu12", "ptxas")
NVDISASM = ("nvidia-cuda-nvdisasm", "nvdisasm")


@dataclass(frozen=True)
class Resources:
    """What one kernel needs on one architecture: registers, and bytes of stack and spills, which should be 0."""

    kernel: str
    registers: int
    stack: int
    spills: int


@dataclass(frozen=True)
class Outcome:
    """What became of a text on one architecture: the compiler's complaints ("" if it has none), or the machine code."""

    complaints: str
    resources: tuple[Resources, ...] = ()
    cubin: bytes = b""


def missing() -> str | None:
    """What to install before anything can be compiled here, or None."""
    absent = []
    try:
        front_end("", ARCHITECTURES[0])
    except (ImportError, RuntimeError):  # without the bindings; without the library
        absent += ["cuda-bindings", "nvidia-cuda-nvrtc-cu12"]
    absent += [] if include_folders() else ["nvidia-cuda-runtime-cu12"]
    absent += [] if tool(*PTXAS) else [PTXAS[0]]
    return f"compiling kernels without a GPU needs: pip install {' '.join(absent)}" if absent else None


@functools.cache
def tool(distribution: str, name: str) -> Path | None:
    """The path of a program among the files of an installed package, or None."""
    try:
        files = importlib.metadata.files(distribution) or []
    except importlib.metadata.PackageNotFoundError:
        return None
    found = (Path(file.locate()) for file in files if file.name == name and file.parent.name == "bin")
    return next((path for path in found if path.is_file()), None)


@functools.cache
def include_folders() -> tuple[Path, ...]:
    """Where cuda_fp16.h is: in the package nvidia-cuda-runtime-cu12."""
    try:
        spec = importlib.util.find_spec("nvidia.cuda_runtime")
    except ModuleNotFoundError:
        return ()
    folders = list(spec.submodule_search_locations or []) if spec else []
    return tuple(Path(folder) / "include" for folder in folders if (Path(folder) / "include").is_dir())


# --- compiling ------------------------------------------------------------------------------------------------------


def families(text: str, architectures: Iterable[int] = ARCHITECTURES) -> list[list[int]]:
    """The architectures in groups for which NVRTC's front end makes the same PTX of a text.

    Those of a group answer every question that the text asks of __CUDA_ARCH__ alike, and have the same optimiser.
    A text that asks in a way that is not understood here has every architecture in a group of its own. CUDA's own
    headers ask too; of what the kernels use of them (the conversions of __half) all these architectures have the same.
    """
    questions = re.findall(r"__CUDA_ARCH__\s*(>=|<=|==|!=|>|<)\s*(\d+)", text)
    mentions = len(re.findall(r"__CUDA_ARCH", text)) - len(re.findall(r"defined\(__CUDA_ARCH__\)", text))
    compare = {">=": operator.ge, "<=": operator.le, "==": operator.eq, "!=": operator.ne, ">": operator.gt}
    compare["<"] = operator.lt
    groups: dict[tuple[object, ...], list[int]] = {}
    for architecture in architectures:
        answers = tuple(compare[sign](10 * architecture, int(bound)) for sign, bound in set(questions))
        own = architecture if mentions > len(questions) else None
        groups.setdefault((architecture >= NEW_OPTIMISER, own, *answers), []).append(architecture)
    return list(groups.values())


def compile_text(
    text: str, architectures: Iterable[int] = ARCHITECTURES, oldest_alone: bool = False
) -> dict[int, Outcome]:
    """Text to machine code for each of the architectures, or for the oldest of each family alone."""
    outcomes = {}
    for family in families(text, architectures):
        complaints, ptx = front_end(text, family[0])
        for architecture in family[:1] if oldest_alone and not complaints else family:
            outcome = Outcome(complaints) if complaints else assemble(ptx, architecture)
            if outcome.complaints and architecture != family[0]:  # of the oldest's PTX; what of its own?
                own_complaints, own = front_end(text, architecture)
                outcome = Outcome(own_complaints) if own_complaints else assemble(own, architecture)
            outcomes[architecture] = outcome
    return outcomes


def front_end(text: str, architecture: int) -> tuple[str, bytes]:
    """NVRTC's complaints ("" if it has none), and the PTX for an architecture."""
    from cuda.bindings import nvrtc

    program, complaints, _ = _nvrtc(text, f"compute_{architecture}")
    if complaints:
        return complaints, b""
    ptx = bytes(nvrtc.nvrtcGetPTXSize(program)[1])
    nvrtc.nvrtcGetPTX(program, ptx)
    nvrtc.nvrtcDestroyProgram(program)
    return "", ptx.rstrip(b"\0")


def assemble(ptx: bytes, architecture: int) -> Outcome:
    """PTX to machine code."""
    assembler = tool(*PTXAS)
    assert assembler is not None, missing()
    with tempfile.TemporaryDirectory() as folder:
        source, output = Path(folder) / "unit.ptx", Path(folder) / "unit.cubin"
        source.write_bytes(ptx)
        command = [assembler, f"--gpu-name=sm_{architecture}", "--verbose", source, "--output-file", output]
        done = subprocess.run(command, capture_output=True, text=True)
        told = done.stdout + done.stderr
        if done.returncode:
            return Outcome(told.strip() or f"ptxas ended with status {done.returncode}")
        return Outcome("", tuple(_resources(told)), output.read_bytes())


def compile_as_cupy(text: str, architecture: int) -> Outcome:
    """Text to machine code by NVRTC alone, the way CuPy has it done."""
    from cuda.bindings import nvrtc

    program, complaints, log = _nvrtc(text, f"sm_{architecture}", "--ptxas-options=-v")
    if complaints:
        return Outcome(complaints)
    cubin = bytes(nvrtc.nvrtcGetCUBINSize(program)[1])
    nvrtc.nvrtcGetCUBIN(program, cubin)
    nvrtc.nvrtcDestroyProgram(program)
    return Outcome("", tuple(_resources(log)), cubin)


def _nvrtc(text: str, target: str, *more: str) -> tuple[object, str, str]:
    """The compiled program, the complaints and the log."""
    from cuda.bindings import nvrtc

    options = [*launch.OPTIONS, *CUPY_OPTIONS, f"--gpu-architecture={target}", *more]
    encoded = [option.encode() for option in (*options, *(f"-I{folder}" for folder in include_folders()))]
    _, program = nvrtc.nvrtcCreateProgram(text.encode(), b"unit.cu", 0, [], [])
    result = nvrtc.nvrtcCompileProgram(program, len(encoded), encoded)[0]
    log = bytes(nvrtc.nvrtcGetProgramLogSize(program)[1] + 2)  # written to in place; a single byte is all of Python's
    nvrtc.nvrtcGetProgramLog(program, log)
    told = log.decode(errors="replace").strip("\0 \n")
    if result == nvrtc.nvrtcResult.NVRTC_SUCCESS:
        return program, "", told
    nvrtc.nvrtcDestroyProgram(program)
    return None, told or str(result), told


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


# --- looking into machine code --------------------------------------------------------------------------------------

GLOBAL_ACCESS = re.compile(r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?(LDG?|STG?|ATOMG?|REDG?)((?:\.\w+)*)\s")


def global_accesses(cubin: bytes) -> dict[str, Counter[str]]:
    """By kernel, how many instructions access global memory: "LDG.128", "STG.64", … with the width in bits."""
    disassembler = tool(*NVDISASM)
    assert disassembler is not None, f"pip install {NVDISASM[0]}"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "unit.cubin"
        path.write_bytes(cubin)
        listing = subprocess.run([disassembler, "-c", path], capture_output=True, text=True, check=True).stdout
    found: dict[str, Counter[str]] = {}
    kernel = None
    for line in listing.splitlines():
        if match := re.match(r"\.text\.(\w+):", line):
            kernel = match[1]
            found[kernel] = Counter()
        elif kernel is not None and (match := GLOBAL_ACCESS.match(line)):
            found[kernel][f"{match[1]}.{_bits(match[2])}"] += 1
    return found


def _bits(suffixes: str) -> int:
    """The width of an access, by the suffixes of its instruction; 32 where none says."""
    widths = (re.fullmatch(r"[US]?(8|16|64|128)", suffix) for suffix in suffixes.split("."))
    return next((int(width[1]) for width in widths if width), 32)
