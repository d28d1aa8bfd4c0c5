"""One training run from its options to its run folder: data, network, training, figures, files.

Leans on `data`, `preprocessing`, `model` and `training`; the command line leans on it.
"""

from __future__ import annotations

import json
import os
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import checks, data, logs, losses, optimizers, options, parallel, plots, schedules, tensorfile
from .averaging import EMA
from .checkpoint import LOCK, Checkpoints, interval, listed
from .failures import BrokenData, DeviceLost, Diverged, Terminated
from .fitting import Callback
from .history import EarlyStopping, History
from .model import OUTPUT_OF, Model
from .network import MLP
from .options import TrainOptions
from .parallel import ranks
from .preprocessing import Labels, Preprocessor, TargetScaler, infer_task
from .readers import RawData
from .regularizers import ElasticNet
from .training import Trainer

DEFAULT_DROPOUT, DEFAULT_SMOOTHING, DEFAULT_SCHEDULE = 0.3, 0.05, "cosine"
DEFAULT_CHECKPOINTS, NEVER = "60 seconds", "never"
OPTIONS, CHECKPOINTS = "options.toml", "checkpoints"  # what a run folder has from the start
DEFAULT_LR = {"adam": 2e-3, "adamw": 2e-3}


@dataclass
class Parts:
    """The parts of a data set: what is trained on, what is watched meanwhile, and what gives the final figures.

    Each is a `RawData`, or all are a `Stream`.
    """

    train: Any
    validation: Any
    test: Any

    def named(self) -> dict[str, Any]:
        """The parts that there are, by name."""
        found = {"train": self.train, "validation": self.validation, "test": self.test}
        return {name: part for name, part in found.items() if part is not None}


@dataclass
class Result:
    """What a run leaves: the model, its history, the figures of every part and the folder they were written to."""

    model: Model
    history: History
    figures: dict[str, dict[str, float]]
    folder: Path


def split_parts(raw: RawData, task: str, test: float, validation: float, seed: int) -> Parts:
    """Cut a data set into parts; its own test part, where it has one, is the test part.

    Classes are spread evenly over the parts. ``test`` and ``validation`` are fractions of what is left to cut; 0
    means no such part.
    """
    test_part = raw.test
    rest = data.take(raw, slice(None)) if raw.test is not None else raw
    if test_part is None and test:
        rest, test_part = _cut(rest, task, test, seed)
    validation_part = None
    if validation:
        rest, validation_part = _cut(rest, task, validation, seed)
    return Parts(rest, validation_part, test_part)


def _cut(raw: RawData, task: str, fraction: float, seed: int) -> tuple[RawData, RawData]:
    if len(raw) < 2:
        raise ValueError(f"data: {len(raw)} row cannot be split; use test=0 and validation=0")
    stratify = Labels.fit(raw.y).encode(raw.y) if task == "classification" and raw.y is not None else None
    first, second = data.split(len(raw), fraction, seed, stratify)
    return data.take(raw, first), data.take(raw, second)


class Run:
    """A run that has been checked and is ready to start.

    Making one reads the data and prepares every part of it, so that whatever is wrong shows before the training. It
    leaves nothing on the disk. ``raw``: the data, where another run with the same ones has read them. With ``resume``
    it is the run in the folder ``given.out``, which goes on.
    """

    in_pieces = False  # whether the data set is a `Stream`
    _confused: tuple[Any, ...]  # the true classes, those they were taken for, and how often where it is not once each

    def __init__(self, given: TrainOptions, raw: Any = None, resume: bool = False) -> None:
        self.options = _resolved(given)
        self.resume = resume
        self._parallel = parallel.named(self.options.parallel, self.options.shard_optimizer, self.options.wire)
        self.ranks = ranks.join(None if self._parallel is None else self._parallel is not False)
        self.folder = _new_folder(given.data) if given.out is None else Path(given.out)
        self._early_stopping = None if self.options.patience is None else EarlyStopping(self.options.patience)
        if given.out is not None and not resume and self.ranks.first:
            _remove_empty(_make(self.folder))  # before the data are read: can there be such a folder?
        self.raw = raw = self._read() if raw is None else raw
        self._resolve_task(raw)
        self._check_whole(raw)
        self.parts = self._split(raw)
        self.model = self._model()
        self.trainer = self._trainer()
        self._prepared = {name: self._prepare(name, part) for name, part in self.parts.named().items()}

    # --- before the start ---

    def _read(self) -> Any:
        chosen = self.options
        raw = data.load(chosen.data, chosen.target, chosen.folder)
        if raw.y is None:
            raise ValueError(f"target: {chosen.data} has none; name it with --target")
        return raw

    def _split(self, raw: Any) -> Parts:
        chosen = self.options
        return split_parts(raw, chosen.task, chosen.test, chosen.validation, chosen.seed)

    def _targets(self, raw: Any) -> NDArray[Any]:
        """The targets that the task is inferred from."""
        return _target_of(raw)

    def _resolve_task(self, raw: Any) -> None:
        """The options whose defaults wait for the task, and the losses that do not fit it."""
        chosen = self.options
        if chosen.task == "auto":
            chosen.task = infer_task(self._targets(raw))
        outputs = OUTPUT_OF[chosen.task]
        if chosen.loss is None:
            chosen.loss = next(iter(outputs))
        if chosen.loss not in outputs:
            checks.choice("loss", chosen.loss, losses.LOSSES)
            raise ValueError(f"loss: {chosen.loss!r} does not fit {chosen.task}; use one of {', '.join(outputs)}")
        if chosen.label_smoothing is None:
            chosen.label_smoothing = DEFAULT_SMOOTHING if chosen.loss == "cross_entropy" else 0.0
        elif chosen.label_smoothing and chosen.loss != "cross_entropy":
            raise ValueError(f"label_smoothing: only for loss 'cross_entropy', not {chosen.loss!r}")

    def _check_whole(self, raw: Any) -> None:
        """Refuse bad values by their row in the file, which the rows of a part no longer know."""
        if len(raw) < 2 and raw.test is None and (self.options.test or self.options.validation):
            raise ValueError(f"data: {len(raw)} row cannot be split; use test=0 and validation=0")
        target = Labels if self.options.task == "classification" else TargetScaler
        target.fit(_target_of(raw))
        Preprocessor.fit(raw.x, feature_names=raw.feature_names, standardize=False, impute=self.options.impute)

    def _learn(self) -> tuple[Preprocessor, Labels | TargetScaler]:
        """What the training part says about inputs and targets."""
        chosen, train = self.options, self.parts.train
        y = _target_of(train)
        target: Labels | TargetScaler
        if chosen.task == "classification":
            target = Labels.fit(y)
        else:
            target = TargetScaler.fit(y, standardize=chosen.loss != "poisson")
        preprocessor = Preprocessor.fit(
            train.x, feature_names=train.feature_names, standardize=chosen.standardize, impute=chosen.impute
        )
        return preprocessor, target

    def _model(self) -> Model:
        chosen = self.options
        preprocessor, target = self._learn()
        n_outputs = len(target) if isinstance(target, Labels) else len(target.mean)
        names = [name.strip() for name in chosen.activation.split(",")]
        net = MLP(
            [preprocessor.n_features_out, *chosen.hidden_sizes, n_outputs],
            activation=names[0] if len(names) == 1 else names,
            output=OUTPUT_OF[chosen.task][str(chosen.loss)],
            dropout=chosen.dropout or 0.0,
            init=chosen.init,
            precision=chosen.precision,
            device=chosen.device,
            seed=chosen.seed,
        )
        source = {name: getattr(chosen, name) for name in ("data", "target", "folder", "test", "validation", "seed")}
        source["data"] = _from_anywhere(chosen.data)
        source["in_pieces"] = self.in_pieces
        return Model(net, preprocessor, target, str(chosen.loss), source)

    def _trainer(self) -> Trainer:
        chosen = self.options
        loss = losses.get(str(chosen.loss))
        if chosen.label_smoothing:
            loss = losses.CrossEntropy(label_smoothing=chosen.label_smoothing)
        return Trainer(
            self.model.net,
            loss,
            _optimizer(chosen),
            ElasticNet(chosen.l1, chosen.l2) if chosen.l1 or chosen.l2 else None,
            _schedule(chosen),
            chosen.clip_norm,
            chosen.accumulate,
            average=None if chosen.average is None else EMA(chosen.average),
            parallel=self._parallel,
        )

    def _prepare(self, name: str, part: Any) -> Any:
        """A part as the network takes it."""
        try:
            x, y = self.model.inputs(part.x), self.model.targets(_target_of(part))
            self.trainer.loss.check_targets(y, self.model.net.sizes[-1])
        except ValueError as error:
            raise ValueError(f"{name} part: {error}") from None
        return x, y

    # --- the run ---

    def start(self) -> Result:
        """Train, then write the run folder. What was learned is written too when a run is interrupted or diverges.

        Where ranks train together the first one writes, and the others wait until it has.
        """
        chosen = self.options
        if chosen.out is None:
            self.folder = Path(self.ranks.told(str(_new_folder(chosen.data))))  # the name may be taken since
        created = self.ranks.on_first(lambda: [] if self.resume else _make(self.folder)) or []
        checkpoints, resume = self._checkpoints()
        failed: Diverged | DeviceLost | BrokenData | None = None
        try:
            if not self.resume and self.ranks.first:
                self._write_options()
            self.model.describe()
            written = logs.of(chosen.log, self.folder) if self.ranks.first else []
            history = self.fit(written, chosen.progress, checkpoints, resume)
        except (Diverged, DeviceLost, BrokenData) as error:
            if error.history is None or not len(error.history):
                self._take_back(created)
                raise
            failed, history = error, error.history
        except Terminated:
            raise
        except BaseException:
            self._take_back(created)
            raise
        try:
            result = self.ranks.on_first(lambda: self._write(history))
        except BaseException:
            self._take_back(created)  # only if nothing at all could be written
            raise
        result = result or Result(self.model, history, {}, self.folder)
        if failed is not None:
            raise type(failed)(f"{failed}; the model of the last good epoch is in {self.folder}", history)
        return result

    @property
    def checkpoint(self) -> Path | None:
        """The newest checkpoint in the run folder, if there is one."""
        found = listed(self.folder / CHECKPOINTS)
        return found[-1] if found else None

    def _checkpoints(self) -> tuple[Checkpoints | None, bool | Path]:
        """What `Trainer.fit` takes as ``checkpoints`` and as ``resume``."""
        chosen, place = self.options, self.folder / CHECKPOINTS
        if chosen.checkpoint_every == NEVER:
            return None, place if self.resume and self.checkpoint else False
        return Checkpoints(place, str(chosen.checkpoint_every), chosen.checkpoint_keep), self.resume

    def _write_options(self) -> None:
        chosen = replace(self.options, data=_from_anywhere(self.options.data))  # to be resumed from anywhere
        tensorfile.write_bytes(self.folder / OPTIONS, options.to_toml(chosen).encode())

    def _take_back(self, created: list[Path]) -> None:
        """Leave no folder behind of a new run of which nothing is worth keeping."""
        if not self.ranks.first:
            return
        if self.resume or self.checkpoint or {path.name for path in self.folder.iterdir()} - {OPTIONS, CHECKPOINTS}:
            return
        place = self.folder / CHECKPOINTS
        (self.folder / OPTIONS).unlink(missing_ok=True)
        (place / LOCK).unlink(missing_ok=True)
        _remove_empty([place, *created] if place.exists() else created)

    def fit(
        self,
        callbacks: Sequence[Callback],
        progress: bool,
        checkpoints: Checkpoints | None = None,
        resume: bool | Path = False,
    ) -> History:
        """Train alone: nothing is written but by the callbacks, and the checkpoints."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "training was interrupted")  # the command line says it in its own way
            return self.trainer.fit(
                self._prepared["train"],
                epochs=self.options.epochs,
                batch_size=self.options.batch_size,
                validation=self._prepared.get("validation"),
                progress=progress,
                early_stopping=self._early_stopping,
                callbacks=callbacks,
                checkpoints=checkpoints,
                resume=resume,
            )

    def _write(self, history: History) -> Result:
        """The files of the run folder, the model first: whatever happens then, what was learned is there."""
        self.model.save(self.folder / "model.safetensors")
        self._write_options()
        with np.errstate(all="ignore"):  # the square of a huge target; the figure then says inf
            figures = self._judge()
        record = {**history.to_dict(), "figures": figures}
        tensorfile.write_bytes(self.folder / "history.json", _json(record).encode())
        if self.options.plots and plots.available():
            self._draw(history)
        return Result(self.model, history, figures, self.folder)

    def _judge(self) -> dict[str, dict[str, float]]:
        """The figures of every part; what the plot of the last one shows is kept."""
        figures, net, target = {}, self.model.net, self.model.target
        for name, part in self.parts.named().items():
            y_hat, y = net.forward(self._prepared[name][0]), _target_of(part)
            figures[name] = self.model.figures(y_hat, y)
            if isinstance(target, Labels):
                self._confused = target.encode(y), y_hat.argmax(axis=1)
        return figures

    def _draw(self, history: History) -> None:
        title = f"{self.options.data}: {' → '.join(map(str, self.model.net.sizes))}"
        if len(history):
            plots.learning_curves(self.folder / "learning_curves.png", history, title)
        if isinstance(self.model.target, Labels):
            labels = [str(label) for label in self.model.target.decode(np.arange(len(self.model.target)))]
            path, part = self.folder / "confusion_matrix.png", list(self.parts.named())[-1]
            true, predicted, *times = self._confused
            plots.confusion_matrix(path, true, predicted, labels, f"{title}, {part} part", *times)


def held_out(model: Model) -> tuple[str, RawData]:
    """The part of a model's own data that was held out in its run: the test part, or else the validation part."""
    with known_source(model) as source:
        raw = data.load(source["data"], source["target"], source["folder"])
        parts = split_parts(raw, model.task, source["test"], source["validation"], source["seed"])
    return list(parts.named().items())[-1]


@contextmanager
def known_source(model: Model) -> Iterator[Mapping[str, Any]]:
    """Where a model's data came from; a ValueError where it does not say all that is asked."""
    try:
        yield model.data
    except KeyError as error:
        raise ValueError(
            f"data: the model does not say where its data is ({error} is missing); name it with --data"
        ) from None


# --- options to objects ---------------------------------------------------------------------------------------------


def _resolved(given: TrainOptions) -> TrainOptions:
    """The options with the defaults that depend on other options filled in, each checked as far as it can be alone."""
    chosen = replace(given)
    checks.choice("task", chosen.task, ("auto", *OUTPUT_OF))
    checks.choice("optimizer", chosen.optimizer, optimizers.OPTIMIZERS)
    for name in ("test", "validation"):
        checks.real(name, getattr(chosen, name), 0, 1, open_maximum=True)
    for name in ("epochs", "batch_size", "accumulate"):
        checks.integer(name, getattr(chosen, name), 1)
    checks.integer("warmup", chosen.warmup, 0)
    logs.check(chosen.log)
    if chosen.average is not None:
        checks.real("average", chosen.average, 0, 1, open_maximum=True)
    checks.integer("seed", chosen.seed, 0)
    full_batch = chosen.optimizer == "lbfgs"
    if chosen.dropout is None:
        chosen.dropout = 0.0 if full_batch or not chosen.hidden_sizes else DEFAULT_DROPOUT
    if chosen.schedule is None:
        chosen.schedule = "constant" if full_batch else DEFAULT_SCHEDULE
    if chosen.checkpoint_every is None:
        chosen.checkpoint_every = NEVER if full_batch else DEFAULT_CHECKPOINTS
    elif full_batch and chosen.checkpoint_every != NEVER:
        raise ValueError(f"checkpoint_every: a run of L-BFGS cannot be resumed; leave it out, or say {NEVER}")
    if chosen.checkpoint_every != NEVER:
        _named("checkpoint_every", interval, chosen.checkpoint_every)
    checks.integer("checkpoint_keep", chosen.checkpoint_keep, 1)
    if chosen.lr is None:
        chosen.lr = DEFAULT_LR.get(chosen.optimizer)
    return chosen


def _named(option: str, check: Callable[[str], Any], value: str) -> None:
    """Check a value whose errors go by another name."""
    try:
        check(value)
    except ValueError as error:
        raise ValueError(f"{option}: {str(error).partition(': ')[2]}, or {NEVER}") from None


def _optimizer(chosen: TrainOptions) -> optimizers.Optimizer:
    kind = optimizers.OPTIMIZERS[chosen.optimizer]
    given = {name: getattr(chosen, name) for name in ("lr", "momentum", "weight_decay")}
    given = {name: value for name, value in given.items() if value is not None}
    for name in given:
        if name not in kind.__dataclass_fields__:
            raise ValueError(f"{name}: optimizer {chosen.optimizer!r} has none")
    return kind(**given)


def _schedule(chosen: TrainOptions) -> schedules.Schedule:
    name = str(chosen.schedule)
    checks.choice("schedule", name, schedules.SCHEDULES)
    if name in ("step", "exponential"):
        raise ValueError(
            f"schedule: {name!r} needs parameters that only the Python interface takes; use cosine or another"
        )
    schedule = schedules.get(name)
    return schedules.Warmup(chosen.warmup, then=schedule) if chosen.warmup else schedule


# --- the run folder -------------------------------------------------------------------------------------------------


def _new_folder(source: str) -> Path:
    """A folder under runs/ that does not exist yet, named after the data and the time."""
    stem = "".join(c if c.isalnum() or c in "-_" else "-" for c in Path(source.split(",")[0]).stem or "run")
    first = Path("runs") / f"{stem}-{time.strftime('%Y%m%d-%H%M%S')}"
    folder, n = first, 1
    while folder.exists():
        n += 1
        folder = first.with_name(f"{first.name}-{n}")
    return folder


def _make(folder: Path) -> list[Path]:
    """Make the run folder and see that it can be written to; the folders that had to be made, innermost first."""
    created: list[Path] = []
    try:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise ValueError(f"out: {folder} exists and is not an empty folder; choose another")
        for path in reversed([folder, *folder.parents]):
            if not path.exists():
                path.mkdir(exist_ok=path != folder)  # another run may be making runs/ just now
                created.insert(0, path)
        tensorfile.write_bytes(folder / ".probe", b"").unlink()
    except OSError as error:
        _remove_empty(created)
        raise ValueError(f"out: cannot write to {folder} ({os.strerror(error.errno or 0)})") from None
    return created


def _remove_empty(folders: list[Path]) -> None:
    """Take back the folders that a run made and left empty."""
    for folder in folders:
        try:
            folder.rmdir()
        except OSError:
            return


def _from_anywhere(source: str) -> str:
    """A data source in words that mean the same in every folder: the path in full, a built-in name as it is."""
    if source in data.BUILT_IN:
        return source
    parts = [source] if os.path.exists(source) else source.split(",")  # "x.npy,y.npy" names two files
    return ",".join(os.path.abspath(part.strip()) for part in parts)


def _target_of(part: RawData) -> NDArray[Any]:
    assert part.y is not None  # a run and an evaluation refuse data without a target before any work
    return part.y


def _json(record: Any) -> str:
    """JSON with null where a figure is NaN, which JSON does not have."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(part) for key, part in value.items()}
        if isinstance(value, list):
            return [plain(part) for part in value]
        return None if isinstance(value, float) and not np.isfinite(value) else value

    return json.dumps(plain(record), indent=1, allow_nan=False) + "\n"
