"""How many threads the BLAS of this process may have: NumPy's, SciPy's and any other's.

A leaf: threadpoolctl finds them, and OpenBLAS's own functions are called where it has them.
"""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable
from typing import Any

SETTINGS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "BLIS_NUM_THREADS", "GOTO_NUM_THREADS")
_LIMITING = threading.Lock()
_before: int | None = None  # the threads there were before the limit at hand


def threads() -> int:
    """The threads that a GEMM may have, were it not for a limit of ours: the fewest of NumPy's BLAS and any other.

    1 where a user, or a context around this one, wants that.
    """
    if _before is not None:
        return _before
    return min((told() for told, _ in _libraries()), default=1)


class OneThread:
    """A context that keeps BLAS to one thread; the limit is the process's, so the first thread to come sets it and
    takes it back.

    On a busy machine the threads of a small GEMM wait for each other for whole time slices of the scheduler: a product
    of 0.1 ms was seen to take 24 ms.
    """

    def __enter__(self) -> None:
        global _before
        self._limited: list[tuple[int, Callable[[int], object]]] = []
        self._first = _LIMITING.acquire(blocking=False)
        if not self._first:
            return  # limited already, by this thread or another
        try:
            fewest = None
            for told, limit in _libraries():
                count = told()
                fewest = count if fewest is None or count < fewest else fewest
                if count > 1:
                    self._limited.append((count, limit))
            _before = fewest or 1
            for _, limit in self._limited:
                limit(1)
        except BaseException:  # an interrupt: nobody would take the limit back
            self.__exit__()
            raise

    def __exit__(self, *raised: object) -> None:
        global _before
        if self._first:
            for count, limit in self._limited:
                limit(count)
            _before = None
            _LIMITING.release()


def keep_to(cores: int) -> None:
    """Keep BLAS, and with it all else that runs in threads, to so many, unless the environment says how many."""
    if not any(os.environ.get(name) for name in SETTINGS) and threads() > cores:
        _controller().limit(limits=cores, user_api="blas")


@functools.cache
def _libraries() -> tuple[tuple[Callable[[], int], Callable[[int], object]], ...]:
    """What tells the threads of every BLAS, and what sets them.

    OpenBLAS's own functions where it has them: threadpoolctl's take as long as a small step, and would keep every other
    thread of the program from setting anything later.
    """
    found: list[Any] = []
    for library in _controller().lib_controllers:
        own = [_symbol(library, f"openblas_{verb}_num_threads") for verb in ("get", "set")]
        if library.internal_api == "openblas" and library.threading_layer == "pthreads" and all(own):
            found.append(own)
        else:
            found.append((lambda library=library: library.get_num_threads() or 1, library.set_num_threads))
    return tuple((told, limit) for told, limit in found)


def _symbol(library: Any, name: str) -> Any:
    """A function of a BLAS, whatever is put before and behind its name; None where it has none of that name."""
    names = (f"{before}{name}{behind}" for before in ("", "scipy_") for behind in ("", "64_", "_64"))
    return next((getattr(library.dynlib, full) for full in names if hasattr(library.dynlib, full)), None)


@functools.cache
def _controller() -> Any:
    from scipy.linalg import cython_blas  # noqa: F401  (a BLAS of its own, which is loaded now and limited as well)
    from threadpoolctl import ThreadpoolController

    return ThreadpoolController().select(user_api="blas")
