// __nv_bfloat16: the upper half of a float. As in CUDA's header, arithmetic on two of them rounds each result
// to bf16; kernels that want better convert to float first.
#pragma once
#include <bit>
#include <cstdint>

#include "types.h"

struct __nv_bfloat16 {
    uint16_t bits;

    __nv_bfloat16() = default;
    // Round to nearest, ties to even: adding 0x7fff carries into the upper half if the lower is above half,
    // and adding the upper half's lowest bit makes that "or exactly half, and odd". Any NaN becomes 0x7fff.
    __nv_bfloat16(float x) {
        uint32_t b = std::bit_cast<uint32_t>(x);
        uint32_t rounded = (b + 0x7fff + (b >> 16 & 1)) >> 16;
        bits = static_cast<uint16_t>((b & 0x7fffffff) > 0x7f800000 ? 0x7fff : rounded);
    }
    operator float() const { return std::bit_cast<float>(static_cast<uint32_t>(bits) << 16); }

    __nv_bfloat16& operator+=(__nv_bfloat16 o) { return *this = float(*this) + float(o); }
    __nv_bfloat16& operator-=(__nv_bfloat16 o) { return *this = float(*this) - float(o); }
    __nv_bfloat16& operator*=(__nv_bfloat16 o) { return *this = float(*this) * float(o); }
    __nv_bfloat16& operator/=(__nv_bfloat16 o) { return *this = float(*this) / float(o); }
};
typedef __nv_bfloat16 nv_bfloat16;

inline __nv_bfloat16 operator+(__nv_bfloat16 a, __nv_bfloat16 b) {
    return a += b;
}
inline __nv_bfloat16 operator-(__nv_bfloat16 a, __nv_bfloat16 b) {
    return a -= b;
}
inline __nv_bfloat16 operator*(__nv_bfloat16 a, __nv_bfloat16 b) {
    return a *= b;
}
inline __nv_bfloat16 operator/(__nv_bfloat16 a, __nv_bfloat16 b) {
    return a /= b;
}
inline __nv_bfloat16 operator-(__nv_bfloat16 a) {
    return -float(a);
}

struct alignas(4) __nv_bfloat162 {
    __nv_bfloat16 x, y;
};
typedef __nv_bfloat162 nv_bfloat162;

inline __nv_bfloat16 __float2bfloat16(float x) {
    return x;
}
inline __nv_bfloat16 __float2bfloat16_rn(float x) {
    return x;
}
inline float __bfloat162float(__nv_bfloat16 x) {
    return x;
}
inline unsigned short __bfloat16_as_ushort(__nv_bfloat16 x) {
    return x.bits;
}
inline __nv_bfloat16 __ushort_as_bfloat16(unsigned short x) {
    return std::bit_cast<__nv_bfloat16>(x);
}
inline __nv_bfloat162 __halves2bfloat162(__nv_bfloat16 x, __nv_bfloat16 y) {
    return {x, y};
}
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) {
    return {x, y};
}
inline float2 __bfloat1622float2(__nv_bfloat162 v) {
    return {v.x, v.y};
}
inline float __low2float(__nv_bfloat162 v) {
    return v.x;
}
inline float __high2float(__nv_bfloat162 v) {
    return v.y;
}
