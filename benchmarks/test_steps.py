"""The judged steps of the CPU under pytest-benchmark: each with its floor, and its goal.

    pytest benchmarks                     # fails where a goal is missed
    pytest benchmarks -k "64 and adam" --benchmark-json out.json

The time that pytest-benchmark prints is that of our step by itself; the ratios in its ``extra_info`` are from rounds in
turn with the bare GEMMs and with those peers that are ready at once. `benchmarks/run.py` measures all of them.
"""

from __future__ import annotations

import plans
import pytest
from tables import GOALS

from gpu_mlp.bench import steps
from gpu_mlp.bench.peers import OURS

PEERS = ("PyTorch eager", "JAX jit", "scikit-learn")
GOAL = GOALS["cpu"]


@pytest.mark.parametrize("task", plans.steps("cpu", False), ids=lambda task: task.name)
def test_step(benchmark, task):
    record = steps.measure(task, (OURS, *PEERS), seconds=4.0, rounds=(5, 15))
    assert not steps.faulty(record), record["wrong"] | record["failed"]
    over_floor = record["over_floor"][OURS]["median"]
    ahead = {name: told["median"] for name, told in record["over_ours"].items()}
    benchmark.extra_info.update({"over bare GEMMs": over_floor, **ahead})
    turn = steps.Turn(task, steps.named([OURS])[0])
    benchmark.pedantic(lambda: turn.contender.step(*turn.batch), rounds=10, iterations=turn.repeats, warmup_rounds=1)
    print(f"\n{task.name}: over bare GEMMs {over_floor:.2f}, " + ", ".join(f"{n} {r:.2f}" for n, r in ahead.items()))
    if (task.activation, task.optimizer) == ("relu", "sgd"):
        assert over_floor <= GOAL["narrow_floor" if max(task.sizes) <= 64 else "floor"]
    assert all(ahead[name] > 1 for name in GOAL["ahead"] if name in ahead)
    assert all(ahead[name] >= GOAL["behind"] for name in GOAL["half"] if name in ahead)
