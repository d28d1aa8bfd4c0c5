// Muon, the elementwise parts around its GEMMs; see gpu_mlp/optimizers.py. Everything here is in S.

// m averages the effective gradient of one W, (n,) flat; u is the direction to be orthogonalised; partial[block] its part
// of |u|^2. `c` is what prepare_update left.
extern "C" __global__ void __launch_bounds__(THREADS, LEAST_BLOCKS)
muon_direction(const S* __restrict__ W, const S* __restrict__ g, S* m, S* u, Index n, S l1, S l2, S momentum,
               int nesterov, double* partial, const double* __restrict__ c) {
    __shared__ double shared[32];
    double sum = 0;
    S unscale = S(c[1]), clip = S(c[2]);
#pragma unroll 1  // see tile.cuh
    for (Index i = flat_first(); i < n; i += flat_stride()) {
        S x = (g[i] * unscale + l1 * sign(W[i]) + l2 * W[i]) * clip;
        S average = m[i] + (S(1) - momentum) * (x - m[i]);
        if (c[0] != 0) m[i] = average;
        x = nesterov ? x + momentum * (average - x) : average;
        u[i] = x;
        sum += double(x) * double(x);
    }
    sum = block_sum(sum, shared);
    if (threadIdx.x == 0) partial[blockIdx.x] = sum;
}

// u /= max(|u|, eps), with |u|^2 the sum of the `parts` partial sums, added up by every block in the same order.
extern "C" __global__ void __launch_bounds__(THREADS, LEAST_BLOCKS)
muon_normalise(S* u, Index n, const double* __restrict__ partial, Index parts, double eps) {
    __shared__ double shared[32];
    double sum = 0;
    for (Index i = threadIdx.x; i < parts; i += blockDim.x) sum += partial[i];
    double norm = sqrt(block_sum(sum, shared));
    S factor = S(1 / (norm > eps ? norm : eps));
    for (Index i = flat_first(); i < n; i += flat_stride()) u[i] *= factor;
}

// W = (1 - lr weight_decay) W - lr rate u, and its 16-bit copy.
extern "C" __global__ void __launch_bounds__(THREADS, LEAST_BLOCKS)
muon_apply(S* W, const S* __restrict__ u, T* shadow, Index n, double rate, double weight_decay,
           const double* __restrict__ c, const double* __restrict__ state) {
    if (c[0] == 0) return;
    S step = S(state[LEARNING_RATE] * rate), keep = S(1 - state[LEARNING_RATE] * weight_decay);
    for (Index i = flat_first(); i < n; i += flat_stride()) {
        W[i] = W[i] * keep - step * u[i];
#if HAS_SHADOW
        narrow(shadow + i, W[i]);
#endif
    }
}
