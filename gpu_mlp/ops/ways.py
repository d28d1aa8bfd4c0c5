"""Which of several sequences of work computes a layer's share fastest: a GEMM and a kernel, or a GEMM with an epilogue.

Each is timed as a whole, once for a shape, a precision and a device, in the first step of a shape; `choices` keeps
which it was. What is neither measured nor kept goes the plain way. An epilogue that gives something else than the
plain way is no candidate: that is looked at, and not taken on trust.

Leans on `search`, and on `gemm` for the device's choices.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import cupy

from . import gemm, search

PLAIN = "plain"
# By which two ways may differ, of the norm: they round in other places.
TOLERANCE = {"float32": 1e-4, "tf32": 1e-3, "bfloat16": 2e-2, "float16": 5e-3}

Work = Callable[[], None]
Offer = Callable[[], Work | None]  # makes the work, if this product has such a way here


class Ways:
    """The choices of one precision.

    as_float32: an array, or its values as float32 in a new one.
    """

    def __init__(self, precision: str, as_float32: Callable[[Any], Any]) -> None:
        self._precision, self._as_float32 = precision, as_float32
        self._chosen: dict[tuple[Any, ...], str] = {}

    def run(
        self,
        key: tuple[Any, ...],
        plain: Work,
        offers: Mapping[str, Offer],
        results: Sequence[Any],
        again: bool = True,
        sound: Callable[[str], bool] = lambda way: True,
    ) -> str:
        """Do the work the way that is fastest; says which.

        key: what the choice depends on; results: what every way writes; again: whether doing it again changes nothing,
        so that it can be timed here; sound: what else is asked of a way.
        """
        way = self.pick(key, (PLAIN, *offers), lambda: self._search(plain, offers, results, sound), again)
        work = None if way == PLAIN else offers[way]()
        if work is None:
            way, work = PLAIN, plain
        work()
        return way

    def pick(self, key: tuple[Any, ...], ways: Sequence[str], find: Callable[[], str | None], again: bool) -> str:
        """Which of the ways to go: the one that is kept, or that ``find`` finds; the first where that cannot be told.

        ``find`` is called where a search is allowed, and ``again`` says that what it tries does no harm.
        """
        if not search.tuned():
            return ways[0]
        library = gemm.binding().lt
        if key in self._chosen or library is None or library.choices.path is None:
            return self._chosen.get(key, ways[0])
        name = " ".join(map(str, (*key, self._precision)))
        kept = library.choices.get(name)
        if kept not in ways:
            found = find() if again and search.allowed() else None
            kept = None if found is None else library.choices.keep(name, found)
        if kept not in ways:
            return ways[0]
        self._chosen[key] = str(kept)
        return self._chosen[key]

    def _search(
        self, plain: Work, offers: Mapping[str, Offer], results: Sequence[Any], sound: Callable[[str], bool]
    ) -> str | None:
        """The fastest sound way; None where that cannot be told now."""
        plain()  # its products find their algorithms
        ways: dict[str, Work] = {PLAIN: plain}
        try:
            expected = [self._copy(result) for result in results]
            if not all(bool(cupy.isfinite(values).all()) for values in expected):
                return None
            for way, offer in offers.items():
                work = offer()
                if work is None:
                    continue
                work()
                if all(self._close(result, values) for result, values in zip(results, expected)) and sound(way):
                    ways[way] = work
        except cupy.cuda.memory.OutOfMemoryError:
            return None
        names = list(ways)
        return names[search.fastest(list(ways.values()))] if len(names) > 1 else PLAIN

    def _copy(self, array: Any) -> Any:
        values = self._as_float32(array)
        return values.copy() if values is array else values

    def _close(self, array: Any, expected: Any) -> bool:
        """A NaN is never close."""
        off, size = ((values**2).sum() for values in (self._as_float32(array) - expected, expected))
        return bool(float(off) <= TOLERANCE[self._precision] ** 2 * float(size))
