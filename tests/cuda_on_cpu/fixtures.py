"""The fixtures of tests that run kernels without a GPU; `tests/conftest.py` hands `emulated_gpu` on to every test.

A file with many small tests imports and uses `kept_stand_in` as well.
"""

from __future__ import annotations

import os
import sys
from contextlib import contextmanager

import pytest

from . import compiler, fake_cupy


def require_compiler():
    """Skip where g++ or CUDA's headers are missing, and say what to install; under CI=true that is a failure."""
    missing = compiler.missing()
    if missing:
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(missing)


@contextmanager
def _installed():
    require_compiler()
    if not getattr(sys.modules.get("cupy"), "is_stand_in", True):
        pytest.skip("the real CuPy is in use in this process")
    with fake_cupy.installed() as device:
        yield device


@pytest.fixture
def emulated_gpu():
    """The emulated device (see `Emulator`), with its stand-in installed as `cupy`."""
    with _installed() as device:
        device.reset()
        yield device


@pytest.fixture(scope="module")
def kept_stand_in():
    """The stand-in for all tests of a file: the CUDA half is imported, and its kernels are loaded, once for all."""
    with _installed():
        yield
