"""The options of a training run: one table for the command line, the TOML file, and the copy kept in the run folder.

A leaf: imports nothing heavy.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from . import checks


def _option(default: Any, group: str, text: str, shown: str | None = None) -> Any:
    """A field with what ``--help`` says of it; ``shown`` is what it calls a default that depends on other options."""
    return field(default=default, metadata={"group": group, "help": text, "shown": shown})


DATA, NETWORK, TRAINING, RUN = "Data", "Network", "Training", "Run"


@dataclass
class TrainOptions:
    """What `gpu-mlp train` can be told. None stands for a default that depends on the data or on other options."""

    data: str = _option(
        "digits",
        DATA,
        "digits, fashion-mnist, a file: .csv .tsv .parquet .npz .npy or IDX, or a folder of IDX files or of shards",
    )
    target: str | None = _option(
        None,
        DATA,
        "Target column of a table (several numeric ones: a,b), key of an .npz, or file of y",
        "by convention",
    )
    folder: str | None = _option(None, DATA, "Folder with the four IDX files of fashion-mnist", "where Debian has it")
    task: str = _option("auto", DATA, "classification, regression, or auto: decided by the target")
    test: float = _option(0.2, DATA, "Fraction held out for the final figures, if the data has no test part; 0: none")
    validation: float = _option(0.1, DATA, "Fraction of the training part to watch while training; 0: none")
    standardize: bool = _option(True, DATA, "Scale every numeric column to mean 0 and deviation 1 (training part's)")
    impute: str | None = _option(
        None, DATA, "Fill missing values: mean, median or most_frequent", "missing values are refused"
    )

    memory: str | None = _option(
        None,
        DATA,
        "Memory of the run, such as 1GiB: what does not fit is read in pieces",
        "what the machine has left",
    )
    buffer_rows: int | None = _option(
        None, DATA, "Rows that are shuffled among each other, of data read in pieces", "as many as take 64 MiB"
    )

    hidden: str = _option("256,128", NETWORK, "Widths of the hidden layers; none: no hidden layer")
    activation: str = _option("relu", NETWORK, "Activation of the hidden layers (or one a layer: relu,tanh)")
    dropout: float | None = _option(None, NETWORK, "Rate at which hidden units are dropped in training", "0.3")
    init: str = _option("auto", NETWORK, "Initial weights: auto, he_uniform, glorot_normal, orthogonal, …")
    precision: str = _option("float32", NETWORK, "float64, float32, tf32, bfloat16 or float16")
    device: str = _option("auto", NETWORK, "auto, cpu or cuda")

    loss: str | None = _option(
        None, TRAINING, "cross_entropy, nll, hinge; mse, half_mse, mae, huber, log_cosh, poisson", "by task"
    )
    label_smoothing: float | None = _option(None, TRAINING, "Label smoothing of cross_entropy", "0.05")
    optimizer: str = _option(
        "adamw", TRAINING, "sgd adam adamw nadam radam adamax adagrad rmsprop adadelta lion muon lbfgs"
    )
    lr: float | None = _option(None, TRAINING, "Learning rate", "0.002 for adam and adamw, else the optimizer's own")
    momentum: float | None = _option(None, TRAINING, "Momentum of sgd, rmsprop or muon", "the optimizer's own")
    weight_decay: float | None = _option(None, TRAINING, "The optimizer's weight decay", "the optimizer's own")
    l1: float = _option(0.0, TRAINING, "λ of the penalty λ‖W‖₁")
    l2: float = _option(0.0, TRAINING, "λ of the penalty λ·½‖W‖²")
    schedule: str | None = _option(
        None, TRAINING, "Learning rate over the run: constant, cosine, one_cycle, inverse_scaling, on_plateau", "cosine"
    )
    warmup: int = _option(0, TRAINING, "Updates of linear warm-up before the schedule")
    clip_norm: float | None = _option(None, TRAINING, "Scale a gradient down to this norm", "no clipping")
    average: float | None = _option(
        None, TRAINING, "Decay (0.999, say) of a moving average of the weights, which is validated and saved", "none"
    )
    epochs: int = _option(60, TRAINING, "Passes over the training part")
    batch_size: int = _option(64, TRAINING, "Rows of one update")
    accumulate: int = _option(1, TRAINING, "Micro-batches a batch is cut into: the same update with less memory")
    patience: int | None = _option(
        None,
        TRAINING,
        "Stop after so many epochs without a better validation loss; keep the best weights",
        "never stop",
    )

    checkpoint_every: str | None = _option(
        None,
        RUN,
        "How often what --resume goes on from is written: 500 steps, 2 epochs, 10 minutes, never",
        "60 seconds",
    )
    checkpoint_keep: int = _option(2, RUN, "How many checkpoints stay, beside the best")
    seed: int = _option(0, RUN, "Of the split, the initial weights, the shuffles and the dropout masks")
    out: str | None = _option(None, RUN, "Run folder; must be new or empty", "a new one under runs/")
    plots: bool = _option(True, RUN, "Draw the learning curves and the confusion matrix (needs matplotlib)")
    parallel: str = _option(
        "auto", RUN, "Train on all ranks that mpiexec or srun started with mpi4py: auto, on (one rank too), off"
    )
    shard_optimizer: bool = _option(False, RUN, "Spread the optimizer's moments over the ranks")
    wire: str = _option("full", RUN, "Gradients between ranks: full, or bfloat16 for half the bytes")
    log: str | None = _option(
        None, RUN, "A row an epoch in the run folder: csv, jsonl or tensorboard, or several: csv,jsonl", "none"
    )
    progress: bool = _option(True, RUN, "Show the progress on standard error")

    def __post_init__(self) -> None:
        for option in dataclasses.fields(self):
            value = getattr(self, option.name)
            if value is None and option.default is None:
                continue
            kind = str(option.type).replace(" | None", "")
            if option.name in ("hidden", "activation", "log") and isinstance(value, (list, tuple)):
                value = ",".join(str(part) for part in value)
            setattr(self, option.name, _CHECKS[kind](option.name, value))

    @property
    def hidden_sizes(self) -> list[int]:
        """The widths of the hidden layers."""
        if self.hidden.strip().lower() in ("", "none", "0"):
            return []
        try:
            return [checks.integer("hidden", int(part), 1) for part in self.hidden.split(",")]
        except ValueError:
            raise ValueError(f"hidden: expected widths such as 256,128 (or none), got {self.hidden!r}") from None


def _string(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{name}: expected a string, got {value!r} ({type(value).__name__})")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{name}: expected text that can be written as UTF-8, got {value!r}") from None
    return value


_CHECKS: dict[str, Any] = {
    "str": _string,
    "float": checks.real,
    "int": checks.integer,
    "bool": checks.boolean,
}


def merged(config: str | os.PathLike[str] | None, given: Mapping[str, Any]) -> TrainOptions:
    """The options: those given on the command line, then those of the TOML file, then the defaults."""
    values = {} if config is None else read_toml(Path(config))
    return from_values(values, config, **{name: value for name, value in given.items() if value is not None})


def from_values(values: Mapping[str, Any], path: str | os.PathLike[str] | None, **given: Any) -> TrainOptions:
    """The options of the TOML file at ``path``, and over them those ``given``; an unknown name is refused."""
    known = [option.name for option in dataclasses.fields(TrainOptions)]
    for name in values:
        if name not in known:
            raise ValueError(f"{path}: unknown option {name!r}{checks.nearest(name, known)}")
    return TrainOptions(**{**values, **given})


# What a run that is resumed may be told anew; whether the epochs may change depends on the schedule.
FREE = (
    "epochs", "device", "memory", "plots", "log", "progress", "checkpoint_every", "checkpoint_keep", "parallel",
    "shard_optimizer", "wire",
)  # fmt: skip


def resumed(
    folder: str | os.PathLike[str], config: str | os.PathLike[str] | None, given: Mapping[str, Any]
) -> TrainOptions:
    """The options of the run in ``folder``, with those given that may change; ValueError names those that may not."""
    path = Path(folder) / "options.toml"
    if not path.is_file():
        raise ValueError(f"resume: {folder} is no run folder: it has no options.toml")
    saved = merged(path, {})
    wanted = merged(config, given)
    named = {name for name, value in given.items() if value is not None}
    named |= set() if config is None else set(read_toml(Path(config)))
    changed = []
    for name in sorted(named - {*FREE, "out"}):
        old, new = getattr(saved, name), getattr(wanted, name)
        if new != old and not (name == "data" and os.path.abspath(new) == old):
            changed.append(f"{name} {old} (given: {new})")
    if changed:
        raise ValueError(
            f"resume: the run in {folder} has {', '.join(changed)}; leave these options out, or begin a new run"
        )
    if wanted.out is not None and Path(wanted.out).resolve() != Path(folder).resolve():
        raise ValueError(f"out: a run that is resumed goes on in its own folder, {folder}")
    free = {name: getattr(wanted, name) for name in named & set(FREE)}
    return dataclasses.replace(saved, **free, out=os.fspath(folder))


def read_toml(path: Path) -> dict[str, Any]:
    """The values of a TOML file by name, with _ for -."""
    try:
        import tomllib
    except ModuleNotFoundError:  # Python 3.10
        import tomli as tomllib
    try:
        with open(path, "rb") as file:
            values = tomllib.load(file)
    except FileNotFoundError:
        raise FileNotFoundError(f"config: no file at {path}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"config: {path} is not valid TOML ({error})") from None
    return {name.replace("-", "_"): value for name, value in values.items()}


def to_toml(options: TrainOptions) -> str:
    """The options as a TOML file that `gpu-mlp train --config` reads back; those that are None are left out."""
    lines = ["# The options of this run; gpu-mlp train --config with this file repeats it."]
    for option in dataclasses.fields(options):
        value = getattr(options, option.name)
        if value is not None and option.name != "out":
            literal = json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")  # TOML has no bare DEL; JSON has
            lines.append(f"{option.name} = {literal}")
    return "\n".join(lines) + "\n"
