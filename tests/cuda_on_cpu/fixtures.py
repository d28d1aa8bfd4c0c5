"""The fixture of tests that run kernels without a GPU; `tests/conftest.py` hands it on to every test."""

from __future__ import annotations

import os
import sys

import pytest

from . import compiler, fake_cupy


def require_compiler():
    """Skip where g++ or CUDA's headers are missing, and say what to install; under CI=true that is a failure."""
    missing = compiler.missing()
    if missing:
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(missing)


@pytest.fixture
def emulated_gpu():
    """The emulated device (see `Emulator`), with its stand-in installed as `cupy`."""
    require_compiler()
    if not getattr(sys.modules.get("cupy"), "is_stand_in", True):
        pytest.skip("the real CuPy is in use in this process")
    with fake_cupy.installed() as device:
        device.reset()
        yield device
