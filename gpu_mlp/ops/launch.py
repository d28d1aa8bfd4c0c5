"""From kernel text to a launched kernel: puts the sources together, compiles them once for the types at hand, sizes
grids.

Leans on CuPy and on the texts of `gpu_mlp.kernels`. The headers are written into the source rather than included:
CuPy's kernel cache goes by the source text alone.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.resources
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..optimizers import Optimizer
from .interface import DeviceError

THREADS = 256  # of every block; as in kernels/types.cuh
BLOCKS_PER_PROCESSOR = 8  # 2048 threads fill a multiprocessor of every architecture from sm_70 on, or nearly
MAX_GRID_Y = 65535
WARP = 32
WIDE_ROW = 1024  # columns from which a row gets a whole block instead of a warp
PACK_BYTES = 16  # of one load or store

CUDA_PACKAGES = ("cupy", "cupy_backends", "nvmath", "cuda")  # whose errors are the device's

STORAGE = {
    "float64": "STORAGE_FLOAT64",
    "float32": "STORAGE_FLOAT32",
    "float16": "STORAGE_FLOAT16",
    "bfloat16": "STORAGE_BFLOAT16",
}
FUNCTIONS = ("types.cuh", "sine.cuh", "activations.cuh")  # all that an elementwise operation needs
COMMON = (*FUNCTIONS, "philox.cuh", "reduce.cuh")
# Which headers a source needs in front of it, beside the common ones.
HEADERS = {
    "forward.cu": ("tile.cuh",),
    "backward.cu": ("tile.cuh",),
    "softmax.cu": ("rows.cuh",),
    "loss.cu": ("tile.cuh", "losses.cuh", "target.cuh"),
    "cross_entropy.cu": ("rows.cuh", "losses.cuh", "target.cuh"),
    "flat.cu": (),
    "update.cu": ("optimizers.cuh",),
    "muon.cu": (),
    "average.cu": (),
    "gather.cu": ("tile.cuh", "sources.cuh"),
}

OPTIONS = ("--std=c++17",)  # of NVRTC, beside those that CuPy adds

Macros = tuple[tuple[str, str], ...]
Geometry = tuple[tuple[int, int], tuple[int, int]]  # grid and block, across and down


@functools.cache
def text(name: str) -> str:
    """A kernel source or header: of this very copy of the package, in which a checkout has them one folder up."""
    shipped = importlib.resources.files("gpu_mlp").joinpath("kernels")
    folder = shipped if shipped.is_dir() else Path(__file__).parents[2] / "kernels"
    return folder.joinpath(name).read_text()


def headers(name: str, storage: str) -> tuple[str, ...]:
    """The headers in front of a source, in their order."""
    return (*(["bfloat16.cuh"] if storage == "bfloat16" else []), *COMMON, *HEADERS[name])


def source(name: str, storage: str, vec: int, macros: Macros = ()) -> str:
    """The whole text of one module: macros, headers, kernels.

    storage: the dtype name of T; vec: elements of a thread's load; macros: pairs of name and value.
    """
    defines = [f"#define {STORAGE[storage]}", f"#define VEC {vec}"]
    defines += [f"#define {macro} {value}" for macro, value in macros]
    files = (*headers(name, storage), name)
    return "\n".join([*defines, *(f"// --- {file}\n{text(file)}" for file in files)])


@functools.cache
def _module(name: str, storage: str, vec: int, macros: Macros) -> Any:
    import cupy

    return cupy.RawModule(code=source(name, storage, vec, macros), options=OPTIONS, backend="nvrtc")


@functools.cache
def kernel(name: str, function: str, storage: str, vec: int, macros: Macros = ()) -> Any:
    """A compiled kernel; compiled at the first call, then kept (and by CuPy on disk)."""
    return _module(name, storage, vec, macros).get_function(function)


@functools.cache
def elementwise(inputs: str, outputs: str, operation: str, compute: str) -> Any:
    """An operation on every element, for arrays of any shape and strides, with activations.cuh at hand.

    inputs, outputs: as for `cupy.ElementwiseKernel`, with X the one type of all arrays; compute: the dtype name of S.
    """
    import cupy

    preamble = "\n".join([f"#define {STORAGE[compute]}", "#define VEC 1", *map(text, FUNCTIONS)])
    name = f"elementwise_{hashlib.sha256(f'{operation} {compute}'.encode()).hexdigest()[:16]}"
    return cupy.ElementwiseKernel(inputs, outputs, operation, name, preamble=preamble, options=OPTIONS)


@functools.cache
def processors() -> int:
    """The number of multiprocessors of the current device."""
    import cupy

    return int(cupy.cuda.Device().attributes["MultiProcessorCount"])


def vector_length(columns: int, *arrays: Any) -> int:
    """How many elements a thread may load at once: a pack of 16 bytes where every array and row allows it, else 1.

    The length fits the narrowest type among the arrays, so that no pack is larger than 16 bytes.
    """
    present = [array for array in arrays if array is not None]
    length = PACK_BYTES // max(array.dtype.itemsize for array in present)
    if columns % length:
        return 1
    aligned = all(array.data.ptr % min(PACK_BYTES, length * array.dtype.itemsize) == 0 for array in present)
    return length if aligned else 1


def tile(rows: int, columns: int, vec: int) -> Geometry:
    """Grid and block for `kernels/tile.cuh`: columns across, rows down, about as many blocks as fill the device."""
    packs = -(-columns // vec)
    across = WARP
    while across < THREADS and across < packs:
        across *= 2
    down = THREADS // across
    grid_x = -(-packs // across)
    wanted = max(1, processors() * BLOCKS_PER_PROCESSOR // max(1, grid_x))
    grid_y = min(-(-rows // down), wanted, MAX_GRID_Y)
    return (grid_x, grid_y), (across, down)


def by_row(rows: int, columns: int) -> Geometry:
    """Grid and block for `kernels/rows.cuh`: a warp a row, or a block a row where it is long."""
    block = (THREADS, 1) if columns > WIDE_ROW else (WARP, THREADS // WARP)
    groups = -(-rows // block[1])
    return (min(groups, processors() * BLOCKS_PER_PROCESSOR), 1), block


def flat(count: int, vec: int = 1) -> Geometry:
    """Grid and block for a grid-stride loop over ``count`` elements."""
    blocks = -(-count // (THREADS * vec))
    return (min(blocks, processors() * BLOCKS_PER_PROCESSOR), 1), (THREADS, 1)


def by_column(columns: int) -> Geometry:
    """Grid and block with a warp's width of columns for each block, and several threads down each column."""
    return (-(-columns // WARP), 1), (WARP, THREADS // WARP)


ONE_BLOCK = ((1, 1), (THREADS, 1))
ONE_THREAD = ((1, 1), (1, 1))


def device_error(error: Exception, what: str, arguments: Sequence[Any]) -> Exception:
    """An error of CUDA's, of whichever of its libraries, as a DeviceError that says what failed; any other as it is."""
    if type(error).__module__.split(".")[0] not in CUDA_PACKAGES or isinstance(error, MemoryError):
        return error
    arrays = ", ".join(f"{a.dtype} {tuple(a.shape)}" for a in arguments if getattr(a, "ndim", 0))
    late = "or an operation before it, since a GPU works behind the host's back: CUDA_LAUNCH_BLOCKING=1 tells"
    return DeviceError(f"{what}({arrays}) failed ({late}): {' '.join(str(error).split())}")


def launch(function: Any, geometry: Geometry, arguments: Sequence[Any]) -> None:
    """Launch a kernel; a grid without blocks launches nothing. An argument that is None becomes a null pointer."""
    grid, block = geometry
    if grid[0] == 0 or grid[1] == 0:
        return
    function(grid, block, tuple(np.uint64(0) if argument is None else argument for argument in arguments))


def rule_macros(optimizer: Optimizer) -> Macros:
    """The hyperparameters of a rule as the macros that kernels/optimizers.cuh is written in."""
    values: dict[str, Any] = {
        name.upper(): getattr(optimizer, name)
        for name in (
            "weight_decay",
            "eps",
            "momentum",
            "dampening",
            "nesterov",
            "momentum_decay",
            "lr_decay",
            "alpha",
            "rho",
            "centered",
            "amsgrad",
            "epsilon_hat",
        )
        if hasattr(optimizer, name)
    }
    if hasattr(optimizer, "betas"):
        values["BETA1"], values["BETA2"] = optimizer.betas
    decoupled = getattr(optimizer, "decoupled", getattr(optimizer, "decoupled_weight_decay", optimizer.name == "lion"))
    values["DECOUPLED"] = decoupled
    values["MOMENTS"] = len(optimizer.moments)
    values["HAS_MOMENTUM"] = bool(getattr(optimizer, "momentum", 0))
    rule = "RULE_ADAM" if optimizer.name in ("adam", "adamw") else f"RULE_{optimizer.name.upper()}"
    return ((rule, "1"), *((name, literal(value)) for name, value in values.items()))


def literal(value: Any) -> str:
    """A flag, a count or a number as C++ writes it, whichever of NumPy's types it came in."""
    return str(int(value)) if isinstance(value, (bool, np.bool_, int)) else repr(float(value))


def gather_macros(source: str, out: str) -> Macros:
    """The element types of a gather, by their names in the kernels, as the macros of kernels/gather.cu."""
    facts = {"SAME": source == out, "NARROW": out == "T", "WIDEN": source == "T" and out != "T"}
    return (("FROM", source), ("TO", out), *((name, str(int(value))) for name, value in facts.items()))
