"""The three GEMMs of a layer on cuBLAS, without a transposed copy.

cuBLAS is column-major: a C-order (m, n) array is to it an (n, m) one. C = A B in C order is Cᵀ = Bᵀ Aᵀ in its eyes,
so the factors change places and nothing is moved. Leans on CuPy's binding of cublasGemmEx.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..precision import Precision

_TYPES = {"float32": 0, "float64": 1, "float16": 2, "bfloat16": 14}  # cudaDataType
_COMPUTE_32F, _COMPUTE_32F_FAST_TF32, _COMPUTE_64F = 68, 77, 70  # cublasComputeType
_DEFAULT_ALGORITHM = -1  # CUBLAS_GEMM_DEFAULT: cuBLAS chooses


class GEMM:
    """``out = alpha · op(a) op(b) + beta · out`` at one precision; 16-bit factors are summed in float32."""

    def __init__(self, precision: Precision) -> None:
        if precision.master == "float64":
            self._compute, self._scalar = _COMPUTE_64F, np.float64
        else:
            self._compute = _COMPUTE_32F_FAST_TF32 if precision.reduced_gemm else _COMPUTE_32F
            self._scalar = np.float32

    def __call__(
        self,
        a: Any,
        b: Any,
        out: Any,
        transpose_a: bool = False,
        transpose_b: bool = False,
        alpha: float = 1.0,
        beta: float = 0.0,
    ) -> None:
        """a, b, out: C-order matrices of the precision's storage type, or of float32; out: (m, n)."""
        import cupy
        from cupy_backends.cuda.libs import cublas

        m, n = out.shape
        k = a.shape[0] if transpose_a else a.shape[1]
        if m == 0 or n == 0:
            return
        if k == 0:
            if beta:
                out *= beta
            else:
                out.fill(0)  # as cuBLAS: with beta 0 what stood there is not read, not even a NaN
            return
        scalars = np.array([alpha, beta], self._scalar)
        first, second = scalars.ctypes.data, scalars.ctypes.data + scalars.itemsize
        cublas.gemmEx(
            cupy.cuda.device.get_cublas_handle(),
            cublas.CUBLAS_OP_T if transpose_b else cublas.CUBLAS_OP_N,
            cublas.CUBLAS_OP_T if transpose_a else cublas.CUBLAS_OP_N,
            n, m, k,
            first, b.data.ptr, _TYPES[b.dtype.name], b.shape[1],
            a.data.ptr, _TYPES[a.dtype.name], a.shape[1],
            second, out.data.ptr, _TYPES[out.dtype.name], n,
            self._compute, _DEFAULT_ALGORITHM,
        )  # fmt: skip
