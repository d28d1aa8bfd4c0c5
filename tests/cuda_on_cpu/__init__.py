"""Runs the package's CUDA kernels on the CPU, so that a machine without a GPU can test them.

g++ compiles the very text that NVRTC compiles on a GPU; a scheduler runs its threads and watches every access; a
stand-in for CuPy and cuBLAS carries the launches, so that grids, argument lists and GEMM calls run too. In a test::

    def test_scale(emulated_gpu):
        import cupy  # the stand-in
        kernel = cupy.RawModule(code=TEXT).get_function("scale")
        y = cupy.empty(1000, "float32")
        kernel((4,), (256,), (y, np.int64(1000), np.float32(2)))

A launch raises an exception of `emulator` (all are `KernelError`) that names kernel, argument, block, thread and line:

===================== =================================================================================================
ArgumentError         number or types of the arguments, launch bounds, a grid or block that no GPU takes
OutOfBounds           an access outside the arrays (or views) that were passed, by a byte, used or not
Race                  two accesses, one a store, without a barrier in between (or, between blocks, fence and atomic)
Uninitialised         shared memory read before it is written; a result that depends on what `cupy.empty` left
Nondeterministic      a result that depends on the order of threads and blocks
BarrierError          a barrier or shuffle that not all threads reach, wrong masks, values of absent lanes
UndefinedBehaviour    misaligned vector access, index outside a fixed array, int overflow, long shift, division by zero
ReadOnlyWrite         a store to an array within ``with emulated_gpu.read_only(array):``
Stopped               assert, __trap, a crash, an endless loop
===================== =================================================================================================

`runtime.h` what kernels see, `runtime.cpp` scheduler and watch, `compiler.py` text to module, `emulator.py` memory and
launches, `fake_cupy.py` and `fake_cublas.py` the stand-in, `as_cupy.py` puts it in CuPy's place for a whole process,
`test_emulator.py` the tests of all this.

Not emulated: the speed, FMA contraction and the approximate intrinsics of a GPU, flushing of denormal numbers (CuPy
compiles with -ftz=true), dynamic shared memory, inline PTX, float atomics, streams that overlap, graphs.
"""
