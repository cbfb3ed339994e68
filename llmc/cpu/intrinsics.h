// Atomics, cache hints, bit casts and the fast maths functions. The compilers see through all of them, so a
// kernel's inner loop vectorizes as a plain C++ loop would.
#pragma once
#include <atomic>
#include <bit>
#include <cmath>
#include <cstdint>
#include <type_traits>

#include "types.h"

// ---------------------------------------------------------------- atomics

// Compiler built-ins, not std::atomic_ref: behind its function parameters the memory order is no constant
// when nothing is inlined, and then g++ hides the access from the race checker.
namespace cuda_cpu {
// Replaces *p by f(*p) and returns what it was.
template <class T, class F>
T atomic_update(T* p, F f) {
    static_assert(sizeof(T) == 4 || sizeof(T) == 8);
    typedef std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t> Bits __attribute__((may_alias));
    Bits* target = reinterpret_cast<Bits*>(p);
    Bits old = __atomic_load_n(target, __ATOMIC_RELAXED), wanted;
    do wanted = std::bit_cast<Bits>(f(std::bit_cast<T>(old)));
    while (!__atomic_compare_exchange_n(target, &old, wanted, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
    return std::bit_cast<T>(old);
}
}  // namespace cuda_cpu

template <class T>
T atomicAdd(T* p, cuda_cpu::Same<T> v) {
    if constexpr (std::is_integral_v<T>)
        return __atomic_fetch_add(p, v, __ATOMIC_RELAXED);
    else
        return cuda_cpu::atomic_update(p, [v](T old) { return old + v; });
}
template <class T>
T atomicMin(T* p, cuda_cpu::Same<T> v) {
    static_assert(std::is_integral_v<T>);  // CUDA has none for float
    return cuda_cpu::atomic_update(p, [v](T old) { return v < old ? v : old; });
}
template <class T>
T atomicMax(T* p, cuda_cpu::Same<T> v) {
    static_assert(std::is_integral_v<T>);
    return cuda_cpu::atomic_update(p, [v](T old) { return old < v ? v : old; });
}
template <class T>
T atomicAnd(T* p, cuda_cpu::Same<T> v) {
    return __atomic_fetch_and(p, v, __ATOMIC_RELAXED);
}
template <class T>
T atomicOr(T* p, cuda_cpu::Same<T> v) {
    return __atomic_fetch_or(p, v, __ATOMIC_RELAXED);
}
inline unsigned atomicInc(unsigned* p, unsigned limit) {
    return cuda_cpu::atomic_update(p, [limit](unsigned old) { return old >= limit ? 0u : old + 1; });
}
template <class T>
T atomicExch(T* p, cuda_cpu::Same<T> v) {
    return cuda_cpu::atomic_update(p, [v](T) { return v; });
}
template <class T>
T atomicCAS(T* p, cuda_cpu::Same<T> expected, cuda_cpu::Same<T> v) {
    __atomic_compare_exchange_n(p, &expected, v, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);
    return expected;  // what was there: the built-in stores it when it fails
}
inline void __threadfence() {
    std::atomic_thread_fence(std::memory_order_seq_cst);
}

// ---------------------------------------------------------------- cache hints

template <class T>
T __ldcg(const T* p) {
    return *p;
}
template <class T>
void __stcg(T* p, cuda_cpu::Same<T> v) {
    *p = v;
}

// ---------------------------------------------------------------- bits

inline int __float_as_int(float x) {
    return std::bit_cast<int>(x);
}
inline unsigned __float_as_uint(float x) {
    return std::bit_cast<unsigned>(x);
}
inline float __int_as_float(int x) {
    return std::bit_cast<float>(x);
}
inline float __uint_as_float(unsigned x) {
    return std::bit_cast<float>(x);
}
inline int __popc(unsigned x) {
    return std::popcount(x);
}
inline int __clz(int x) {
    return std::countl_zero(static_cast<unsigned>(x));
}
inline int __ffs(int x) {
    return __builtin_ffs(x);
}
inline unsigned __brev(unsigned x) {
    x = (x >> 1 & 0x55555555u) | (x & 0x55555555u) << 1;
    x = (x >> 2 & 0x33333333u) | (x & 0x33333333u) << 2;
    x = (x >> 4 & 0x0f0f0f0fu) | (x & 0x0f0f0f0fu) << 4;
    return __builtin_bswap32(x);
}
inline unsigned __umulhi(unsigned a, unsigned b) {
    return static_cast<unsigned>(uint64_t{a} * b >> 32);
}

// ---------------------------------------------------------------- maths

using std::isfinite;
using std::isinf;
using std::isnan;

namespace cuda_cpu {
// fmaxf and fminf are one instruction on a GPU, and kernels use them freely; here they would be calls into
// libm. Of a number and a NaN the number is the result.
inline float max_number(float a, float b) {
    return a < b || a != a ? b : a;
}
inline float min_number(float a, float b) {
    return b < a || a != a ? b : a;
}
}  // namespace cuda_cpu
#define fmaxf(a, b) ::cuda_cpu::max_number(a, b)
#define fminf(a, b) ::cuda_cpu::min_number(a, b)

template <class T, class U>
constexpr std::common_type_t<T, U> max(T a, U b) {
    if constexpr (std::is_floating_point_v<std::common_type_t<T, U>>) {
        return a < b || a != a ? b : a;
    } else {
        using C = std::common_type_t<T, U>;
        return static_cast<C>(a) < static_cast<C>(b) ? static_cast<C>(b) : static_cast<C>(a);
    }
}
template <class T, class U>
constexpr std::common_type_t<T, U> min(T a, U b) {
    if constexpr (std::is_floating_point_v<std::common_type_t<T, U>>) {
        return b < a || a != a ? b : a;
    } else {
        using C = std::common_type_t<T, U>;
        return static_cast<C>(b) < static_cast<C>(a) ? static_cast<C>(b) : static_cast<C>(a);
    }
}

// e^x within 1.02 ulp (measured on all floats), without a branch or a call, so that loops around it
// vectorize. x = n ln 2 + r with |r| <= ln 2 / 2; e^r is a polynomial (coefficients: Cephes expf), and 2^n is
// made from its exponent bits in two halves, because 2^128 and 2^-150 are not floats while the results near
// them are.
inline float __expf(float x) {
    constexpr float kMagic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, in the low bits
    x = x < -104.0f ? -104.0f : x;         // rounds to 0; written so that a NaN passes
    x = x > 89.0f ? 89.0f : x;             // rounds to infinity
    float shifted = x * 1.44269504f + kMagic;
    float n = shifted - kMagic;
    float r = x - n * 0.693359375f;  // few bits: exact
    r = r - n * -2.12194440e-4f;     // the rest of ln 2
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;
    int exponent = std::bit_cast<int>(shifted) - std::bit_cast<int>(kMagic);
    int half = exponent >> 1;
    float scale1 = std::bit_cast<float>(static_cast<unsigned>(half + 127) << 23);
    float scale2 = std::bit_cast<float>(static_cast<unsigned>(exponent - half + 127) << 23);
    return p * scale1 * scale2;
}
inline float rsqrtf(float x) {
    return 1.0f / sqrtf(x);
}

// ---------------------------------------------------------------- vectors

// For inner loops that kernels write in the processor's vectors here.
#ifdef __aarch64__
#include <arm_neon.h>
#endif

namespace cuda_cpu {
template <int N>
struct Floats {
    typedef float Vector __attribute__((vector_size(N * sizeof(float))));
};

// a b + c in each lane, rounded once, as the same chain of fmaf is elsewhere. By itself g++ contracts such a
// sum too, but not at every level of optimization. Where the processor has no such instruction for N lanes
// that is what is left; and where it has none at all, no sum is bit for bit that of fmaf.
template <int N>
[[gnu::always_inline]] inline typename Floats<N>::Vector fma_lanes(typename Floats<N>::Vector a,
                                                                   typename Floats<N>::Vector b,
                                                                   typename Floats<N>::Vector c) {
#ifdef __AVX512F__
    if constexpr (N == 16)
        return __builtin_ia32_vfmaddps512_mask(a, b, c, -1, 4);  // rounded as the mode says
#endif
#ifdef __FMA__
    if constexpr (N == 8) return __builtin_ia32_vfmaddps256(a, b, c);
    if constexpr (N == 4) return __builtin_ia32_vfmaddps(a, b, c);
#endif
#ifdef __aarch64__
    if constexpr (N == 4) return vfmaq_f32(c, a, b);
#endif
    return a * b + c;
}
}  // namespace cuda_cpu
