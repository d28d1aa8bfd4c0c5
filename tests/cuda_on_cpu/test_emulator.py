"""The emulator itself: right kernels give NumPy's results; of each fault a broken kernel is caught, its twin passes.

The kernels here are small and written for these tests only; they compile with NVRTC as well, which is checked where the
package cuda-bindings is installed.
"""

from __future__ import annotations

import contextlib
import sys
import threading
import uuid
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from . import compiler, emulator, fake_cupy
from .emulator import (
    ASCENDING,
    DESCENDING,
    SHUFFLED,
    ArgumentError,
    BarrierError,
    Nondeterministic,
    OutOfBounds,
    Race,
    ReadOnlyWrite,
    Stopped,
    UndefinedBehaviour,
    Uninitialised,
)
from .fixtures import require_compiler

SIZES = (0, 1, 31, 257, 5000)
BLOCK, GRID = 128, 3  # three blocks: the larger sizes go round the grid-stride loops several times

RIGHT = r"""
#include <cuda_fp16.h>
#include <cuda_bf16.h>

template <typename T>
__device__ __forceinline__ T warp_sum(T v) {
#pragma unroll
    for (int step = 16; step > 0; step /= 2) v += __shfl_down_sync(0xffffffffu, v, step);
    return v;
}

template <typename T>
__device__ T block_sum(T v) {
    __shared__ T partial[32];
    v = warp_sum(v);
    if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = v;
    __syncthreads();
    v = threadIdx.x < blockDim.x / 32 ? partial[threadIdx.x] : T(0);
    if (threadIdx.x < 32) v = warp_sum(v);
    __syncthreads();
    return v;
}

// y += a x, four at a time where both begin at 16 bytes.
extern "C" __global__ void __launch_bounds__(256)
    saxpy(float* __restrict__ y, const float* __restrict__ x, long long n, float a) {
    long long thread = (long long)blockIdx.x * blockDim.x + threadIdx.x, step = (long long)gridDim.x * blockDim.x;
    bool aligned = ((size_t)x | (size_t)y) % 16 == 0;
    long long whole = aligned ? n / 4 : 0;
    for (long long i = thread; i < whole; i += step) {
        float4 u = __ldg(reinterpret_cast<const float4*>(x) + i), v = reinterpret_cast<float4*>(y)[i];
        v.x += a * u.x; v.y += a * u.y; v.z += a * u.z; v.w += a * u.w;
        reinterpret_cast<float4*>(y)[i] = v;
    }
    for (long long i = 4 * whole + thread; i < n; i += step) y[i] += a * x[i];
}

extern "C" __global__ void sum(double* out, const double* x, long long n) {
    double v = 0;
    for (long long i = threadIdx.x; i < n; i += blockDim.x) v += x[i];
    v = block_sum(v);
    if (threadIdx.x == 0) out[0] = v;
}

// Column sums in two stages: part[block.y, column], then out[column].
extern "C" __global__ void column_part(float* part, const __nv_bfloat16* x, int rows, int columns) {
    __shared__ float tile[4][33];
    int lane = threadIdx.x % 32, row = threadIdx.x / 32, column = blockIdx.x * 32 + lane;
    float total = 0.0f;
    if (column < columns)
        for (int r = blockIdx.y * 4 + row; r < rows; r += 4 * gridDim.y)
            total += __bfloat162float(x[(long long)r * columns + column]);
    tile[row][lane] = total;
    __syncthreads();
    if (row == 0 && column < columns)
        part[(long long)blockIdx.y * columns + column] = tile[0][lane] + tile[1][lane] + tile[2][lane] + tile[3][lane];
}
extern "C" __global__ void column_total(float* out, const float* part, int parts, int columns) {
    int column = blockIdx.x * blockDim.x + threadIdx.x;
    if (column >= columns) return;
    float total = 0.0f;
    for (int p = 0; p < parts; ++p) total += part[(long long)p * columns + column];
    out[column] = total;
}

// The same in one launch: the block that finishes last adds up.
extern "C" __global__ void sum_once(float* out, float* part, unsigned* ticket, const float* x, long long n) {
    __shared__ bool last;
    float v = 0;
    long long thread = (long long)blockIdx.x * blockDim.x + threadIdx.x, step = (long long)gridDim.x * blockDim.x;
    for (long long i = thread; i < n; i += step) v += x[i];
    v = block_sum(v);
    if (threadIdx.x == 0) {
        part[blockIdx.x] = v;
        __threadfence();
        last = atomicAdd(ticket, 1u) == gridDim.x - 1;
    }
    __syncthreads();
    if (!last) return;
    v = block_sum(threadIdx.x < gridDim.x ? part[threadIdx.x] : 0.0f);
    if (threadIdx.x == 0) { out[0] = v; *ticket = 0; }
}

extern "C" __global__ void round_trip(__half* h, __nv_bfloat16* b, float* h_back, float* b_back, const float* x,
                                      int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    h[i] = __float2half(x[i]);
    b[i] = __float2bfloat16(x[i]);
    h_back[i] = __half2float(h[i]);
    b_back[i] = __bfloat162float(b[i] + b[i]);
}

// Ten rounds of multiply and xor, as Philox has them.
extern "C" __global__ void scramble(uint4* out, unsigned long long seed, int n) {
    for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x) {
        unsigned c0 = i, c1 = 7, c2 = 0, c3 = 0, k0 = (unsigned)seed, k1 = (unsigned)(seed >> 32);
        for (int r = 0; r < 10; ++r) {
            unsigned h0 = __umulhi(0xD2511F53u, c0), l0 = 0xD2511F53u * c0;
            unsigned h1 = __umulhi(0xCD9E8D57u, c2), l1 = 0xCD9E8D57u * c2;
            c0 = h1 ^ c1 ^ k0; c1 = l1; c2 = h0 ^ c3 ^ k1; c3 = l0;
            k0 += 0x9E3779B9u; k1 += 0xBB67AE85u;
        }
        out[i] = make_uint4(c0, c1, c2, c3);
    }
}

extern "C" __global__ void lanes(int* out) {
    int lane = threadIdx.x;
    out[lane] = __shfl_sync(0xffffffffu, lane, 5);
    out[32 + lane] = __shfl_up_sync(0xffffffffu, lane, 3);
    out[64 + lane] = __shfl_down_sync(0xffffffffu, lane, 3, 8);
    out[96 + lane] = __shfl_xor_sync(0xffffffffu, lane, 6);
    out[128 + lane] = (int)__ballot_sync(0xffffffffu, lane % 3 == 0);
    out[160 + lane] = __any_sync(0xffffffffu, lane == 9) * 2 + __all_sync(0xffffffffu, lane < 31);
    if (lane < 16) out[192 + lane] = __shfl_xor_sync(0x0000ffffu, lane, 1);
    else out[192 + lane] = __shfl_xor_sync(0xffff0000u, lane, 2);
    __syncwarp();
    out[224 + lane] = out[192 + (lane + 1) % 32];
}

extern "C" __global__ void votes(int* out, int n) {
    int odd = __syncthreads_count((int)threadIdx.x < n && threadIdx.x % 2);
    int all = __syncthreads_and(threadIdx.x < 1000), any = __syncthreads_or(threadIdx.x == 77);
    if (threadIdx.x == 0) { out[0] = odd; out[1] = all; out[2] = any; }
}

extern "C" __global__ void axes(int* out) {
    int block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
    int thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
    out[block * blockDim.x * blockDim.y * blockDim.z + thread] = block * 1000 + thread;
}

extern "C" __global__ void shared_words(float* out) {
    static __shared__ float a[3];
    __shared__ alignas(sizeof(float4)) float b[4];
    alignas(16) __shared__ float c[4];
    __shared__ __align__(16) float d[4];
    if (threadIdx.x < 3) a[threadIdx.x] = 1.0f;
    b[threadIdx.x] = c[threadIdx.x] = d[threadIdx.x] = (float)threadIdx.x;
    __syncthreads();
    float4 u = *reinterpret_cast<float4*>(b), v = *reinterpret_cast<float4*>(c), w = *reinterpret_cast<float4*>(d);
    out[threadIdx.x] = a[threadIdx.x % 3] + u.w + v.w + w.w;
}

// Every atomic once or twice; out holds what each returned.
extern "C" __global__ void atomics(int* i, unsigned* u, unsigned long long* l, long long* out) {
    int k = 0;
    out[k++] = atomicAdd(i, -5); out[k++] = atomicSub(i, 3); out[k++] = atomicMin(i, -9); out[k++] = atomicMax(i, 4);
    out[k++] = atomicExch(i, 12); out[k++] = atomicAnd(i, 10); out[k++] = atomicOr(i, 5); out[k++] = atomicXor(i, 15);
    out[k++] = atomicCAS(i, 2, 7); out[k++] = atomicCAS(i, 2, 8); out[k++] = *i;
    out[k++] = atomicInc(u, 1u); out[k++] = atomicInc(u, 1u); out[k++] = atomicDec(u, 3u); out[k++] = atomicDec(u, 3u);
    out[k++] = atomicMax(u, 0xffffffffu); out[k++] = atomicMin(u, 3u); out[k++] = *u;
    out[k++] = atomicAdd(l, 1ull << 40); out[k++] = atomicMax(l, 1ull << 41); out[k++] = *l;
}

extern "C" __global__ void arrival(int* out, int* counter) {
    out[blockIdx.x * blockDim.x + threadIdx.x] = atomicAdd(counter, 1);
}

struct Rates { double rate; float decay; int step; };
extern "C" __global__ void take_struct(double* out, Rates r, bool twice) {
    out[0] = (r.rate * r.decay + r.step) * (twice ? 2 : 1);
}

template <typename T, int N>
__global__ void fill(T* out, T value) {
    if (threadIdx.x < N) out[threadIdx.x] = value;
}

extern "C" { __global__ void in_braces(int* out) { out[threadIdx.x] = SCALE * threadIdx.x; } }
"""


@pytest.fixture
def cp(emulated_gpu):
    import cupy

    return cupy


@pytest.fixture
def right(cp):
    return cp.RawModule(code=RIGHT, options=("-std=c++17", "-DSCALE=3"), name_expressions=("fill<float, 7>",))


def placed(cp, values, offset):
    """The values on the device, ``offset`` elements after an aligned address, with NaN around them."""
    whole = cp.empty(len(values) + 2 * offset + 8, values.dtype)
    view = whole[offset : offset + len(values)]
    view.set(values)
    return view


# --- right kernels ---


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("offset", [0, 1, 4])
def test_elementwise_with_wide_loads_and_a_tail(cp, right, n, offset):
    rng = np.random.default_rng(n)
    x, y = rng.normal(size=(2, n)).astype(np.float32)
    xs, ys = placed(cp, x, offset), placed(cp, y, offset)
    right.get_function("saxpy")((GRID,), (BLOCK,), (ys, xs, np.int64(n), np.float32(0.5)))
    np.testing.assert_array_equal(cp.asnumpy(ys), y + np.float32(0.5) * x)
    np.testing.assert_array_equal(cp.asnumpy(xs), x)


@pytest.mark.parametrize("n", SIZES)
def test_block_reduction(cp, right, n):
    x = np.random.default_rng(n).integers(-1000, 1000, n).astype(np.float64)  # their sums are exact in any order
    out = cp.empty(1, np.float64)
    right.get_function("sum")((1,), (256,), (out, cp.asarray(x), np.int64(n)))
    assert float(out[0]) == x.sum()


@pytest.mark.parametrize(("rows", "columns"), [(0, 5), (1, 1), (31, 31), (64, 33), (257, 100), (5, 500)])
def test_column_sum_in_two_stages(cp, right, rows, columns):
    bfloat16 = pytest.importorskip("ml_dtypes").bfloat16
    x = np.random.default_rng(rows).integers(-100, 100, (rows, columns)).astype(bfloat16)
    part, out = cp.empty((2, columns), np.float32), cp.empty(columns, np.float32)
    tiles = -(-columns // 32)
    right.get_function("column_part")((tiles, 2), (128,), (part, cp.asarray(x), np.int32(rows), np.int32(columns)))
    right.get_function("column_total")((tiles,), (32,), (out, part, np.int32(2), np.int32(columns)))
    np.testing.assert_array_equal(cp.asnumpy(out), x.astype(np.float32).sum(axis=0))


@pytest.mark.parametrize("n", SIZES)
def test_the_last_block_adds_up(cp, right, n):
    """Blocks that hand over by __threadfence and an atomic are no race."""
    x = np.random.default_rng(n).integers(-1000, 1000, n).astype(np.float32)
    out, part, ticket = cp.empty(1, np.float32), cp.empty(GRID, np.float32), cp.zeros(1, np.uint32)
    for _ in range(2):
        right.get_function("sum_once")((GRID,), (BLOCK,), (out, part, ticket, cp.asarray(x), np.int64(n)))
        assert float(out[0]) == x.sum()
        assert int(ticket[0]) == 0


@pytest.mark.parametrize("n", SIZES[1:])
def test_16_bit_types(cp, right, n):
    bfloat16 = pytest.importorskip("ml_dtypes").bfloat16
    x = np.random.default_rng(n).normal(size=n).astype(np.float32)
    h, b = cp.empty(n, np.float16), cp.empty(n, bfloat16)
    back = cp.empty((2, n), np.float32)
    right.get_function("round_trip")((-(-n // 64),), (64,), (h, b, back[0], back[1], cp.asarray(x), np.int32(n)))
    np.testing.assert_array_equal(cp.asnumpy(h), x.astype(np.float16))
    np.testing.assert_array_equal(cp.asnumpy(b), x.astype(bfloat16))
    np.testing.assert_array_equal(cp.asnumpy(back[0]), x.astype(np.float16).astype(np.float32))
    np.testing.assert_array_equal(cp.asnumpy(back[1]), x.astype(bfloat16).astype(np.float32) * 2)


def scrambled(i, seed):
    c, k, low = [i, 7, 0, 0], [seed & 0xFFFFFFFF, seed >> 32], 0xFFFFFFFF
    for _ in range(10):
        p, q = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [q >> 32 ^ c[1] ^ k[0], q & low, p >> 32 ^ c[3] ^ k[1], p & low]
        k = [(k[0] + 0x9E3779B9) & low, (k[1] + 0xBB67AE85) & low]
    return c


@pytest.mark.parametrize("n", SIZES)
def test_integer_arithmetic(cp, right, n):
    seed, out = 0x0123456789ABCDEF, cp.empty((n, 4), np.uint32)
    right.get_function("scramble")((GRID,), (BLOCK,), (out, np.uint64(seed), np.int32(n)))
    for i in {0, n // 2, n - 1} if n else ():
        assert cp.asnumpy(out[i]).tolist() == scrambled(i, seed)


def test_warp_operations(cp, right):
    out = cp.empty((8, 32), np.int32)
    right.get_function("lanes")((1,), (32,), (out,))
    lane = np.arange(32)
    halves = np.where(lane < 16, lane ^ 1, lane ^ 2)
    expected = [
        np.full(32, 5),
        np.where(lane < 3, lane, lane - 3),
        np.where(lane % 8 < 5, lane + 3, lane),
        lane ^ 6,
        np.full(32, np.int32(np.uint32(sum(1 << i for i in range(0, 32, 3))).view(np.int32))),
        np.full(32, 2),
        halves,
        halves[(lane + 1) % 32],
    ]
    np.testing.assert_array_equal(cp.asnumpy(out), expected)


def test_words_around_shared(cp, right):
    out = cp.empty(4, np.float32)
    right.get_function("shared_words")((1,), (4,), (out,))
    assert cp.asnumpy(out).tolist() == [10.0] * 4


def test_atomics(cp, right):
    i, u, wide = cp.full(1, 2, np.int32), cp.zeros(1, np.uint32), cp.full(1, 3, np.uint64)
    out = cp.empty(21, np.int64)
    right.get_function("atomics")((1,), (1,), (i, u, wide, out))
    expected = [2, -3, -6, -9, 4, 12, 8, 13, 2, 7, 7, 0, 1, 0, 3, 2, 2**32 - 1, 3, 3, 3 + 2**40, 2**41]
    assert cp.asnumpy(out).tolist() == expected


def test_order_of_threads_and_blocks(emulated_gpu, cp, right):
    def arrivals(order, seed=0):
        emulated_gpu.orders, emulated_gpu.seed = (order,), seed
        out = cp.empty((8, 64), np.int32)
        right.get_function("arrival")((8,), (64,), (out, cp.zeros(1, np.int32)))
        return cp.asnumpy(out)

    order = np.arange(512).reshape(8, 64)
    np.testing.assert_array_equal(arrivals(ASCENDING), order)
    np.testing.assert_array_equal(arrivals(DESCENDING), order[::-1, ::-1])
    shuffled, again, other = arrivals(SHUFFLED), arrivals(SHUFFLED), arrivals(SHUFFLED, seed=1)
    np.testing.assert_array_equal(shuffled, again)
    assert sorted(shuffled.ravel()) == sorted(other.ravel()) == list(range(512))
    assert sorted(shuffled.min(axis=1).tolist()) == list(range(0, 512, 64))  # a block runs as a whole
    for a, b in ((shuffled, order), (shuffled, other), (other, order)):
        assert (np.argsort(a.min(axis=1)) != np.argsort(b.min(axis=1))).any()  # the blocks' order
        assert (np.argsort(a[0]) != np.argsort(b[0])).any()  # and the threads'


def test_votes_of_a_block(cp, right):
    out = cp.empty(3, np.int32)
    right.get_function("votes")((1,), (96,), (out, np.int32(50)))
    assert cp.asnumpy(out).tolist() == [25, 1, 1]


def test_three_axes(cp, right):
    out = cp.empty((2 * 3 * 2, 4 * 2 * 3), np.int32)
    right.get_function("axes")((2, 3, 2), (4, 2, 3), (out,))
    np.testing.assert_array_equal(cp.asnumpy(out), np.arange(12)[:, None] * 1000 + np.arange(24))


def test_arguments_by_value(cp, right):
    out = cp.empty(1, np.float64)
    rates = np.array([(0.5, 4.0, 3)], np.dtype([("rate", "f8"), ("decay", "f4"), ("step", "i4")]))
    right.get_function("take_struct")((1,), (1,), (out, rates, np.bool_(True)))
    assert float(out[0]) == 10.0
    right.get_function("take_struct")((1,), (1,), (out.data, rates, False))  # an address, a Python bool
    assert float(out[0]) == 5.0


def test_templates_options_and_braces(cp, right):
    out = cp.zeros(9, np.float32)
    right.get_function("fill<float, 7>")((1,), (32,), (out, np.float32(2)))
    assert cp.asnumpy(out).tolist() == [2.0] * 7 + [0.0] * 2
    numbers = cp.empty(4, np.int32)
    right.get_function("in_braces")((1,), (4,), (numbers,))
    assert cp.asnumpy(numbers).tolist() == [0, 3, 6, 9]
    with pytest.raises(cp.cuda.driver.CUDADriverError, match="saxpy"):
        right.get_function("fill")


@pytest.mark.parametrize("orders", [(ASCENDING,), (DESCENDING,), (SHUFFLED, ASCENDING)])
def test_orders(emulated_gpu, cp, right, orders):
    emulated_gpu.orders, emulated_gpu.seed = orders, 5
    x = np.arange(5000, dtype=np.float32)
    out, part, ticket = cp.empty(1, np.float32), cp.empty(7, np.float32), cp.zeros(1, np.uint32)
    right.get_function("sum_once")((7,), (96,), (out, part, ticket, cp.asarray(x), np.int64(5000)))
    assert float(out[0]) == x.sum()
    numbers = cp.empty((40, 24), np.int32)
    right.get_function("axes")((40,), (24,), (numbers,))
    np.testing.assert_array_equal(cp.asnumpy(numbers), np.arange(40)[:, None] * 1000 + np.arange(24))


def test_nvrtc_takes_the_same_text():
    require_compiler()
    nvrtc = pytest.importorskip("cuda.bindings.nvrtc")
    includes = [option.encode() for option in compiler._includes() if option != "-isystem"]
    options = [b"-std=c++17", b"-arch=sm_80", b"-DSCALE=3", *(b"-I" + folder for folder in includes)]
    for text in (RIGHT, BROKEN):
        error, program = nvrtc.nvrtcCreateProgram(text.encode(), b"kernel.cu", 0, [], [])
        assert not int(error)
        (error,) = nvrtc.nvrtcCompileProgram(program, len(options), options)
        _, size = nvrtc.nvrtcGetProgramLogSize(program)
        log = bytes(size + 2)  # written to in place; a single byte would be one that all of Python shares
        nvrtc.nvrtcGetProgramLog(program, log)
        assert not int(error), log.decode()
        nvrtc.nvrtcDestroyProgram(program)


# --- broken kernels, each with its twin ---

BROKEN = r"""
extern "C" __global__ void write_over(float* y, int n) { if (threadIdx.x <= n) y[threadIdx.x] = 1.0f; }
extern "C" __global__ void write_over_fixed(float* y, int n) { if (threadIdx.x < n) y[threadIdx.x] = 1.0f; }

extern "C" __global__ void read_over(float* y, const float* x, int n) {
    int i = threadIdx.x;
    float ignored = x[i + 1];
    if (i < n) y[i] = ignored > 2.0f ? x[i] : x[i] + 0.0f;
}
extern "C" __global__ void read_over_fixed(float* y, const float* x, int n) {
    int i = threadIdx.x;
    float ignored = i + 1 < n ? x[i + 1] : 0.0f;
    if (i < n) y[i] = ignored > 2.0f ? x[i] : x[i] + 0.0f;
}

extern "C" __global__ void read_under(float* y, const float* x) { y[threadIdx.x] = x[(int)threadIdx.x - 1]; }
extern "C" __global__ void read_under_fixed(float* y, const float* x) {
    y[threadIdx.x] = x[threadIdx.x ? threadIdx.x - 1 : 0];
}

extern "C" __global__ void wide_over(float* y, int n) {
    float4* wide = reinterpret_cast<float4*>(y);
    if (threadIdx.x <= n / 4) wide[threadIdx.x] = make_float4(1, 1, 1, 1);
}
extern "C" __global__ void wide_over_fixed(float* y, int n) {
    float4* wide = reinterpret_cast<float4*>(y);
    if (threadIdx.x < n / 4) wide[threadIdx.x] = make_float4(1, 1, 1, 1);
}

struct alignas(16) Eight { unsigned short v[8]; };
extern "C" __global__ void copy_over(unsigned short* y, const unsigned short* x, int n) {
    reinterpret_cast<Eight*>(y)[threadIdx.x] = reinterpret_cast<const Eight*>(x)[threadIdx.x];
}

extern "C" __global__ void chase(float* y, float* const* table) { y[0] = *table[0]; }
extern "C" __global__ void null_read(float* y, const float* x) {
    if (threadIdx.x == 0) y[0] = x ? x[0] : 2.0f;
    if (threadIdx.x == 1) y[1] = x[1];
}

extern "C" __global__ void misaligned(float* y, const float* x) {
    reinterpret_cast<float4*>(y)[threadIdx.x] = reinterpret_cast<const float4*>(x)[threadIdx.x];
}

extern "C" __global__ void no_barrier(float* y, const float* x) {
    __shared__ float s[64];
    s[threadIdx.x] = x[threadIdx.x];
    y[threadIdx.x] = s[63 - threadIdx.x];
}
extern "C" __global__ void no_barrier_fixed(float* y, const float* x) {
    __shared__ float s[64];
    s[threadIdx.x] = x[threadIdx.x];
    __syncthreads();
    y[threadIdx.x] = s[63 - threadIdx.x];
}

// The barrier before the next round's store is missing: what others still read is overwritten.
extern "C" __global__ void one_barrier(float* y, const float* x, int rounds) {
    __shared__ float s[64];
    float total = 0;
    for (int r = 0; r < rounds; ++r) {
        s[threadIdx.x] = x[r * 64 + threadIdx.x];
        __syncthreads();
        total += s[(threadIdx.x + 40) % 64];
    }
    y[threadIdx.x] = total;
}
extern "C" __global__ void one_barrier_fixed(float* y, const float* x, int rounds) {
    __shared__ float s[64];
    float total = 0;
    for (int r = 0; r < rounds; ++r) {
        s[threadIdx.x] = x[r * 64 + threadIdx.x];
        __syncthreads();
        total += s[(threadIdx.x + 40) % 64];
        __syncthreads();
    }
    y[threadIdx.x] = total;
}

// A shuffle is no barrier for memory, __syncwarp is.
extern "C" __global__ void warp_order(int* y) {
    __shared__ int s[32];
    s[threadIdx.x] = 0;
    __syncwarp();
    s[threadIdx.x] = threadIdx.x;
    int one = __shfl_sync(0xffffffffu, 1, 0);
    if (threadIdx.x < 16) y[threadIdx.x] = s[threadIdx.x ^ one];
}
extern "C" __global__ void warp_order_fixed(int* y) {
    __shared__ int s[32];
    s[threadIdx.x] = threadIdx.x;
    __syncwarp();
    int one = __shfl_sync(0xffffffffu, 1, 0);
    y[threadIdx.x] = s[threadIdx.x ^ one];
    __syncwarp();
    s[threadIdx.x] = 0;
}
// __syncwarp orders one warp, not two.
extern "C" __global__ void two_warps(int* y) {
    __shared__ int s[64];
    s[threadIdx.x] = threadIdx.x;
    __syncwarp();
    y[threadIdx.x] = s[threadIdx.x ^ 32];
}
// All read, then one writes: a race with the readers, of the block or of one warp.
extern "C" __global__ void read_then_write(int* y, int writer, int with_barrier) {
    int seen = y[0];
    if (with_barrier) __syncthreads();
    if (threadIdx.x == writer) y[0] = seen + 1;
    y[1 + threadIdx.x] = seen;
}
extern "C" __global__ void read_twice_then_write(int* y) {
    int seen = y[0];
    __syncwarp();
    if (threadIdx.x == 3) y[0] = y[0] + seen + 1;
}

extern "C" __global__ void same_element(int* y) { y[threadIdx.x / 2] = 1; }
extern "C" __global__ void between_blocks(float* y) {
    y[threadIdx.x] = y[64 + threadIdx.x] + 1;
    y[64 + threadIdx.x] = blockIdx.x;
}
extern "C" __global__ void between_blocks_fixed(float* y) { y[blockIdx.x * 64 + threadIdx.x] = blockIdx.x; }
extern "C" __global__ void no_fence(int* part, unsigned* ticket, int* out, int fence) {
    part[blockIdx.x] = blockIdx.x;
    if (fence) __threadfence();
    if (atomicAdd(ticket, 1u) == gridDim.x - 1) {
        int total = 0;
        for (int i = 0; i < gridDim.x; ++i) total += part[i];
        *out = total;
    }
}
// The last block by number, not by arrival, reads what it never acquired.
extern "C" __global__ void no_acquire(int* part, unsigned* ticket, int* out, int acquire) {
    part[blockIdx.x] = blockIdx.x;
    __threadfence();
    unsigned arrived = blockIdx.x + 1 < gridDim.x || acquire ? atomicAdd(ticket, 1u) : gridDim.x - 1;
    if (arrived == gridDim.x - 1) *out = part[0];
}
// A barrier, then one thread's fence for all; and a counter set back plainly by who came last.
extern "C" __global__ void fence_of_one(int* part, unsigned* counters, unsigned* ticket, int* out) {
    __shared__ bool last;
    part[blockIdx.x * blockDim.x + threadIdx.x] = threadIdx.x;
    __syncthreads();
    if (threadIdx.x == 0) {
        __threadfence();
        atomicMax(counters, blockIdx.x);
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        if (blockIdx.x == 0) atomicAdd(counters + 1, 1u);
        last = atomicAdd(ticket, 1u) == gridDim.x - 1;
    }
    __syncthreads();
    if (last && threadIdx.x == 0) {
        int total = 0;
        for (int i = 0; i < gridDim.x * blockDim.x; ++i) total += part[i];
        *out = total + counters[0] + counters[1];
        *ticket = 0;
    }
}
extern "C" __global__ void atomic_wide(unsigned* y, int at) {
    atomicAdd(reinterpret_cast<unsigned long long*>(y + at), 1ull);
}
extern "C" __global__ void count(unsigned* n, int atomically) {
    if (atomically) atomicAdd(n, 1u);
    else *n = *n + 1;
}
// Deterministic in every access, and yet: who comes first takes it.
extern "C" __global__ void first_come(unsigned* lock, int* winner) {
    if (atomicExch(lock, 1u) == 0u) *winner = threadIdx.x;
}
extern "C" __global__ void first_come_fixed(unsigned* lock, int* winner) {
    atomicExch(lock, 1u);
    atomicMin(winner, (int)threadIdx.x);
}

extern "C" __global__ void shared_unset(float* y) {
    __shared__ float s[64];
    if (threadIdx.x < 32) s[threadIdx.x] = 1.0f;
    __syncthreads();
    y[threadIdx.x] = s[threadIdx.x];
}
extern "C" __global__ void shared_unset_fixed(float* y) {
    __shared__ float s[64];
    s[threadIdx.x] = threadIdx.x < 32 ? 1.0f : 0.0f;
    __syncthreads();
    y[threadIdx.x] = s[threadIdx.x];
}

extern "C" __global__ void accumulate(float* y, const float* x, int add) {
    int i = threadIdx.x;
    y[i] = add ? fmaxf(y[i], x[i]) : x[i];
}
extern "C" __global__ void skip_last(float* y, int n) { if (threadIdx.x < n - 1) y[threadIdx.x] = 1.0f; }
extern "C" __global__ void set_bytes(unsigned char* y, const unsigned char* x, int n) {
    for (int i = threadIdx.x; i < n; i += blockDim.x) y[i] = x[i] + 1;
}

extern "C" __global__ void half_waits(int* y, int n) {
    if (threadIdx.x < n) __syncwarp();
    else __syncthreads();
    if (threadIdx.x < n) __shfl_sync(0xffffffffu, 1, 0);
    y[threadIdx.x] = 1;
}
extern "C" __global__ void other_barrier(int* y, int n) {
    if (threadIdx.x < n) {
        __syncthreads();
    } else {
        __syncthreads();
    }
    y[threadIdx.x] = 1;
}
extern "C" __global__ void early_exit(int* y, int n) {
    if (threadIdx.x >= n) return;
    __syncthreads();
    y[threadIdx.x] = 1;
}
extern "C" __global__ void shuffle_some(int* y, int n) {
    int v = threadIdx.x;
    if (threadIdx.x < n) v = __shfl_down_sync(0xffffffffu, v, 1);
    y[threadIdx.x] = v;
}
extern "C" __global__ void shuffle_mask(int* y, unsigned mask) {
    y[threadIdx.x] = __shfl_xor_sync(mask, (int)threadIdx.x, 1);
}
extern "C" __global__ void shuffle_lines(int* y) {
    int v = threadIdx.x;
    if (v < 16) v = __shfl_sync(0xffffffffu, v, 0);
    else
        v = __shfl_sync(0xffffffffu, v, 1);
    y[threadIdx.x] = v;
}

extern "C" __global__ void overflow(long long* y, int n) { y[0] = n * 100000; }
extern "C" __global__ void overflow_fixed(long long* y, int n) { y[0] = (long long)n * 100000; }
extern "C" __global__ void over_tile(float* y, int n) {
    __shared__ float s[32], t[32];
    s[threadIdx.x] = t[threadIdx.x] = 1.0f;
    __syncthreads();
    y[threadIdx.x] = s[threadIdx.x + n] + t[threadIdx.x];
}
extern "C" __global__ void over_local(float* y, int n) {
    float local[8];
    for (int i = 0; i < n; ++i) local[i] = i;
    y[0] = local[threadIdx.x];
}
extern "C" __global__ void shift(unsigned* y, int by) { y[0] = 1u << by; }
extern "C" __global__ void divide(int* y, int by) { y[0] = 7 / by; }

__device__ __noinline__ int deep(int n) {
    volatile int local[64];
    local[n % 64] = n;
    return n ? deep(n - 1) + local[n % 64] : 0;
}
extern "C" __global__ void recursion(int* y, int n) { y[0] = deep(n); }
extern "C" __global__ void spin(volatile int* y, int n) { while (y[0] < n) {} }
extern "C" __global__ void checked(int* y, int n) { if (n < 0) __trap(); y[0] = n; }
extern "C" __global__ void jump(float* y, float (*f)(float)) { y[0] = f(1.0f); }
extern "C" __global__ void copies(char* y, const char* x, long long n) { memcpy(y, x, n); }
extern "C" __global__ void __launch_bounds__(64) small(int* y) { y[threadIdx.x] = 1; }
__constant__ float table[4] = {1.0f, 2.0f, 3.0f, 4.0f};
extern "C" __global__ void constants(float* y) { y[threadIdx.x] = table[threadIdx.x]; }
extern "C" __global__ void every_type(float* f, double* d, int* i, const unsigned* u, long long* l, bool* b, int n,
                                      float s) {}
"""


@pytest.fixture
def run(emulated_gpu, cp):
    """run(name, threads, *arguments): launch a kernel of BROKEN, in one block or in (blocks, threads)."""
    module = cp.RawModule(code=BROKEN)

    def launch(name, threads, *arguments):
        blocks, threads = threads if isinstance(threads, tuple) else (1, threads)
        arguments = [np.int32(a) if type(a) is int else a for a in arguments]
        module.get_function(name)((blocks,), (threads,), tuple(arguments))

    return launch


def test_writes_over_the_end(cp, run):
    y = cp.zeros(10, np.float32)
    what = (
        r"kernel write_over, .*thread \(10, 0, 0\), line 2: (.|\n)*writes to argument 1 \(float\* y\) at index 10 of 10"
    )
    with pytest.raises(OutOfBounds, match=what):
        run("write_over", 32, y, 10)
    assert cp.asnumpy(y).tolist() == [0.0] * 10  # a launch that fails changes nothing
    run("write_over_fixed", 32, y, 10)
    assert cp.asnumpy(y).tolist() == [1.0] * 10


@pytest.mark.parametrize("n", [1, 5, 10, 1024])
def test_reads_over_the_end_though_the_value_is_not_used(cp, run, n):
    x = cp.asarray(np.arange(n, dtype=np.float32))
    with pytest.raises(OutOfBounds, match=rf"reads argument 2 \(const float\* x\) at index {n} of {n}"):
        run("read_over", n, cp.empty(n, np.float32), x, n)
    run("read_over_fixed", n, cp.empty(n, np.float32), x, n)


def test_reads_before_the_start(cp, run):
    x = cp.zeros(8, np.float32)
    with pytest.raises(OutOfBounds, match="at index -1 of 8"):
        run("read_under", 8, cp.empty(8, np.float32), x)
    run("read_under_fixed", 8, cp.empty(8, np.float32), x)


@pytest.mark.parametrize(("start", "stop"), [(4, 14), (20, 30)])
def test_runs_over_a_view(cp, run, start, stop):
    """What lies behind a view belongs to someone else, inside the allocation (4:14) as well as at its end (20:30)."""
    whole = cp.zeros(30, np.float32)
    with pytest.raises(OutOfBounds, match="at index 10 of 10"):
        run("write_over", 32, whole[start:stop], 10)
    run("write_over_fixed", 32, whole[start:stop], 10)
    assert int(whole.sum()) == 10


def test_wide_store_over_the_end(cp, run):
    y = cp.zeros(10, np.float32)
    with pytest.raises(OutOfBounds, match="argument 1"):
        run("wide_over", 32, y, 10)
    run("wide_over_fixed", 32, y, 10)


@pytest.mark.parametrize("broken", [0, 1])
def test_copy_of_a_struct_over_the_end(cp, run, broken):
    x = cp.zeros(32 - broken, np.float16)
    y = cp.zeros(32, np.float16)
    if broken:
        with pytest.raises(OutOfBounds, match="argument 2"):
            run("copy_over", 4, y, x, 4)
    else:
        run("copy_over", 4, y, x, 4)


def test_memory_that_was_not_passed(cp, run):
    hidden, y = cp.zeros(3, np.float32), cp.zeros(2, np.float32)
    table = cp.asarray(np.array([hidden.data.ptr], np.uint64))
    with pytest.raises(OutOfBounds, match="an array that was not passed to this kernel"):
        run("chase", 1, y, table)
    run("null_read", 1, y, None)
    run("null_read", 1, y, np.uint64(0))
    run("null_read", 1, y, np.uint64(hidden.data.ptr))  # an address as a number, as CuPy takes it
    assert float(y[0]) == 0.0
    with pytest.raises(OutOfBounds, match="null pointer"):
        run("null_read", 2, y, None)


def test_misaligned_vector_load(cp, run):
    x, y = cp.zeros(16, np.float32), cp.zeros(16, np.float32)
    run("misaligned", 2, y, x[4:12])
    with pytest.raises(UndefinedBehaviour, match=r"line \d+: (.|\n)*not aligned to the 16 bytes"):
        run("misaligned", 2, y, x[1:9])


def test_missing_barrier(cp, run):
    x = cp.asarray(np.arange(64, dtype=np.float32))
    y = cp.empty(64, np.float32)
    with pytest.raises((Race, Uninitialised), match="no_barrier"):
        run("no_barrier", 64, y, x)
    run("no_barrier_fixed", 64, y, x)
    assert cp.asnumpy(y).tolist() == list(range(63, -1, -1))


def test_missing_barrier_before_the_next_round(cp, run):
    x = cp.zeros(128, np.float32)  # all the same: only who reads what when gives it away, no value does
    with pytest.raises(
        Race, match=r"with no barrier in between: 4 bytes at byte \d+ of the shared array s; the other is"
    ):
        run("one_barrier", 64, cp.empty(64, np.float32), x, 2)
    run("one_barrier_fixed", 64, cp.empty(64, np.float32), x, 2)


def test_missing_barrier_shows_in_the_results_too(emulated_gpu, cp, run):
    emulated_gpu.races = False
    x = cp.asarray(np.arange(128, dtype=np.float32))
    with pytest.raises(Nondeterministic, match=r"one_barrier: argument 1 \(float\* y\) at index \d+ of 64"):
        run("one_barrier", 64, cp.empty(64, np.float32), x, 2)
    run("one_barrier_fixed", 64, cp.empty(64, np.float32), x, 2)
    emulated_gpu.orders = (ASCENDING,)
    run("one_barrier", 64, cp.empty(64, np.float32), x, 2)  # and with neither check it passes


def test_shuffle_orders_no_memory(emulated_gpu, cp, run):
    emulated_gpu.orders = (ASCENDING,)
    with pytest.raises(Race, match="warp_order"):
        run("warp_order", 32, cp.empty(32, np.int32))
    y = cp.empty(32, np.int32)
    run("warp_order_fixed", 32, y)
    assert cp.asnumpy(y).tolist() == [i ^ 1 for i in range(32)]
    with pytest.raises((Race, Uninitialised), match="two_warps"):
        run("two_warps", 64, cp.empty(64, np.int32))


@pytest.mark.parametrize("threads", [2, 32, 64])
@pytest.mark.parametrize("writer", [0, -1])
def test_readers_and_a_writer(emulated_gpu, cp, run, threads, writer):
    emulated_gpu.orders = (ASCENDING,)  # the writer comes before the other readers, or is the last of them itself
    y = cp.zeros(threads + 1, np.int32)
    with pytest.raises(Race, match="read_then_write"):
        run("read_then_write", threads, y, writer % threads, 0)
    y = cp.zeros(threads + 1, np.int32)
    run("read_then_write", threads, y, writer % threads, 1)
    assert cp.asnumpy(y).tolist() == [1] + [0] * threads


def test_readers_of_a_warp_and_a_writer(cp, run):
    y = cp.zeros(1, np.int32)
    run("read_twice_then_write", 32, y)
    assert int(y[0]) == 1
    with pytest.raises(Race):
        run("read_twice_then_write", 64, y)


def test_two_threads_write_one_element(cp, run):
    with pytest.raises(Race, match=r"thread \(1, 0, 0\)(.|\n)*the other is thread \(0, 0, 0\)"):
        run("same_element", 64, cp.zeros(32, np.int32))


def test_blocks_are_not_ordered(cp, run):
    with pytest.raises(Race, match=r"another block (reads|writes)(.|\n)*the other is block \(0, 0, 0\)"):
        run("between_blocks", (3, 64), cp.zeros(128, np.float32))
    y = cp.empty(192, np.float32)
    run("between_blocks_fixed", (3, 64), y)
    assert cp.asnumpy(y).tolist() == [0.0] * 64 + [1.0] * 64 + [2.0] * 64


def test_missing_fence(cp, run):
    part, ticket, out = cp.zeros(5, np.int32), cp.zeros(1, np.uint32), cp.zeros(1, np.int32)
    with pytest.raises(Race, match="__threadfence"):
        run("no_fence", (5, 1), part, ticket, out, 0)
    run("no_fence", (5, 1), part, ticket, out, 1)
    assert int(out[0]) == 10


def test_missing_acquire(emulated_gpu, cp, run):
    emulated_gpu.orders = (ASCENDING,)
    part, ticket, out = cp.zeros(5, np.int32), cp.zeros(1, np.uint32), cp.zeros(1, np.int32)
    with pytest.raises(Race, match="__threadfence"):
        run("no_acquire", (5, 1), part, ticket, out, 0)
    run("no_acquire", (5, 1), part, ticket, out, 1)


def test_fence_of_one_thread_for_all(cp, run):
    part, counters, ticket = cp.empty(5 * 64, np.int32), cp.zeros(2, np.uint32), cp.zeros(1, np.uint32)
    out = cp.empty(1, np.int32)
    run("fence_of_one", (5, 64), part, counters, ticket, out)
    assert int(out[0]) == 5 * 32 * 63 + 4 + 1
    assert int(ticket[0]) == 0


def test_misaligned_atomic(cp, run):
    y = cp.zeros(4, np.uint32)
    run("atomic_wide", 1, y, 2)
    with pytest.raises(UndefinedBehaviour, match="atomic on an address that is not aligned"):
        run("atomic_wide", 1, y, 1)


def test_numbering_starts_again_in_time(monkeypatch, cp, run):
    """Slices are numbered through all launches; before the numbers run out, all that was noted is forgotten."""
    monkeypatch.setattr(emulator, "MOST_SLICES", 0)
    for _ in range(3):
        test_missing_barrier_before_the_next_round(cp, run)
        test_readers_of_a_warp_and_a_writer(cp, run)
        test_fence_of_one_thread_for_all(cp, run)


def test_count_without_atomic(cp, run):
    n = cp.zeros(1, np.uint32)
    with pytest.raises(Race):
        run("count", (2, 32), n, 0)
    run("count", (2, 32), n, 1)
    assert int(n[0]) == 64


def test_first_come(cp, run):
    lock, winner = cp.zeros(1, np.uint32), cp.full(1, 99, np.int32)
    with pytest.raises(Nondeterministic, match=r"winner\) at index 0 of 1 \(int32\) is 0 in one run and 31 in another"):
        run("first_come", 32, lock, winner)
    run("first_come_fixed", 32, lock, winner)
    assert int(winner[0]) == 0


def test_shared_memory_before_it_is_written(cp, run):
    with pytest.raises(Uninitialised, match="reads shared memory that the block has not written"):
        run("shared_unset", 64, cp.empty(64, np.float32))
    run("shared_unset_fixed", 64, cp.empty(64, np.float32))


def test_result_of_unwritten_memory(cp, run):
    """fmaxf passes over the NaN that `empty` is filled with: the second run, with an ordinary number there, tells."""
    x = cp.ones(32, np.float32)
    with pytest.raises(Uninitialised, match="never written"):
        run("accumulate", 32, cp.empty(32, np.float32), x, 1)
    y = cp.empty(32, np.float32)
    run("accumulate", 32, y, x, 0)
    run("accumulate", 32, y, x, 1)
    assert cp.asnumpy(y).tolist() == [1.0] * 32


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "bfloat16", "int32", "uint8"])
def test_what_is_not_written_stays_poisoned(cp, dtype):
    if dtype == "bfloat16":
        dtype = pytest.importorskip("ml_dtypes").bfloat16
    a = cp.asnumpy(cp.empty(20, dtype))
    if a.dtype.kind in "iu":
        assert (a.view(np.uint8) == 0xA5).all()
    else:
        assert np.isnan(a.astype(np.float64)).all()


def test_an_output_that_a_kernel_forgets(cp, run):
    y = cp.empty(10, np.float32)
    run("skip_last", 32, y, 10)
    assert np.isnan(cp.asnumpy(y)).tolist() == [False] * 9 + [True]
    run("write_over_fixed", 32, y, 10)
    assert np.isfinite(cp.asnumpy(y)).all()


def test_bytes_that_look_like_poison_are_data(cp, run):
    x = np.random.default_rng(0).integers(0, 256, 1000).astype(np.uint8)
    x[::7] = 0xA5
    device_x, y = cp.empty(1000, np.uint8), cp.empty(1000, np.uint8)
    device_x.set(x)
    run("set_bytes", 64, y, device_x, 1000)
    np.testing.assert_array_equal(cp.asnumpy(y), x + 1)


def test_barriers(cp, run):
    y = cp.zeros(64, np.int32)
    with pytest.raises(BarrierError, match=r"(would hang|waits in line|names lane)"):
        run("half_waits", 64, y, 16)
    with pytest.raises(BarrierError, match="at different __syncthreads"):
        run("other_barrier", 64, y, 32)
    run("other_barrier", 64, y, 64)
    run("early_exit", 64, y, 40)  # since compute capability 7.0 a barrier waits for those that have not ended


@pytest.mark.parametrize(("threads", "n"), [(32, 16), (16, 16), (48, 48)])
def test_shuffles_that_not_all_lanes_reach(cp, run, threads, n):
    y = cp.zeros(64, np.int32)
    with pytest.raises(
        BarrierError, match=r"names lane \d+, which (has ended|the block of \d+ threads does not have)|hang"
    ):
        run("shuffle_some", threads, y, n)
    run("shuffle_some", 64, y, 64)


def test_shuffle_with_lanes_that_have_ended(emulated_gpu, cp, run):
    emulated_gpu.orders = (DESCENDING,)
    with pytest.raises(BarrierError, match=r"names lane \d+, which has ended"):
        run("shuffle_some", 32, cp.zeros(32, np.int32), 16)


def test_shuffles_with_wrong_masks(cp, run):
    y = cp.zeros(32, np.int32)
    run("shuffle_mask", 32, y, np.uint32(0xFFFFFFFF))
    with pytest.raises(BarrierError, match="lane 16 is not in the mask 0x0000ffff"):
        run("shuffle_mask", 32, y, np.uint32(0xFFFF))
    with pytest.raises(BarrierError, match=r"lane 0 takes the value of lane 1, which is not in the mask"):
        run("shuffle_mask", 1, y, np.uint32(1))
    with pytest.raises(BarrierError, match="comes to another warp operation"):
        run("shuffle_lines", 32, y)


def test_undefined_behaviour(cp, run):
    y = cp.zeros(32, np.int64)
    with pytest.raises(UndefinedBehaviour, match="overflow in a multiplication"):
        run("overflow", 1, y, 100000)
    run("overflow_fixed", 1, y, 100000)
    assert int(y[0]) == 10**10
    f, u, i = cp.zeros(32, np.float32), cp.zeros(1, np.uint32), cp.zeros(1, np.int32)
    with pytest.raises(UndefinedBehaviour, match="index 32 is outside the array"):
        run("over_tile", 32, f, 1)
    run("over_tile", 32, f, 0)
    with pytest.raises(UndefinedBehaviour, match="index 8 is outside the array"):
        run("over_local", 1, f, 9)
    run("over_local", 1, f, 8)
    with pytest.raises(UndefinedBehaviour, match="shift by 32 bits"):
        run("shift", 1, u, 32)
    run("shift", 1, u, 31)
    with pytest.raises(UndefinedBehaviour, match="division by zero"):
        run("divide", 1, i, 0)
    run("divide", 1, i, 2)


def test_kernels_that_stop_or_crash(emulated_gpu, cp, run):
    y = cp.zeros(1, np.int32)
    run("recursion", 1, y, 20)
    assert int(y[0]) == 210
    with pytest.raises(Stopped, match="stack is full"):
        run("recursion", 1, y, 100000)
    with pytest.raises(Stopped, match=r"line \d+: (.|\n)*__trap\(\)"):
        run("checked", 1, y, -1)
    run("checked", 1, y, 3)
    emulated_gpu.patience = 10**6
    with pytest.raises(Stopped, match="does not seem to end"):
        run("spin", 1, y, 4)
    run("spin", 1, y, 3)
    x = cp.zeros(100, np.int8)
    with pytest.raises(OutOfBounds, match=r"argument 2 .*, 51 bytes"):
        run("copies", 1, x[:50], x[50:], np.int64(51))
    run("copies", 1, x[:50], x[50:], np.int64(50))
    f = cp.zeros(4, np.float32)
    run("constants", 4, f)
    assert cp.asnumpy(f).tolist() == [1.0, 2.0, 3.0, 4.0]
    with pytest.raises(UndefinedBehaviour, match="index 4 is outside the array"):
        run("constants", 5, cp.zeros(5, np.float32))


def test_threads_that_wait_do_not_survive_a_failure(cp, run):
    """After a launch that stopped half-way, with threads at a barrier, the next one starts afresh."""
    y = cp.zeros(64, np.int32)
    for _ in range(3):
        with pytest.raises(BarrierError):
            run("other_barrier", 64, y, 32)
        run("other_barrier", 64, y, 64)


# --- the watch itself ---

FORMS = r"""
#include <cuda_fp16.h>
struct Twelve { float v[12]; };
union Word { float f; unsigned u; unsigned char bytes[4]; };
struct Bits { unsigned low : 5, high : 27; };
template <typename T> __device__ __noinline__ T indirect(const T* p, int i) { return p[i]; }

// Each reads 4 n bytes of x, in its own way, and writes something that depends on them.
extern "C" __global__ void scalar(float* y, const float* x, int n) {
    float t = 0;
    for (int i = 0; i < n; ++i) t += x[i];
    y[0] = t;
}
extern "C" __global__ void unrolled(float* y, const float* x, int n) {
    float t = 0;
#pragma unroll 4
    for (int i = n - 4; i < n; ++i) t += x[i];
    y[0] = t;
}
extern "C" __global__ void cached(float* y, const float* __restrict__ x, int n) { y[0] = __ldg(x + n - 1); }
extern "C" __global__ void streaming(float* y, const float* x, int n) { y[0] = __ldcs(x + n - 1); }
extern "C" __global__ void changing(float* y, const volatile float* x, int n) { y[0] = x[n - 1]; }
extern "C" __global__ void by_function(float* y, const float* x, int n) { y[0] = indirect(x, n - 1); }
extern "C" __global__ void pairs(float* y, const float* x, int n) {
    float2 v = reinterpret_cast<const float2*>(x)[n / 2 - 1];
    y[0] = v.y;
}
extern "C" __global__ void fours(float* y, const float* x, int n) {
    uint4 v = reinterpret_cast<const uint4*>(x)[n / 4 - 1];
    y[0] = __uint_as_float(v.w);
}
extern "C" __global__ void twelves(float* y, const float* x, int n) {
    Twelve v = reinterpret_cast<const Twelve*>(x)[n / 12 - 1];
    y[0] = v.v[n % 12];
}
extern "C" __global__ void words(float* y, const float* x, int n) {
    y[0] = reinterpret_cast<const Word*>(x)[n - 1].bytes[3];
}
extern "C" __global__ void fields(float* y, const float* x, int n) {
    y[0] = reinterpret_cast<const Bits*>(x)[n - 1].high;
}
extern "C" __global__ void halves(float* y, const float* x, int n) {
    __half2 v = reinterpret_cast<const __half2*>(x)[n - 1];
    y[0] = __high2float(v);
}
extern "C" __global__ void moved(float* y, const float* x, int n) {
    float v;
    memcpy(&v, x + n - 1, 4);
    y[0] = v;
}
extern "C" __global__ void moved_far(float* y, const float* x, int n) {
    float v[64];
    memcpy(v, x + n - 64, sizeof v);
    y[0] = v[n % 64];
}
extern "C" __global__ void counted(float* y, const float* x, int n) {
    y[0] = atomicAdd(const_cast<unsigned*>(reinterpret_cast<const unsigned*>(x)) + n - 1, 0u);
}
"""
FORM_NAMES = [line.split("void ")[1].split("(")[0] for line in FORMS.splitlines() if line.startswith('extern "C"')]


@pytest.mark.parametrize("name", FORM_NAMES)
def test_every_form_of_access_is_watched(cp, name):
    kernel = cp.RawModule(code=FORMS).get_function(name)
    x = cp.zeros(96, np.float32)
    kernel((1,), (1,), (cp.empty(1, np.float32), x, np.int32(96)))
    with pytest.raises(OutOfBounds, match=rf"kernel {name}, .*line \d+: (.|\n)*argument 2"):
        kernel((1,), (1,), (cp.empty(1, np.float32), x[:95], np.int32(96)))


@pytest.mark.parametrize("threads", [1, 31, 33, 100, 1024])
@pytest.mark.parametrize("orders", [(ASCENDING, DESCENDING), (SHUFFLED, ASCENDING)])
def test_blocks_of_any_size(emulated_gpu, cp, threads, orders):
    """Every thread passes three barriers and sees what the others left before them."""
    emulated_gpu.orders = orders
    kernel = cp.RawModule(
        code="""
        extern "C" __global__ void rotate(int* y) {
            __shared__ int s[1024];
            s[threadIdx.x] = threadIdx.x;
            for (int r = 0; r < 3; ++r) {
                __syncthreads();
                int v = s[(threadIdx.x + 1) % blockDim.x];
                __syncthreads();
                s[threadIdx.x] = v;
            }
            y[blockIdx.x * blockDim.x + threadIdx.x] = s[threadIdx.x];
        }"""
    ).get_function("rotate")
    y = cp.empty((2, threads), np.int32)
    kernel((2,), (threads,), (y,))
    np.testing.assert_array_equal(cp.asnumpy(y), [(np.arange(threads) + 3) % threads] * 2)


# Threads that do what a table says: at each step one access (0 none, 1 read, 2 write, 3 atomic) to one of a few
# elements, then for all of them nothing, __syncwarp or __syncthreads.
TABLE = r"""
__device__ int access(int kind, int* p) {
    return kind == 1 ? *p : kind == 2 ? (*p = 1) : kind == 3 ? atomicAdd(p, 1) : 0;
}
extern "C" __global__ void table(int* elements, int* sums, const int* kinds, const int* places, const int* syncs,
                                 int steps, int in_shared) {
    __shared__ int s[4];
    if (threadIdx.x < 4) s[threadIdx.x] = 0;
    __syncthreads();
    int sum = 0, me = blockIdx.x * blockDim.x + threadIdx.x;
    for (int i = 0; i < steps; ++i) {
        int place = places[me * steps + i];
        sum += access(kinds[me * steps + i], in_shared ? s + place : elements + place);
        if (syncs[i] == 1) __syncwarp();
        if (syncs[i] == 2) __syncthreads();
    }
    sums[me] = sum;
}
"""


def has_race(kinds, places, syncs, threads):
    """The definition, pair by pair: kinds, places: (threads in all, steps)."""
    steps = kinds.shape[1]
    barriers = np.concatenate([[0], np.cumsum(syncs == 2)[:-1]])
    warp_barriers = np.concatenate([[0], np.cumsum(syncs >= 1)[:-1]])
    accesses = [(t, i) for t in range(len(kinds)) for i in range(steps) if kinds[t, i]]
    for a, (t, i) in enumerate(accesses):
        for u, j in accesses[a + 1 :]:
            if t == u or places[t, i] != places[u, j] or {kinds[t, i], kinds[u, j]} in ({1}, {3}):
                continue
            same_block, same_warp = t // threads == u // threads, t // 32 == u // 32
            ordered = barriers[i] != barriers[j] or (same_warp and warp_barriers[i] != warp_barriers[j])
            if not (same_block and ordered):
                return True
    return False


def random_table(rng, in_shared):
    """Kinds, places: (threads in all, steps); syncs: (steps,); and the number of blocks. About half of them race."""
    blocks, steps = 1 if in_shared else int(rng.integers(1, 4)), int(rng.integers(3, 14))
    shape = (blocks * 64, steps)
    kinds, places = np.zeros(shape, np.int32), rng.integers(0, rng.integers(1, 5), shape).astype(np.int32)
    active = rng.choice(len(kinds), rng.integers(2, 10), replace=False)
    if rng.random() < 0.5 and blocks == 1:
        active = np.unique(active % 8)  # all in one warp
    odds = [0.1, 0.6, 0.1, 0.2] if blocks == 1 else [0.1, 0.7, 0.2]  # mostly reads; atomics would order the blocks
    size = (len(active), steps)
    kinds[active] = rng.choice(len(odds), size, p=odds) * (rng.random(size) < rng.random() / (2 * blocks))
    return kinds, places, rng.choice(3, steps, p=[0.1, 0.5, 0.4]).astype(np.int32), blocks


@pytest.mark.parametrize("in_shared", [0, 1])
@pytest.mark.parametrize("seed", range(3))
def test_races_are_found_exactly(emulated_gpu, cp, in_shared, seed):
    """Random tables: the launch fails where, and only where, two accesses are in no order."""
    rng = np.random.default_rng([seed, in_shared])
    kernel = cp.RawModule(code=TABLE).get_function("table")
    emulated_gpu.orders = (SHUFFLED,)
    found = np.zeros(2, int)
    for number in range(200):
        emulated_gpu.seed = number
        kinds, places, syncs, blocks = random_table(rng, in_shared)
        arrays = [cp.zeros(4, np.int32), cp.empty(len(kinds), np.int32), *map(cp.asarray, (kinds, places, syncs))]
        arguments = (*arrays, np.int32(len(syncs)), np.int32(in_shared))
        race = has_race(kinds, places, syncs, threads=64)
        found[int(race)] += 1
        with pytest.raises(Race) if race else contextlib.nullcontext():
            kernel((blocks,), (64,), arguments)
    assert found.min() > 50  # enough of both


# --- arguments and geometry ---


def full_list(cp):
    arrays = [cp.zeros(4, dtype) for dtype in ("f4", "f8", "i4", "u4", "i8", "?")]
    return [*arrays, np.int32(4), np.float32(0.5)]


def test_right_arguments(cp, run):
    run("every_type", 1, *full_list(cp))


@pytest.mark.parametrize(
    ("at", "wrong", "match"),
    [
        (0, lambda cp: cp.zeros(4, "f8"), r"argument 1 \(float\* f\): got an array of float64"),
        (0, lambda cp: cp.zeros(4, "f2"), "got an array of float16"),
        (1, lambda cp: cp.zeros(4, "f4"), "argument 2"),
        (2, lambda cp: cp.zeros(4, "u4"), "argument 3"),
        (3, lambda cp: cp.zeros(4, "i4"), "argument 4"),
        (4, lambda cp: cp.zeros(4, "i4"), "argument 5"),
        (5, lambda cp: cp.zeros(4, "f4"), "argument 6"),
        (0, lambda cp: np.float32(1), "takes an array, got the number"),
        (6, lambda cp: cp.zeros(1, "i4"), "takes a value, got an array"),
        (6, lambda cp: np.int64(4), r"argument 7 \(int n\): got .*passed as int64"),
        (6, lambda cp: np.uint32(4), "argument 7"),
        (6, lambda cp: np.float32(4), "argument 7"),
        (7, lambda cp: 0.5, r"argument 8 \(float s\): got 0.5, which is passed as float64"),
        (7, lambda cp: np.int32(1), "argument 8"),
    ],
)
def test_wrong_argument(cp, run, at, wrong, match):
    arguments = full_list(cp)
    arguments[at] = wrong(cp)
    with pytest.raises(ArgumentError, match=f"kernel every_type(.|\n)*{match}"):
        run("every_type", 1, *arguments)


@pytest.mark.parametrize("wrong", [np.zeros(4, np.float32), "x", [1, 2]])
def test_arguments_that_no_kernel_takes(cp, run, wrong):
    arguments = full_list(cp)
    arguments[0] = wrong
    with pytest.raises(TypeError, match="argument 1"):
        run("every_type", 1, *arguments)


def test_wrong_count(cp, run):
    for arguments in (full_list(cp)[:-1], [*full_list(cp), np.int32(1)], []):
        with pytest.raises(ArgumentError, match=rf"{len(arguments)} arguments given, it takes 8"):
            run("every_type", 1, *arguments)


def test_python_numbers_are_64_bits(cp, right):
    x = cp.ones(4, np.float32)
    right.get_function("saxpy")((1,), (32,), (x, cp.ones(4, np.float32), 4, np.float32(1)))
    assert cp.asnumpy(x).tolist() == [2.0] * 4


@pytest.mark.parametrize(
    ("grid", "block", "error"),
    [
        ((0,), (32,), ArgumentError),
        ((1,), (0,), ArgumentError),
        ((1,), (1025,), ArgumentError),
        ((1, 65536), (32,), ArgumentError),
        ((1,), (1, 1, 65), ArgumentError),
        ((1,), (64, 32), ArgumentError),
        (1, (32,), TypeError),
        ((1,), 32, TypeError),
    ],
)
def test_wrong_geometry(cp, right, grid, block, error):
    with pytest.raises(error, match="kernel axes"):
        right.get_function("axes")(grid, block, (cp.empty(10, np.int32),))


def test_misaligned_argument(cp, right):
    whole = cp.empty(9, np.uint32)
    arguments = (np.uint64(1), np.int32(1))
    right.get_function("scramble")((1,), (1,), (whole[4:8], *arguments))
    with pytest.raises(ArgumentError, match=r"argument 1 \(uint4\* out\).* not at a multiple of 16 bytes"):
        right.get_function("scramble")((1,), (1,), (whole[1:5], *arguments))


def test_launch_bounds(cp, run):
    run("small", 64, cp.empty(64, np.int32))
    with pytest.raises(ArgumentError, match="block of 65 threads, the limit is 64"):
        run("small", 65, cp.empty(65, np.int32))


# --- read-only arrays ---


def test_read_only(emulated_gpu, cp, run):
    y, x = cp.zeros(10, np.float32), cp.zeros(10, np.float32)
    what = r"argument 1 \(float\* y\) at index 3 of 7"
    with emulated_gpu.read_only(x):
        run("write_over_fixed", 32, y, 10)
        with pytest.raises(ReadOnlyWrite, match=what), emulated_gpu.read_only(y[3:5]):
            run("write_over_fixed", 32, y[:7], 7)
    run("write_over_fixed", 32, x, 10)
    with pytest.raises(ReadOnlyWrite, match="has changed"), emulated_gpu.read_only(x):
        x[2] = 5


# --- text that does not compile ---


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ('extern "C" __global__ void k(float* y) { y[0] = z; }', r"kernel.cu:1:\d+: error: .z. was not declared"),
        (
            'extern "C" __global__ void k(float* y) { extern __shared__ float s[]; y[0] = s[0]; }',
            "dynamic shared memory",
        ),
        ('extern "C" __global__ void k(float* y) { atomicAdd(y, 1.0f); }', "deleted function"),
    ],
)
def test_text_that_does_not_compile(cp, text, match):
    with pytest.raises(compiler.CompileError, match=match):
        cp.RawModule(code=text).get_function("k")


def test_modules_are_kept(cp, monkeypatch):
    text = 'extern "C" __global__ void kept(int* y) { y[0] = VALUE; }'

    def value(n):
        y = cp.empty(1, np.int32)
        cp.RawModule(code=text, options=(f"-DVALUE={n}",)).get_function("kept")((1,), (1,), (y,))
        return int(y[0])

    assert [value(5), value(6)] == [5, 6]  # the options are part of what a module is kept under
    monkeypatch.setattr(compiler, "_compile", lambda *_: pytest.fail("compiled again"))
    assert value(5) == 5


def test_threads_compile_the_same_text_at_the_same_time(cp):
    text = f'extern "C" __global__ void fresh(int* y) {{}}  // {uuid.uuid4()}'
    together = threading.Barrier(4)

    def compiled(_):
        together.wait(10)
        return compiler.Module(text).kernels

    with ThreadPoolExecutor(4) as threads:
        assert all("fresh" in kernels for kernels in threads.map(compiled, range(4)))


def test_what_is_missing_is_said(monkeypatch):
    monkeypatch.setattr(compiler, "compiler", lambda: None)
    assert "apt install g++" in compiler.missing()
    monkeypatch.undo()
    monkeypatch.setitem(compiler.HEADER_PACKAGES, "nvidia.no_such_package", "nvidia-no-such-package")
    if compiler.compiler() is not None:
        assert "pip install" in compiler.missing()
        assert "nvidia-no-such-package" in compiler.missing()


# --- the stand-in for CuPy ---


def test_the_stand_in_comes_and_goes(emulated_gpu):
    import cupy
    from cupy_backends.cuda.libs import cublas

    assert cupy is fake_cupy.cupy
    assert cupy.cuda.cublas is cublas
    with fake_cupy.installed() as again:
        assert again is emulated_gpu
    assert sys.modules["cupy"] is fake_cupy.cupy


def test_real_cupy_is_left_alone(monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", type(sys)("cupy"))
    with pytest.raises(RuntimeError, match="real CuPy"), fake_cupy.installed():
        pass


def test_arrays(emulated_gpu, cp):
    host = np.arange(12, dtype=np.float32).reshape(3, 4)
    a = cp.asarray(host)
    host[0, 0] = 99
    assert isinstance(a, cp.ndarray)
    assert float(a[0, 0]) == 0.0  # device memory is not the host's
    assert a.data.ptr % 256 == 0
    assert a[1:].data.ptr == a.data.ptr + 16
    assert a[1].shape == (4,)
    assert a[1, 2].shape == ()
    a[1:, :2] = 7
    a.reshape(-1)[0] = 3
    assert cp.asnumpy(a).tolist() == [[3, 1, 2, 3], [7, 7, 6, 7], [7, 7, 10, 11]]
    b = (a * 2 + a).sum(axis=0)
    assert isinstance(b, cp.ndarray)
    assert cp.asnumpy(b).tolist() == [51, 45, 54, 63]
    assert isinstance(a.sum(), cp.ndarray)
    assert isinstance(cp.isfinite(a).all(), cp.ndarray)
    assert bool(cp.isfinite(a).all())
    assert cp.asarray(a) is a
    assert cp.asarray(a, np.float64).dtype == np.float64
    out = np.empty((3, 4), np.float32)
    assert a.get(out=out) is out
    assert out.tolist() == cp.asnumpy(a).tolist()
    c = cp.empty((3, 4), np.float64)
    cp.copyto(c, a)
    assert c.get().tolist() == out.tolist()
    assert cp.matmul(a, a.T, out=cp.empty((3, 3), np.float32)).get().tolist() == (out @ out.T).tolist()
    assert cp.float32 is np.float32
    assert emulated_gpu.counts["synchronisations"] > 0


def test_host_arrays_are_refused(cp):
    a, host = cp.zeros(3), np.zeros(3)
    for mix in (lambda: a + host, lambda: host + a, lambda: cp.add(a, host, out=a), lambda: cp.maximum(host, 0)):
        with pytest.raises(TypeError, match="Unsupported type"):
            mix()
    with pytest.raises(TypeError, match="Unsupported type"):
        a[:] = host
    with pytest.raises(ValueError, match="copyto"):
        cp.copyto(a, host)
    a.set(host)
    with pytest.raises(ValueError, match="mismatch"):
        a.set(host.astype(np.float32))


def test_counts(emulated_gpu, cp, run):
    y = cp.empty(10, np.float32)
    emulated_gpu.counts.clear()
    for _ in range(3):
        run("write_over_fixed", 32, y, 10)
    assert emulated_gpu.counts == {"launches": 3}
    assert emulated_gpu.log[-1] == ("write_over_fixed", (1,), (32,))
    float(y[0])
    assert emulated_gpu.counts["copies to host"] == 1
    before = cp.get_default_memory_pool().used_bytes()
    more = cp.empty(1000)
    assert cp.get_default_memory_pool().used_bytes() - before == 8000
    del more
    assert cp.get_default_memory_pool().used_bytes() == before


def test_device(cp):
    with cp.cuda.Device(0) as device:
        assert device.attributes["MultiProcessorCount"] > 1
        assert device.compute_capability == "90"
        device.synchronize()
    assert cp.cuda.runtime.getDeviceCount() == 1
    assert b"GPU" in cp.cuda.runtime.getDeviceProperties(0)["name"]
    with pytest.raises(RuntimeError, match="invalid device"):
        cp.cuda.Device(1)
    with cp.cuda.Stream(non_blocking=True) as stream:
        assert cp.cuda.get_current_stream() is stream
        stream.synchronize()
    assert cp.cuda.get_current_stream() is cp.cuda.Stream.null
    pinned = cp.cuda.alloc_pinned_memory(16)
    host = np.frombuffer(pinned, np.float32, 4)
    host[:] = 2
    assert host.tolist() == [2.0] * 4


# --- cuBLAS ---

FLOAT, DOUBLE, HALF, BFLOAT = 0, 1, 2, 14


def gemm(
    cp, a, b, c, *, alpha=1.0, beta=0.0, transa=0, transb=0, types=None, compute=68, m=None, n=None, k=None, ld=None
):
    """C = alpha op(A) op(B) + beta C for Fortran-ordered device arrays."""
    cublas, wide = cp.cuda.cublas, np.float64 if compute == 70 else np.float32
    alpha, beta = np.array(alpha, wide), np.array(beta, wide)
    ta, tc = types or {"float32": (FLOAT, FLOAT), "float64": (DOUBLE, DOUBLE)}[c.dtype.name]
    m, n = c.shape[0] if m is None else m, c.shape[1] if n is None else n
    k = (a.shape[0] if transa else a.shape[1]) if k is None else k
    lda, ldb, ldc = ld or (max(1, a.shape[0]), max(1, b.shape[0]), max(1, c.shape[0]))
    handle = cp.cuda.device.get_cublas_handle()
    cublas.gemmEx(
        *(handle, transa, transb, m, n, k, alpha.ctypes.data, a.data.ptr, ta, lda, b.data.ptr, ta, ldb),
        *(beta.ctypes.data, c.data.ptr, tc, ldc, compute, cublas.CUBLAS_GEMM_DEFAULT),
    )


def fortran(cp, values):
    return cp.array(values, order="F")


@pytest.mark.parametrize("transa", [0, 1])
@pytest.mark.parametrize("transb", [0, 1])
@pytest.mark.parametrize(("m", "n", "k"), [(3, 5, 4), (1, 1, 1), (7, 1, 33), (0, 3, 2), (3, 0, 2)])
def test_gemm(cp, transa, transb, m, n, k):
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(k, m) if transa else (m, k)), rng.normal(size=(n, k) if transb else (k, n))
    c = fortran(cp, np.ones((m, n)))
    gemm(cp, fortran(cp, a), fortran(cp, b), c, alpha=0.5, beta=2.0, transa=transa, transb=transb, compute=70)
    expected = 0.5 * (a.T if transa else a) @ (b.T if transb else b) + 2.0
    np.testing.assert_allclose(cp.asnumpy(c), expected, rtol=1e-13, atol=1e-13)


def test_gemm_does_not_read_c_without_beta(cp):
    a = fortran(cp, np.ones((2, 3), np.float32))
    b = fortran(cp, np.ones((3, 2), np.float32))
    c = cp.empty((2, 2), np.float32, order="F")
    gemm(cp, a, b, c, beta=1.0)
    assert np.isnan(cp.asnumpy(c)).all()
    gemm(cp, a, b, c)
    assert cp.asnumpy(c).tolist() == [[3.0, 3.0], [3.0, 3.0]]
    gemm(cp, a, b, c, k=0, beta=2.0)
    assert cp.asnumpy(c).tolist() == [[6.0, 6.0], [6.0, 6.0]]
    gemm(cp, a * np.float32(np.nan), b, c, alpha=0.0, beta=0.5)  # nor A and B without alpha
    assert cp.asnumpy(c).tolist() == [[3.0, 3.0], [3.0, 3.0]]
    c = cp.empty((2, 2), np.float32, order="F")
    gemm(cp, a, b, c, k=0)
    assert cp.asnumpy(c).tolist() == [[0.0, 0.0], [0.0, 0.0]]


def test_gemm_on_parts_of_larger_matrices(cp):
    rng = np.random.default_rng(1)
    a, b = (fortran(cp, rng.normal(size=(9, 9))) for _ in range(2))
    c = fortran(cp, np.zeros((9, 9)))
    gemm(cp, a[2:5], b[:4], c[1:], m=3, n=5, k=4, ld=(9, 9, 9), compute=70, types=(DOUBLE, DOUBLE))
    expected = np.zeros((9, 9))
    expected[1:4, :5] = cp.asnumpy(a)[2:5, :4] @ cp.asnumpy(b)[:4, :5]
    np.testing.assert_allclose(cp.asnumpy(c), expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("code", [HALF, BFLOAT])
@pytest.mark.parametrize("wide_result", [False, True])
def test_gemm_of_16_bits_accumulates_in_32(cp, code, wide_result):
    dtype = np.float16 if code == HALF else pytest.importorskip("ml_dtypes").bfloat16
    a = fortran(cp, np.ones((1, 5000)).astype(dtype))
    b = fortran(cp, np.ones((5000, 1)).astype(dtype))
    c = cp.empty((1, 1), np.float32 if wide_result else dtype, order="F")
    gemm(cp, a, b, c, types=(code, FLOAT if wide_result else code))
    assert float(c[0, 0]) == float(np.float32(5000) if wide_result else np.array(5000).astype(dtype))


def test_tf32_rounds_its_inputs(cp):
    x = np.full((1, 1), 1 + 2.0**-10 + 2.0**-12, np.float32)
    c = cp.empty((1, 1), np.float32, order="F")
    one = fortran(cp, np.ones((1, 1), np.float32))
    gemm(cp, fortran(cp, x), one, c)
    assert float(c[0, 0]) == x[0, 0]
    gemm(cp, fortran(cp, x), one, c, compute=77)
    assert float(c[0, 0]) == 1 + 2.0**-10
    gemm(cp, fortran(cp, x + np.float32(2.0**-11 - 2.0**-10)), one, c, compute=77)
    assert float(c[0, 0]) == 1 + 2.0**-10  # to nearest


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"m": -1}, "INVALID_VALUE"),
        ({"ld": (2, 4, 3)}, "INVALID_VALUE"),
        ({"ld": (3, 3, 3)}, "INVALID_VALUE"),
        ({"ld": (3, 4, 2)}, "INVALID_VALUE"),
        ({"m": 0, "n": 0, "k": 0, "ld": (0, 1, 1)}, "INVALID_VALUE"),
        ({"transa": 3}, "INVALID_VALUE"),
        ({"compute": 70}, "NOT_SUPPORTED"),
        ({"types": (HALF, DOUBLE)}, "NOT_SUPPORTED"),
        ({"types": (FLOAT, HALF)}, "NOT_SUPPORTED"),
        ({"compute": 64}, "NOT_SUPPORTED"),
    ],
)
def test_gemm_errors_of_cublas(cp, change, match):
    a, b = fortran(cp, np.ones((3, 4), np.float32)), fortran(cp, np.ones((4, 5), np.float32))
    with pytest.raises(cp.cuda.cublas.CUBLASError, match=match):
        gemm(cp, a, b, fortran(cp, np.ones((3, 5), np.float32)), **change)


def test_gemm_that_would_run_wild(emulated_gpu, cp):
    a, b = fortran(cp, np.ones((3, 4), np.float32)), fortran(cp, np.ones((4, 5), np.float32))
    c = fortran(cp, np.ones((3, 5), np.float32))
    with pytest.raises(OutOfBounds, match=r"C \(6 columns of 3 float32"):
        gemm(cp, a, b, c, n=6)
    with pytest.raises(OutOfBounds, match=r"A \(5 columns"):
        gemm(cp, a, fortran(cp, np.ones((5, 5), np.float32)), c, k=5)
    with pytest.raises(OutOfBounds, match="overlaps"):
        gemm(cp, c, fortran(cp, np.ones((5, 5), np.float32)), c)
    with pytest.raises(ReadOnlyWrite, match="C"), emulated_gpu.read_only(c):
        gemm(cp, a, b, c)
    cublas, handle = cp.cuda.cublas, cp.cuda.device.get_cublas_handle()
    cublas.setPointerMode(handle, cublas.CUBLAS_POINTER_MODE_DEVICE)
    try:
        with pytest.raises(OutOfBounds, match=r"alpha, .* is not in the device's memory"):
            gemm(cp, a, b, c)
    finally:
        cublas.setPointerMode(handle, cublas.CUBLAS_POINTER_MODE_HOST)
    with pytest.raises(cublas.CUBLASError, match="NOT_INITIALIZED"):
        cublas.setMathMode(handle + 1, 0)
    with pytest.raises(OverflowError):
        gemm(cp, a, b, c, m=2**31)
