// A loss and its gradient in one pass, for losses that are a sum over the outputs; with f' of the output layer and the
// bias gradient in the same pass.
//
// Made for one loss VALUE, SLOPE at a time, and one derivative DF. Macros: MEAN (the loss is a mean over the outputs),
// READS (of f': 0 nothing, 1 h, 2 z), HAS_SUMS, and those of target.cuh.

// gz = LOSS_SCALE share slope / n f'(saved), (rows, n); the columns' sums to `partial`, (gridDim.y, n); the block's part
// of the cost to partial_cost[blockIdx.y gridDim.x + blockIdx.x]. Divides in double: two blocks, see LEAST_BLOCKS.
extern "C" __global__ void __launch_bounds__(THREADS, 2)
pointwise_loss(const T* __restrict__ y_hat, const T* saved, const Y* __restrict__ y, const double* __restrict__ weight,
               const S* __restrict__ class_weight, T* gz, S* partial, double* partial_cost, Index rows, Index n,
               const double* __restrict__ state) {
    __shared__ double shared[32];
    Index column = tile_column();
    double cost = 0, scale = state[LOSS_SCALE] * (MEAN ? 1.0 / n : 1.0);
    S sum[VEC];
    for (int i = 0; i < VEC; ++i) sum[i] = 0;
#pragma unroll 1
    for (Index row = tile_row(); column < n && row < rows; row += tile_stride()) {
        double share = row_share(weight, row, state);
        S factor = S(share * scale);
        Pack<T> pack = load(y_hat + row * n + column), out;
#if READS
        Pack<T> s = load(saved + row * n + column);
#endif
        S value = 0;
        for (int i = 0; i < VEC; ++i) {
            S x = widen(pack.v[i]), t = target(y, row, column + i, n, class_weight);
            value += VALUE(x, t);
            S g = SLOPE(x, t);
#if READS
            g *= DF(widen(s.v[i]));
#endif
            g *= factor;  // last: the loss scale might take a slope that f' shrinks out of range
            sum[i] += g;
            narrow(&out.v[i], g);
        }
        cost += share * double(value);
        store(gz + row * n + column, out);
    }
    cost = block_sum(MEAN ? cost / n : cost, shared);
    if (threadIdx.x == 0 && threadIdx.y == 0) partial_cost[Index(blockIdx.y) * gridDim.x + blockIdx.x] = cost;
#if HAS_SUMS
    store_column_sums(sum, column, n, partial);
#endif
}
