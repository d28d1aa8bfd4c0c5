// The rows of a minibatch, picked out of a data set and cast on the way.
//
// Macros: FROM and TO, the element types; SAME (1 where they are one type), NARROW (1 where TO is the storage type T), WIDEN
// (1 where only FROM is).

// 16-bit floats where the storage type is another. From their bits: cuda_fp16.h would take longer to compile than the rest.
struct Float16Source {
    unsigned short bits;
    __device__ __forceinline__ operator float() const {
        unsigned int sign = (bits & 0x8000u) << 16, exponent = (bits >> 10) & 31u, mantissa = bits & 1023u;
        unsigned int wide = exponent == 31 ? 255u : exponent + 112;  // infinity and NaN, or the bias of 127 for 15
        unsigned int small = __float_as_uint(float(mantissa) * 5.9604644775390625e-8f);  // below the smallest exponent
        return __uint_as_float(sign | (exponent ? wide << 23 | mantissa << 13 : small));
    }
};
struct BFloat16Source {
    unsigned short bits;
    __device__ __forceinline__ operator float() const { return __uint_as_float((unsigned int)bits << 16); }
};

// out[i] = scale * source[rows[first + i]], (batch, n), with first = CURSOR; without rows source[first + i], without a state
// first = 0. Labels, which are no numbers of type T, are not scaled. Moves each array once: reads source, writes out.
extern "C" __global__ void __launch_bounds__(THREADS)
gather(const FROM* __restrict__ source, const Index* __restrict__ rows, TO* out, Index batch, Index n, S scale,
       const double* __restrict__ state) {
    Index first = state ? Index(state[CURSOR]) : 0;
    Index column = tile_column();
    for (Index row = tile_row(); column < n && row < batch; row += tile_stride()) {
        Pack<FROM> from = load(source + (rows ? rows[first + row] : first + row) * n + column);
        Pack<TO> to;
        for (int i = 0; i < VEC; ++i) {
#if NARROW && SAME
            narrow(&to.v[i], widen(from.v[i]) * scale);
#elif NARROW
            narrow(&to.v[i], S(from.v[i]) * scale);
#elif SAME
            to.v[i] = from.v[i];
#elif WIDEN
            to.v[i] = TO(widen(from.v[i]) * scale);
#else
            to.v[i] = TO(from.v[i]);
#endif
        }
        store(out + row * n + column, to);
    }
}
