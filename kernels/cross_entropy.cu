// Cross-entropy of softmax from z, with its gradient: two passes over a row, any number of classes.
//
// Macros: those of target.cuh, and PROBABILITY_CLIP where the loss has one (see losses.cuh). The same kernel serves log_softmax with the negative log-likelihood.

// L = mass log(sum exp(z - max)) - <t, z - max>, gz = LOSS_SCALE share (mass softmax(z) - t), (rows, n), where t is the
// target row and mass its sum; the block's part of the cost to partial_cost[blockIdx.x].
extern "C" __global__ void __launch_bounds__(THREADS, LEAST_BLOCKS)
softmax_cross_entropy(const T* __restrict__ z, const Y* __restrict__ y, const double* __restrict__ weight,
                      const S* __restrict__ class_weight, T* gz, double* partial_cost, Index rows, Index n,
                      const double* __restrict__ state) {
    __shared__ S shared[32];
    __shared__ double shared_cost[32];
    double cost = 0;
    for (Index base = first_row_of_block(); base < rows; base += rows_of_grid()) {
        Index row = base + threadIdx.y;
        Index end = row < rows ? n : 0;
        Normalizer total;
        S mass = 0, product = 0;
        for (Index j = threadIdx.x; j < end; j += blockDim.x) {
            total.add(widen(z[row * n + j]));
            mass += target(y, row, j, n, class_weight);
        }
        total.combine(shared);
        mass = group_sum(mass, shared);
        double share = end ? row_share(weight, row, state) : 0;
        S factor = S(share * state[LOSS_SCALE]), towards = factor * mass / total.sum;
#ifdef PROBABILITY_CLIP
        S log_sum = M(log)(total.sum);
#endif
        for (Index j = threadIdx.x; j < end; j += blockDim.x) {
            S x = widen(z[row * n + j]) - total.top, t = target(y, row, j, n, class_weight);
#ifdef PROBABILITY_CLIP
            product += t * clip_log(x - log_sum);
#else
            product += t * x;
#endif
            narrow(gz + row * n + j, towards * M(exp)(x) - factor * t);
        }
        product = group_sum(product, shared);
#ifdef PROBABILITY_CLIP
        if (threadIdx.x == 0 && end) cost -= share * double(product);
#else
        if (threadIdx.x == 0 && end) cost += share * double(mass * M(log)(total.sum) - product);
#endif
    }
    cost = block_sum(cost, shared_cost);
    if (threadIdx.x == 0 && threadIdx.y == 0) partial_cost[blockIdx.x] = cost;
}
