"""What the future of a training run depends on: taken out of a trainer as a snapshot, and put back into another.

Leans on `checkpoint` for what a snapshot is. Two things are in one: the *state*, which the updates move along, and the
*recipe*, which says what the updates are; a state goes back only into a trainer of the same recipe.
"""

from __future__ import annotations

import dataclasses
import json
import math
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from . import checks, data
from .checkpoint import Snapshot
from .feeding import Parts
from .ops.interface import Slot
from .parallel import Parallel
from .schedules import PlateauState
from .streams import Stream
from .tensorfile import Expected

if TYPE_CHECKING:
    from .fitting import Fit
    from .training import Trainer

LONGEST = 60  # characters of a value in a message


# --- the recipe ------------------------------------------------------------------------------------------------------


def recipe(trainer: Trainer) -> dict[str, Any]:
    """All that decides the updates of a trainer beside its state and the data, as JSON."""
    net = trainer.net
    return {
        "network": {
            "sizes": list(net.sizes),
            "activation": list(net.activation),
            "output": net.output,
            "dropout": list(net.dropout),
            "precision": net.precision,
            "seed": net.seed,
        },
        "loss": told(trainer.loss),
        "optimizer": told(trainer.optimizer),
        "regularizer": told(trainer.regularizer),
        "schedule": told(trainer.schedule),
        "clip_norm": trainer.clip_norm,
        "accumulate": trainer._given_accumulate,
        "average": told(trainer.average),
        "seed": trainer.seed,
    }


def told(value: Any) -> Any:
    """A rule, a number or a list of them as JSON: a rule by its class and its parameters."""
    if isinstance(value, (np.generic, np.ndarray)):
        value = value.tolist()
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else repr(value)
    if isinstance(value, (list, tuple)):
        return [told(part) for part in value]
    if isinstance(value, Mapping):
        return {str(key): told(part) for key, part in value.items()}
    named = (
        {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        if dataclasses.is_dataclass(value)
        else vars(value)
    )
    return {"rule": type(value).__name__, **{name: told(part) for name, part in named.items()}}


def differences(
    was: Mapping[str, Any],
    now: Mapping[str, Any],
    prefix: str = "",
    words: tuple[str, str, str] = ("was", "and is", "now"),
) -> list[str]:
    """Every value that is not the same in two recipes, as "batch_size was 64 and is 128 now"."""
    found = []
    for name in {**was, **now}:
        old, new = was.get(name), now.get(name)
        if isinstance(old, Mapping) and isinstance(new, Mapping) and old.get("rule") == new.get("rule"):
            found += differences(old, new, f"{prefix}{name}.", words)
        elif old != new and name == "hash":
            found.append(f"{prefix}{name}: the values are others")
        elif old != new:
            found.append(f"{prefix}{name} {words[0]} {_short(old)} {words[1]} {_short(new)} {words[2]}")
    return found


def _short(value: Any) -> str:
    if isinstance(value, Mapping) and "rule" in value:
        return str(value["rule"])
    text = repr(value)
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}…"


def refuse(was: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """A ValueError that names every difference between two recipes."""
    found = differences(was, now)
    if found:
        raise ValueError(f"resume: the checkpoint is of another run: {'; '.join(found)}")


# --- the state -------------------------------------------------------------------------------------------------------


def snapshot(trainer: Trainer) -> Snapshot:
    """The state of a trainer, its arrays on the host; where they are on it already, they are not copied."""
    ops, net = trainer.net._ops, trainer.net
    plateau = dataclasses.astuple(trainer.plateau)
    tensors = {
        "theta": net._theta,
        "state": trainer._state,
        "plateau": np.array(plateau, np.float64),
        **{f"moment.{name}": trainer._update.whole_moment(moment) for name, moment in trainer.moments.items()},
    }
    if trainer._averaged is not None:
        tensors["averaged"] = trainer._averaged
    header = {
        "recipe": recipe(trainer),
        "epoch": trainer.epoch,
        "slots": [slot.name for slot in Slot],
        "accumulate": trainer.accumulate,
        "apply_at_once": trainer.apply_at_once,
        "device": net.device,
        "metadata": net.metadata,
    }
    return Snapshot({name: ops.to_host(tensor) for name, tensor in tensors.items()}, header, trainer.rounds)


def fits(trainer: Trainer, header: Mapping[str, Any]) -> dict[str, Expected]:
    """The tensors that follow from a header; ValueError where it is not of this trainer's recipe."""
    now = recipe(trainer)
    refuse({name: value for name, value in header["recipe"].items() if name in now}, now)
    return _expected(trainer, header)


def _expected(trainer: Trainer, header: Mapping[str, Any]) -> dict[str, Expected]:
    """The tensors that follow from a header of this trainer's recipe, every value of which is looked at."""
    if header["slots"] != [slot.name for slot in Slot]:
        raise ValueError("resume: the checkpoint is of another release of gpu_mlp, whose state has other numbers")
    checks.integer("epoch", header["epoch"], 0)
    checks.integer("accumulate", header["accumulate"], 1)
    checks.boolean("apply_at_once", header["apply_at_once"])
    checks.choice("device", header["device"], ("cpu", "cuda"))
    kind, size = {"float32": "F32", "float64": "F64"}[trainer.net._precision.master], trainer.net.layout.size
    expected = {
        "theta": Expected((size,), (kind,)),
        **{f"moment.{name}": Expected((size,), (kind,), False) for name in trainer.moments},
        "state": Expected((len(Slot),), ("F64",), False),
        "plateau": Expected((len(dataclasses.fields(PlateauState)),), ("F64",), False),
    }
    if trainer._averaged is not None:
        expected["averaged"] = Expected((size,), (kind,))
    fit = header.get("fit")
    if fit is not None:
        expected["history"] = Expected((None, len(fit["columns"])), ("F64",), False)
        expected |= {name: Expected((size,), (kind,)) for name in ("good", "best") if fit[name] == "kept"}
    return expected


def restore(trainer: Trainer, found: Snapshot) -> None:
    """Put a snapshot, which `fits`, into a trainer."""
    net, ops, header, tensors = trainer.net, trainer.net._ops, found.header, found.tensors
    if header["device"] != net.device and trainer.ranks.first:
        warnings.warn(
            f"resume: the checkpoint was written on {header['device']} and the run goes on on {net.device}, where sums "
            f"are rounded in another order: the bits will not be those of a run that stayed",
            RuntimeWarning,
            stacklevel=4,
        )
    trainer._cut_as(header["accumulate"], header["apply_at_once"])
    trainer.epoch, trainer.rounds = header["epoch"], found.step
    best, *counts = tensors["plateau"].tolist()
    trainer.plateau = PlateauState(best, *map(int, counts))
    ops.copy(tensors["theta"], net._theta)
    ops.copy(tensors["state"], trainer._state)
    for name in trainer.moments:
        trainer._update.take_moment(name, tensors[f"moment.{name}"])
    if trainer._averaged is not None:
        ops.copy(tensors["averaged"], trainer._averaged)
    if net._shadow is not None:
        ops.copy(net._theta, net._shadow)


def shared(trainer: Trainer, found: Snapshot | None) -> Snapshot | None:
    """The snapshot that the first rank has read, if it has, on every rank."""
    ranks = trainer.ranks
    if ranks.size == 1:
        return found
    described = None
    if found is not None:
        kinds = {name: [tensor.dtype.name, list(tensor.shape)] for name, tensor in found.tensors.items()}
        described = [found.header, found.step, found.figure, kinds]
    told = json.loads(ranks.told(json.dumps(described)))
    if told is None:
        return None
    header, step, figure, kinds = told
    tensors = {}
    for name, (dtype, shape) in kinds.items():
        tensors[name] = np.ascontiguousarray(found.tensors[name]) if found is not None else np.empty(shape, dtype)
        ranks.broadcast(tensors[name])
    return Snapshot(tensors, header, step, figure)


# --- a fit -----------------------------------------------------------------------------------------------------------


def recipe_of_fit(fit: Fit) -> dict[str, Any]:
    """The recipe of the trainer, and all else that decides a fit: its data and its arguments."""
    validation: Any = fit.held_out
    if validation is None and fit.validation is not None:
        validation = _fingerprint(fit, fit.validation)
    return {
        **recipe(fit.trainer),
        "batch_size": fit.batch_size,
        "shuffle": fit.shuffle,
        "early_stopping": told(fit.early_stopping),
        "metrics": list(fit.names),
        "data": _fingerprint(fit, (fit.x, fit.y, fit.w) if fit.stream is None else fit.stream),
        "validation": validation,
    }


def _fingerprint(fit: Fit, dataset: Parts | Stream) -> Any:
    if isinstance(dataset, Stream):
        return told(dataset.fingerprint())
    return data.fingerprint(*dataset, to_host=fit.net._ops.to_host)


def snapshot_fit(fit: Fit, seconds: float, reason: str) -> Snapshot:
    """The state of a fit and its trainer. seconds: of the epoch at hand so far; reason: why the run ends here, if it
    does."""
    found = snapshot(fit.trainer)
    columns, rows = fit.history.table()
    found.tensors["history"] = rows
    model = found.tensors["theta" if fit.trainer._model() is fit.net._theta else "averaged"]
    kept = {"good": "model" if np.array_equal(fit.good, model) else "kept"}
    kept["best"] = "none" if fit.best is None else "good" if fit.best is fit.good else "kept"
    found.tensors |= {name: getattr(fit, name) for name, value in kept.items() if value == "kept"}
    found.header["recipe"] = fit.recipe
    found.header["fit"] = {
        "epochs": fit.epochs,
        "began": list(fit.began),
        "cursor": fit.cursor,
        "seconds": seconds if fit.cursor else 0.0,
        "stopped": reason,
        "monitor": fit.history.monitor,
        "columns": columns,
        "best_row": fit.history.best_index,
        "rounding": _rounding(fit),
        **kept,
    }
    if fit.cursor == 0 and len(rows) and math.isfinite(figure := fit.history.last[fit.history.monitor]):
        found.figure = figure
    return found


def _rounding(fit: Fit) -> dict[str, Any]:
    """What the last bits depend on beside the recipe and the device: whose passes they are, and how a batch is cut."""
    ranks, chosen = fit.trainer.ranks, fit.trainer.parallel
    cut = {"ranks": ranks.size, "wire": chosen.wire if isinstance(chosen, Parallel) else "full"}
    rows = len(range(fit.batch_size)[ranks.part(fit.batch_size)])
    return {"passes": type(fit.net._ops).__name__, "lanes": fit.trainer._cut(rows)[0], **cut}


def fits_fit(fit: Fit, header: Mapping[str, Any]) -> dict[str, Expected]:
    """The tensors that follow from the header of a fit; ValueError where it is not of this fit's recipe."""
    saved = header.get("fit")
    if saved is None:
        raise ValueError("resume: the file is of a trainer and not of a fit; Trainer.restore takes it")
    began, cursor, epoch = saved["began"], checks.integer("cursor", saved["cursor"], 0, fit.n), header["epoch"]
    for name, value in zip(("steps", "epochs"), began, strict=True):
        checks.integer(name, value, 0)
    checks.integer("best_row", saved["best_row"], -1)
    checks.real("seconds", saved["seconds"], 0)
    refuse(header["recipe"], fit.recipe)
    expected = _expected(fit.trainer, header)
    _check_epochs(fit, saved["epochs"], tuple(began), epoch - began[1] - (cursor > 0))
    return expected


def _check_epochs(fit: Fit, epochs: int, began: tuple[int, int], done: int) -> None:
    """A ValueError where a fit of so many ``epochs`` cannot go on as one of ``fit.epochs``."""
    if fit.epochs < done:
        raise ValueError(f"resume: {done} epochs are done already, and epochs is {fit.epochs}")
    if fit.schedule(epochs, began) != fit.schedule(fit.epochs, began):
        raise ValueError(
            f"resume: epochs was {epochs} and is {fit.epochs} now, but the schedule spans the run, so that the steps "
            f"done already would have been other ones; give it a length of its own, or keep the epochs"
        )


def restore_fit(fit: Fit, found: Snapshot) -> str:
    """Put a snapshot, which `fits_fit`, into a fit and its trainer; the reason why that fit is over, or ""."""
    restore(fit.trainer, found)
    saved, tensors = found.header["fit"], found.tensors
    others = differences(saved["rounding"], _rounding(fit))
    if others and found.header["device"] == fit.net.device and fit.trainer.ranks.first:
        warnings.warn(
            f"resume: sums are rounded in another order than before ({'; '.join(others)}): the bits will not be those "
            f"of a run that was not interrupted",
            RuntimeWarning,
            stacklevel=4,
        )
    fit.began, fit.cursor, fit.seconds = tuple(saved["began"]), saved["cursor"], float(saved["seconds"])
    fit.history.take(saved["columns"], tensors["history"], saved["best_row"])
    fit.good = tensors["good"] if saved["good"] == "kept" else fit.remember(fit.trainer._model())
    fit.best = {"kept": tensors.get("best"), "good": fit.good, "none": None}[saved["best"]]
    over = saved["stopped"] == "early stopping" or (not fit.cursor and fit.epochs_done >= fit.epochs)
    return (saved["stopped"] or "completed") if over else ""
