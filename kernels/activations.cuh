// The activation functions: one pair of device functions each, f_name(z) = h and df_name(s) = f', where s is h or z as the
// table in gpu_mlp/activations.py says. Formulas and values at kinks are that table's.

#define SELU_SCALE S(1.0507009873554804934193349852946)
#define SELU_ALPHA S(1.6732632423543772848170429916717)
#define LEAKY_SLOPE S(0.01)
#define SQRT_HALF S(0.70710678118654752440)
#define INV_SQRT_2PI S(0.39894228040143267794)
#define SQRT_2_OVER_PI S(0.79788456080286535588)
#define GELU_TANH_CUBIC S(0.044715)

__device__ __forceinline__ S f_identity(S z) { return z; }
__device__ __forceinline__ S df_identity(S s) { return S(1); }

__device__ __forceinline__ S f_relu(S z) { return smax(z, S(0)); }
__device__ __forceinline__ S df_relu(S h) { return h > S(0) ? S(1) : S(0); }

__device__ __forceinline__ S f_leaky_relu(S z) { return smax(z, LEAKY_SLOPE * z); }
__device__ __forceinline__ S df_leaky_relu(S h) { return h > S(0) ? S(1) : LEAKY_SLOPE; }

__device__ __forceinline__ S f_elu(S z) { return z > S(0) ? z : M(expm1)(z); }
__device__ __forceinline__ S df_elu(S h) { return h > S(0) ? S(1) : h + S(1); }

__device__ __forceinline__ S f_celu(S z) { return f_elu(z); }
__device__ __forceinline__ S df_celu(S h) { return df_elu(h); }

__device__ __forceinline__ S f_selu(S z) { return SELU_SCALE * (z > S(0) ? z : SELU_ALPHA * M(expm1)(z)); }
__device__ __forceinline__ S df_selu(S h) { return h > S(0) ? SELU_SCALE : h + SELU_SCALE * SELU_ALPHA; }

__device__ __forceinline__ S f_sigmoid(S z) { return S(1) / (S(1) + M(exp)(-z)); }
__device__ __forceinline__ S df_sigmoid(S h) { return h * (S(1) - h); }

__device__ __forceinline__ S f_tanh(S z) { return M(tanh)(z); }
__device__ __forceinline__ S df_tanh(S h) { return (S(1) - h) * (S(1) + h); }

__device__ __forceinline__ S f_softplus(S z) { return smax(z, S(0)) + M(log1p)(M(exp)(-M(fabs)(z))); }
__device__ __forceinline__ S df_softplus(S z) { return f_sigmoid(z); }

__device__ __forceinline__ S f_softsign(S z) { return z / (S(1) + M(fabs)(z)); }
__device__ __forceinline__ S df_softsign(S z) {
    S d = S(1) + M(fabs)(z);
    return S(1) / (d * d);
}

__device__ __forceinline__ S f_hardtanh(S z) { return smin(smax(z, S(-1)), S(1)); }
__device__ __forceinline__ S df_hardtanh(S z) { return z > S(-1) && z < S(1) ? S(1) : S(0); }

__device__ __forceinline__ S f_hardsigmoid(S z) { return smin(smax(z * S(1.0 / 6) + S(0.5), S(0)), S(1)); }
__device__ __forceinline__ S df_hardsigmoid(S z) { return z > S(-3) && z < S(3) ? S(1.0 / 6) : S(0); }

__device__ __forceinline__ S f_hardswish(S z) { return z * f_hardsigmoid(z); }
__device__ __forceinline__ S df_hardswish(S z) { return z <= S(-3) ? S(0) : z >= S(3) ? S(1) : z * S(1.0 / 3) + S(0.5); }

__device__ __forceinline__ S f_relu6(S z) { return smin(smax(z, S(0)), S(6)); }
__device__ __forceinline__ S df_relu6(S z) { return z > S(0) && z < S(6) ? S(1) : S(0); }

__device__ __forceinline__ S f_relu_squared(S z) {
    S r = smax(z, S(0));
    return r * r;
}
__device__ __forceinline__ S df_relu_squared(S z) { return S(2) * smax(z, S(0)); }

__device__ __forceinline__ S f_sine(S z) { return sine_of(z, 0); }
__device__ __forceinline__ S df_sine(S z) { return sine_of(z, 1); }

__device__ __forceinline__ S f_exp(S z) { return M(exp)(z); }
__device__ __forceinline__ S df_exp(S h) { return h; }

__device__ __forceinline__ S normal_cdf(S z) { return S(0.5) * (S(1) + M(erf)(z * SQRT_HALF)); }

__device__ __forceinline__ S f_gelu(S z) { return z * normal_cdf(z); }
__device__ __forceinline__ S df_gelu(S z) { return normal_cdf(z) + z * INV_SQRT_2PI * M(exp)(S(-0.5) * z * z); }

__device__ __forceinline__ S gelu_tanh_of(S z) {
    return M(tanh)(SQRT_2_OVER_PI * z * (S(1) + GELU_TANH_CUBIC * z * z));
}
__device__ __forceinline__ S f_gelu_tanh(S z) { return z * S(0.5) * (S(1) + gelu_tanh_of(z)); }
__device__ __forceinline__ S df_gelu_tanh(S z) {
    z = smin(smax(z, S(-10)), S(10));  // beyond, t is 1 or -1 to the last bit, and z * z might overflow
    S t = gelu_tanh_of(z);
    S slope = SQRT_2_OVER_PI * (S(1) + S(3) * GELU_TANH_CUBIC * z * z);
    return S(0.5) * (S(1) + t) + S(0.5) * z * (S(1) - t * t) * slope;
}

__device__ __forceinline__ S f_silu(S z) { return z * f_sigmoid(z); }
__device__ __forceinline__ S df_silu(S z) {
    S s = f_sigmoid(z);
    return s * (S(1) + z * (S(1) - s));
}

__device__ __forceinline__ S f_mish(S z) { return z * M(tanh)(f_softplus(z)); }
__device__ __forceinline__ S df_mish(S z) {
    S w = M(tanh)(f_softplus(z));
    return w + z * f_sigmoid(z) * (S(1) - w * w);
}
