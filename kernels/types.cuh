// The types every kernel is written in, the conversions between them, and the math functions of S.
//
// In front of this text stand: #define STORAGE_FLOAT64 (or FLOAT32, FLOAT16, BFLOAT16), and #define VEC, how many
// elements of T a thread loads and stores at once: 16 bytes of them where the arrays allow it, else 1.

#if defined(STORAGE_FLOAT64)
typedef double T;
typedef double S;
#elif defined(STORAGE_FLOAT32)
typedef float T;
typedef float S;
#elif defined(STORAGE_FLOAT16)
#include <cuda_fp16.h>
typedef __half T;
typedef float S;
#elif defined(STORAGE_BFLOAT16)
typedef BFloat16 T;  // of bfloat16.cuh
typedef float S;
#endif

typedef long long Index;
#define THREADS 256
// How many blocks must fit a multiprocessor. 0 leaves it to ptxas, which in double would rather spill around a division
// than use more than 48 registers.
#if defined(STORAGE_FLOAT64)
#define LEAST_BLOCKS 1
#else
#define LEAST_BLOCKS 0
#endif

#if defined(STORAGE_FLOAT64)
#define LOWEST S(-1.7976931348623157e308)
#define TINY S(2.2250738585072014e-308)
#define ROOT_TINY S(1.4916681462400413e-154)
#define BELOW_ONE S(1.1102230246251565e-16)
#else
#define LOWEST S(-3.4028234663852886e38)
#define TINY S(1.1754943508222875e-38)
#define ROOT_TINY S(1.0842021724855044e-19)
#define BELOW_ONE S(5.9604644775390625e-8)
#endif

#if defined(STORAGE_FLOAT64)
__device__ __forceinline__ S widen(double x) { return x; }
__device__ __forceinline__ void narrow(double* out, S x) { *out = x; }
#else
__device__ __forceinline__ S widen(float x) { return x; }
__device__ __forceinline__ void narrow(float* out, S x) { *out = x; }
#endif
#if defined(STORAGE_FLOAT16)
__device__ __forceinline__ S widen(__half x) { return __half2float(x); }
__device__ __forceinline__ void narrow(__half* out, S x) { *out = __float2half_rn(x); }
#endif

// VEC neighbouring elements, loaded and stored as one.
template <typename E>
struct alignas(VEC * sizeof(E) > 16 ? 16 : VEC * sizeof(E)) Pack {
    E v[VEC];
};

template <typename E>
__device__ __forceinline__ Pack<E> load(const E* p) {
    return *reinterpret_cast<const Pack<E>*>(p);
}

template <typename E>
__device__ __forceinline__ void store(E* p, const Pack<E>& pack) {
    *reinterpret_cast<Pack<E>*>(p) = pack;
}

#if defined(STORAGE_FLOAT64)
#define M(name) name
#else
#define M(name) name##f
#endif

// Of a and a bound b; a NaN in a stays one, as in numpy.maximum, so that a diverged run is seen.
__device__ __forceinline__ S smax(S a, S b) { return a < b ? b : a; }
__device__ __forceinline__ S smin(S a, S b) { return b < a ? b : a; }
__device__ __forceinline__ S sign(S x) { return S(x > S(0)) - S(x < S(0)); }

// The state of ops/interface.py, an array of doubles: what stands where.
enum Slot {
    LEARNING_RATE, STEP, ROUND, LOSS_SCALE, GOOD_STEPS, TOTAL_WEIGHT, COST, GRADIENT_NORM, EPOCH_COST, SKIPPED, BAD_ROUND,
    CURSOR
};

// Whether a step's gradient may be applied: nothing was out of the finite numbers, in this step or before it.
__device__ __forceinline__ bool applies(const double* state) {
    return isfinite(state[COST]) && isfinite(state[GRADIENT_NORM]) && state[BAD_ROUND] == 0;
}
