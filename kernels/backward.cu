// Backward: gz = gh * f' and the bias gradient, the sum of gz over the batch, in one pass over gh.
//
// Made for one derivative DF at a time. Macros: READS (0: f' is 1, 1: it reads h, 2: it reads z), DROPOUT, HAS_SUMS.

// g, (rows, n), becomes g * f'(saved) behind the dropout mask; the columns' sums of each block row go to `partial`,
// (gridDim.y, n). Moves each array once: reads g and saved, writes g.
extern "C" __global__ void __launch_bounds__(THREADS, LEAST_BLOCKS)
activation_gradient(T* g, const T* __restrict__ saved, S* partial, Index rows, Index n, unsigned int threshold,
                    unsigned int layer, unsigned long long seed, Index first_row, const double* __restrict__ state) {
    Index column = tile_column();
    S sum[VEC];
    for (int i = 0; i < VEC; ++i) sum[i] = 0;
#if DROPOUT
    Mask mask{threshold, layer, seed, first_row, (unsigned long long)state[ROUND]};
#endif
#pragma unroll 1
    for (Index row = tile_row(); column < n && row < rows; row += tile_stride()) {
        Pack<T> pack = load(g + row * n + column);
#if READS
        Pack<T> s = load(saved + row * n + column);
#endif
        S x[VEC];
        for (int i = 0; i < VEC; ++i) x[i] = widen(pack.v[i]);
#if DROPOUT
        mask.apply(x, row, column);
#endif
        for (int i = 0; i < VEC; ++i) {
#if READS == 1 && DROPOUT
            x[i] *= DF(widen(s.v[i]) * mask.keep());  // h was divided by keep; where it was dropped, g is 0
#elif READS
            x[i] *= DF(widen(s.v[i]));
#endif
            sum[i] += x[i];
            narrow(&pack.v[i], x[i]);
        }
#if READS || DROPOUT
        store(g + row * n + column, pack);
#endif
    }
#if HAS_SUMS
    store_column_sums(sum, column, n, partial);
#endif
}

// gb = the sum of the `parts` rows of `partial`, added to what stands there with `accumulate`. Block (32, 8): 32 columns,
// each of which 8 threads add up, one every eighth row, and one of them what the others have; always in the same order.
extern "C" __global__ void __launch_bounds__(THREADS)
finish_column_sums(const S* __restrict__ partial, S* gb, Index parts, Index n, int accumulate) {
    __shared__ S sums[THREADS];
    Index column = Index(blockIdx.x) * blockDim.x + threadIdx.x;
    S sum = 0;
    if (column < n) {
#pragma unroll 4
        for (Index part = threadIdx.y; part < parts; part += blockDim.y) sum += partial[part * n + column];
    }
    sums[threadIdx.y * blockDim.x + threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.y != 0 || column >= n) return;
    for (int y = 1; y < blockDim.y; ++y) sum += sums[y * blockDim.x + threadIdx.x];
    gb[column] = accumulate ? gb[column] + sum : sum;
}
