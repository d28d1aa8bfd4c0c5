"""A rehearsal: the tests' stand-in for CuPy takes CuPy's place, so that a script for a GPU runs without one."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parent.parent / "tests"


def rehearse() -> None:
    """Have `import cupy` give the stand-in from here on."""
    sys.path.insert(0, str(TESTS))
    importlib.import_module("cuda_on_cpu.as_cupy")
