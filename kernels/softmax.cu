// Softmax and its logarithm, row by row, and their Jacobian products. Any number of columns.
//
// Macros: LOGARITHM, HAS_BIAS (0 or 1).

// h = softmax(product + b) or its logarithm, (rows, n), in place or not.
extern "C" __global__ void __launch_bounds__(THREADS, LEAST_BLOCKS)
bias_softmax(const T* product, const T* __restrict__ b, T* h, Index rows, Index n) {
    __shared__ S shared[32];
    for (Index base = first_row_of_block(); base < rows; base += rows_of_grid()) {
        Index row = base + threadIdx.y;
        Index end = row < rows ? n : 0;  // a group beyond the last row goes along, for the barriers
        Normalizer total;
        for (Index j = threadIdx.x; j < end; j += blockDim.x) {
#if HAS_BIAS
            total.add(widen(product[row * n + j]) + widen(b[j]));
#else
            total.add(widen(product[row * n + j]));
#endif
        }
        total.combine(shared);
        S log_sum = M(log)(total.sum);
        for (Index j = threadIdx.x; j < end; j += blockDim.x) {
            S x = widen(product[row * n + j]) - total.top;
#if HAS_BIAS
            x += widen(b[j]);
#endif
#if LOGARITHM
            narrow(h + row * n + j, x - log_sum);
#else
            narrow(h + row * n + j, M(exp)(x) / total.sum);
#endif
        }
    }
}

// The Jacobian product, in place: g = h (g - <g, h>) for softmax, g = g - exp(h) sum(g) for its logarithm.
extern "C" __global__ void __launch_bounds__(THREADS, LEAST_BLOCKS)
softmax_gradient(T* g, const T* __restrict__ h, Index rows, Index n) {
    __shared__ S shared[32];
    for (Index base = first_row_of_block(); base < rows; base += rows_of_grid()) {
        Index row = base + threadIdx.y;
        Index end = row < rows ? n : 0;
        S sum = 0;
        for (Index j = threadIdx.x; j < end; j += blockDim.x) {
#if LOGARITHM
            sum += widen(g[row * n + j]);
#else
            sum += widen(g[row * n + j]) * widen(h[row * n + j]);
#endif
        }
        sum = group_sum(sum, shared);
        for (Index j = threadIdx.x; j < end; j += blockDim.x) {
            S gj = widen(g[row * n + j]), hj = widen(h[row * n + j]);
#if LOGARITHM
            narrow(g + row * n + j, gj - M(exp)(hj) * sum);
#else
            narrow(g + row * n + j, hj * (gj - sum));
#endif
        }
    }
}
