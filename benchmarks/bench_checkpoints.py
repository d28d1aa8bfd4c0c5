"""What a checkpoint costs a run: its bytes, the seconds that training waits for it, and its share of a run's time.

The file goes to the folder named on the command line, or to the system's one for temporary files:

    python benchmarks/bench_checkpoints.py [FOLDER]
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from gpu_mlp import EMA, MLP, AdamW, Checkpoints, EarlyStopping, Trainer, data
from gpu_mlp.checkpoint import Folder, interval

SIZES = {"50 thousand": [64, 256, 128, 10], "2 million": [784, 1024, 1024, 10], "19 million": [784, 4096, 3840, 10]}
WRITES = 9


def measure(name: str, sizes: list[int], folder: Path) -> None:
    """One line of the table."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(2048, sizes[0])).astype(np.float32), rng.integers(0, sizes[-1], 2048)
    trainer = Trainer(MLP(sizes, output="softmax"), optimizer=AdamW(), average=EMA())
    spent: list[float] = []
    honest = Folder.write

    def timed(*arguments: object) -> None:
        started = time.perf_counter()
        honest(*arguments)  # type: ignore[arg-type]
        spent.append(time.perf_counter() - started)

    Folder.write = timed  # type: ignore[method-assign,assignment]
    try:
        with tempfile.TemporaryDirectory(dir=folder) as place:
            policy = Checkpoints(place, "1 step", 1)
            trainer.fit((x, y), WRITES, 2048, 0.1, progress=False, early_stopping=EarlyStopping(99), checkpoints=policy)
            size = next(Path(place).glob("*.safetensors")).stat().st_size
    finally:
        Folder.write = honest  # type: ignore[method-assign]
    seconds, every = statistics.median(spent), interval(Checkpoints(folder).every)[0]
    print(f"{name:>12} parameters: {size / 2**20:7.1f} MiB in {seconds:6.3f} s, {seconds / every:.2%} of a run", end="")
    print(f" with one every {every:g} s")


def main() -> None:
    """The table, and what the fingerprint of a data set costs."""
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else tempfile.gettempdir())
    for name, sizes in SIZES.items():
        measure(name, sizes, folder)
    x = np.random.default_rng(0).random((60000, 784), np.float32)
    started = time.perf_counter()
    data.fingerprint(x)
    print(f"fingerprint of {x.nbytes / 2**20:.0f} MiB: {time.perf_counter() - started:.3f} s, once a run")


if __name__ == "__main__":
    main()
