"""Kills a training process again and again, with SIGKILL, at random moments and inside the writing of checkpoints.

After every kill the folder of checkpoints must load and the next process go on from it; every run that gets to its end
must have the bits of one that was never killed. The test command does 10 kills; for more of them:

    python tests/kill_test.py --kills 200
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from gpu_mlp import EMA, MLP, Adam, Checkpoints, EarlyStopping, History, Trainer
from gpu_mlp.checkpoint import listed

EPOCHS, STEPS = 4, 10  # of a run, and of an epoch
IN_A_WRITE = ("open", "fsync", "replace", "unlink", "chmod")  # calls of `os` that a process may die before or after


def trained(folder: Path | None) -> tuple[bytes, History]:
    """The weights, in bytes, and the history of the run, from the last checkpoint in ``folder`` on."""
    rng = np.random.default_rng(3)
    x = rng.normal(size=(STEPS * 16, 20))
    y = (x[:, :4] + rng.normal(size=(len(x), 4))).argmax(axis=1)
    net = MLP([20, 64, 4], output="softmax", dropout=0.2, seed=1)
    trainer = Trainer(net, optimizer=Adam(0.01), average=EMA(0.95), schedule="cosine", clip_norm=1.0)
    options: dict[str, Any] = {"validation": (x[:40], y[:40]), "early_stopping": EarlyStopping(50)}
    if folder is not None:
        options |= {"checkpoints": Checkpoints(folder, "1 step", 2), "resume": True}
    history = trainer.fit((x, y), EPOCHS, 16, progress=False, **options)
    return net.theta.tobytes(), history


def figures(history: History) -> list[Any]:
    """What two histories of the same bits have in common."""
    return [{name: value for name, value in row.items() if "second" not in name} for row in history]


def die_in_a_write(call: int, after: bool) -> None:
    """Have this process kill itself before, or after, its so-manieth call of the system while it trains."""
    left = [call]

    def deadly(name: str) -> None:
        honest = getattr(os, name)

        def watched(*arguments: Any, **options: Any) -> Any:
            left[0] -= 1
            if not left[0] and not after:
                os.kill(os.getpid(), signal.SIGKILL)
            result = honest(*arguments, **options)
            if not left[0]:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        setattr(os, name, watched)

    for name in IN_A_WRITE:
        deadly(name)


def child(folder: Path, call: int | None, after: bool) -> int:
    """Start a process that trains; its number. It ends with status 0 once it has written its end to ``folder``."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        warnings.simplefilter("error")  # a checkpoint that is damaged would be warned of
        if call is not None:
            die_in_a_write(call, after)
        weights, history = trained(folder / "checkpoints")
        (folder / "end").write_bytes(weights + repr(figures(history)).encode())
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def one_kill(folder: Path, chance: random.Random, seconds: float) -> tuple[bool, str]:
    """Train in a process that is killed, from outside or by itself; whether it was, and where."""
    inside = chance.random() < 0.5
    call = chance.randrange(1, 12 * EPOCHS * STEPS // 2) if inside else None
    pid = child(folder, call, chance.random() < 0.5)
    if not inside:
        time.sleep(chance.random() * seconds)
        os.kill(pid, signal.SIGKILL)
    status = os.waitpid(pid, 0)[1]
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
        return True, "in a write" if inside else "from outside"
    if status:
        raise SystemExit(f"a resumed run failed with status {os.waitstatus_to_exitcode(status)}")
    return False, "completed"


def main() -> None:
    """Kill so many times, and compare every run that came to its end."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    chance, counts = random.Random(chosen.seed), {"in a write": 0, "from outside": 0, "completed": 0}
    weights, history = trained(None)
    expected = weights + repr(figures(history)).encode()
    root = Path(tempfile.mkdtemp(prefix="kill_test."))
    resumed = leftovers = 0
    try:
        started = time.perf_counter()
        trained(root / "timed")
        seconds = 0.8 * (time.perf_counter() - started)
        folder = root / "0"
        folder.mkdir()
        while counts["in a write"] + counts["from outside"] < chosen.kills or (folder / "checkpoints").exists():
            over = counts["in a write"] + counts["from outside"] >= chosen.kills
            before = len(listed(folder / "checkpoints"))
            if over:
                killed, where = False, "completed"
                if os.waitpid(child(folder, None, False), 0)[1]:
                    raise SystemExit("the last run failed")
            else:
                killed, where = one_kill(folder, chance, seconds)
            counts[where] += 1
            resumed += before > 0
            if killed:
                leftovers += any((folder / "checkpoints").glob("*.tmp"))
                if before and not listed(folder / "checkpoints"):
                    raise SystemExit("the checkpoints are gone")
                continue
            if (folder / "end").read_bytes() != expected:
                raise SystemExit(f"a run that was killed and resumed ended with other bits (--seed {chosen.seed})")
            shutil.rmtree(folder)
            folder.mkdir()
    finally:
        shutil.rmtree(root, ignore_errors=True)
    print(
        f"{counts['from outside']} kills from outside and {counts['in a write']} inside a write, of which {leftovers} "
        f"left a half-written file; {resumed} processes went on from a checkpoint; {counts['completed']} runs came to "
        f"their end, all with the bits of one that was never killed"
    )


if __name__ == "__main__":
    sys.exit(main())
