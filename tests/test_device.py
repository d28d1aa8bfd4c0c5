"""Which device "auto" means, why a GPU is not used, and what the command says of it; on an emulated GPU."""

from __future__ import annotations

import logging
import re

import numpy as np
import pytest
from cuda_on_cpu.fixtures import emulated_gpu  # noqa: F401

from gpu_mlp import MLP, cli, ops
from gpu_mlp.precision import get as precision_of

FLOAT32 = precision_of("float32")


@pytest.fixture
def runtime(emulated_gpu, monkeypatch):  # noqa: F811
    """The CUDA runtime as CuPy shows it, to be changed, with nothing remembered from before."""
    import cupy

    from gpu_mlp.ops import device

    device.obstacle.cache_clear()
    yield lambda name, value: monkeypatch.setattr(cupy.cuda.runtime, name, value)
    device.obstacle.cache_clear()


def failing(error):
    def fail(*_):
        raise error

    return fail


def test_without_cupy_auto_means_the_cpu_and_cuda_says_what_to_install(monkeypatch, caplog):
    monkeypatch.setattr(ops.importlib.util, "find_spec", lambda name: None)
    with caplog.at_level(logging.INFO, "gpu_mlp"):
        assert MLP([2, 1], device="auto").device == "cpu"
    assert caplog.messages == ["device: cpu (CuPy is not installed (pip install 'gpu-mlp[cuda12]'))"]
    with pytest.raises(ValueError, match=r"device: 'cuda' cannot be used: CuPy is not installed \(pip install"):
        MLP([2, 1], device="cuda")


def test_auto_means_a_gpu_that_is_usable(runtime):
    assert MLP([2, 1]).device == "cuda"
    assert MLP([2, 1], device="cpu").device == "cpu"


def test_no_driver(runtime):
    from cuda_on_cpu.streams import CUDARuntimeError

    runtime("getDeviceCount", failing(CUDARuntimeError("cudaErrorInsufficientDriver: too old")))
    runtime("driverGetVersion", lambda: 0)
    assert ops.cuda_obstacle() == "no NVIDIA driver is loaded; install one"
    assert MLP([2, 1]).device == "cpu"


def test_a_driver_that_is_too_old(runtime):
    from cuda_on_cpu.streams import CUDARuntimeError

    runtime("getDeviceCount", failing(CUDARuntimeError("cudaErrorInsufficientDriver: too old")))
    runtime("driverGetVersion", lambda: 11040)
    assert ops.cuda_obstacle() == "the NVIDIA driver is too old: it is for CUDA 11.4, CuPy is for 12.9; update it"


def test_no_device(runtime):
    from cuda_on_cpu.streams import CUDARuntimeError

    runtime("getDeviceCount", failing(CUDARuntimeError("cudaErrorNoDevice: no CUDA-capable device is detected")))
    assert "no CUDA-capable device is detected" in ops.cuda_obstacle()


def test_none_at_all(runtime):
    runtime("getDeviceCount", lambda: 0)
    with pytest.raises(ValueError, match="device: 'cuda' cannot be used: the driver finds no NVIDIA GPU"):
        MLP([2, 1], device="cuda")


def test_a_gpu_that_is_too_old(runtime, monkeypatch):
    import cupy

    monkeypatch.setattr(cupy.cuda.Device, "compute_capability", "61")
    assert ops.cuda_obstacle() == "the GPU has compute capability 61; the kernels need 70 or later"


def test_a_compiler_that_is_missing(runtime, monkeypatch):
    from gpu_mlp.ops import launch

    monkeypatch.setattr(launch, "kernel", failing(RuntimeError("libnvrtc.so.12: cannot open shared object file")))
    assert re.match(r"a kernel could not be compiled and run: RuntimeError: libnvrtc.*pip install", ops.cuda_obstacle())


def test_a_cupy_that_does_not_load(monkeypatch):
    import builtins

    honest = builtins.__import__

    def refuse(name, *arguments, **options):
        if name.split(".")[0] == "cupy":
            raise ImportError("libcuda.so.1: cannot open shared object file")
        return honest(name, *arguments, **options)

    monkeypatch.setattr(ops.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(builtins, "__import__", refuse)
    assert "CuPy does not load (libcuda.so.1" in ops.cuda_obstacle()


def test_info_names_the_gpu(runtime, capsys):
    assert cli.run(["info"]) == 0
    facts = dict(re.split(r"  +", line, maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert facts["GPU"].startswith("Emulated GPU, compute capability 9.0, 3 multiprocessors")
    assert facts["CUDA"] == "driver 12.9, runtime 12.9"
    assert facts["cuBLAS"] == "through nvmath-python, in CUDA graphs"
    assert facts["GEMMs"] == "cublasLt 120903, by the algorithm that it proposes first"
    assert facts["device='auto'"] == "means cuda"


def test_train_says_where_and_with_how_much_memory(runtime, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.savez("set.npz", x=np.random.default_rng(0).normal(size=(40, 3)), y=np.arange(40) % 2)
    options = [
        "train",
        "--data",
        "set.npz",
        "--target",
        "y",
        "--hidden",
        "4",
        "--epochs",
        "2",
        "--no-progress",
        "--no-plots",
    ]
    assert cli.run([*options, "--out", "on"]) == 0
    said = capsys.readouterr().err
    assert "float32 on cuda\n" in said
    assert "device memory: 32.0 MiB planned" in said
    runtime("getDeviceCount", lambda: 0)
    from gpu_mlp.ops import device

    device.obstacle.cache_clear()
    assert cli.run([*options, "--out", "off"]) == 0
    said = capsys.readouterr().err
    assert "float32 on cpu (no GPU: the driver finds no NVIDIA GPU)\n" in said
    assert "device memory" not in said


def test_train_keeps_the_last_epoch_of_a_gpu_that_failed(runtime, emulated_gpu, capsys, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.chdir(tmp_path)
    np.savez("set.npz", x=np.random.default_rng(0).normal(size=(40, 3)), y=np.arange(40) % 2)
    emulated_gpu.broken_after = 500
    options = ["--data", "set.npz", "--target", "y", "--hidden", "4", "--epochs", "500", "--no-progress", "--no-plots"]
    assert cli.run(["train", *options, "--out", "kept"]) == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert re.match(
        r"gpu-mlp: epoch \d+: .* failed .*illegal memory access.*; the model of the last good epoch is in kept", said
    )
    emulated_gpu.broken_after = None
    assert MLP.load(tmp_path / "kept" / "model.safetensors", device="cpu").sizes == (3, 4, 2)
