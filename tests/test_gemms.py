"""GEMMs through cublasLt: plans, the search for an algorithm, and the file that keeps what was found.

The stand-in for cublasLt checks every call and says how long an algorithm takes; see `cuda_on_cpu/fake_cublaslt.py`.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import threading
import warnings

import numpy as np
import pytest
from cuda_on_cpu import fake_cublaslt, streams
from cuda_on_cpu.fake_cublaslt import Behaviour

from gpu_mlp import MLP, SGD, Trainer, notices
from gpu_mlp import precision as precisions
from gpu_mlp.ops import choices


@pytest.fixture(autouse=True)
def _afresh(monkeypatch):
    monkeypatch.setattr(notices, "_said", set())


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("GPU_MLP_CACHE", str(tmp_path))
    return tmp_path


@pytest.fixture
def lt(emulated_gpu, cache, monkeypatch):
    """The emulated GPU as a new process finds it: `lt()` is another process on the same machine."""
    from gpu_mlp.ops import gemm

    def start():
        monkeypatch.setattr(gemm, "_bindings", threading.local())
        emulated_gpu.products.clear()
        return gemm.binding()

    emulated_gpu.orders, emulated_gpu.races = (0,), False
    start()
    return start


def takes(monkeypatch, seconds):
    monkeypatch.setattr(Behaviour, "seconds", staticmethod(seconds))


def product(m=6, n=8, k=5, precision="float32", **options):
    """out = a b by `ops.gemm.GEMM`, checked, on new arrays."""
    import cupy

    from gpu_mlp.ops.gemm import GEMM

    rng = np.random.default_rng(0)
    of = precisions.get(precision)
    a, b = (cupy.asarray(rng.normal(size=shape).astype(of.storage_dtype)) for shape in ((m, k), (k, n)))
    out = cupy.asarray(np.full((m, n), np.nan, of.storage_dtype))
    GEMM(of)(a, b, out, **options)
    tolerance = {"float64": 1e-14, "float32": 1e-5}.get(precision, 2e-2)
    expected = a.get().astype(float) @ b.get().astype(float)
    np.testing.assert_allclose(out.get().astype(float), expected, atol=tolerance * k)
    return out


def algorithms(device):
    """Which algorithms the products took, in turn."""
    return [queued.algorithm for queued in device.products]


# --- plans -----------------------------------------------------------------------------------------------------------


def test_a_product_is_planned_once(emulated_gpu, lt, monkeypatch):
    library = lt().lt
    made = []
    honest = library._make
    monkeypatch.setattr(library, "_make", lambda key: (made.append(key), honest(key))[1])
    for _ in range(3):
        product()
    assert len(made) == 1
    product(m=7)
    product(precision="float64")
    assert len(made) == 3
    assert algorithms(emulated_gpu) == [0] * 5


def test_a_planned_product_sets_nothing_and_allocates_nothing(emulated_gpu, lt, monkeypatch):
    import cupy

    from gpu_mlp.ops.gemm import GEMM

    gemm = GEMM(precisions.get("float32"))
    a, b, out = cupy.zeros((4, 4), np.float32), cupy.zeros((4, 4), np.float32), cupy.zeros((4, 4), np.float32)
    gemm(a, b, out)
    calls = []
    library = lt().lt
    gemm(a, b, out)
    for name in ("matmul_desc_set_attribute", "matrix_layout_create", "matmul_algo_get_heuristic"):
        monkeypatch.setattr(library._lt, name, lambda *arguments, name=name: calls.append(name))
    before = emulated_gpu.counts["allocations"]
    gemm(a, b, out)
    assert calls == []
    assert emulated_gpu.counts["allocations"] == before


def test_addresses_that_are_less_aligned_have_a_plan_of_their_own(emulated_gpu, lt):
    import cupy

    from gpu_mlp.ops.gemm import GEMM

    flat = cupy.asarray(np.arange(200, dtype=np.float32))
    b, out = cupy.asarray(np.eye(4, dtype=np.float32)), cupy.empty((4, 4), np.float32)
    for start in (0, 4, 1):
        a = flat[start : start + 16].reshape(4, 4)
        GEMM(precisions.get("float32"))(a, b, out)
        np.testing.assert_array_equal(out.get(), a.get())
    from gpu_mlp.ops import gemm

    assert {key[0].alignment for key in gemm.binding().lt._plans} == {(256, 256, 256), (16, 256, 256), (4, 256, 256)}


@pytest.mark.parametrize("missing", ["module", "library"])
def test_without_cublaslt_a_product_goes_through_cublas(emulated_gpu, lt, monkeypatch, missing):
    import sys

    if missing == "module":
        monkeypatch.setitem(sys.modules, "nvmath.bindings.cublasLt", None)
        monkeypatch.delattr(sys.modules["nvmath.bindings"], "cublasLt", raising=False)
    else:

        def refuse():
            raise RuntimeError("no libcublasLt.so")

        monkeypatch.setattr(sys.modules["nvmath.bindings.cublasLt"], "create", refuse)
    with pytest.warns(RuntimeWarning, match="cublasLt cannot be used .*; cublasGemmEx takes its place"):
        assert lt().lt is None
    product()
    assert emulated_gpu.products == []


def test_what_cublaslt_has_no_algorithm_for_goes_through_cublas(emulated_gpu, lt, monkeypatch):
    monkeypatch.setattr(Behaviour, "refuses", staticmethod(lambda epilogue: True))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        product()
    assert emulated_gpu.products == []


# --- the search ------------------------------------------------------------------------------------------------------


def searched(**options):
    from gpu_mlp.ops import search

    with search.tuning(searching=True):
        return product(**options)


def tuned(**options):
    from gpu_mlp.ops import search

    with search.tuning():
        return product(**options)


@pytest.mark.parametrize("fastest", [0, 1, 2])
def test_the_algorithm_that_was_fastest_is_used_from_then_on(emulated_gpu, lt, monkeypatch, fastest):
    takes(monkeypatch, lambda queued: 1.0 if queued.algorithm == fastest else 2.0)
    searched()
    emulated_gpu.products.clear()
    tuned()
    searched()
    assert algorithms(emulated_gpu) == [fastest, fastest]


def test_noise_chooses_nothing(emulated_gpu, lt, monkeypatch):
    takes(monkeypatch, lambda queued: 1.0 - 0.005 * queued.algorithm)
    searched()
    assert algorithms(emulated_gpu)[-1] == 0


def test_outside_of_tuned_work_the_first_proposal_is_used_and_nothing_is_searched(emulated_gpu, lt, monkeypatch):
    """So that what a network gives does not depend on whether a search came before."""
    takes(monkeypatch, lambda queued: 2.0 - queued.algorithm)
    product()
    tuned()
    assert algorithms(emulated_gpu) == [0, 0]
    searched()
    emulated_gpu.products.clear()
    product()
    tuned()
    assert algorithms(emulated_gpu) == [0, 2]


def test_a_search_reads_the_operands_and_leaves_what_a_product_adds_to(emulated_gpu, lt):
    import cupy

    from gpu_mlp.ops import search
    from gpu_mlp.ops.gemm import GEMM

    a = cupy.asarray(np.eye(4, dtype=np.float32))
    out = cupy.asarray(np.full((4, 4), 3, np.float32))
    with search.tuning(searching=True), emulated_gpu.read_only(a):
        GEMM(precisions.get("float32"))(a, a, out, beta=1.0)
    np.testing.assert_array_equal(out.get(), 3 + np.eye(4))
    assert len(emulated_gpu.products) > 4


def test_without_room_to_search_the_first_proposal_is_used_and_not_kept(emulated_gpu, lt, cache):
    import cupy

    from gpu_mlp.ops import search
    from gpu_mlp.ops.gemm import GEMM

    a, out = cupy.zeros((64, 64), np.float32), cupy.zeros((64, 64), np.float32)
    emulated_gpu.memory_limit = emulated_gpu.memory.bytes_in_use() + 100
    with search.tuning(searching=True):
        GEMM(precisions.get("float32"))(a, a, out, beta=1.0)
    assert algorithms(emulated_gpu) == [0]
    assert not (cache / "gemms.json").exists()


def test_a_proposal_that_does_not_run_is_passed_over(emulated_gpu, lt, monkeypatch):
    library = lt().lt._lt
    honest = library.matmul

    def picky(*arguments):
        if fake_cublaslt.bytes_at(arguments[12], 64).view(np.uint64)[1] == 2:
            raise fake_cublaslt.cuBLASLtError(15)
        honest(*arguments)

    monkeypatch.setattr(library, "matmul", picky)
    takes(monkeypatch, lambda queued: 3.0 - queued.algorithm)
    searched()
    emulated_gpu.products.clear()
    tuned()
    assert algorithms(emulated_gpu) == [1]


def trained(steps=4, **options):
    net = MLP([13, 32, 3], output="softmax", device="cuda")
    trainer = Trainer(net, **options)
    rng = np.random.default_rng(9)
    x, y = rng.normal(size=(16, 13)), rng.integers(0, 3, 16)
    for _ in range(steps):
        trainer.step(x, y)
    return np.asarray(net._ops.to_host(net._theta)).tobytes()


@pytest.mark.parametrize("optimizer", ["adam", SGD(0.1)], ids=str)
def test_the_first_step_of_a_shape_searches_and_a_recorded_one_never(emulated_gpu, lt, monkeypatch, optimizer):
    from gpu_mlp.ops import search

    takes(monkeypatch, lambda queued: 2.0 - queued.algorithm)
    searches = []
    honest = search.fastest

    def watched(candidates):
        assert not any(stream.is_capturing() for stream in streams.Stream.living.values())
        searches.append(len(candidates))
        return honest(candidates)

    monkeypatch.setattr(search, "fastest", watched)
    net = MLP([13, 32, 3], output="softmax", device="cuda")
    trainer = Trainer(net, optimizer=optimizer)
    rng = np.random.default_rng(9)
    x, y = rng.normal(size=(16, 13)), rng.integers(0, 3, 16)
    trainer.step(x, y)
    assert searches
    first = len(searches)
    for _ in range(3):
        emulated_gpu.products.clear()
        trainer.step(x, y)
        assert {queued.algorithm for queued in emulated_gpu.products} <= {2}
    assert len(searches) == first


def test_what_is_met_first_while_a_graph_is_recorded_is_not_searched(emulated_gpu, lt):
    import cupy

    from gpu_mlp.ops import search
    from gpu_mlp.ops.gemm import GEMM

    a, out = cupy.asarray(np.eye(4, dtype=np.float32)), cupy.zeros((4, 4), np.float32)
    gemm = GEMM(precisions.get("float32"))
    with search.tuning(searching=True):
        graph = search.captured(lambda: gemm(a, a, out))
    assert algorithms(emulated_gpu) == [0]
    graph.launch()
    np.testing.assert_array_equal(out.get(), np.eye(4))


def test_ten_runs_give_one_hash(emulated_gpu, lt, monkeypatch):
    """The first of them searches; a later one would find another algorithm fastest, and keeps to the first one's."""
    ends = set()
    for run in range(10):
        takes(monkeypatch, lambda queued, run=run: float((queued.algorithm + run) % 3))
        lt()
        ends.add((trained(), tuple(algorithms(emulated_gpu))[-3:]))
    assert len(ends) == 1


# --- the file --------------------------------------------------------------------------------------------------------


def kept(cache):
    return json.loads((cache / "gemms.json").read_text())["devices"]


def test_the_file_names_the_device_the_library_and_the_product(emulated_gpu, lt, cache):
    searched()
    ((device, names),) = kept(cache).items()
    assert device == "Emulated GPU, 3 multiprocessors, cublasLt 120903"
    ((name, choice),) = names.items()
    assert name == "6x8x5 nn float32>float32 compute 68 epilogue 1 aligned 256,256,256 workspace 10485760"
    assert len(bytes.fromhex(choice)) == 64


def test_another_process_takes_what_is_kept(emulated_gpu, lt, monkeypatch):
    takes(monkeypatch, lambda queued: 2.0 - queued.algorithm)
    searched()
    lt()
    takes(monkeypatch, lambda queued: 0.0 + queued.algorithm)
    searched()
    assert algorithms(emulated_gpu) == [2]


@pytest.mark.parametrize("device", ["Another GPU, 3 multiprocessors", "Emulated GPU, 132 multiprocessors"])
def test_another_devices_choices_are_its_own(emulated_gpu, lt, monkeypatch, cache, device):
    takes(monkeypatch, lambda queued: 2.0 - queued.algorithm)
    searched()
    library = lt().lt
    library.choices = choices.Choices(f"{device}, cublasLt 120903")
    tuned()
    assert algorithms(emulated_gpu) == [0]
    searched()
    assert len(kept(cache)) == 2


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"\xff\x00", b"[]", b'{"format": "something else", "devices": {}}',
     b'{"format": "gpu_mlp gemms 1", "devices": {"Emulated GPU": 3}}', b'{"format": "gpu_mlp gemms 1"}'],
)  # fmt: skip
def test_a_damaged_or_foreign_file_is_left_alone_with_one_notice(emulated_gpu, lt, cache, content):
    (cache / "gemms.json").write_bytes(content)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        lt()
        searched()
        lt()
        searched()
    assert len(said) == 1
    assert "gemms.json" in str(said[0].message)
    assert "remove it" in str(said[0].message)
    assert algorithms(emulated_gpu) == [0], "what cannot be kept is not searched"
    assert (cache / "gemms.json").read_bytes() == content


@pytest.mark.parametrize("choice", [3, "nonsense", "00" * 64, "00", None])
def test_a_choice_that_does_not_fit_is_looked_for_anew(emulated_gpu, lt, monkeypatch, cache, choice):
    takes(monkeypatch, lambda queued: 2.0 - queued.algorithm)
    searched()
    content = json.loads((cache / "gemms.json").read_text())
    (names,) = content["devices"].values()
    (name,) = names
    good, names[name] = names[name], choice
    (cache / "gemms.json").write_text(json.dumps(content))
    lt()
    searched()
    assert algorithms(emulated_gpu)[-1] == 2
    assert next(iter(kept(cache).values()))[name] == good


def test_a_folder_that_cannot_be_written_to_is_said_once_and_nothing_is_searched(emulated_gpu, lt, cache, monkeypatch):
    (cache / "file").touch()
    monkeypatch.setenv("GPU_MLP_CACHE", str(cache / "file" / "folder"))
    with pytest.warns(RuntimeWarning, match="cannot be kept .* proposes first.* GPU_MLP_CACHE names a folder"):
        lt()
    searched()
    assert algorithms(emulated_gpu) == [0]


def test_a_disk_that_fills_up_during_the_search_leaves_the_first_proposal(emulated_gpu, lt, cache, monkeypatch):
    takes(monkeypatch, lambda queued: 2.0 - queued.algorithm)

    def full(path, devices):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(choices, "_write", full)
    with pytest.warns(RuntimeWarning, match="No space left"):
        searched()
    assert algorithms(emulated_gpu)[-1] == 0
    assert [path.name for path in cache.iterdir()] == [".gemms.json.lock"]


def test_nothing_is_kept_or_searched_where_the_cache_is_off(emulated_gpu, lt, cache, monkeypatch):
    monkeypatch.setenv("GPU_MLP_CACHE", "0")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lt()
        searched()
    assert algorithms(emulated_gpu) == [0]
    assert list(cache.glob("*.json")) == []


def test_where_nothing_is_said_the_users_cache_folder_is_used(monkeypatch, tmp_path):
    monkeypatch.delenv("GPU_MLP_CACHE", raising=False)
    monkeypatch.delenv("LOCALAPPDATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert choices.folder() == tmp_path / "gpu_mlp"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert choices.folder() == tmp_path / ".cache" / "gpu_mlp"


def test_the_first_to_keep_a_choice_decides(cache):
    first, second = choices.Choices("a device"), choices.Choices("a device")
    assert first.keep("product", "one") == "one"
    assert second.keep("product", "two") == "one"
    assert second.keep("another", "three") == "three"
    assert kept(cache) == {"a device": {"another": "three", "product": "one"}}


def _keep_many(folder, number):
    os.environ["GPU_MLP_CACHE"] = str(folder)
    mine = choices.Choices("a device")
    for i in range(20):
        mine.keep(f"product {number} {i}", i)


def test_processes_that_keep_choices_at_once_lose_none(cache):
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_keep_many, args=(cache, number)) for number in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert len(kept(cache)["a device"]) == 60
