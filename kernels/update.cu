// The update of all parameters in one launch: unscale, penalty gradient, clipping, the rule, the 16-bit copy.
//
// Made for one rule at a time. Macros: MOMENTS (0 to 3), HAS_SHADOW, and the rule's hyperparameters.

// What one update needs, worked out by one thread: c[0] whether it is applied at all, c[1] 1 / LOSS_SCALE, c[2] the factor
// that clips (clip_norm 0: none), then the rule's coefficients.
extern "C" __global__ void prepare_update(double clip_norm, double clip_eps, double lr_factor, double* c,
                                          const double* __restrict__ state) {
    double norm = state[GRADIENT_NORM], clip = clip_norm / (norm + clip_eps);
    c[0] = applies(state);
    c[1] = 1 / state[LOSS_SCALE];
    c[2] = clip_norm > 0 && clip < 1 ? clip : 1;
    coefficients(state[LEARNING_RATE] * lr_factor, state[STEP] + 1, c + 3);
}

// theta, g, every moment and the shadow: (n,), n a multiple of VEC. The penalty covers the first `covered`.
// Moves each array once: reads theta, g and the moments, writes theta, the moments and the shadow.
extern "C" __global__ void __launch_bounds__(THREADS, LEAST_BLOCKS)
update(S* theta, const S* __restrict__ g, S* m0, S* m1, S* m2, T* shadow, Index n, Index covered, S l1, S l2,
       const double* __restrict__ coefficient) {
    if (coefficient[0] == 0) return;
    S unscale = S(coefficient[1]), clip = S(coefficient[2]), c[COEFFICIENTS];
    for (int k = 0; k < COEFFICIENTS; ++k) c[k] = S(coefficient[3 + k]);
    S* moments[3] = {m0, m1, m2};
    Index stride = Index(gridDim.x) * blockDim.x * VEC;
#pragma unroll 1  // what is stored may be what is loaded: see tile.cuh
    for (Index i = (Index(blockIdx.x) * blockDim.x + threadIdx.x) * VEC; i < n; i += stride) {
        Pack<S> p = load(theta + i), gradient = load(g + i), m[MOMENTS + 1];
        Pack<T> copy;
        for (int k = 0; k < MOMENTS; ++k) m[k] = load(moments[k] + i);
        for (int j = 0; j < VEC; ++j) {
            S x = gradient.v[j] * unscale, own[MOMENTS + 1];
            if (i + j < covered) x += l1 * sign(p.v[j]) + l2 * p.v[j];
            for (int k = 0; k < MOMENTS; ++k) own[k] = m[k].v[j];
            rule(p.v[j], x * clip, own, c);
            for (int k = 0; k < MOMENTS; ++k) m[k].v[j] = own[k];
            narrow(&copy.v[j], p.v[j]);
        }
        store(theta + i, p);
        for (int k = 0; k < MOMENTS; ++k) store(moments[k] + i, m[k]);
#if HAS_SHADOW
        store(shadow + i, copy);
#endif
    }
}

// Plain SGD as a GEMM, W = factors[0] gz' h + factors[1] W: what it is multiplied with. A step that is not applied leaves
// W as it is, to the bit. One thread.
extern "C" __global__ void prepare_descent(double decay, S* factors, const double* __restrict__ state) {
    bool on = applies(state);
    factors[0] = on ? S(-state[LEARNING_RATE]) : S(0);
    factors[1] = on ? S(1 - state[LEARNING_RATE] * decay) : S(1);
}

// Zeros over the factors of a product that is not to be applied, since 0 times a NaN is a NaN; else does nothing.
extern "C" __global__ void __launch_bounds__(THREADS)
disarm(T* gz, Index gz_count, T* h, Index h_count, const double* __restrict__ state) {
    if (applies(state)) return;
    for (Index i = flat_first(); i < gz_count; i += flat_stride()) narrow(gz + i, S(0));
    for (Index i = flat_first(); i < h_count; i += flat_stride()) narrow(h + i, S(0));
}
