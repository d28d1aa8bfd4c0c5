"""What the suite measures: the tasks of every part, for a CPU, for a GPU, and in a rehearsal."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

from gpu_mlp.activations import ACTIVATIONS
from gpu_mlp.bench.peers import OURS, PEERS
from gpu_mlp.bench.tasks import OPTIMIZERS, Task

EVERYBODY = (OURS, *PEERS)
CLASSES = 16

# The judged table of the CPU: widths and batch.
CPU_SHAPES = (
    ((784, 512, 512, 10), 128),
    ((784, 512, 512, 10), 1024),
    ((784, 4096, 4096, 10), 512),
    ((1024, 1024, 1024, 1024, 10), 4096),
    ((64, 64, 64, 64, 10), 65536),
)
# And of the GPU: width, batch; eight layers wide. The first ones first, should time be short.
GPU_SHAPES = ((256, 256), (4096, 4096), (1024, 4096), (8192, 8192), (4096, 32768), (1024, 32768), (16384, 4096))
GPU_DEPTH = 8


def _deep(width: int, layers: int) -> tuple[int, ...]:
    """``layers`` layers, of which the last leads to the classes."""
    return (*(width,) * layers, CLASSES)


def tiny(device: str) -> Task:
    """The task of a rehearsal."""
    rule, precision = ("adam", "float32") if device == "cpu" else ("adamw", "bfloat16")
    return Task((8, 8, 8, 4), 6, "relu", rule, precision, device, rehearsal=True)


def steps(device: str, rehearsal: bool) -> list[Task]:
    """Whole training steps."""
    if rehearsal:
        return [tiny(device), dataclasses.replace(tiny(device), optimizer="sgd", precision="float32")]
    if device == "cpu":
        return [
            Task(sizes, batch, activation, rule)
            for sizes, batch in CPU_SHAPES
            for rule in ("sgd", "adam")
            for activation in ("relu", "gelu")
        ]
    return [
        Task(_deep(width, GPU_DEPTH), batch, activation, "adamw", precision, device)
        for width, batch in GPU_SHAPES
        for precision in ("bfloat16", "tf32")
        for activation in ("relu", "gelu")
    ]


def variety(device: str, rehearsal: bool) -> list[Task]:
    """Every activation, then every optimizer, in one network."""
    if rehearsal:
        task = tiny(device)
        return [dataclasses.replace(task, activation="silu"), dataclasses.replace(task, optimizer="lion")]
    left_out = {"identity", "softmax", "log_softmax", "exp"}  # of hidden layers; of several exp grows out of all bounds
    if device == "cpu":
        first = Task((784, 512, 512, 10), 1024, "relu", "adam")
        then = dataclasses.replace(first, batch=128)  # where the update counts
    else:
        first = then = Task(_deep(1024, GPU_DEPTH), 4096, "relu", "adamw", "bfloat16", device)
    return [
        *(dataclasses.replace(first, activation=name) for name in ACTIVATIONS if name not in left_out),
        *(dataclasses.replace(then, optimizer=name) for name in OPTIMIZERS),
    ]


def overhead(device: str, rehearsal: bool) -> list[Task]:
    """Networks so small that a step is all overhead."""
    if rehearsal:
        return [tiny(device)]
    precision = "float32" if device == "cpu" else "bfloat16"
    return [Task((8, 8, 8, 4), 8, "relu", rule, precision, device) for rule in ("sgd", "adam")]


def broken_down(device: str, rehearsal: bool) -> list[Task]:
    """The steps whose time is divided among their parts."""
    rule = "adam" if device == "cpu" else "adamw"
    return [task for task in steps(device, rehearsal) if task.optimizer == rule]


class Axis(NamedTuple):
    """One quantity that grows while the others stay."""

    name: str
    points: Sequence[tuple[int, Task]]  # the quantity, and the task


def scaling(device: str, rehearsal: bool) -> list[Axis]:
    """Width, depth and batch."""
    widths, depths = (16, 64, 256, 1024, 2048, 4096, 8192, 16384), (2, 4, 8, 16, 32, 64)
    batches = (1, 8, 64, 512, 4096, 32768, 262144, 1048576)
    if rehearsal:
        widths, depths, batches = (4, 8), (2, 3), (1, 4)
    precision, rule = ("float32", "sgd") if device == "cpu" else ("bfloat16", "adamw")

    def task(width: int, layers: int, batch: int) -> Task:
        return Task(_deep(width, layers), batch, "relu", rule, precision, device, rehearsal=rehearsal)

    rows, width = (128, 256) if device == "cpu" else (4096, 1024)
    rows, width = (4, 8) if rehearsal else (rows, width)
    return [
        Axis("width", [(n, task(n, 3, rows)) for n in widths]),
        Axis("depth", [(n, task(width, n, rows)) for n in depths]),
        Axis("batch", [(n, task(64 if device == "cpu" else width, 3, n)) for n in batches]),
    ]


STEP_SECONDS = {"cpu": 4.0, "cuda": 1.0}  # the longest step of a scaling curve; what would take longer is cut


class Product(NamedTuple):
    """A layer's GEMMs: a batch through W of (n_out, n_in)."""

    batch: int
    n_in: int
    n_out: int


def products(device: str, rehearsal: bool) -> list[Product]:
    """The layers whose three GEMMs are measured one by one: those of the steps, each once."""
    found = [
        Product(task.batch, n_in, n_out)
        for task in steps(device, rehearsal)
        for n_in, n_out in task.layers
        if n_out > CLASSES or rehearsal
    ]
    return list(dict.fromkeys(found))
