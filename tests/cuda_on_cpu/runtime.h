// What CUDA C++ kernel text needs in order to compile with g++: the words of the language (__global__, __shared__,
// threadIdx, __syncthreads, shuffles, atomics) and the device functions that <math.h> does not have.
//
// `compiler.py` puts this file in front of the kernel text with -include, so the text itself stays as NVRTC takes it;
// the macro CUDA_ON_CPU tells the two apart where a kernel must. __CUDA_ARCH__ is not defined. Vector types, __half and
// __nv_bfloat16 are CUDA's own headers. What is declared in namespace emu is defined in `runtime.cpp`.
//
// The text is compiled with -fsanitize=thread, which calls a function of ours before every load and store, and with
// parts of -fsanitize=undefined; no sanitizer library is linked, `runtime.cpp` has the functions that they call.
//
// Left out on purpose: atomics on floating-point numbers (the order of the sum would change from run to run), dynamic
// shared memory, textures, cooperative groups, inline PTX.

#pragma once

#define CUDA_ON_CPU 1

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>

#include <cstring>
#include <type_traits>
#include <utility>

#include "vector_functions.h"
#include "vector_types.h"

// --- the words of the language ---

#undef __global__
#undef __device__
#undef __host__
#undef __shared__
#undef __constant__
#undef __managed__
#undef __launch_bounds__
#undef __grid_constant__
#undef __noinline__
// A kernel stays a function of its own, so that its accesses are not taken for its caller's. The bounds are read by
// `compiler.py`. All shared arrays of a module together become its thread-local block: one block of the grid runs at a
// time, and the address and the size of the thread-local block are there to be asked for.
#define __global__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __shared__ static thread_local
#define __device__
#define __host__
#define __constant__ const
#define __grid_constant__
#define __noinline__ __attribute__((noinline))

extern const uint3 threadIdx __asm__("emu_thread_index");
extern const uint3 blockIdx __asm__("emu_block_index");
extern const dim3 blockDim __asm__("emu_block_size");
extern const dim3 gridDim __asm__("emu_grid_size");
static const int warpSize = 32;

// --- barriers, shuffles, votes ---

namespace emu {

enum ShuffleKind { INDEX, UP, DOWN, XOR };
enum AtomicKind { ADD, SUB, MIN, MAX, AND, OR, EXCHANGE, INCREMENT, DECREMENT, COMPARE_AND_SWAP, BIT_XOR };

extern "C" {
void emu_block_barrier(int line);
int emu_block_vote(int line, int predicate, int kind);  // kind 0: count, 1: and, 2: or
void emu_warp_barrier(unsigned mask, int line);
uint64_t emu_shuffle(unsigned mask, uint64_t bits, int operand, int width, int kind, int line);
unsigned emu_ballot(unsigned mask, int predicate, int line);
void emu_fence(void);
uint64_t emu_atomic(void* address, int size, int is_signed, int kind, uint64_t operand, uint64_t compare);
[[noreturn]] void emu_stop(const char* why, int line);
void* emu_memcpy(void* to, const void* from, size_t n);
void* emu_memmove(void* to, const void* from, size_t n);
void* emu_memset(void* to, int value, size_t n);
}

template <class T>
uint64_t bits_of(T value) {
    static_assert(sizeof(T) <= 8 && std::is_trivially_copyable<T>::value, "a shuffle moves 1 to 8 bytes");
    uint64_t bits = 0;
    __builtin_memcpy(&bits, &value, sizeof(T));
    return bits;
}

template <class T>
T from_bits(uint64_t bits) {
    T value;
    __builtin_memcpy(static_cast<void*>(&value), &bits, sizeof(T));
    return value;
}

template <class T>
T shuffle(unsigned mask, T value, int operand, int width, ShuffleKind kind, int line) {
    return from_bits<T>(emu_shuffle(mask, bits_of(value), operand, width, kind, line));
}

inline __attribute__((always_inline)) int width_of(int width = 32) { return width; }

template <class T>
T atomic(T* address, AtomicKind kind, T operand, T compare = T()) {
    return from_bits<T>(emu_atomic(const_cast<std::remove_cv_t<T>*>(address), sizeof(T), std::is_signed<T>::value, kind,
                                   bits_of(operand), bits_of(compare)));
}

}  // namespace emu

#define __syncthreads() emu::emu_block_barrier(__LINE__)
#define __syncthreads_count(predicate) emu::emu_block_vote(__LINE__, predicate, 0)
#define __syncthreads_and(predicate) emu::emu_block_vote(__LINE__, predicate, 1)
#define __syncthreads_or(predicate) emu::emu_block_vote(__LINE__, predicate, 2)
#define EMU_FIRST(first, ...) first
#define __syncwarp(...) emu::emu_warp_barrier(EMU_FIRST(__VA_ARGS__ __VA_OPT__(, ) 0xffffffffu), __LINE__)
#define __shfl_sync(mask, value, lane, ...) \
    emu::shuffle(mask, value, lane, emu::width_of(__VA_ARGS__), emu::INDEX, __LINE__)
#define __shfl_up_sync(mask, value, delta, ...) \
    emu::shuffle(mask, value, delta, emu::width_of(__VA_ARGS__), emu::UP, __LINE__)
#define __shfl_down_sync(mask, value, delta, ...) \
    emu::shuffle(mask, value, delta, emu::width_of(__VA_ARGS__), emu::DOWN, __LINE__)
#define __shfl_xor_sync(mask, value, bits, ...) \
    emu::shuffle(mask, value, bits, emu::width_of(__VA_ARGS__), emu::XOR, __LINE__)
#define __ballot_sync(mask, predicate) emu::emu_ballot(mask, predicate, __LINE__)
#define __any_sync(mask, predicate) (emu::emu_ballot(mask, predicate, __LINE__) != 0)
#define __all_sync(mask, predicate) (emu::emu_ballot(mask, !(predicate), __LINE__) == 0)
#define __threadfence() emu::emu_fence()
#define __threadfence_block() ((void)0)
#define __builtin_assume(condition) ((void)0)
#define __trap() emu::emu_stop("__trap()", __LINE__)
#undef assert
#define assert(condition) ((condition) ? (void)0 : emu::emu_stop("assert(" #condition ")", __LINE__))

// --- atomics, on integers ---

#define EMU_ATOMIC(name, kind)                                                                        \
    inline int name(int* p, int v) { return emu::atomic(p, emu::kind, v); }                           \
    inline unsigned name(unsigned* p, unsigned v) { return emu::atomic(p, emu::kind, v); }            \
    inline unsigned long long name(unsigned long long* p, unsigned long long v) {                     \
        return emu::atomic(p, emu::kind, v);                                                          \
    }
EMU_ATOMIC(atomicAdd, ADD)
EMU_ATOMIC(atomicExch, EXCHANGE)
EMU_ATOMIC(atomicMin, MIN)
EMU_ATOMIC(atomicMax, MAX)
EMU_ATOMIC(atomicAnd, AND)
EMU_ATOMIC(atomicOr, OR)
EMU_ATOMIC(atomicXor, BIT_XOR)
#undef EMU_ATOMIC
inline long long atomicMin(long long* p, long long v) { return emu::atomic(p, emu::MIN, v); }
inline long long atomicMax(long long* p, long long v) { return emu::atomic(p, emu::MAX, v); }
inline int atomicSub(int* p, int v) { return emu::atomic(p, emu::SUB, v); }
inline unsigned atomicSub(unsigned* p, unsigned v) { return emu::atomic(p, emu::SUB, v); }
inline unsigned atomicInc(unsigned* p, unsigned limit) { return emu::atomic(p, emu::INCREMENT, limit); }
inline unsigned atomicDec(unsigned* p, unsigned limit) { return emu::atomic(p, emu::DECREMENT, limit); }
inline int atomicCAS(int* p, int old, int v) { return emu::atomic(p, emu::COMPARE_AND_SWAP, v, old); }
inline unsigned atomicCAS(unsigned* p, unsigned old, unsigned v) {
    return emu::atomic(p, emu::COMPARE_AND_SWAP, v, old);
}
inline unsigned long long atomicCAS(unsigned long long* p, unsigned long long old, unsigned long long v) {
    return emu::atomic(p, emu::COMPARE_AND_SWAP, v, old);
}
float atomicAdd(float*, float) = delete;  // sums in no fixed order: not the same bits every run
double atomicAdd(double*, double) = delete;

// --- loads and stores with a cache hint ---

template <class T>
T __ldg(const T* p) { return *p; }
template <class T>
T __ldcs(const T* p) { return *p; }
template <class T>
T __ldcg(const T* p) { return *p; }
template <class T>
T __ldca(const T* p) { return *p; }
template <class T>
void __stcs(T* p, T value) { *p = value; }
template <class T>
void __stcg(T* p, T value) { *p = value; }
template <class T>
void __stwb(T* p, T value) { *p = value; }

// --- integers ---

inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>((uint64_t{a} * b) >> 32); }
inline int __mulhi(int a, int b) { return static_cast<int>((int64_t{a} * b) >> 32); }
inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
    return static_cast<unsigned long long>((static_cast<unsigned __int128>(a) * b) >> 64);
}
inline long long __mul64hi(long long a, long long b) {
    return static_cast<long long>((static_cast<__int128>(a) * b) >> 64);
}
inline int __popc(unsigned a) { return __builtin_popcount(a); }
inline int __popcll(unsigned long long a) { return __builtin_popcountll(a); }
inline int __clz(int a) { return a == 0 ? 32 : __builtin_clz(static_cast<unsigned>(a)); }
inline int __clzll(long long a) { return a == 0 ? 64 : __builtin_clzll(static_cast<unsigned long long>(a)); }
inline int __ffs(int a) { return __builtin_ffs(a); }
inline int __ffsll(long long a) { return __builtin_ffsll(a); }
inline unsigned __brev(unsigned a) {
    unsigned reversed = 0;
    for (int i = 0; i < 32; ++i) reversed |= ((a >> i) & 1u) << (31 - i);
    return reversed;
}
inline unsigned __funnelshift_l(unsigned low, unsigned high, unsigned shift) {
    return static_cast<unsigned>(((uint64_t{high} << 32 | low) << (shift & 31)) >> 32);
}
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned shift) {
    return static_cast<unsigned>((uint64_t{high} << 32 | low) >> (shift & 31));
}

// --- min and max of two types, by C++'s usual conversions; a NaN loses, as in fminf ---

template <class A, class B>
using emu_arithmetic = std::enable_if_t<std::is_arithmetic<A>::value && std::is_arithmetic<B>::value,
                                        decltype(std::declval<A>() + std::declval<B>())>;
template <class A, class B>
emu_arithmetic<A, B> min(A a, B b) {
    using T = emu_arithmetic<A, B>;
    if constexpr (std::is_floating_point<T>::value) return fmin(static_cast<T>(a), static_cast<T>(b));
    else return static_cast<T>(a) < static_cast<T>(b) ? static_cast<T>(a) : static_cast<T>(b);
}
template <class A, class B>
emu_arithmetic<A, B> max(A a, B b) {
    using T = emu_arithmetic<A, B>;
    if constexpr (std::is_floating_point<T>::value) return fmax(static_cast<T>(a), static_cast<T>(b));
    else return static_cast<T>(a) > static_cast<T>(b) ? static_cast<T>(a) : static_cast<T>(b);
}

// --- bits of floating-point numbers ---

inline int __float_as_int(float a) { return emu::from_bits<int>(emu::bits_of(a)); }
inline unsigned __float_as_uint(float a) { return emu::from_bits<unsigned>(emu::bits_of(a)); }
inline float __int_as_float(int a) { return emu::from_bits<float>(emu::bits_of(a)); }
inline float __uint_as_float(unsigned a) { return emu::from_bits<float>(emu::bits_of(a)); }
inline long long __double_as_longlong(double a) { return emu::from_bits<long long>(emu::bits_of(a)); }
inline double __longlong_as_double(long long a) { return emu::from_bits<double>(emu::bits_of(a)); }

// --- floating point; the fast intrinsics are computed accurately here, only a GPU has their errors ---

inline float rsqrtf(float a) { return static_cast<float>(1.0 / sqrt(static_cast<double>(a))); }
inline double rsqrt(double a) { return 1.0 / sqrt(a); }
inline float rsqrt(float a) { return rsqrtf(a); }
inline float rcbrtf(float a) { return 1.0f / cbrtf(a); }
inline double rcbrt(double a) { return 1.0 / cbrt(a); }
inline double sinpi(double a) { return sin(M_PI * fmod(a, 2.0)); }
inline double cospi(double a) { return cos(M_PI * fmod(a, 2.0)); }
inline float sinpif(float a) { return static_cast<float>(sinpi(a)); }
inline float cospif(float a) { return static_cast<float>(cospi(a)); }
inline double normcdf(double a) { return 0.5 * erfc(-a * M_SQRT1_2); }
inline float normcdff(float a) { return static_cast<float>(normcdf(a)); }
inline float __saturatef(float a) { return fminf(fmaxf(a, 0.0f), 1.0f); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __expf(float a) { return expf(a); }
inline float __exp10f(float a) { return exp10f(a); }
inline float __logf(float a) { return logf(a); }
inline float __log2f(float a) { return log2f(a); }
inline float __log10f(float a) { return log10f(a); }
inline float __powf(float a, float b) { return powf(a, b); }
inline float __sinf(float a) { return sinf(a); }
inline float __cosf(float a) { return cosf(a); }
inline float __tanf(float a) { return tanf(a); }
inline float __tanhf(float a) { return tanhf(a); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __frcp_rn(float a) { return 1.0f / a; }
inline float __fsqrt_rn(float a) { return sqrtf(a); }
inline float __frsqrt_rn(float a) { return rsqrtf(a); }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline double __dadd_rn(double a, double b) { return a + b; }
inline double __dsub_rn(double a, double b) { return a - b; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline double __ddiv_rn(double a, double b) { return a / b; }
inline double __drcp_rn(double a) { return 1.0 / a; }
inline double __dsqrt_rn(double a) { return sqrt(a); }
inline double __fma_rn(double a, double b, double c) { return fma(a, b, c); }
inline float __double2float_rn(double a) { return static_cast<float>(a); }
inline float __int2float_rn(int a) { return static_cast<float>(a); }
inline float __uint2float_rn(unsigned a) { return static_cast<float>(a); }
inline float __ll2float_rn(long long a) { return static_cast<float>(a); }
inline float __ull2float_rn(unsigned long long a) { return static_cast<float>(a); }
inline double __int2double_rn(int a) { return a; }
inline double __uint2double_rn(unsigned a) { return a; }
inline double __ll2double_rn(long long a) { return static_cast<double>(a); }
inline double __ull2double_rn(unsigned long long a) { return static_cast<double>(a); }
inline int __float2int_rn(float a) { return static_cast<int>(rintf(a)); }
inline int __float2int_rd(float a) { return static_cast<int>(floorf(a)); }
inline int __float2int_rz(float a) { return static_cast<int>(a); }
inline unsigned __float2uint_rn(float a) { return static_cast<unsigned>(rintf(a)); }

// --- the table of a module's kernels, which `compiler.py` reads ---

struct __half;
struct __half2;
struct __nv_bfloat16;
struct __nv_bfloat162;

namespace emu {

// What a C type is made of: a letter (f float, h half, b bfloat16, i and u integers, ? bool, c plain bytes, v void,
// s struct) and how many of it.
template <class T>
struct Shape {
    static constexpr char letter = std::is_floating_point<T>::value ? 'f'
                                   : std::is_same<T, bool>::value   ? '?'
                                   : std::is_integral<T>::value     ? (std::is_signed<T>::value ? 'i' : 'u')
                                                                    : 's';
    static constexpr int lanes = 1;
};
template <char LETTER, int LANES>
struct ShapeOf {
    static constexpr char letter = LETTER;
    static constexpr int lanes = LANES;
};
template <> struct Shape<void> : ShapeOf<'v', 1> {};
template <> struct Shape<char> : ShapeOf<'c', 1> {};
template <> struct Shape<__half> : ShapeOf<'h', 1> {};
template <> struct Shape<__half2> : ShapeOf<'h', 2> {};
template <> struct Shape<__nv_bfloat16> : ShapeOf<'b', 1> {};
template <> struct Shape<__nv_bfloat162> : ShapeOf<'b', 2> {};
template <> struct Shape<float2> : ShapeOf<'f', 2> {};
template <> struct Shape<float4> : ShapeOf<'f', 4> {};
template <> struct Shape<double2> : ShapeOf<'f', 2> {};
template <> struct Shape<int2> : ShapeOf<'i', 2> {};
template <> struct Shape<int4> : ShapeOf<'i', 4> {};
template <> struct Shape<uint2> : ShapeOf<'u', 2> {};
template <> struct Shape<uint4> : ShapeOf<'u', 4> {};
template <> struct Shape<longlong2> : ShapeOf<'i', 2> {};
template <> struct Shape<ulonglong2> : ShapeOf<'u', 2> {};

template <class T>
constexpr int size_of() {
    if constexpr (std::is_void<T>::value) return 1;
    else return sizeof(T);
}

struct Parameter {
    int is_pointer;
    int is_const;  // of what it points to
    int letter;
    int lanes;
    int size;  // of the parameter, or of what it points to
};

template <class T>
constexpr Parameter parameter() {
    using Pointee = std::remove_pointer_t<T>;
    using Plain = std::remove_cv_t<Pointee>;
    return {std::is_pointer<T>::value, std::is_const<Pointee>::value, Shape<Plain>::letter, Shape<Plain>::lanes,
            size_of<Plain>()};
}

struct Kernel {
    const char* name;
    void (*invoke)(void**);
    const Parameter* parameters;
    int n_parameters;
    int max_threads;  // of __launch_bounds__, or 0
};

constexpr int first_bound(int max_threads = 0, int = 0, int = 0) { return max_threads; }

template <auto* kernel>
struct Entry;
template <class... Ts, void (*kernel)(Ts...)>
struct Entry<kernel> {
    static constexpr Parameter parameters[sizeof...(Ts) + 1] = {parameter<Ts>()..., {}};

    template <size_t... I>
    __attribute__((no_sanitize("thread", "undefined"))) static void call(void** arguments, std::index_sequence<I...>) {
        kernel(*static_cast<std::remove_reference_t<Ts>*>(arguments[I])...);
    }
    __attribute__((no_sanitize("thread", "undefined"))) static void invoke(void** arguments) {
        call(arguments, std::index_sequence_for<Ts...>());
    }
    static constexpr Kernel describe(const char* name, int max_threads) {
        return {name, invoke, parameters, sizeof...(Ts), max_threads};
    }
};

}  // namespace emu
