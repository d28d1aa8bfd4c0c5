"""Every kernel through NVRTC to machine code, without a GPU: it compiles, and nothing spills.

Here for the oldest architecture and for Hopper; `benchmarks/kernel_units.py` does all of them and writes the table of
registers.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
import kernel_units
from kernel_units import Unit, compile_unit, units

from gpu_mlp.ops import launch

try:
    from cuda.bindings import nvrtc  # noqa: F401
except ImportError:
    if os.environ.get("CI") == "true":
        raise
    pytest.skip("NVRTC is missing: pip install cuda-bindings nvidia-cuda-nvrtc-cu12", allow_module_level=True)

ARCHITECTURES = (70, 90)
# sin and cos reduce arguments beyond 10^5 with a table in local memory; nothing is read from it below that.
WITH_A_STACK_FRAME = re.compile("_sine$")


@pytest.fixture(scope="module")
def compiled():
    return list(kernel_units.compile_all(ARCHITECTURES))


def test_every_unit_compiles(compiled):
    assert len(compiled) == len(ARCHITECTURES) * len(list(units()))
    assert [(unit, arch, told) for unit, arch, told, _ in compiled if told] == []


def test_every_kernel_is_among_them(compiled):
    names = {resource.kernel for _, _, _, resources in compiled for resource in resources}
    for file in launch.HEADERS:
        for kernel in kernel_units.KERNEL.findall(launch.text(file)):
            assert any(name.startswith(f"{kernel}_") for name in names), kernel


def test_nothing_spills_on_hopper(compiled):
    found = [
        (unit, resource)
        for unit, arch, _, resources in compiled
        for resource in resources
        if arch >= 80 and (resource.stack or resource.spills) and not WITH_A_STACK_FRAME.search(resource.kernel)
    ]
    assert found == []


def test_a_broken_kernel_is_found(monkeypatch):
    monkeypatch.setattr(kernel_units.launch, "text", lambda name: "int x = missing;" if name == "flat.cu" else "")
    told, resources = compile_unit(Unit("flat.cu", "float32", 1, (), (("all", ()),)).source(), 90)
    assert "missing" in told
    assert resources == []
