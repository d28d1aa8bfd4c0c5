// Forward: bias, activation and dropout in one pass over a GEMM's product.
//
// Made for one activation F at a time. Macros: KEEPS_Z, HAS_BIAS, DROPOUT (0 or 1).

// h = f(product + b), (rows, n), then dropout; with KEEPS_Z the sum is written back over the product.
// `product` may be `h` itself. Moves each array once: reads product and b, writes h (and z).
extern "C" __global__ void __launch_bounds__(THREADS, LEAST_BLOCKS)
bias_activation(T* product, const T* __restrict__ b, T* h, Index rows, Index n, unsigned int threshold,
                unsigned int layer, unsigned long long seed, Index first_row, const double* __restrict__ state) {
    Index column = tile_column();
    if (column >= n) return;
#if HAS_BIAS
    Pack<T> bias = load(b + column);
#endif
#if DROPOUT
    Mask mask{threshold, layer, seed, first_row, (unsigned long long)state[ROUND]};
#endif
#pragma unroll 1
    for (Index row = tile_row(); row < rows; row += tile_stride()) {
        Pack<T> z = load(product + row * n + column), out;
        S x[VEC];
        for (int i = 0; i < VEC; ++i) {
            x[i] = widen(z.v[i]);
#if HAS_BIAS
            x[i] += widen(bias.v[i]);
#endif
#if KEEPS_Z
            narrow(&z.v[i], x[i]);
#endif
            x[i] = F(x[i]);
        }
#if KEEPS_Z
        store(product + row * n + column, z);
#endif
#if DROPOUT
        mask.apply(x, row, column);
#endif
        for (int i = 0; i < VEC; ++i) narrow(&out.v[i], x[i]);
        store(h + row * n + column, out);
    }
}
