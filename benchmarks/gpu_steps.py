"""Whole training steps on a GPU against their bare GEMMs and against PyTorch eager, in turn within one run.

A step is one AdamW update of a network with relu, softmax and cross-entropy, on a batch that is on the device in
float32. PyTorch does the same with autocast for bfloat16, TF32 matrix products for tf32, and its fused AdamW. Called by
`prove_on_gpu.py`.
"""

from __future__ import annotations

import gc
import itertools
import statistics
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from timing import on_both_sides, spread

from gpu_mlp import MLP, AdamW, Trainer, precision

Step = Callable[[], object]
CLASSES, LAYERS, LEARNING_RATE, WEIGHT_DECAY = 16, 5, 1e-4, 0.01


def measure(
    records: Any,
    widths: Sequence[int] = (256, 1024, 4096),
    batches: Sequence[int] = (256, 4096),
    precisions: Sequence[str] = ("bfloat16", "tf32"),
    rounds: int = 20,
    repeats: int = 10,
) -> None:
    """Time every combination; each sample is ``repeats`` steps in a row, the contenders in turn."""
    for width, batch, name in itertools.product(widths, batches, precisions):
        with records.attempt(f"width {width}, batch {batch}, {name}"):
            _measure(records, width, batch, name, rounds, repeats)
        gc.collect()


def _measure(records: Any, width: int, batch: int, name: str, rounds: int, repeats: int) -> None:
    sizes = [width] * LAYERS + [CLASSES]
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(batch, width)).astype(np.float32), rng.integers(0, CLASSES, batch)
    told = {"width": width, "batch": batch, "precision": name, "sizes": sizes, "parameters": _parameters(sizes)}
    makers: dict[str, Callable[[], Step]] = {
        "bare GEMMs": lambda: bare_gemms(sizes, batch, name),
        "graph off": lambda: ours(sizes, x, y, name, False),
        "graph on": lambda: ours(sizes, x, y, name, True),
        "PyTorch eager": lambda: torchs(sizes, x, y, name, records.rehearsal),
    }
    contenders, memory = {}, {}
    for contender, make in makers.items():
        try:
            contenders[contender], memory[contender] = _peak(make)
        except Unavailable as error:
            records.add(contender, **told, unavailable=str(error))
        except Exception:  # the others still run
            records.add(f"{contender}, width {width}, batch {batch}, {name}", error=traceback.format_exc())
    samples: dict[str, list[dict[str, float]]] = {contender: [] for contender in contenders}
    for _ in range(rounds):
        for contender, step in contenders.items():
            samples[contender].append(on_both_sides(step, repeats))
    for contender in contenders:
        figures = _figures(samples, contender) | {"peak_bytes": memory[contender]}
        records.add(contender, **told, **(dict.fromkeys(figures) if records.rehearsal else figures))


def _figures(samples: dict[str, list[dict[str, float]]], contender: str) -> dict[str, Any]:
    """Seconds a step, and the medians of the ratios to the other contenders' samples of the same round."""
    mine = samples[contender]
    figures: dict[str, Any] = {kind: spread([sample[kind] for sample in mine]) for kind in ("host", "device", "wall")}
    for other, name in (("bare GEMMs", "over_gemms"), ("PyTorch eager", "over_pytorch")):
        pairs = zip(mine, samples.get(other, []))
        ratios = [a["wall"] / b["wall"] for a, b in pairs if b["wall"]]
        figures[name] = statistics.median(ratios) if ratios and other != contender else None
    return figures


class Unavailable(RuntimeError):
    """A contender that cannot take part here, and why."""


def _peak(make: Callable[[], Step]) -> tuple[Step, int]:
    """A contender that has warmed up, and the bytes of device memory that it takes, cuBLAS's workspace with them."""
    import cupy

    from gpu_mlp.ops import gemm

    workspace = getattr(gemm.binding(), "_workspace", None)  # made once, for all
    gc.collect()
    pool = cupy.get_default_memory_pool()
    pool.free_all_blocks()
    before = pool.total_bytes()
    step = make()
    for _ in range(5):  # compiles, records and grows scratch
        step()
    cupy.cuda.Device().synchronize()
    taken = getattr(step, "peak_bytes", None)
    return step, taken() if taken else pool.total_bytes() - before + (0 if workspace is None else workspace.nbytes)


def ours(sizes: list[int], x: Any, y: Any, name: str, graph: bool) -> Step:
    """A step of the package."""
    import cupy

    from gpu_mlp.ops import gemm

    if graph and not gemm.binding().in_graphs:
        raise Unavailable("CuPy's cuBLAS cannot be captured: pip install nvmath-python")
    net = MLP(sizes, "relu", "softmax", precision=name, device="cuda", seed=0)
    optimizer = AdamW(lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    trainer = Trainer(net, "cross_entropy", optimizer, graph=graph)
    batch = cupy.asarray(x), cupy.asarray(y)
    return lambda: trainer.step(*batch)


def bare_gemms(sizes: list[int], batch: int, name: str) -> Step:
    """The GEMMs of a step and nothing else: three a layer, two in the first, into buffers of their own."""
    import cupy

    from gpu_mlp.ops.gemm import GEMM

    of = precision.get(name)
    gemm, storage, master = GEMM(of), of.storage_dtype, of.master_dtype
    rng = np.random.default_rng(1)

    def numbers(*shape: int) -> Any:
        return cupy.asarray((rng.normal(size=shape) / 16).astype(storage))

    h, gz = [numbers(batch, n) for n in sizes], [numbers(batch, n) for n in sizes]
    W = [numbers(n_out, n_in) for n_in, n_out in zip(sizes, sizes[1:])]
    out, gW = [cupy.empty_like(a) for a in h], [cupy.empty(w.shape, master) for w in W]

    def step() -> None:
        for l, w in enumerate(W):
            gemm(h[l], w, out[l + 1], transpose_b=True)
        for l in reversed(range(len(W))):
            gemm(gz[l + 1], h[l], gW[l], transpose_a=True)
            if l:
                gemm(gz[l + 1], W[l], out[l])

    return step


def torchs(sizes: list[int], x: Any, y: Any, name: str, rehearsal: bool) -> Step:
    """The same step in PyTorch eager; in a rehearsal on the CPU."""
    try:
        import torch
    except ImportError:
        raise Unavailable("PyTorch is not installed") from None
    if not (torch.cuda.is_available() or rehearsal):
        raise Unavailable("this PyTorch finds no GPU")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_float32_matmul_precision("high" if name == "tf32" else "highest")
    layers = [torch.nn.Linear(n_in, n_out) for n_in, n_out in zip(sizes, sizes[1:])]
    modules = [module for layer in layers[:-1] for module in (layer, torch.nn.ReLU())]
    model = torch.nn.Sequential(*modules, layers[-1]).to(device)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, fused=device == "cuda"
    )
    inputs, labels = torch.from_numpy(x).to(device), torch.from_numpy(y).to(device)

    def step() -> Any:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device, torch.bfloat16, enabled=name == "bfloat16"):
            loss = torch.nn.functional.cross_entropy(model(inputs), labels)
        loss.backward()
        optimizer.step()
        return loss

    if device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step.peak_bytes = lambda: torch.cuda.max_memory_allocated() - before  # type: ignore[attr-defined]
    return step


def _parameters(sizes: list[int]) -> int:
    return sum(n_out * (n_in + 1) for n_in, n_out in zip(sizes, sizes[1:]))
