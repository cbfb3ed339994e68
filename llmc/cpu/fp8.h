// FP8 as CUDA's cuda_fp8.h has it: bytes, and conversions that round to nearest, ties to even.
#pragma once
#include <bit>
#include <cmath>
#include <cstdint>

#include "types.h"

typedef uint8_t __nv_fp8_storage_t;
typedef uint16_t __nv_fp8x2_storage_t;
enum __nv_saturation_t { __NV_NOSAT, __NV_SATFINITE };
enum __nv_fp8_interpretation_t { __NV_E4M3, __NV_E5M2 };

namespace cuda_cpu {
// E4M3 has no infinity: its largest number takes the place of all exponents' ones but the NaN, 0x7f.
struct Fp8Format {
    int mantissa_bits, bias;
    uint8_t largest, infinity;
};
constexpr Fp8Format fp8_format(__nv_fp8_interpretation_t format) {
    return format == __NV_E4M3 ? Fp8Format{3, 7, 0x7e, 0x7f} : Fp8Format{2, 15, 0x7b, 0x7c};
}
inline float fp8_to_float(uint8_t code, __nv_fp8_interpretation_t format) {
    const Fp8Format f = fp8_format(format);
    const int magnitude = code & 0x7f, exponent = magnitude >> f.mantissa_bits;
    const int mantissa = magnitude & ((1 << f.mantissa_bits) - 1);
    float x;
    if (magnitude > f.largest)
        x = magnitude == f.infinity && format == __NV_E5M2 ? INFINITY : NAN;
    else if (exponent == 0)
        x = std::ldexp((float)mantissa, 1 - f.bias - f.mantissa_bits);
    else
        x = std::ldexp((float)(mantissa + (1 << f.mantissa_bits)), exponent - f.bias - f.mantissa_bits);
    return code & 0x80 ? -x : x;
}
}  // namespace cuda_cpu

inline __nv_fp8_storage_t __nv_cvt_float_to_fp8(float x, __nv_saturation_t saturation,
                                                __nv_fp8_interpretation_t format) {
    const cuda_cpu::Fp8Format f = cuda_cpu::fp8_format(format);
    const uint32_t bits = std::bit_cast<uint32_t>(x);
    const uint8_t sign = (uint8_t)(bits >> 24 & 0x80);
    const float magnitude = std::fabs(x);
    if (std::isnan(x)) return 0x7f;
    // In units of the last place, which below the smallest normal number is that number's; rounding up to the
    // next power of two carries into the exponent by itself.
    int exponent = (int)(bits >> 23 & 0xff) - 127;
    if (exponent < 1 - f.bias) exponent = 1 - f.bias;
    const float units = magnitude * std::bit_cast<float>((f.mantissa_bits - exponent + 127) << 23);
    const float places = (float)((exponent + f.bias - 1) << f.mantissa_bits) + std::nearbyint(units);
    if (places > (float)f.largest) return sign | (saturation == __NV_SATFINITE ? f.largest : f.infinity);
    return sign | (uint8_t)places;
}
inline __nv_fp8x2_storage_t __nv_cvt_float2_to_fp8x2(float2 x, __nv_saturation_t saturation,
                                                     __nv_fp8_interpretation_t format) {
    return (uint16_t)(__nv_cvt_float_to_fp8(x.x, saturation, format) |
                      __nv_cvt_float_to_fp8(x.y, saturation, format) << 8);
}
