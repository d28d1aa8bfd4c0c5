"""The command `gpu-mlp`: train, sweep, evaluate, predict, export, make-data, info, check, bench.

The topmost room: turns words into calls of `runs`, `model`, `environment`, `selfcheck` and `bench`, and errors into one
line on standard error. Exit status: 0 done; 1 training diverged or a check failed; 2 bad options, data or files; 130
interrupted (Ctrl-C); 143 terminated (SIGTERM), after a checkpoint.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import io
import json
import os
import shlex
import sys
import time
import traceback
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .failures import BrokenData, DeviceLost, Terminated
from .ops.interface import DeviceError
from .options import TrainOptions, merged, resumed
from .parallel import ranks

if TYPE_CHECKING:
    from .runs import Run

app = typer.Typer(
    name="gpu-mlp",
    help="Train fully connected networks (MLPs), judge them, and predict with them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

ModelArgument = Annotated[
    Path, typer.Argument(help="A model file, or the run folder that holds it.", show_default=False)
]
SECONDS_BETWEEN_NOTES = 2.0
MemoryOption = Annotated[
    str | None,
    typer.Option(help="Memory to do it in, such as 1GiB: what does not fit is read in pieces", show_default=False),
]
DeviceOption = Annotated[str, typer.Option(help="auto, cpu or cuda")]


# --- train ----------------------------------------------------------------------------------------------------------


def train(config: Path | None, resume: Path | None, **given: Any) -> None:
    """Train a network. With no option at all: the digits set that ships with the package, in a few seconds.

    A file needs a target: gpu-mlp train --data churn.csv --target churned. Options can also stand in a TOML file
    (--config), one a line as epochs = 20; those on the command line win. The run folder gets model.safetensors,
    history.json, options.toml and the plots. Ctrl-C ends a run after the step at hand and keeps what was learned.

    gpu-mlp train --resume RUN_FOLDER goes on with a run that was interrupted, killed or ended by a full disk, from its
    last checkpoint to the very weights that it would have reached. Of its options --device, --plots, --log, --progress,
    --checkpoint-every and --checkpoint-keep can be given anew, and --epochs where the schedule does not span the run.
    """
    from .streamed import make

    options = merged(config, given) if resume is None else resumed(resume, config, given)
    if options.parallel == "off":
        ranks.leave()
    elif ranks.started() > 1 and not ranks.has_mpi4py():
        raise ValueError(
            f"parallel: {ranks.started()} processes were started; train on all of them with {ranks.LAUNCH} -m gpu_mlp "
            "train …, or say --parallel off"
        )
    run = make(options, resume=resume is not None)
    net, parts = run.model.net, run.parts.named()
    _say(f"{run.options.data}: " + ", ".join(f"{len(part)} {name}" for name, part in parts.items()) + " rows")
    shape = f"{' → '.join(map(str, net.sizes))}, {net.n_parameters:,} parameters"
    _say(f"network: {shape}, {net.precision} on {net.device}{_why_not_cuda(options.device, net.device)}")
    if run.ranks.size > 1:
        _say(f"{run.ranks.size} ranks: each works on its part of every batch")
    if net.device == "cuda":
        _say(f"device memory: {run.trainer.plan(run.options.batch_size).summary()}")
    if resume is not None:
        found = run.checkpoint
        _say(f"resume: from {found}" if found else f"resume: {resume} has no checkpoint yet; the run begins anew")
    try:
        result = run.start()
    except Terminated:
        _say(f"gpu-mlp: terminated{_how_to_resume(run)}")
        raise typer.Exit(143) from None
    except OSError as error:
        if run.checkpoint is None:
            raise
        raise ValueError(f"{_one_line(error)}; make room, then: {_resuming(run)}") from error
    except (DeviceLost, BrokenData) as error:
        if run.checkpoint is None:
            raise
        raise type(error)(f"{error}; to go on: {_resuming(run)}", error.history) from error  # type: ignore[arg-type]
    if not run.ranks.first:
        raise typer.Exit(130 if result.history.stopped == "interrupted" else 0)
    _figures_table(result.figures)
    last = list(result.figures)[-1]
    for name, value in result.figures[last].items():
        print(f"{last} {name.replace('_', ' ')}: {value:.4f}")
    interrupted = result.history.stopped == "interrupted"
    how = _how_to_resume(run) if interrupted else ""
    seconds = sum(result.history["seconds"]) if len(result.history) else 0.0
    _say(f"{len(result.history)} epochs in {seconds:.1f} s, {result.history.stopped}; written to {result.folder}{how}")
    if interrupted:
        raise typer.Exit(130)


def _how_to_resume(run: Run) -> str:
    return f"; {_resuming(run)} goes on from here" if run.checkpoint else ""


def _resuming(run: Run) -> str:
    return f"gpu-mlp train --resume {shlex.quote(str(run.folder))}"


def _declared(command: Any) -> Any:
    """Give a command one option for every field of `TrainOptions`, so that the table there is the only one."""
    parameters = [
        inspect.Parameter(
            "config",
            inspect.Parameter.KEYWORD_ONLY,
            default=None,
            annotation=Annotated[Path | None, typer.Option(help="TOML file with options", show_default=False)],
        ),
        inspect.Parameter(
            "resume",
            inspect.Parameter.KEYWORD_ONLY,
            default=None,
            annotation=Annotated[Path | None, typer.Option(help="Run folder to go on with", show_default=False)],
        ),
    ]
    types = {"str": str, "int": int, "float": float, "bool": bool}
    for option in dataclasses.fields(TrainOptions):
        kind = types[str(option.type).replace(" | None", "")]
        shown = option.metadata["shown"]
        if shown is None:
            shown = str(option.default) if kind is not bool else "on" if option.default else "off"
        declared = typer.Option(
            help=option.metadata["help"], rich_help_panel=option.metadata["group"], show_default=shown
        )
        annotation = Annotated[kind | None, declared]  # type: ignore[valid-type]
        parameters.append(
            inspect.Parameter(option.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)
        )
    command.__signature__ = inspect.Signature(parameters)
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return command


def _flowing(command: Any) -> str:
    """The docstring of a command with its paragraphs as single lines, for the terminal to wrap."""
    return "\n\n".join(" ".join(part.split()) for part in inspect.cleandoc(command.__doc__).split("\n\n"))


app.command(help=_flowing(train))(_declared(train))


# --- sweep ----------------------------------------------------------------------------------------------------------


def sweep(
    config: Annotated[Path, typer.Option(help="TOML file with options and a table named search", show_default=False)],
    trials: Annotated[int, typer.Option(help="Trials in all, those of earlier calls counted")] = 50,
    out: Annotated[Path, typer.Option(help="Folder of the sweep; an existing one is gone on with")] = Path(
        "runs/sweep"
    ),
    metric: Annotated[
        str, typer.Option(help="What is compared: validation_loss, validation_accuracy, …")
    ] = "validation_loss",
    prune: Annotated[bool, typer.Option(help="End trials that are worse than the median at their epoch")] = True,
) -> None:
    """Search for good training options: many short runs, the next one's options picked by how the others went.

    The TOML file is one for train, with a table named search: lr = { low = 1e-4, high = 0.1, log = true } for a range,
    hidden = ["64", "256,128"] for a choice. The folder gets every trial as it ends, and the best one's options as
    best.toml, for gpu-mlp train --config. After Ctrl-C or a kill the same command goes on.
    """
    from .sweeps import Sweep, read_space

    common, search = read_space(config)
    found = Sweep(common, search, out, metric, prune, _say)
    done = found.run(trials)
    if found.best is not None:
        _say(f"the best of {len(found.finished)} trials, with all its options in {out / 'best.toml'}:")
        for name, value in found.best.params.items():
            print(f"{name} = {json.dumps(value, ensure_ascii=False)}")
        print(f"best {metric.replace('_', ' ')}: {found.best.value:.4f}")
    if not done:
        raise typer.Exit(130)


app.command(help=_flowing(sweep))(sweep)

# --- evaluate, predict ----------------------------------------------------------------------------------------------


@app.command()
def evaluate(
    model: ModelArgument,
    data: Annotated[
        str | None, typer.Option(help="Data with targets", show_default="the part held out when it was trained")
    ] = None,
    target: Annotated[
        str | None, typer.Option(help="Target column, key or file", show_default="as in training")
    ] = None,
    memory: MemoryOption = None,
    device: DeviceOption = "auto",
) -> None:
    """Judge a model: accuracy for classes, RMSE and R² for values."""
    from .model import Model
    from .streamed import held_out, opened
    from .streams import Stream

    loaded = Model.load(model, device)
    if data is None:
        if target is not None:
            raise ValueError("target: goes with --data")
        name, part = held_out(loaded, memory)
    else:
        name, part = "", opened(data, _target_in(data, target, loaded), None, memory)
    if isinstance(part, Stream):
        figures = loaded.judge(loaded.labelled(part))
    else:
        part = part.test if part.test is not None and data is not None else part
        if part.y is None:
            raise ValueError(f"target: {data} has none; name it with --target")
        figures = loaded.figures(loaded.outputs(part.x), part.y)
    _say(f"{len(part)} rows")
    for figure, value in figures.items():
        print(f"{name} {figure.replace('_', ' ')}: {value:.4f}".strip())


@app.command()
def predict(
    model: ModelArgument,
    data: Annotated[str, typer.Option(help="Rows to predict: a file as for training; a target in it is ignored")],
    out: Annotated[
        Path | None,
        typer.Option(help="File to write: .csv, .npy or .parquet", show_default="CSV to the screen"),
    ] = None,
    probabilities: Annotated[bool, typer.Option("--probabilities", help="Also the probability of every class")] = False,
    memory: MemoryOption = None,
    device: DeviceOption = "auto",
) -> None:
    """Predict a label or a value for every row."""
    from . import data as datasets
    from .model import Model
    from .predictions import check_path, write
    from .streamed import opened
    from .streams import Stream

    if out is not None:
        check_path(out)
    loaded = Model.load(model, device)
    raw = opened(data, _target_in(data, None, loaded), None, memory, require_target=False)
    if isinstance(raw, Stream):
        write(out, loaded, (y_hat for y_hat, _ in loaded.batches(raw)), len(raw), probabilities)
    else:
        raw = raw.test if raw.test is not None and data in datasets.BUILT_IN else raw
        write(out, loaded, [loaded.outputs(raw.x)], len(raw), probabilities)
    if out is not None:
        _say(f"{len(raw)} predictions written to {out}")


def _target_in(data: str, given: str | None, model: Any) -> str | None:
    """The target that was given; else, for a file whose columns or keys have names, the one of the training data."""
    named = (".csv", ".tsv", ".csv.gz", ".tsv.gz", ".parquet", ".npz")
    return given if given is not None or not data.lower().endswith(named) else model.data.get("target")


# --- make-data ------------------------------------------------------------------------------------------------------


@app.command()
def export(
    model: ModelArgument,
    out: Annotated[Path, typer.Argument(help="File to write: .onnx", show_default=False)],
    dtype: Annotated[str, typer.Option(help="What the graph computes in: float32 or float64")] = "float32",
) -> None:
    """Write a model, its preprocessing and its labels as an ONNX graph, which other runtimes compute with."""
    from .export import to_onnx
    from .model import Model

    if out.suffix != ".onnx":
        raise ValueError(f"out: expected a file name that ends in .onnx, got {out}")
    loaded = Model.load(model, "cpu")
    try:
        made = to_onnx(loaded, out, dtype)
    except ImportError as error:
        raise ValueError(str(error)) from None
    inputs, outputs = (", ".join(value.name for value in values) for values in (made.graph.input, made.graph.output))
    _say(f"{out}: from {inputs} to {outputs}")


@app.command(name="make-data")
def make_data(
    out: Annotated[Path, typer.Argument(help="Folder to write; must be new", show_default=False)],
    rows: Annotated[int, typer.Option(help="How many rows")] = 100_000,
    features: Annotated[int, typer.Option(help="How many columns of x, at least 2")] = 20,
    task: Annotated[str, typer.Option(help="classification or regression")] = "classification",
    classes: Annotated[int, typer.Option(help="How many classes, for a classification")] = 3,
    format: Annotated[str, typer.Option(help="npy, npz, parquet or csv")] = "npy",
    shards: Annotated[int, typer.Option(help="Files that the rows are spread over")] = 1,
    seed: Annotated[int, typer.Option(help="Of the rule and of the rows")] = 0,
) -> None:
    """Write a synthetic data set of any size whose best possible figure is known, to test and to measure with."""
    from .synthetic import Synthetic, write

    data = Synthetic(rows, features, task, classes, seed)
    started = told = time.monotonic()

    def tell(done: int) -> None:
        nonlocal told
        if time.monotonic() - told > SECONDS_BETWEEN_NOTES and done < rows:
            told = time.monotonic()
            _say(f"{done:,} of {rows:,} rows, {(told - started) * (rows - done) / done:.0f} s left")

    folder = write(data, out, format, shards, tell)
    _say(f"{rows:,} rows of {features} features in {shards} {format} shard{'s' * (shards != 1)} written to {folder}")
    for name, value in data.best.items():
        print(f"best possible {name}: {value:.4f}")


# --- info, check, bench ---------------------------------------------------------------------------------------------


@app.command()
def info(
    model: Annotated[
        Path | None, typer.Argument(help="A model or a run folder to describe", show_default=False)
    ] = None,
    plan: Annotated[
        str | None, typer.Option(help="Widths such as 784,4096,10: the memory of a training step", show_default=False)
    ] = None,
    batch_size: Annotated[int, typer.Option(help="With --plan: rows of a step")] = 128,
    activation: Annotated[str, typer.Option(help="With --plan: of the hidden layers")] = "relu",
    output: Annotated[str, typer.Option(help="With --plan: the output activation")] = "softmax",
    precision: Annotated[str, typer.Option(help="With --plan")] = "float32",
    optimizer: Annotated[str, typer.Option(help="With --plan")] = "adam",
    accumulate: Annotated[int, typer.Option(help="With --plan: micro-batches of a step")] = 1,
) -> None:
    """Say what this machine has to compute with, what is in a model, or what memory a training step takes."""
    from .environment import describe_machine, describe_model, describe_plan

    if plan is not None:
        if model is not None:
            raise ValueError("plan: goes without a model")
        _facts_table(describe_plan(plan, batch_size, activation, output, precision, optimizer, accumulate))
    else:
        _facts_table(describe_machine() if model is None else describe_model(model))


@app.command()
def check(
    device: DeviceOption = "auto",
    seed: Annotated[int, typer.Option(help="Of the networks and the data that are tried")] = 0,
) -> None:
    """Check the gradients and the precisions on this machine; exit status 1 if any is off."""
    from .selfcheck import run_checks

    failed = total = 0
    for row in run_checks(device, seed):
        total += 1
        failed += not row.ok
        print(f"{'ok  ' if row.ok else 'FAIL'}  {row.name}: {row.detail}")
    print(f"{total - failed} of {total} checks passed")
    if failed:
        raise typer.Exit(1)


@app.command()
def bench(
    device: DeviceOption = "auto",
    seconds: Annotated[float, typer.Option(help="To measure for, about")] = 120.0,
    peers: Annotated[
        str, typer.Option(help="Who takes part if installed: usual, all (torch.compile too: minutes), none, or names")
    ] = "usual",
    out: Annotated[Path | None, typer.Option(help="Folder for results.jsonl", show_default="nothing is kept")] = None,
) -> None:
    """Measure training steps on this machine, against their bare matrix products and other libraries.

    Everybody computes the same step in one process, in turn, and is timed only where the result is right. Exit status
    1 if this library's was not.
    """
    from .bench import quick

    found = quick.run(device, seconds, peers, out, say=_say)
    _print_table(*quick.rows(found))
    print(quick.CAPTION)
    for line in quick.remarks(found):
        print(line)
    if quick.wrong(found):
        raise typer.Exit(1)


def _why_not_cuda(wanted: str, device: str) -> str:
    """In brackets, why the device that was chosen automatically is not a GPU."""
    from .ops import cuda_obstacle

    return f" (no GPU: {cuda_obstacle()})" if wanted == "auto" and device == "cpu" else ""


# --- what is printed ------------------------------------------------------------------------------------------------


def _say(line: str) -> None:
    """A line for the reader, not for a script: to standard error, if anybody reads it; of several ranks the first's."""
    if ranks.joined().first:
        _tell(line)


def _tell(line: str) -> None:
    if sys.stderr is not None:
        with contextlib.suppress(OSError):
            print(line, file=sys.stderr, flush=True)


def _figures_table(figures: dict[str, dict[str, float]]) -> None:
    rows = [[part, *(f"{value:.4f}" for value in row.values())] for part, row in figures.items()]
    _print_table(["part", *next(iter(figures.values()))], rows)


def _print_table(head: list[str], rows: list[list[str]]) -> None:
    from rich.box import SIMPLE
    from rich.console import Console
    from rich.table import Column, Table

    table = Table(Column(head[0], no_wrap=True), *head[1:], box=SIMPLE)
    for row in rows:
        table.add_row(*row)
    console = Console()
    with console.capture() as captured:  # printed by us: rich would end the process over a closed pipe
        console.print(table)
    print(captured.get(), end="")


def _facts_table(facts: dict[str, str]) -> None:
    width = max(map(len, facts))
    for name, value in facts.items():
        print(f"{name:<{width}}  {value}")


# --- errors ---------------------------------------------------------------------------------------------------------


def main() -> None:
    """Run the command line; every failure a user can cause is one line and an exit status."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # for a terminal that lacks an arrow
    warnings.showwarning = lambda message, *where: _say(f"gpu-mlp: note: {message}")
    sys.exit(run(sys.argv[1:]))


def run(arguments: list[str]) -> int:
    """The exit status of `gpu-mlp` with these arguments."""
    usage_error: Any
    click_error: Any
    usage_error, click_error = typer.BadParameter.__mro__[1:3]  # typer brings its own click and does not name them
    try:
        if ranks.has_mpi4py() and ranks.join(None).size > 1 and arguments[:1] != ["train"]:
            raise ValueError("only train works on several ranks; start this command without mpiexec")
        # Not through the command's own main, which would end the process over a closed pipe.
        with typer.main.get_command(app).make_context("gpu-mlp", arguments or ["--help"]) as context:
            context.command.invoke(context)
        if sys.stdout is not None:
            sys.stdout.flush()
        return 0
    except typer.Exit as exit_:
        if exit_.exit_code:
            ranks.joined().parted()  # whoever exits first with a status ends the others
        return exit_.exit_code
    except SystemExit:  # rich's way of saying that nobody reads its help any more
        return 0
    except click_error as error:
        where = getattr(getattr(error, "ctx", None), "command_path", "gpu-mlp")
        hint = f" (see {where} --help)" if isinstance(error, usage_error) else ""
        return _fail(f"{error.format_message()}{hint}", 2)
    except (typer.Abort, KeyboardInterrupt):
        return _fail("interrupted", 130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nobody reads on; let the exit be quiet
        return 0
    except (ValueError, TypeError, OSError) as error:
        return _fail(_one_line(error), 2)
    except (ArithmeticError, MemoryError, DeviceLost, DeviceError) as error:
        return _fail(_one_line(error) or "not enough memory; try a smaller --batch-size or more --accumulate", 1)


def _one_line(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return " ".join(str(error).split())


def _fail(message: str, status: int) -> int:
    if os.environ.get("GPU_MLP_TRACEBACK"):
        traceback.print_exc()
    if told := ranks.joined().blame(f"gpu-mlp: {message}"):
        _tell(told)
    ranks.joined().parted()
    return status


if __name__ == "__main__":
    main()
