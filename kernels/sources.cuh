// 16-bit floats as a data set holds them where the network stores another type. From their bits: cuda_fp16.h would take
// longer to compile than all the rest.

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
