// The type bfloat16 and its conversions, in front of types.cuh where T is it. cuda_bf16.h is not everywhere, and this is all
// it takes.

struct alignas(2) BFloat16 {  // the upper half of a float
    unsigned short bits;
};

__device__ __forceinline__ float widen(BFloat16 x) { return __uint_as_float((unsigned int)x.bits << 16); }
__device__ __forceinline__ void narrow(BFloat16* out, float x) {  // to nearest, ties to even; NaN stays NaN
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(out->bits) : "f"(x));
#else
    unsigned int u = __float_as_uint(x);
    out->bits = x != x ? 0x7FFF : (unsigned short)((u + 0x7FFF + ((u >> 16) & 1)) >> 16);
#endif
}
