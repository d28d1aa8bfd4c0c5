"""A search over training options: many runs, each with options that Optuna picks, the hopeless ones cut short.

Leans on `runs` for the training and on Optuna (``pip install 'gpu-mlp[sweep]'``) for the search. Every trial is in a
SQLite file from its start on, so that the same call goes on where a killed one stopped, with the same trials.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from . import checks, metrics, options, tensorfile
from .failures import Diverged
from .history import LOWER_IS_BETTER, History
from .options import TrainOptions
from .readers import RawData
from .streamed import make
from .streams import Stream

# What a trial may not change, since its figure could not be compared with another's, and what is the sweep's own.
COMMON = (
    "data",
    "target",
    "folder",
    "memory",
    "buffer_rows",
    "task",
    "test",
    "validation",
    "seed",
    "device",
    "log",
    "plots",
    "progress",
    "out",
)
STARTUP_TRIALS = 5  # before any is pruned
CUT = "cut"  # the study's list of trials that did not come to their end


def read_space(path: str | os.PathLike[str]) -> tuple[TrainOptions, dict[str, Any]]:
    """The options that every trial has, and Optuna's distributions of those that are searched, of a TOML file.

    The file is one for ``gpu-mlp train --config`` with a table ``[search]``: a list of choices for an option, or
    ``{low = 1e-4, high = 0.1, log = true}``. Raises ValueError or TypeError that names the option.
    """
    values = options.read_toml(Path(path))
    search = values.pop("search", None)
    if not isinstance(search, dict) or not search:
        raise ValueError(f"config: {path} has no table [search] with the options to search, as lr = [0.001, 0.01]")
    common = options.from_values(values, path)
    if common.out is not None:
        raise ValueError("out: belongs on the command line of a sweep, not into its file")
    if not common.validation:
        raise ValueError("validation: a sweep needs a part to compare trials on, got 0")
    return common, {name.replace("-", "_"): _searched(name.replace("-", "_"), found) for name, found in search.items()}


def _searched(name: str, found: Any) -> Any:
    """The distribution of an option, from what the table has for it."""
    fields = {field.name: str(field.type).replace(" | None", "") for field in dataclasses.fields(TrainOptions)}
    where = f"search.{name}"
    if name not in fields:
        raise ValueError(f"{where}: unknown option{checks.nearest(name, fields)}")
    if name in COMMON:
        raise ValueError(f"{where}: cannot be searched, since the trials could not be compared")
    try:
        if isinstance(found, dict):
            return _range(where, found, fields[name])
        if not isinstance(found, list) or not found:
            raise TypeError(f"{where}: expected a list of choices or {{low = …, high = …}}, got {found!r}")
        choices = [getattr(TrainOptions(**{name: value}), name) for value in found]
        return _optuna().distributions.CategoricalDistribution(choices)
    except (TypeError, ValueError) as error:
        raise type(error)(str(error) if str(error).startswith(where) else f"search.{error}") from None


def _range(where: str, found: dict[str, Any], kind: str) -> Any:
    if kind not in ("int", "float"):
        raise TypeError(f"{where}: only numbers have ranges; expected a list of choices, got {found!r}")
    if not {"low", "high"} <= set(found) <= {"low", "high", "log"}:
        raise ValueError(f"{where}: expected low, high and perhaps log, got {', '.join(found) or 'nothing'}")
    check = checks.integer if kind == "int" else checks.real
    log = checks.boolean(f"{where}.log", found.get("log", False))
    low, high = (check(f"{where}.{end}", found[end]) for end in ("low", "high"))
    if low >= high or (log and low <= 0):
        raise ValueError(f"{where}: expected low < high{' and low > 0' * log}, got {low:g} and {high:g}")
    distributions = _optuna().distributions
    made = distributions.IntDistribution if kind == "int" else distributions.FloatDistribution
    return made(low, high, log=log)


class Sweep:
    """The trials over a space in the folder ``out``: those that it already has, and those that `run` adds.

    metric: the column of the history that is compared, validation_loss or validation_<metric>, as the trained model
    has it: of the best epoch where the options say patience, else of the last. prune: end a trial whose figure is
    worse than the median of those before at its epoch. say: takes a line about every trial.
    """

    def __init__(
        self,
        common: TrainOptions,
        search: Mapping[str, Any],
        out: str | os.PathLike[str],
        metric: str = "validation_loss",
        prune: bool = True,
        say: Callable[[str], None] = print,
    ) -> None:
        optuna = _optuna()
        self.common, self.search, self.out, self.metric = common, dict(search), Path(out), metric
        self._say = say
        if metric == "validation_loss" and (odd := {"loss", "label_smoothing"} & set(search)):
            raise ValueError(f"search.{odd.pop()}: changes what validation_loss means; compare validation_accuracy")
        self._raw: RawData | Stream = make(common).raw  # before anything is written: do the common options work at all?
        self._lower = metric in LOWER_IS_BETTER
        pruners = optuna.pruners
        self._study = self._opened(
            pruners.MedianPruner(STARTUP_TRIALS, common.epochs // 4) if prune else pruners.NopPruner()
        )

    def _opened(self, pruner: Any) -> Any:
        """The study in the folder's file, whose space must be this one."""
        optuna = _optuna()
        from sqlalchemy.engine import URL

        self.out.mkdir(parents=True, exist_ok=True)
        file = self.out / "trials.db"
        try:
            url = URL.create("sqlite", database=os.fspath(file)).render_as_string()
            direction = "minimize" if self._lower else "maximize"
            study = optuna.create_study(
                storage=url, study_name="sweep", load_if_exists=True, direction=direction, pruner=pruner
            )
        except Exception as error:  # SQLAlchemy's and Optuna's: both have roots of their own
            raise ValueError(f"out: {file} cannot be used ({checks.brief(error)})") from None
        space = json.dumps([repr(self.common), repr(self.search), self.metric])
        if study.user_attrs.setdefault("space", space) != space:
            raise ValueError(f"out: {self.out} has the trials of another search; choose another folder")
        study.set_user_attr("space", space)
        return study

    @property
    def finished(self) -> list[Any]:
        """The trials, as Optuna has them, that came to an end of their own."""
        cut = self._study.user_attrs.get(CUT, [])
        return [trial for trial in self._study.trials if trial.state.is_finished() and trial.number not in cut]

    @property
    def best(self) -> Any:
        """The best of the finished trials; None before one is."""
        return next(iter(self._study.best_trials), None)

    @property
    def best_options(self) -> TrainOptions:
        """The options of the best trial."""
        return dataclasses.replace(self.common, **self.best.params)

    def run(self, trials: int) -> bool:
        """Go on until there are so many trials; False where Ctrl-C ended it before. ``best.toml`` has the best one's
        options, for ``gpu-mlp train --config``.

        Raises ValueError where no trial could be trained.
        """
        checks.integer("trials", trials, 1)
        with _alone(self.out):
            for trial in self._study.get_trials(states=(_optuna().trial.TrialState.RUNNING,)):
                self._try_again(trial)  # its process was killed
            while (number := len(self.finished)) < trials:
                # A seed for each trial, so that a sweep that was stopped goes on as if it had not been.
                self._study.sampler = _optuna().samplers.TPESampler(seed=self.common.seed + number)
                if not self._one(f"trial {number + 1}/{trials}"):
                    return False
        if self.best is None:
            raise ValueError(f"search: no trial could be trained; the last: {self.finished[-1].user_attrs['error']}")
        return True

    def _one(self, name: str) -> bool:
        """Train with the options of one trial and note what came of it; False where it was interrupted."""
        state = _optuna().trial.TrialState
        trial = self._study.ask(self.search)
        shown = ", ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in trial.params.items())
        try:
            history = self._trained(trial, dataclasses.replace(self.common, **trial.params))
        except Diverged as error:
            self._study.tell(trial, state=state.PRUNED)
            self._say(f"{name}: diverged ({error}); {shown}")
            return True
        except (ValueError, TypeError, MemoryError) as error:  # options that do not go together, a network too large
            reason = checks.brief(error) or "not enough memory"
            trial.set_user_attr("error", reason)
            self._study.tell(trial, state=state.FAIL)
            self._say(f"{name}: cannot be trained ({reason}); {shown}")
            return True
        if history.stopped == "interrupted":
            self._try_again(trial)
            return False
        value = (history.best if history.restored_best else history.last)[self.metric]
        pruned = history.stopped == "callback"
        self._study.tell(trial, None if pruned else value, state.PRUNED if pruned else state.COMPLETE)
        end = f"pruned after epoch {history.last['epoch']}" if pruned else f"{self.metric} {value:.4g}"
        best = "" if self.best is None else f" (best {self.best.value:.4g})"
        self._say(f"{name}: {end}{best}; {shown}")
        if self.best is not None:
            tensorfile.write_bytes(self.out / "best.toml", options.to_toml(self.best_options).encode())
        return True

    def _trained(self, trial: Any, chosen: TrainOptions) -> History:
        """The history of a run with these options, ended early where Optuna says so."""
        run = make(chosen, self._raw)
        names = metrics.default(run.trainer.loss.name, run.model.net.sizes[-1])
        checks.choice("metric", self.metric, ["validation_loss", *(f"validation_{name}" for name in names)])

        def report(trainer: Any, row: Mapping[str, float]) -> bool:
            trial.report(row[self.metric], int(row["epoch"]))
            return bool(trial.should_prune()) and row["epoch"] < chosen.epochs

        return run.fit([report], progress=False)

    def _try_again(self, trial: Any) -> None:
        """Note that a trial did not come to its end, and have the next one take its options."""
        self._study.set_user_attr(CUT, [*self._study.user_attrs.get(CUT, []), trial.number])
        self._study.tell(trial.number, state=_optuna().trial.TrialState.FAIL)
        self._study.enqueue_trial(trial.params)


def _optuna() -> Any:
    try:
        import optuna
    except ImportError:
        raise ValueError("sweep: needs Optuna; pip install 'gpu-mlp[sweep]'") from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """See that no other process works in ``folder``: its running trial would be taken for a killed one."""
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(f"out: another sweep is at work in {folder}") from None
        yield
