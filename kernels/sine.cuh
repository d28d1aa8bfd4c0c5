// sin and cos without local memory, which CUDA's own need for large arguments: sine_of(z, k) = sin(z + k pi / 2).
//
// z is brought to q quarter turns and a rest r, |r| <= pi / 4: by Cody and Waite's subtraction of q pi / 2 in three parts
// while |z| <= MODERATE, by Payne and Hanek's multiplication with 2 / pi beyond, which is exact enough for every finite z.
// NaN for infinite z and for NaN.

#if defined(STORAGE_FLOAT64)
#define MODERATE 2147483648.0  // q fits an int, and the third part is still far below an ulp of the smallest rest
#else
#define MODERATE 105615.0f
#endif

// The binary digits of 2 / pi behind the point, 64 a word, after a word of zeros.
__constant__ unsigned long long TWO_OVER_PI[20] = {
    0x0000000000000000ull, 0xA2F9836E4E441529ull, 0xFC2757D1F534DDC0ull, 0xDB6295993C439041ull, 0xFE5163ABDEBBC561ull,
    0xB7246E3A424DD2E0ull, 0x06492EEA09D1921Cull, 0xFE1DEB1CB129A73Eull, 0xE88235F52EBB4484ull, 0xE99C7026B45F7E41ull,
    0x3991D639835339F4ull, 0x9C845F8BBDF9283Bull, 0x1FF897FFDE05980Full, 0xEF2F118B5A0A6D1Full, 0x6D367ECF27CB09B7ull,
    0x4F463F669E5FEA2Dull, 0x7527BAC7EBE5F17Bull, 0x3D0739F78A5292EAull, 0x6BFB5FB11F8D5D08ull, 0x56033046FC7B6BABull,
};

// |z| = m 2^e times 2 / pi, modulo 4 quarter turns: digits of 2 / pi that give whole turns are left out, and 192 that follow
// leave 2^-137 of a quarter turn behind a rest of at least 2^-62.
__device__ __forceinline__ double reduce_large(double z, int& quarters) {
    unsigned long long bits = (unsigned long long)__double_as_longlong(z);
    unsigned long long m = (bits & 0xFFFFFFFFFFFFFull) | 0x10000000000000ull;
    int first = int(bits >> 52 & 0x7FF) - 1075 - 2 + 64;  // the digit whose place, times 2^e, is worth 2 quarter turns
    int word = first >> 6, shift = first & 63;
    unsigned long long window[3];
    for (int i = 0; i < 3; ++i) {
        window[i] = TWO_OVER_PI[word + i] << shift | TWO_OVER_PI[word + i + 1] >> 1 >> (63 - shift);
    }
    unsigned long long middle = m * window[1], low = middle + __umul64hi(m, window[2]);
    unsigned long long high = m * window[0] + __umul64hi(m, window[1]) + (low < middle);
    quarters = int(high >> 62);
    high = high << 2 | low >> 62;  // the part behind the point
    low <<= 2;
    bool upper = high >> 63;
    if (upper) {
        ++quarters;
        high = ~high;
        low = ~low;  // 2^-128 away from the negative, which nothing sees
    }
    double rest = (double(high) + double(low) * 5.421010862427522e-20) * 8.515303950216386e-20;  // 2^-64, and 2^-64 pi / 2
    if (upper != (z < 0)) rest = -rest;
    if (z < 0) quarters = -quarters;
    return rest;
}

// z - q pi / 2, and q. The products are not rounded before they are subtracted, so that the first step is exact.
__device__ __forceinline__ S reduce(S z, int& quarters) {
    quarters = 0;
    if (M(fabs)(z) <= MODERATE) {
        S q = M(rint)(z * S(0.63661977236758134308));
        quarters = int(q);
#if defined(STORAGE_FLOAT64)
        z = fma(q, -1.5707963267948966, z);
        z = fma(q, -6.123233995736766e-17, z);
        return fma(q, 1.4973849048591698e-33, z);
#else
        z = fmaf(q, -1.5707963705062866f, z);
        z = fmaf(q, 4.371138828673793e-8f, z);
        return fmaf(q, 1.7151245100058819e-15f, z);
#endif
    }
    return isfinite(z) ? S(reduce_large(double(z), quarters)) : z - z;
}

// The factorials' reciprocals in the series of sin and cos, as many as S can tell.
#if defined(STORAGE_FLOAT64)
#define SINE_SERIES                                                                                                  \
    {1.0 / 355687428096000, -1.0 / 1307674368000, 1.0 / 6227020800, -1.0 / 39916800, 1.0 / 362880, -1.0 / 5040,      \
     1.0 / 120, -1.0 / 6}
#define COSINE_SERIES                                                                                                \
    {1.0 / 20922789888000, -1.0 / 87178291200, 1.0 / 479001600, -1.0 / 3628800, 1.0 / 40320, -1.0 / 720, 1.0 / 24,   \
     -1.0 / 2}
#else
#define SINE_SERIES {1.0f / 362880, -1.0f / 5040, 1.0f / 120, -1.0f / 6}
#define COSINE_SERIES {-1.0f / 3628800, 1.0f / 40320, -1.0f / 720, 1.0f / 24, -1.0f / 2}
#endif

template <int N>
__device__ __forceinline__ S polynomial(S x, const S (&coefficients)[N]) {
    S sum = coefficients[0];
    for (int i = 1; i < N; ++i) sum = M(fma)(sum, x, coefficients[i]);
    return sum;
}

// sin(z + k pi / 2), to about an ulp.
__device__ __forceinline__ S sine_of(S z, int k) {
    int quarters;
    S r = reduce(z, quarters), square = r * r;
    const S sine_series[] = SINE_SERIES, cosine_series[] = COSINE_SERIES;
    S sine = M(fma)(r * square, polynomial(square, sine_series), r);
    S cosine = M(fma)(square, polynomial(square, cosine_series), S(1));
    S result = (k + quarters) & 1 ? cosine : sine;
    return (k + quarters) & 2 ? -result : result;
}
