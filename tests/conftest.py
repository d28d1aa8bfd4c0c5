"""What every test may ask for: a GPU. Plain `pytest` emulates it; `pytest -m gpu` takes the real one.

    emulated_gpu   the emulated device itself: its counters, its checks, its order of threads
    real_gpu       the real device; skipped where there is none, with the reason
    gpu            either: a test that names it runs on the emulated device, and under `-m gpu` on the real one

A file with a table of implementations can name the worlds there too, and ask for each by `request.getfixturevalue`::

    params=["emulated_gpu", pytest.param("real_gpu", marks=pytest.mark.gpu)]

With REQUIRE_GPU=1 a run that selects tests for a GPU and finds none ends at once, with exit status 1.
"""

from __future__ import annotations

import functools
import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from cuda_on_cpu.fixtures import emulated_gpu  # noqa: F401

from gpu_mlp.ops import cuda_obstacle

NO_GPU = "no GPU to test on"
os.environ["GPU_MLP_CACHE"] = "0"  # nothing is searched; what is about searching has a folder of its own


@functools.cache
def obstacle() -> str:
    """Why no real GPU can be used; an empty string where one can."""
    return cuda_obstacle()


def pytest_collection_finish(session: pytest.Session) -> None:
    """Skip what needs a GPU where there is none: all of it with one reason, or not at all."""
    wanted = [item for item in session.items if item.get_closest_marker("gpu")]
    if not wanted or not obstacle():
        return
    if os.environ.get("REQUIRE_GPU") == "1":
        pytest.exit(f"REQUIRE_GPU=1, and there is no GPU to test on: {obstacle()}", returncode=1)
    for item in wanted:
        item.add_marker(pytest.mark.skip(reason=f"{NO_GPU}: {obstacle()}"))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    reasons = [r.longrepr[2] for r in terminalreporter.getreports("skipped") if isinstance(r.longrepr, tuple)]
    said = [reason for reason in reasons if NO_GPU in reason]
    if said:
        terminalreporter.write_line(f"{len(said)} tests were skipped, {said[0].removeprefix('Skipped: ')}")


class EmulatedGPU:
    """The emulated device, as far as a real one can do the same."""

    real = False

    def __init__(self, emulator) -> None:
        self._emulator = emulator

    def bytes_in_use(self) -> int:
        return self._emulator.memory.bytes_in_use()

    @contextmanager
    def limited_to(self, room: int) -> Iterator[None]:
        """Let ``room`` more bytes be allocated, and no more."""
        self._emulator.memory_limit = self.bytes_in_use() + room
        yield
        self._emulator.memory_limit = None

    def read_only(self, *arrays):
        """Refuse every store to these arrays."""
        return self._emulator.read_only(*arrays)

    def hurry(self) -> None:
        """Launch each kernel in one order of its threads and watch for no races: the test is about something else."""
        self._emulator.orders, self._emulator.races = (0,), False


class RealGPU:
    """The same on a real device, through CuPy's memory pool."""

    real = True

    def __init__(self) -> None:
        import cupy

        self.pool = cupy.get_default_memory_pool()

    def bytes_in_use(self) -> int:
        return int(self.pool.used_bytes())

    @contextmanager
    def limited_to(self, room: int) -> Iterator[None]:
        gc.collect()
        self.pool.free_all_blocks()  # what is free counts towards the limit
        self.pool.set_limit(size=self.pool.total_bytes() + room)
        try:
            yield
        finally:
            self.pool.set_limit(size=0)

    @contextmanager
    def read_only(self, *arrays) -> Iterator[None]:
        """See afterwards that these arrays hold what they held."""
        before = [array.get() for array in arrays]
        yield
        assert all(array.get().tobytes() == held.tobytes() for array, held in zip(arrays, before))

    def hurry(self) -> None:
        pass


@pytest.fixture
def real_gpu():
    """The real device, with a memory pool in which nothing is left of earlier tests."""
    device = RealGPU()
    gc.collect()
    device.pool.free_all_blocks()
    return device


@pytest.fixture(params=["emulated_gpu", pytest.param("real_gpu", marks=pytest.mark.gpu)], ids=["emulated", "real"])
def gpu(request):
    device = request.getfixturevalue(request.param)
    return device if request.param == "real_gpu" else EmulatedGPU(device)


@pytest.fixture
def graph_launches(monkeypatch):
    """A list that grows by an entry with every recorded step that is replayed."""
    from gpu_mlp.ops.graphs import GraphRecorder

    launches, launch = [], GraphRecorder._launch
    monkeypatch.setattr(GraphRecorder, "_launch", lambda self, graph: (launches.append(graph), launch(self, graph))[1])
    return launches


@pytest.fixture
def captures():
    """Skips where cuBLAS cannot be captured, since steps are then launched one kernel at a time."""
    from gpu_mlp.ops import gemm

    if not gemm.binding().in_graphs:
        pytest.skip("CuPy's cuBLAS cannot be captured: pip install nvmath-python")
