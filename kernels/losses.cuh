// The losses, entry by entry: a pair of device functions each, value_name(x, y) and slope_name(x, y) = d value / dx.
//
// x is y_hat, or z for the fused pairs. The formulas are those of gpu_mlp/losses.py; the mean over the outputs is the
// caller's. HUBER_DELTA is a macro, and PROBABILITY_CLIP where a loss has one: in the value, not in the slope, a probability
// counts as within [PROBABILITY_CLIP, 1 - PROBABILITY_CLIP].

#ifdef PROBABILITY_CLIP
__device__ __forceinline__ S clip_log(S x) {
    return smin(smax(x, S(log(double(PROBABILITY_CLIP)))), S(log1p(-double(PROBABILITY_CLIP))));
}
#else
__device__ __forceinline__ S clip_log(S x) { return x; }
#endif

__device__ __forceinline__ S value_mse(S x, S y) { return (x - y) * (x - y); }
__device__ __forceinline__ S slope_mse(S x, S y) { return S(2) * (x - y); }

__device__ __forceinline__ S value_half_mse(S x, S y) { return S(0.5) * (x - y) * (x - y); }
__device__ __forceinline__ S slope_half_mse(S x, S y) { return x - y; }

__device__ __forceinline__ S value_mae(S x, S y) { return M(fabs)(x - y); }
__device__ __forceinline__ S slope_mae(S x, S y) { return sign(x - y); }

#ifndef HUBER_DELTA
#define HUBER_DELTA 1.0
#endif
__device__ __forceinline__ S slope_huber(S x, S y) { return smin(smax(x - y, -S(HUBER_DELTA)), S(HUBER_DELTA)); }
__device__ __forceinline__ S value_huber(S x, S y) {
    S slope = M(fabs)(slope_huber(x, y));
    return slope * (M(fabs)(x - y) - S(0.5) * slope);
}

__device__ __forceinline__ S value_log_cosh(S x, S y) {
    S d = M(fabs)(x - y);
    return d + M(log1p)(M(exp)(S(-2) * d)) - S(0.69314718055994530942);
}
__device__ __forceinline__ S slope_log_cosh(S x, S y) { return M(tanh)(x - y); }

__device__ __forceinline__ S value_poisson(S x, S y) { return x - y * M(log)(smax(x, ROOT_TINY)); }
__device__ __forceinline__ S slope_poisson(S x, S y) { return S(1) - y / smax(x, ROOT_TINY); }

__device__ __forceinline__ S value_binary_cross_entropy(S x, S y) {
    S other = clip_log(M(log)(smax(S(1) - x, BELOW_ONE)));
    return -(y * (clip_log(M(log)(smax(x, TINY))) - other) + other);
}
__device__ __forceinline__ S slope_binary_cross_entropy(S x, S y) {
    return (x - y) / (smax(x, TINY) * smax(S(1) - x, BELOW_ONE));
}

__device__ __forceinline__ S value_hinge(S x, S y) { return smax(S(1) - y * x, S(0)); }
__device__ __forceinline__ S slope_hinge(S x, S y) { return S(1) - y * x > S(0) ? -y : S(0); }

__device__ __forceinline__ S value_cross_entropy(S x, S y) { return -y * clip_log(M(log)(smax(x, TINY))); }
__device__ __forceinline__ S slope_cross_entropy(S x, S y) { return -y * (S(1) / smax(x, TINY)); }

__device__ __forceinline__ S value_nll(S x, S y) { return -y * x; }
__device__ __forceinline__ S slope_nll(S x, S y) { return -y; }

// The fused pairs, from z.
#ifdef PROBABILITY_CLIP
__device__ __forceinline__ S value_sigmoid_binary_cross_entropy(S z, S y) {
    return -(y * clip_log(-f_softplus(-z)) + (S(1) - y) * clip_log(-f_softplus(z)));
}
#else
__device__ __forceinline__ S value_sigmoid_binary_cross_entropy(S z, S y) { return f_softplus(z) - y * z; }
#endif
__device__ __forceinline__ S slope_sigmoid_binary_cross_entropy(S z, S y) { return f_sigmoid(z) - y; }

__device__ __forceinline__ S value_exp_poisson(S z, S y) { return M(exp)(z) - y * z; }
__device__ __forceinline__ S slope_exp_poisson(S z, S y) { return M(exp)(z) - y; }
