"""The stand-in as `cupy` for a whole process: a rehearsal of what is meant for a real GPU.

    PYTHONPATH=tests python -m pytest -p cuda_on_cpu.as_cupy -m gpu -k fused_pairs

Importing this module installs it. Speed, and whatever else only a GPU can tell, is not to be read off such a run.
"""

from __future__ import annotations

import sys

from . import compiler, fake_cupy

if compiler.missing():
    raise ImportError(compiler.missing())
sys.modules.update(fake_cupy.MODULES)
fake_cupy.device.reset()
fake_cupy.device.orders, fake_cupy.device.races = (0,), False
