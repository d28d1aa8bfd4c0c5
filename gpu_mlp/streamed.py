"""Runs, judgements and predictions on data that is read in pieces, and which data that is.

Leans on `runs`, whose every step is here the same on a `Stream`; the command line leans on it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import checkpoint, checks, data, folders, piecewise, runs
from .failures import BrokenData
from .model import Model
from .options import TrainOptions
from .preprocessing import Labels, Preprocessor, TargetScaler
from .readers import Columns, RawData
from .runs import Parts, Result, Run
from .streams import Stream, as_stored

PROGRAM_BYTES = 256 << 20  # what Python with all the libraries of a run takes, plots and pyarrow included
DEFAULT_MEMORY = 1 << 30  # of a data set that is read in pieces, where nobody says how much
TIMES_WHOLE, TIMES_PACKED = 4, 12  # its size on the disk that a data set takes which is read whole, packed or not
PACKED = (".parquet", ".npz")
SAMPLED_CHUNKS = 64  # from which the task is inferred


def in_pieces(source: str, memory: str | None) -> bool:
    """Whether a data set is read in pieces: a folder of shards always, a file where it would not fit in memory.

    What fits is reckoned in ``memory``, or in what the machine has left; a file is taken to need four times its size
    once it is read and prepared, a packed one twelve times.
    """
    if source in data.BUILT_IN:
        return False
    if folders.is_sharded(source):
        return True
    paths = [Path(part.strip()) for part in ([source] if os.path.exists(source) else source.split(","))]
    if not all(path.is_file() and path.suffix.lower() in folders.ENDINGS for path in paths):
        return False
    times = TIMES_PACKED if paths[0].suffix.lower() in PACKED else TIMES_WHOLE
    needed = PROGRAM_BYTES + times * sum(path.stat().st_size for path in paths)
    limit = _available() if memory is None else checks.size("memory", memory)
    return limit is not None and needed > limit


def _available() -> int | None:
    """The bytes of memory that the machine has left, where it tells."""
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            found = dict(line.split(":", 1) for line in file)
        return int(found["MemAvailable"].split()[0]) << 10
    except (OSError, KeyError, ValueError):
        return None


def budget(memory: str | None, network: int = 0) -> int:
    """The bytes that the buffers may take of a run's memory, of which the network takes so many."""
    if memory is None:
        return DEFAULT_MEMORY
    limit = checks.size("memory", memory)
    left = limit - PROGRAM_BYTES - network
    if left <= 0:
        taken = checks.shown_size(PROGRAM_BYTES + network)
        raise ValueError(f"memory: of {checks.shown_size(limit)} the program and the network take {taken}; allow more")
    return left


def opened(
    source: str, target: str | None, folder: str | None, memory: str | None, *, require_target: bool = True
) -> RawData | Stream:
    """A data set in memory, or in pieces as they are stored."""
    if folder is None and in_pieces(source, memory):
        return Stream(source, target, memory=budget(memory), require_target=require_target).prepared(as_stored)
    return data.load(source, target, folder, require_target=require_target)


def make(given: TrainOptions, raw: RawData | Stream | None = None, resume: bool = False) -> Run:
    """The run that the options and the size of the data ask for; ``raw``: the data, where another run has them.

    With ``resume`` it is the run in the folder ``given.out``, which reads its data as it did before.
    """
    if raw is not None:
        return StreamRun(given, raw) if isinstance(raw, Stream) else Run(given, raw)
    before = _as_before(given) if resume else None
    pieces = given.folder is None and in_pieces(given.data, given.memory) if before is None else before
    return StreamRun(given, resume=resume) if pieces else Run(given, resume=resume)


def _as_before(given: TrainOptions) -> bool | None:
    """Whether the run that goes on in ``given.out`` read its data in pieces; None where it has no checkpoint."""
    found = checkpoint.metadata(Path(str(given.out)) / runs.CHECKPOINTS)
    return None if found is None else bool(found.get("data", {}).get("in_pieces"))


def split_stream(stream: Stream, test: float, validation: float, seed: int) -> Parts:
    """The parts of a stream, as `runs.split_parts` cuts one in memory, but by chunks and without regard to classes."""
    rest, test_part, validation_part = stream, None, None
    if test:
        rest, test_part = rest.split(test, seed)
    if validation:
        rest, validation_part = rest.split(validation, seed)
    return Parts(rest, validation_part, test_part)


class StreamRun(Run):
    """A run on a data set that is read in pieces: every pass over it is a pass over the files."""

    in_pieces = True
    _unread: BrokenData | None = None

    def _read(self) -> Stream:
        chosen = self.options
        memory = budget(chosen.memory)
        stream = Stream(chosen.data, chosen.target, memory=memory, buffer_rows=chosen.buffer_rows)
        if stream.raw_piece(0).y is None:
            raise ValueError(f"target: {chosen.data} has none; name it with --target")
        return stream.prepared(as_stored)

    def _targets(self, raw: Stream) -> NDArray[Any]:
        """Those of some chunks from all over the set."""
        some = np.unique(np.linspace(0, len(raw.chunks) - 1, SAMPLED_CHUNKS).astype(int))
        return np.concatenate([y for y in (raw.piece(int(chunk)).y for chunk in some) if y is not None])

    def _check_whole(self, raw: Stream) -> None:
        if self.options.optimizer == "lbfgs":
            raise ValueError(
                "optimizer: lbfgs needs the whole data set many times for one step, and this one is read in pieces; "
                "use another, such as adamw, or data that fits in memory"
            )
        if len(raw) < 2 and (self.options.test or self.options.validation):
            raise ValueError(f"data: {len(raw)} row cannot be split; use test=0 and validation=0")

    def _split(self, raw: Stream) -> Parts:
        return split_stream(raw, self.options.test, self.options.validation, self.options.seed)

    def _learn(self) -> tuple[Preprocessor, Labels | TargetScaler]:
        chosen, train = self.options, self.parts.train
        classes = chosen.task == "classification"
        target = piecewise.LabelsFit() if classes else piecewise.ScalerFit(chosen.loss != "poisson")
        inputs = piecewise.InputsFit(train.feature_names, chosen.standardize, chosen.impute)

        def look(x: NDArray[Any] | Columns, y: NDArray[Any]) -> None:
            inputs.look(x)
            target.look(y)

        def measure(x: NDArray[Any] | Columns, y: NDArray[Any]) -> None:
            if inputs.measures:
                inputs.measure(x)
            target.measure(y)

        train.each(look)
        if inputs.measures or target.measures:
            train.each(measure)
        return inputs.result(), target.result()

    def _prepare(self, name: str, part: Stream) -> Stream:
        """A part as the network takes it; what is held out is looked through once, so that it holds no surprise."""
        network = self.trainer.plan(self.options.batch_size).total + 3 * self.model.net.theta.nbytes
        stream = self.model.prepared(part.within(budget(self.options.memory, network)))
        if name != "train":
            for piece in stream.pieces():
                _, y, _ = piece.arrays()
                self.trainer.loss.check_targets(y, self.model.net.sizes[-1])
        return stream

    def start(self) -> Result:
        """As `Run.start`; BrokenData too, once the model is saved, where the files could not be read to the end."""
        result = super().start()
        unread = self.ranks.told("" if self._unread is None else str(self._unread))
        if unread:
            raise BrokenData(f"{unread}; the model is in {self.folder}", result.history)
        return result

    def _judge(self) -> dict[str, dict[str, float]]:
        figures = {}
        for name, part in self.parts.named().items():
            self._counts: NDArray[np.int64] | None = None
            try:
                figures[name] = self.model.judge(self._counted(part))
            except BrokenData as error:
                self._unread = error
        if self._counts is not None:
            true, predicted = np.nonzero(self._counts)
            self._confused = true, predicted, self._counts[true, predicted]
        return figures

    def _counted(self, part: Stream) -> Iterator[tuple[NDArray[Any], NDArray[Any]]]:
        """The batches of a part, and how often each class was taken for which."""
        target = self.model.target
        for y_hat, y in self.model.labelled(part):
            if isinstance(target, Labels):
                if self._counts is None:
                    self._counts = np.zeros((len(target), len(target)), np.int64)
                np.add.at(self._counts, (target.encode(y), y_hat.argmax(axis=1)), 1)
            yield y_hat, y


def held_out(model: Model, memory: str | None = None) -> tuple[str, RawData | Stream]:
    """The part of a model's own data that was held out in its run: the test part, or else the validation part."""
    if not model.data.get("in_pieces"):
        return runs.held_out(model)
    with runs.known_source(model) as source:
        stream = Stream(source["data"], source["target"], memory=budget(memory)).prepared(as_stored)
        parts = split_stream(stream, source["test"], source["validation"], source["seed"])
    return list(parts.named().items())[-1]
