"""The stand-ins for CuPy, NCCL, cuBLAS and cublasLt against what these offer: names, parameters, constants.

`cuda_on_cpu/libraries.json` is a record of the packages themselves, which `cuda_on_cpu/libraries.py` writes; where they
are installed, it is held against them.
"""

from __future__ import annotations

import importlib.util
import inspect

import pytest
from cuda_on_cpu import fake_cupy, libraries

RECORD = libraries.recorded()
HERE = dict(libraries.names(fake_cupy.MODULES))
# What the emulator has for itself, and what only CuPy makes, with arguments of its own.
OWN = {"drain", "living", "refuse_capture", "stack", "submit", "device", "on_device", "is_stand_in"}
MADE_BY_CUPY = {"MemoryPointer", "PinnedMemoryPointer", "Graph"}
INTEGERS = {"int", "intptr_t", "size_t", "uint64_t", "int64_t", "ptrdiff_t"}


def test_every_name_of_the_stand_ins_is_one_of_the_libraries():
    own = OWN | set(fake_cupy.NUMPYS_ALONE)
    assert {name for name in HERE if name not in RECORD and name.rpartition(".")[2] not in own} == set()


def test_constants_have_the_libraries_values():
    compared = {name: value for name, value in RECORD.items() if isinstance(value, (bool, int, str))}
    assert len(compared) > 40
    assert {name: HERE[name] for name in compared} == compared


def comparable(name):
    """The parameters of a function or class here and there; None where there is nothing to compare."""
    mine, theirs = HERE[name], RECORD.get(name)
    error = inspect.isclass(mine) and issubclass(mine, BaseException)
    if not isinstance(theirs, list) or name.rpartition(".")[2] in MADE_BY_CUPY or error:
        return None
    try:
        own = [p for p in inspect.signature(mine).parameters.values() if p.name != "self"]
    except ValueError:  # one of NumPy's in C, without a signature
        return None
    if any(parameter.startswith("*") for parameter, _ in theirs) and name != "cupy.ElementwiseKernel":
        return None  # it takes whatever comes
    return own, theirs


@pytest.mark.parametrize("name", [name for name in sorted(HERE) if comparable(name)])
def test_parameters_are_the_libraries(name):
    own, theirs = comparable(name)
    names = [parameter for parameter, _ in theirs]
    bindings = any(kind in INTEGERS for _, kind in theirs)  # of a library in C, which are called by place
    inherited = "cupy.ndarray." in name and not inspect.isfunction(HERE[name])  # from NumPy, in C
    for place, parameter in enumerate(own):
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD) or inherited:
            continue
        assert place < len(theirs), f"{parameter.name} is one too many"
        if parameter.kind == parameter.KEYWORD_ONLY:
            assert parameter.name in names
        elif not bindings:
            assert names[place] == parameter.name
        kind = theirs[place][1] if names[place] == parameter.name or bindings else ""
        if kind in (*INTEGERS, "str", "bytes", "tuple") and isinstance(parameter.annotation, str):
            wanted = "int" if kind in INTEGERS else kind
            assert parameter.annotation.split("[")[0] in (wanted, "Any")
    if bindings and "nvmath" in name:  # which have no parameter that may be left out
        assert len(own) == len(theirs)


def test_what_cupys_arrays_do_not_have_is_refused(emulated_gpu):
    import cupy

    for name in fake_cupy.NUMPYS_ALONE:
        assert f"cupy.ndarray.{name}" not in RECORD
        with pytest.raises(AttributeError):
            getattr(cupy.zeros(3), name)


def test_the_record_is_of_what_is_installed():
    for package in ("cupy", "nvmath"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed (the extras cuda12 and nccl12)")
    import cupy
    from cupy.cuda import nccl

    if hasattr(cupy, "is_stand_in") or not nccl.available:
        pytest.skip("CuPy is a stand-in here, or has no NCCL")
    told = {name: libraries.described(libraries.found(name)) for name in RECORD}
    assert told == RECORD
