"""The threads that share products and passes: right for every shape, the same bits every time, and never stuck.

What the operations make of them is compared in `test_operations.py`, row "numba".
"""

from __future__ import annotations

import contextlib
import os
import threading
import time

import numpy as np
import pytest
import threadpoolctl

pytest.importorskip("numba", reason="without Numba there is no crew")

from gpu_mlp.ops import crew as crew_module
from gpu_mlp.ops import crew_kernels as kernels
from gpu_mlp.ops import jobs
from gpu_mlp.ops.crew import Crew, crew
from gpu_mlp.ops.jobs import PART_FLOP

SHAPES = [(1, 1, 1), (33, 17, 65), (128, 300, 200), (1, 3000, 500), (500, 3000, 1), (200, 1, 300)]


@pytest.fixture(autouse=True)
def one_blas_thread():
    with threadpoolctl.threadpool_limits(1, "blas"):
        yield


@pytest.fixture
def shared(monkeypatch):
    """A crew of its own that hands out the smallest products."""
    monkeypatch.setattr(jobs, "PART_FLOP", 1)
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    own = Crew()
    yield own
    own.dismiss()
    for thread in own._threads:
        thread.join(timeout=60)
        assert not thread.is_alive()


def fall_asleep(crew):
    """Wait until every thread of the crew has: how long that takes is up to what else the machine does."""
    deadline = time.monotonic() + 60
    while int(crew._control[kernels.SLEEPERS]) < len(crew._threads):
        assert time.monotonic() < deadline, "some thread still looks for work"
        time.sleep(0.001)


def factors(m, k, n, dtype, transposed):
    rng = np.random.default_rng(m + k + n)
    a, b = rng.normal(size=(m, k)).astype(dtype), rng.normal(size=(k, n)).astype(dtype)
    if transposed[0]:
        a = np.ascontiguousarray(a.T).T
    if transposed[1]:
        b = np.ascontiguousarray(b.T).T
    return a, b, rng.normal(size=(m, n)).astype(dtype)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("transposed", [(False, False), (True, False), (False, True)])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_product_is_the_product(shared, shape, transposed, dtype):
    a, b, before = factors(*shape, dtype, transposed)
    wide = a.astype(np.longdouble) @ b.astype(np.longdouble)
    bound = np.finfo(dtype).eps * shape[1] * 4 * (np.abs(a) @ np.abs(b) + np.abs(before))
    for threads in (1, 2, 3, 4):
        for alpha, beta in ((1.0, 0.0), (-0.5, 1.0), (2.0, 0.25)):
            out = before.copy() if beta else np.full_like(before, np.nan)
            assert shared.gemm(a, b, out, threads, alpha, beta) is out
            expected = alpha * wide + (beta * before if beta else 0)
            assert np.all(np.abs(out - expected) <= 4 * bound)


@pytest.mark.parametrize("shape", [(0, 5, 7), (5, 0, 7), (5, 7, 0)])
def test_a_product_of_nothing(shared, shape):
    a, b, before = factors(*shape, "float32", (False, False))
    for beta in (0.0, 0.5):
        out = before.copy() if beta else np.full_like(before, np.nan)
        shared.gemm(a, b, out, 2, 1.0, beta)
        np.testing.assert_array_equal(out, before * np.float32(beta) if beta else np.zeros_like(before))


def test_the_bits_do_not_depend_on_who_does_a_part(shared):
    a, b, out = factors(300, 70, 90, "float32", (False, True))
    bits = set()
    for i in range(60):
        if i % 20 == 0:
            fall_asleep(shared)
        bits.add(shared.gemm(a, b, out, 4).tobytes())
    assert len(bits) == 1


def test_work_is_shared_and_every_block_done_once(shared):
    done, names = np.zeros(101, int), set()

    def work(block):
        done[block] += 1
        names.add(threading.current_thread().name)
        time.sleep(0.001)

    shared.for_each(range(101), work, 4)
    assert (done == 1).all()
    assert len(shared._threads) == 3
    assert names == {threading.current_thread().name, "gpu_mlp"}


def test_an_error_of_a_part_is_raised_once_all_are_done(shared):
    done = []

    def work(block):
        if block in (1, 2):
            raise ValueError(f"block {block}")
        time.sleep(0.02)
        done.append(block)

    for _ in range(3):
        done.clear()
        with pytest.raises(ValueError, match=r"block [12]"):
            shared.for_each(range(4), work, 4)
        assert set(done) <= {0, 3}
    shared.for_each(range(4), done.append, 4)
    assert {0, 1, 2, 3} <= set(done)


def test_an_interrupt_of_the_callers_part_leaves_the_crew_usable(shared):
    caller = threading.current_thread()

    def work(block):
        if threading.current_thread() is caller:
            raise KeyboardInterrupt
        time.sleep(0.01)

    for _ in range(5):
        with contextlib.suppress(KeyboardInterrupt):
            shared.for_each(range(8), work, 4)
    done = []
    shared.for_each(range(8), done.append, 4)
    assert sorted(done) == list(range(8))


def test_an_interrupt_before_the_callers_part_of_a_product_waits_for_the_others(shared, monkeypatch):
    a, b, out = factors(300, 70, 90, "float32", (False, False))
    expected = shared.gemm(a, b, out, 4).copy()

    def interrupted(base):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(crew_module.kernels, "to_be_woken", interrupted)
        for _ in range(5):
            fall_asleep(shared)
            with pytest.raises(KeyboardInterrupt):
                shared.gemm(a, b, out, 4)
            out[...] = 7
            time.sleep(0.001)
            assert (out == 7).all()
    assert shared.gemm(a, b, out, 4).tobytes() == expected.tobytes()


def test_within_a_part_and_from_another_thread_the_work_is_the_callers(shared):
    a, b, _ = factors(60, 40, 50, "float64", (False, False))
    outs = [np.ones((60, 50)) for _ in range(8)]

    def work(block):
        shared.gemm(a, b, outs[block], 4, 1.0, 1.0)
        shared.for_each(range(3), lambda inner: None, 4)

    others = [threading.Thread(target=shared.for_each, args=(blocks, work, 4)) for blocks in ([4, 5], [6, 7])]
    for other in others:
        other.start()
    shared.for_each(range(4), work, 4)
    for other in others:
        other.join()
    for out in outs:
        np.testing.assert_allclose(out, 1 + a @ b, rtol=1e-12)


def test_numbers_that_are_not_finite_are_quiet_in_every_thread(shared, recwarn):
    shared.for_each(range(8), lambda block: np.float32(3e38) * np.full(4, 10, np.float32), 4)
    assert not [warning for warning in recwarn if issubclass(warning.category, RuntimeWarning)]


def test_small_products_are_not_handed_out():
    a, b, out = factors(16, 16, 16, "float32", (False, False))
    assert PART_FLOP > 2 * 16**3
    own = Crew()
    own.gemm(a, b, out, 4)
    assert not own._threads


def test_a_process_has_one_crew():
    assert crew() is crew()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_has_a_crew_of_its_own():
    a, b, out = factors(300, 200, 250, "float32", (False, False))
    expected = crew().gemm(a, b, out, 2).copy()
    child = os.fork()
    if not child:
        try:
            os._exit(0 if crew().gemm(a, b, out, 2).tobytes() == expected.tobytes() else 1)
        finally:
            os._exit(2)
    assert os.waitpid(child, 0)[1] == 0
