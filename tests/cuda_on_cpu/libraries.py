"""What CuPy and nvmath-python really offer of the names that the stand-ins have, so that the two can be compared.

    python -m tests.cuda_on_cpu.libraries

writes `libraries.json` anew from the packages that are installed (the extras cuda12 and nccl12), and takes names that
are gone out of it. It needs no GPU: nothing of CUDA is called, but for NCCL's version. A function stands there as its
parameters, each with its C type where it has one; a class as those of its constructor; a constant as its value;
anything else as null.
"""

from __future__ import annotations

import importlib
import inspect
import json
import re
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

RECORD = Path(__file__).with_name("libraries.json")


def recorded() -> dict[str, Any]:
    """What is kept of every name."""
    names: dict[str, Any] = json.loads(RECORD.read_text())["names"]
    return names


def names(modules: dict[str, types.ModuleType]) -> Iterator[tuple[str, Any]]:
    """(dotted name, object) of everything public in the stand-ins' modules and in the classes there."""
    for module, contents in modules.items():
        for name, value in vars(contents).items():
            if name.startswith("_") or isinstance(value, types.ModuleType):
                continue
            yield f"{module}.{name}", value
            if inspect.isclass(value):
                yield from _members(f"{module}.{name}", value)


def _members(prefix: str, kind: type) -> Iterator[tuple[str, Any]]:
    """What a class adds to Python's own; of the arrays also what they have from NumPy."""
    for name in dir(kind):
        home = next((c for c in kind.__mro__ if name in vars(c)), object)
        if home.__module__ != "builtins" and not name.startswith("_"):
            yield f"{prefix}.{name}", vars(home)[name]


def found(name: str) -> Any:
    """The object of that dotted name in what is installed; AttributeError where there is none."""
    parts = name.split(".")
    for end in range(len(parts) - 1, 0, -1):
        try:
            value: Any = importlib.import_module(".".join(parts[:end]))
        except ImportError:
            continue
        for part in parts[end:]:
            value = getattr(value, part)
        return value
    raise AttributeError(name)


def described(value: Any) -> Any:
    """What is kept of an object: parameters [[name, C type], …], a number or text, or None."""
    if isinstance(value, (bool, int, str)):
        return value
    if not callable(value):
        return None
    written = re.match(r"[\w.]+\((.*)\)", _first_line(value))
    try:
        parameters = [[str(p).split(":")[0].split("=")[0], ""] for p in inspect.signature(value).parameters.values()]
    except (TypeError, ValueError):
        parameters = []
    if written and not (parameters and "(self" not in written[0] and not re.search(r"\w [a-zA-Z]\w*", written[1])):
        parameters = [_parameter(text) for text in re.split(r",\s*", written[1]) if text and text != "*"]
    return [parameter for parameter in parameters if parameter[0] != "self"]


def _first_line(value: Any) -> str:
    """How Cython writes a function down, at the head of its docstring."""
    return (getattr(value, "__doc__", None) or "").strip().split("\n")[0]


def _parameter(text: str) -> list[str]:
    """[name, C type] of "intptr_t handle" or "dtype=float"."""
    *kind, name = text.split("=")[0].split()
    return [name, " ".join(kind)]


def main() -> None:
    """Write the record of what is installed."""
    from . import fake_cupy

    record, missing = {}, []
    for name, _ in sorted(names(fake_cupy.MODULES)):
        try:
            record[name] = described(found(name))
        except AttributeError:
            missing.append(name)
    import cupy
    import nvmath
    from cupy.cuda import nccl

    versions = {"cupy": cupy.__version__, "nvmath-python": nvmath.__version__, "nccl": nccl.get_version()}
    lines = [f"  {json.dumps(name)}: {json.dumps(value)}" for name, value in record.items()]
    RECORD.write_text(f'{{\n "versions": {json.dumps(versions)},\n "names": {{\n' + ",\n".join(lines) + "\n }\n}\n")
    print(f"{RECORD}: {len(record)} names; not there: {', '.join(missing) or 'none'}")


if __name__ == "__main__":
    main()
