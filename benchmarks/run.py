"""The benchmark suite: what this library's steps cost, part by part, against the floor and against its peers.

    python benchmarks/run.py                                       # everything, on the GPU where there is one
    python benchmarks/run.py --device cpu --parts steps,overhead
    python benchmarks/run.py --seconds 540 --out somewhere         # what there is time for; call it again for the rest
    python benchmarks/run.py --rehearse --device cuda              # without a GPU: does the suite itself run?

The parts, in this order, each in a process of its own with its share of the time that is left:

    tests       pytest -m gpu: comparisons with the CPU, same bits, flat memory, large arrays        (GPU only)
    sanitizer   memcheck, racecheck (shared memory only), initcheck and synccheck over a training    (GPU only)
    kernels     every streaming kernel's bandwidth, as a share of a copy's
    gemms       every GEMM's rate, as a share of the best that the BLAS can do
    overhead    steps of a tiny network
    steps       whole training steps over their bare GEMMs, and over every peer
    variety     a step with every activation, and with every optimizer
    breakdown   where the time of those steps goes
    memory      the most memory that those steps take, of everybody
    accuracy    epochs and seconds to an accuracy on digits and Fashion-MNIST
    scaling     the cost of a step as width, depth and batch grow
    estimators  an epoch of MLPClassifier over one of scikit-learn's                                 (CPU only)

Into the folder --out (by default benchmarks/results/<device>/) go results.jsonl, a record a line as soon as there is
one, and logs/ with what every part printed. A part that fails or runs out of time
leaves its records, and the next one runs. What the folder has of the same code is not measured again, so that a run can
be made in pieces; --again measures anew. `python benchmarks/report.py` draws tables and pictures from it. Exit status:
0 if every part was done and nothing was found wrong.
"""

from __future__ import annotations

import argparse
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]  # this checkout is measured, installed or not
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(HERE.parent), os.environ.get("PYTHONPATH")]))
import plans  # noqa: E402
from rehearsal import rehearse  # noqa: E402

from gpu_mlp.bench import records as book  # noqa: E402
from gpu_mlp.bench.peers import OURS  # noqa: E402
from gpu_mlp.bench.records import Records  # noqa: E402

# By part: its share of the seconds, as it takes on a GPU and on two processors.
PARTS = {
    "cuda": {"tests": 230, "sanitizer": 140, "kernels": 45, "gemms": 60, "overhead": 30, "steps": 300, "variety": 60,
             "breakdown": 30, "memory": 200, "accuracy": 60, "scaling": 120},
    "cpu": {"kernels": 30, "gemms": 60, "overhead": 60, "steps": 1400, "variety": 400, "breakdown": 90, "memory": 300,
            "accuracy": 150, "scaling": 700, "estimators": 40},
}  # fmt: skip
EVERY = tuple(dict.fromkeys([*PARTS["cuda"], *PARTS["cpu"]]))
SHORT = {"cpu": 10.0, "cuda": 1.0}  # seconds for a step of the part "variety"
ENOUGH = {"cpu": 60.0, "cuda": 30.0}  # seconds that a step with all its peers may need; with fewer none is begun


# --- the parts: each gets its records, the end of its time, and the arguments ----------------------------------------


def tests(records: Records, deadline: float, arguments: argparse.Namespace) -> None:
    import proof

    proof.tests(records, deadline, arguments)


def sanitizer(records: Records, deadline: float, arguments: argparse.Namespace) -> None:
    import proof

    proof.sanitizer(records, deadline, arguments)


def kernels(records: Records, deadline: float, arguments: argparse.Namespace) -> None:
    import kernels

    if not records.done(kernels.LAST):
        usual = {"cuda": {"size": 256 << 20, "samples": 30}, "cpu": {"size": 128 << 20, "samples": 7}}[arguments.device]
        kernels.measure(records, arguments.device, **({"size": 1 << 16, "samples": 2} if records.rehearsal else usual))


def gemms(records: Records, deadline: float, arguments: argparse.Namespace) -> None:
    import gemms

    gemms.measure(records, deadline, arguments.device)


def overhead(records: Records, deadline: float, arguments: argparse.Namespace) -> None:
    _steps(records, deadline, arguments, plans.overhead)


def steps(records: Records, deadline: float, arguments: argparse.Namespace) -> None:
    _steps(records, deadline, arguments, plans.steps)


def variety(records: Records, deadline: float, arguments: argparse.Namespace) -> None:
    _steps(records, deadline, arguments, plans.variety, compiled=False, seconds=SHORT[arguments.device])


def _steps(
    records: Records, deadline: float, arguments: argparse.Namespace, plan: Callable[..., Any], compiled: bool = True,
    seconds: float | None = None,
) -> None:  # fmt: skip
    """The steps of a plan; with ``compiled`` in the company of those that take a minute to be ready."""
    from gpu_mlp.bench import steps

    names = [name for name in peers(arguments) if compiled or not _compiles(name)]

    for task in plan(arguments.device, records.rehearsal):
        if records.done(task.name):
            continue
        if time.monotonic() > deadline - (0 if records.rehearsal else ENOUGH[arguments.device]):
            return
        how = {"seconds": 0, "rounds": (1, 1), "rehearsal": True} if records.rehearsal else {"seconds": seconds}
        with records.attempt(task.name):
            records.add(task.name, **steps.measure(task, names, **how))


def breakdown(records: Records, deadline: float, arguments: argparse.Namespace) -> None:
    import breakdown

    breakdown.measure(records, deadline, arguments.device)


def memory(records: Records, deadline: float, arguments: argparse.Namespace) -> None:
    import memory

    memory.measure(records, deadline, arguments.device, peers(arguments))


def accuracy(records: Records, deadline: float, arguments: argparse.Namespace) -> None:
    from gpu_mlp.bench import accuracy

    short = {"seeds": 1, "epochs": 1, "rehearsal": True, "rows": 200} if records.rehearsal else {}
    names = [name for name in peers(arguments) if not _compiles(name)]
    for name, goal in accuracy.GOALS.items():
        if records.done(name) or time.monotonic() > deadline - 5:
            continue
        with records.attempt(name):
            try:
                records.add(name, **accuracy.measure(goal, names, arguments.device, **short))
            except FileNotFoundError as error:
                records.add(name, absent={name: str(error)})


def scaling(records: Records, deadline: float, arguments: argparse.Namespace) -> None:
    import scaling

    names = [name for name in peers(arguments) if not _compiles(name)]  # every point would have to be compiled
    scaling.measure(records, deadline, arguments.device, names)


def estimators(records: Records, deadline: float, arguments: argparse.Namespace) -> None:
    import estimators

    if "scikit-learn" in peers(arguments):
        estimators.measure(records, **({"rows": 2000, "rounds": 1} if records.rehearsal else {}))


def peers(arguments: argparse.Namespace) -> tuple[str, ...]:
    """Who takes part: this library always."""
    if arguments.peers != "all":
        return (OURS, *(name for name in arguments.peers.split(",") if name != "none"))
    return tuple(name for name in plans.EVERYBODY if not (arguments.rehearse and _compiles(name)))


def _compiles(name: str) -> bool:
    """Whether somebody takes a minute to be ready."""
    return name.startswith("torch.compile")


# --- processes -------------------------------------------------------------------------------------------------------


def run_part(part: str, arguments: argparse.Namespace, seconds: float) -> bool:
    """A part in a process of its own, so that neither a crash nor a lost device reaches the next."""
    command = [sys.executable, __file__, "--part", part, "--run", str(arguments.run or 0), "--out", str(arguments.out)]
    command += ["--device", arguments.device, "--seconds", str(seconds)]
    command += [*["--rehearse"] * arguments.rehearse, *["--again"] * arguments.again]
    command += ["--peers", arguments.peers, "--command", arguments.command]
    command += ["--commit", arguments.commit] if arguments.commit else []
    started = time.monotonic()
    with open(arguments.logs / f"{part}.log", "ab") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            status: int | str = process.wait(None if math.isinf(seconds) else seconds)
        except subprocess.TimeoutExpired:
            status = "out of time"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)  # the part, and what it has started
                process.wait()
    taken = time.monotonic() - started
    if part != "facts":
        kept = Records(arguments.out, "parts", arguments.run, arguments.rehearse)
        kept.add(part, status=status, seconds=None if arguments.rehearse else taken)
    print(f"{part}: {'done' if status == 0 else f'status {status}'}, {taken:.0f} s", flush=True)
    return status == 0


def child(arguments: argparse.Namespace) -> None:
    """The process of one part; exit status 1 if something in it failed, with the traceback among the records."""
    from gpu_mlp.bench import machine

    if arguments.rehearse and arguments.device == "cuda":
        rehearse()
    if arguments.part == "facts":
        facts = machine.facts(arguments.device, arguments.commit)
        book.begin(arguments.out, arguments.rehearse, {**facts, "command": arguments.command})
        return
    records = Records(arguments.out, arguments.part, arguments.run, arguments.rehearse, arguments.again)
    with records.attempt("part"):
        globals()[arguments.part](records, time.monotonic() + arguments.seconds, arguments)
    sys.exit(any(map(wrong, records.made)))


def wrong(record: dict[str, Any]) -> bool:
    """Whether a record tells of something that went wrong with this library."""
    if "clean" in record:
        return record["clean"] is not True
    faults = [record.get(key, {}) for key in ("wrong", "failed", "absent")]
    return "error" in record or any(OURS in of for of in faults) or record.get("status", 0) != 0


# --- the command -----------------------------------------------------------------------------------------------------


def parse(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--parts", help="which, with commas between them; by default all of the device's")
    parser.add_argument("--seconds", type=float, default=math.inf, help="for all parts together; by default no limit")
    parser.add_argument("--out", type=Path, help="the folder of the results")
    parser.add_argument("--again", action="store_true", help="measure also what the folder has already")
    parser.add_argument("--commit", help="what is measured, where git cannot tell")
    parser.add_argument("--peers", default="all", help="all, none, or names with commas between them")
    parser.add_argument("--rehearse", action="store_true", help="tiny sizes, a stand-in for a GPU; keeps no timing")
    parser.add_argument("--part", choices=("facts", *EVERY), help=argparse.SUPPRESS)
    parser.add_argument("--run", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--command", default=" ".join(["benchmarks/run.py", *sys.argv[1:]]), help=argparse.SUPPRESS)
    arguments = parser.parse_args(words)
    if arguments.peers not in ("all", "none") and (odd := set(arguments.peers.split(",")) - set(plans.EVERYBODY)):
        parser.error(f"--peers: {', '.join(sorted(odd))}: not among {', '.join(plans.EVERYBODY[1:])}")
    arguments.device = _device(arguments, parser)
    named = list(PARTS[arguments.device]) if arguments.parts is None else arguments.parts.split(",")
    if unknown := set(named) - set(PARTS[arguments.device]):
        known = ", ".join(PARTS[arguments.device])
        parser.error(f"--parts: {', '.join(sorted(unknown))}: not among those of this device, {known}")
    arguments.parts = [part for part in PARTS[arguments.device] if part in named]
    return arguments


def _device(arguments: argparse.Namespace, parser: argparse.ArgumentParser) -> str:
    """The device that is meant; a GPU only if it can be used, or is rehearsed."""
    from gpu_mlp.ops import cuda_obstacle

    if arguments.part or arguments.device == "cpu" or (arguments.rehearse and arguments.device == "cuda"):
        return arguments.device
    obstacle = cuda_obstacle()
    if obstacle and arguments.device == "cuda":
        parser.exit(1, f"there is no GPU to measure: {obstacle}\n")
    return "cpu" if obstacle else "cuda"


def folder_of(arguments: argparse.Namespace) -> Path:
    """benchmarks/results/ and the device's name as a folder may be called."""
    from gpu_mlp.bench import machine

    name = "rehearsal" if arguments.rehearse else machine.processor()
    if arguments.device == "cuda" and not arguments.rehearse:
        import cupy

        name = cupy.cuda.runtime.getDeviceProperties(0)["name"].decode()
    return HERE / "results" / re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def main() -> None:
    """Run the parts one after the other."""
    arguments = parse()
    arguments.out = (arguments.out or folder_of(arguments)).resolve()
    if arguments.part:
        child(arguments)
        return
    arguments.logs = arguments.out / "logs"
    arguments.logs.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + arguments.seconds
    if not run_part("facts", arguments, min(60.0, arguments.seconds)):
        sys.exit(f"the machine could not be described: see {arguments.logs / 'facts.log'}")
    arguments.run = book.read(arguments.out)[-1]["run"]
    shares, well = PARTS[arguments.device], True
    for position, part in enumerate(arguments.parts):
        share = shares[part] / sum(shares[later] for later in arguments.parts[position:])
        well &= run_part(part, arguments, max(1.0, (end - time.monotonic()) * share))
    sys.exit(not well)


if __name__ == "__main__":
    main()
