"""CUDA graphs: work that is the same every time is captured once and then replayed with a single launch.

Leans on CuPy's stream capture, and on `gemm` for a cuBLAS that can be captured. What differs from one replay to the
next lies in device memory (the state); the addresses may not change, so a recording keeps what they belong to alive.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

from ..notices import say_once
from . import gemm, search
from .interface import Array, Recorder
from .launch import device_error

MOST_GRAPHS = 32  # of one recorder; a user who sends ever new batch sizes gets plain launches beyond


class GraphRecorder(Recorder):
    """Runs work as it is at first, then captures it, then replays it.

    The first run compiles kernels, grows scratch, and looks for the fastest way to compute every product.

    keep: gives what a recording leans on beside the work itself.
    """

    replays = True

    def __init__(self, keep: Callable[[], Any], wanted: bool | None) -> None:
        self._keep = keep
        self._wanted = wanted is not False
        self._seen: set[Hashable] = set()
        self._graphs: dict[Hashable, tuple[Any, Any]] = {}

    def run(self, key: Hashable, work: Callable[[], None], moving: Sequence[Array] = ()) -> None:
        if key in self._graphs:
            self._launch(self._graphs[key][0])
            return
        new = key not in self._seen and len(self._seen) < MOST_GRAPHS
        with search.tuning(searching=new):
            if self._wanted and key in self._seen and len(self._graphs) < MOST_GRAPHS:
                self._record(key, work)
            else:
                self._seen.add(key)
                work()

    def clear(self) -> None:
        self._seen.clear()
        self._graphs.clear()

    def _record(self, key: Hashable, work: Callable[[], None]) -> None:
        if not gemm.binding().in_graphs:
            self._fall_back("CuPy's cuBLAS cannot be captured (pip install nvmath-python)", work)
            return
        try:
            graph = search.captured(work)
        except Exception as error:  # whatever a driver or a library objects to, the steps themselves still run
            self._fall_back(f"{type(error).__name__}: {error}", work)
            return
        self._graphs[key] = (graph, (work, self._keep()))
        self._launch(graph)

    def _launch(self, graph: Any) -> None:
        try:
            graph.launch()
        except Exception as error:
            raise device_error(error, "a recorded step", ()) from error

    def _fall_back(self, why: str, work: Callable[[], None]) -> None:
        self._wanted = False
        say_once(f"steps are launched one kernel at a time, not as a CUDA graph: {why}")
        work()
