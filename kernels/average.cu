// The moving average of the parameters, moved on by one update.

// averaged += share (theta - averaged), share = 1 - d, with d of update t = STEP + 1 as in gpu_mlp/averaging.py; the first
// one copies theta. Both: (n,), n a multiple of VEC. Moves each array once: reads theta and averaged, writes averaged.
extern "C" __global__ void __launch_bounds__(THREADS)
average(const S* __restrict__ theta, S* averaged, Index n, double decay, int warmup, const double* __restrict__ state) {
    if (!applies(state)) return;
    double t = state[STEP] + 1, warm = t / (9 + t);
    bool first = t <= 1;
    S share = S(1 - (warmup && warm < decay ? warm : decay));
    Index stride = Index(gridDim.x) * blockDim.x * VEC;
#pragma unroll 1  // what is stored may be what is loaded: see tile.cuh
    for (Index i = (Index(blockIdx.x) * blockDim.x + threadIdx.x) * VEC; i < n; i += stride) {
        Pack<S> p = load(theta + i), kept = load(averaged + i);
        for (int j = 0; j < VEC; ++j) kept.v[j] = first ? p.v[j] : kept.v[j] + share * (p.v[j] - kept.v[j]);
        store(averaged + i, kept);
    }
}
