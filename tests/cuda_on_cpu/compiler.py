"""Kernel text in, a loaded module out: g++ compiles what NVRTC would, and the result is kept for the next time.

The text, with `runtime.h` in front and a table of its kernels behind, is compiled with a call before every access,
which `runtime.cpp` answers. Compiled modules lie in a cache, named by a hash of everything that went in; it is per user
and safe with several test processes at once. CUDA's headers come from the pip packages nvidia-cuda-runtime-cu12,
nvidia-cuda-nvcc-cu12 and nvidia-cuda-cccl-cu12; they and `runtime.h` are compiled once, to a precompiled header.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import importlib.util
import json
import os
import re
import shutil
import struct
import subprocess
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).parent
HEADER_PACKAGES = {
    "nvidia.cuda_runtime": "nvidia-cuda-runtime-cu12",
    "nvidia.cuda_nvcc": "nvidia-cuda-nvcc-cu12",
    "nvidia.cuda_cccl": "nvidia-cuda-cccl-cu12",
}
# What the C++ standard leaves undefined and a GPU answers with garbage. Not here: conversions of floats out of range,
# which CUDA defines.
CHECKS = "alignment,bounds,signed-integer-overflow,integer-divide-by-zero,shift-exponent,return,bool"
FLAGS = [
    *("-O1", "-g1", "-w", "-fPIC", "-fvisibility=hidden", "-fno-gnu-unique", "-fno-exceptions", "-fno-rtti"),
    *("-fno-strict-aliasing", "-ffp-contract=off", "-U_FORTIFY_SOURCE"),
    *("-fsanitize=thread", f"-fsanitize={CHECKS}", "-fno-sanitize-recover=all"),
]
RUNTIME_FLAGS = ["-O2", "-g1", "-std=c++17", "-fPIC", "-shared", "-fno-exceptions", "-U_FORTIFY_SOURCE"]


class CompileError(RuntimeError):
    """g++ did not take the kernel text."""


# --- what is needed ---


def missing() -> str | None:
    """What to install before kernels can run here, or None."""
    if os.uname().sysname != "Linux":
        return "running CUDA kernels on the CPU needs Linux"
    if compiler() is None:
        return "running CUDA kernels on the CPU needs g++: apt install g++"
    absent = [package for module, package in HEADER_PACKAGES.items() if _package_folder(module) is None]
    return f"running CUDA kernels on the CPU needs CUDA's headers: pip install {' '.join(absent)}" if absent else None


@functools.cache
def compiler() -> str | None:
    """The path of g++."""
    return shutil.which("g++")


@functools.cache
def _package_folder(module: str) -> Path | None:
    try:
        spec = importlib.util.find_spec(module)
    except ModuleNotFoundError:
        return None
    folders = list(spec.submodule_search_locations or []) if spec else []
    return next((Path(folder) for folder in folders if (Path(folder) / "include").is_dir()), None)


@functools.cache
def _includes() -> list[str]:
    folders = [_package_folder(module) for module in HEADER_PACKAGES]
    return [option for folder in folders if folder for option in ("-isystem", str(folder / "include"))]


@functools.cache
def _toolchain() -> str:
    """Everything besides text and options that a compiled module depends on."""
    version = subprocess.run([compiler(), "--version"], capture_output=True, text=True, check=True).stdout
    ours = [(HERE / name).read_text() for name in ("runtime.h", "runtime.cpp", "compiler.py")]
    return "\0".join([compiler(), version.splitlines()[0], *_includes(), *ours])


# --- the cache ---


@functools.cache
def cache_folder() -> Path:
    """The folder of compiled modules, this user's own."""
    base = os.environ.get("XDG_CACHE_HOME")
    folder = Path(base) / "gpu_mlp" if base else Path(tempfile.gettempdir())
    folder = folder / f"cuda_on_cpu-{os.getuid()}"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        folder = Path(tempfile.mkdtemp(prefix="cuda_on_cpu-"))
    return folder


def _prune(days: int = 14) -> None:
    """Forget modules that nobody has compiled for a while; a loaded one stays loaded."""
    oldest = time.time() - days * 86400
    for path in cache_folder().iterdir():
        with contextlib.suppress(OSError):
            if path.stat().st_mtime < oldest:
                path.unlink()


def _build(command: list[str], output: Path, what: str) -> None:
    """Run g++, with the result put in place at once, so that another process never sees half a file."""
    partial = _partial(output)
    done = subprocess.run([*command, "-o", str(partial)], capture_output=True, text=True)
    if done.returncode:
        raise CompileError(f"g++ did not take {what}:\n{_first_lines(done.stderr)}")
    os.replace(partial, output)


def _partial(path: Path) -> Path:
    """Where a thread writes a file before it is put in place."""
    return path.with_name(f"{path.name}.{os.getpid()}-{threading.get_ident()}")


def _write(path: Path, text: str) -> None:
    """A text file, put in place at once."""
    partial = _partial(path)
    partial.write_text(text)
    os.replace(partial, path)


def _first_lines(text: str, n: int = 40) -> str:
    lines = text.splitlines()
    return "\n".join(lines[:n] + ([f"... ({len(lines) - n} more lines)"] if len(lines) > n else []))


@functools.cache
def runtime() -> ctypes.CDLL:
    """`runtime.cpp`, compiled and loaded."""
    _prune()
    key = hashlib.sha256("\0".join([_toolchain(), *RUNTIME_FLAGS]).encode()).hexdigest()[:24]
    path = cache_folder() / f"runtime-{key}.so"
    if not path.exists():
        _build([compiler(), *RUNTIME_FLAGS, str(HERE / "runtime.cpp"), "-ldl"], path, "runtime.cpp")
    return ctypes.CDLL(str(path))


# --- kernels ---


@dataclass(frozen=True)
class Parameter:
    """One parameter of a kernel: its declaration, and what it takes.

    ``letter``: f float, h half, b bfloat16, i int, u unsigned, ? bool, c bytes, v void, s struct. ``size`` in bytes, of
    ``lanes`` numbers together; for a pointer, of what it points to.
    """

    declaration: str
    is_pointer: bool
    is_const: bool
    letter: str
    lanes: int
    size: int


@dataclass(frozen=True)
class Kernel:
    """A kernel that can be launched: its name, its parameters, and the address of a function that calls it."""

    name: str
    parameters: tuple[Parameter, ...]
    max_threads: int  # of __launch_bounds__, else 1024
    invoke: int
    module: Module


class _ParameterRecord(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int) for name in ("is_pointer", "is_const", "letter", "lanes", "size")]


class _KernelRecord(ctypes.Structure):
    _fields_ = [
        ("name", ctypes.c_char_p),
        ("invoke", ctypes.c_void_p),
        ("parameters", ctypes.POINTER(_ParameterRecord)),
        ("n_parameters", ctypes.c_int),
        ("max_threads", ctypes.c_int),
    ]


class Module:
    """Compiled kernel text. ``kernels`` holds what is `extern "C" __global__` and what is in name_expressions."""

    def __init__(self, code: str, options: tuple[str, ...] = (), name_expressions: tuple[str, ...] = ()) -> None:
        self.code = code
        flags = _flags_of(options)
        parts = [_toolchain(), *FLAGS, *flags, *name_expressions, code]
        key = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]
        self.path = cache_folder() / f"{key}.so"
        table = cache_folder() / f"{key}.json"
        runtime()
        if not (self.path.exists() and table.exists()):
            declarations = _compile(code, flags, name_expressions, self.path)
            _write(table, json.dumps(declarations))
        self._library = ctypes.CDLL(str(self.path))
        self.kernels = self._read_table(json.loads(table.read_text()))

    def _read_table(self, declarations: dict[str, list[str]]) -> dict[str, Kernel]:
        n = ctypes.c_int.in_dll(self._library, "emu_n_kernels").value
        records = (_KernelRecord * n).in_dll(self._library, "emu_kernels")
        kernels = {}
        for record in records:
            name = record.name.decode()
            texts = declarations.get(name, [])
            parameters = []
            for i in range(record.n_parameters):
                p = record.parameters[i]
                text = texts[i] if len(texts) == record.n_parameters else f"number {i + 1}"
                parameters.append(Parameter(text, bool(p.is_pointer), bool(p.is_const), chr(p.letter), p.lanes, p.size))
            kernels[name] = Kernel(name, tuple(parameters), record.max_threads or 1024, record.invoke, self)
        return kernels

    def line_of(self, program_counter: int) -> int:
        """The line of the kernel text that an address in the compiled module came from, or 0."""
        tool = shutil.which("addr2line")
        if not program_counter or tool is None:
            return 0
        anchor = ctypes.addressof(ctypes.c_char.in_dll(self._library, "emu_anchor"))
        offset = next(symbol.value for symbol in self._symbols() if symbol.name == "emu_anchor")
        address = program_counter - 1 - (anchor - offset)
        found = subprocess.run([tool, "-i", "-e", str(self.path), hex(address)], capture_output=True, text=True).stdout
        lines = [line.rsplit(":", 1) for line in found.split("\n") if KERNEL_FILE in line]
        match = re.match(r"\d+", lines[0][1]) if lines else None
        return int(match[0]) if match else 0

    def shared_array_at(self, offset: int) -> tuple[str, int]:
        """The shared array that a byte of the module's shared memory is in, and which byte of it that is."""
        for symbol in self._symbols():
            if symbol.is_thread_local and symbol.value <= offset < symbol.value + max(symbol.size, 1):
                names = re.findall(r"(?:E|_ZL|_Z)(\d+)(?=[A-Za-z_])", symbol.name)
                length = int(names[-1]) if names else 0
                start = symbol.name.rindex(names[-1]) + len(names[-1]) if names else 0
                return symbol.name[start:][: length or None], offset - symbol.value
        return "(none)", offset

    def _symbols(self) -> list[_Symbol]:
        return _symbols_of(self.path.read_bytes())


KERNEL_FILE = "kernel.cu"


class _Symbol(NamedTuple):
    name: str
    value: int
    size: int
    is_thread_local: bool


def _symbols_of(elf: bytes) -> list[_Symbol]:
    """The symbols of a 64-bit ELF file."""
    sections, count = struct.unpack_from("<Q", elf, 0x28)[0], struct.unpack_from("<H", elf, 0x3C)[0]
    headers = [struct.unpack_from("<IIQQQQIIQQ", elf, sections + 64 * i) for i in range(count)]
    symbols = []
    for _, kind, _, _, offset, size, link, *_ in headers:
        if kind == 2:  # SHT_SYMTAB
            strings = headers[link][4]
            for at in range(offset, offset + size, 24):
                start, info, _, _, value, length = struct.unpack_from("<IBBHQQ", elf, at)
                name = elf[strings + start : elf.index(b"\0", strings + start)].decode()
                symbols.append(_Symbol(name, value, length, info & 15 == 6))
    return symbols


def _flags_of(options: tuple[str, ...]) -> list[str]:
    """The options that mean something to g++ as well: -D, -U, -std."""
    flags, standard = [], "-std=c++17"
    pending = iter(options)
    for option in pending:
        if option in ("-D", "-U", "--define-macro", "--undefine-macro"):
            flags.append(("-D" if "define-macro" in option and "un" not in option else option[:2]) + next(pending, ""))
        elif option.startswith(("-D", "-U")):
            flags.append(option)
        elif option.startswith("--define-macro="):
            flags.append("-D" + option.split("=", 1)[1])
        elif option.startswith("--undefine-macro="):
            flags.append("-U" + option.split("=", 1)[1])
        elif option.startswith(("-std=", "--std=")):
            standard = "-" + option.lstrip("-")
    return [standard, *flags]


def _compile(code: str, flags: list[str], name_expressions: tuple[str, ...], output: Path) -> dict[str, list[str]]:
    """Compile to a shared library; returns the parameter declarations of each kernel."""
    text = _translate(code)
    kernels = _kernels_in(text, flags)
    entries = [f'emu::Entry<&{k.name}>::describe("{k.name}", emu::first_bound({k.bounds}))' for k in kernels]
    entries += [f'emu::Entry<&{e}>::describe("{e}", 0)' for e in name_expressions]
    exported = 'extern "C" __attribute__((visibility("default"))) const'
    table = [
        f"{exported} int emu_n_kernels = {len(entries)};",
        f"{exported} char emu_anchor = 0;",
        f"{exported} emu::Kernel emu_kernels[] = {{{', '.join(entries) or '{}'}}};",
    ]
    standard = next(flag for flag in flags if flag.startswith("-std"))
    command = [compiler(), *flags, *FLAGS, *_includes(), "-include", str(_prelude(standard))]
    libraries = ["-x", "none", runtime()._name, "-lm", "-lc", "-lgcc"]
    with tempfile.TemporaryDirectory(prefix="cuda_on_cpu-") as folder:
        source = Path(folder) / KERNEL_FILE
        source.write_text("\n".join([text, '#line 1 "table of kernels"', *table, ""]))
        command += ["-shared", "-nodefaultlibs", "-x", "c++", str(source), *libraries]
        _build(command, output, "the kernel text")
    return {k.name: k.parameters for k in kernels}


@functools.cache
def _prelude(standard: str) -> Path:
    """The header that every kernel text begins with, precompiled: g++ finds the .gch next to it."""
    key = hashlib.sha256("\0".join([_toolchain(), *FLAGS, standard]).encode()).hexdigest()[:24]
    header = cache_folder() / f"prelude-{key}.h"
    compiled = header.with_name(f"{header.name}.gch")
    if not compiled.exists():
        _write(header, f'#include "{HERE / "runtime.h"}"\n#include <cuda_fp16.h>\n#include <cuda_bf16.h>\n')
        _build([compiler(), standard, *FLAGS, *_includes(), "-x", "c++-header", str(header)], compiled, "runtime.h")
    return header


def _translate(code: str) -> str:
    """The few places where g++ wants words in another order, or where a copy would go unwatched."""
    if re.search(r"\bextern\s+__shared__", code):
        raise CompileError("the kernel text has dynamic shared memory (extern __shared__); use arrays of a fixed size")
    code = re.sub(r"\bstatic\s+__shared__", "__shared__", code)
    code = re.sub(r"\b__shared__\s+(alignas\s*\((?:[^()]|\([^()]*\))*\))", r"\1 __shared__", code)
    return re.sub(r"(?<![\w:.])(memcpy|memmove|memset)\s*\(", r"emu::emu_\1(", code)


@dataclass
class _Found:
    name: str
    bounds: str
    parameters: list[str]


def _kernels_in(code: str, flags: list[str]) -> list[_Found]:
    """The kernels with C linkage, read from the text after its own macros are expanded (headers are left out)."""
    bare = re.sub(r"^\s*#\s*include\b.*$", "", code, flags=re.MULTILINE)
    words = ["-D__global__=__emu_global__", "-D__launch_bounds__(...)=__emu_bounds__(__VA_ARGS__)"]
    command = [compiler(), *flags, *words, "-DCUDA_ON_CPU=1", "-nostdinc", "-E", "-P", "-x", "c++", "-"]
    done = subprocess.run(command, input=bare, capture_output=True, text=True)
    if done.returncode:
        raise CompileError(f"g++ did not take the kernel text:\n{_first_lines(done.stderr)}")
    text = done.stdout
    kernels: dict[str, _Found] = {}
    for match in re.finditer("__emu_global__", text):
        start = max(text.rfind(mark, 0, match.start()) for mark in ";}{") + 1
        before = text[start : match.start()]
        if not re.search(r'extern\s*"C"', before) and ("template" in before or not _within_extern_c(text, start)):
            continue
        rest, bounds = text[match.end() :], ""
        found = re.match(r"[\w\s]*?__emu_bounds__\s*\(", rest)
        if found:
            end = _closing(rest, found.end() - 1)
            bounds, rest = rest[found.end() : end], rest[end + 1 :]
        name = re.match(r"[\w\s]*?(\w+)\s*\(", rest)
        if name:
            declared = rest[name.end() : _closing(rest, name.end() - 1)]
            kernels.setdefault(name[1], _Found(name[1], bounds, [" ".join(p.split()) for p in _split(declared)]))
    return list(kernels.values())


def _within_extern_c(text: str, at: int) -> bool:
    """Whether the last extern "C" { before ``at`` is still open there."""
    opened = [match.end() for match in re.finditer(r'extern\s*"C"\s*\{', text[:at])]
    return bool(opened) and text.count("{", opened[-1], at) >= text.count("}", opened[-1], at)


def _closing(text: str, at: int) -> int:
    """The index of the parenthesis that closes the one at ``at``."""
    depth = 0
    for match in re.compile(r"[()]").finditer(text, at):
        depth += 1 if match[0] == "(" else -1
        if depth == 0:
            return match.start()
    raise CompileError("a parenthesis is not closed")


def _split(declared: str) -> list[str]:
    """Parameter declarations, split at the commas outside any bracket."""
    parts, depth, start = [], 0, 0
    for i, character in enumerate(declared):
        depth += (character in "(<[{") - (character in ")>]}")
        if character == "," and depth == 0:
            parts.append(declared[start:i])
            start = i + 1
    last = declared[start:]
    return [*parts, last] if last.strip() and last.strip() != "void" else parts
