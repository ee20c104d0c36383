// Numbers in and out of memory. Everything is in an unnamed namespace: each translation unit is compiled for its own
// instruction set, and the linker must not merge two copies of one function.
#pragma once

#include <cstdint>
#include <cstring>

#include "kernel.h"

namespace gqsa::cpu {
namespace {

inline float as_float(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

inline uint32_t as_bits(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}

inline float from_bfloat16(uint16_t half) { return as_float(uint32_t{half} << 16); }

inline uint16_t to_bfloat16(float value) {  // to nearest even
    const uint32_t bits = as_bits(value);
    const uint32_t rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
    return static_cast<uint16_t>(value == value ? rounded : (bits >> 16 | 0x40));
}

inline float from_float16(uint16_t half) {
    const uint32_t sign = (half & 0x8000u) << 16, exponent = half >> 10 & 31, mantissa = half & 0x3FF;
    const float subnormal = static_cast<float>(mantissa) * 0x1p-24f;
    const uint32_t bits = exponent == 31 ? 0x7F800000 | mantissa << 13 : (exponent + 112) << 23 | mantissa << 13;
    return as_float(sign | (exponent == 0 ? as_bits(subnormal) : bits));
}

inline uint16_t to_float16(float value) {  // to nearest even
    const uint32_t bits = as_bits(value), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7FFFFFFF;
    // Adding 0.5 puts the rounding of a subnormal half into the hardware's addition.
    const uint32_t small = as_bits(as_float(magnitude) + 0.5f) - 0x3F000000;
    const uint32_t normal = (magnitude - 0x38000000 + 0xFFF + (magnitude >> 13 & 1)) >> 13;
    const uint32_t infinite = magnitude > 0x7F800000 ? 0x7E00 : 0x7C00;
    const uint32_t half = magnitude >= 0x477FF000 ? infinite : magnitude < 0x38800000 ? small : normal;
    return static_cast<uint16_t>(sign | half);
}

inline float scale_of(uint16_t scale_zero) { return from_float16((scale_zero & 0xFFF0) >> 1); }

inline float load(const void* data, Dtype dtype, int64_t at) {
    switch (dtype) {
        case Dtype::bfloat16: return from_bfloat16(static_cast<const uint16_t*>(data)[at]);
        case Dtype::float16: return from_float16(static_cast<const uint16_t*>(data)[at]);
        default: return static_cast<const float*>(data)[at];
    }
}

inline void store(void* data, Dtype dtype, int64_t at, float value) {
    switch (dtype) {
        case Dtype::bfloat16: static_cast<uint16_t*>(data)[at] = to_bfloat16(value); break;
        case Dtype::float16: static_cast<uint16_t*>(data)[at] = to_float16(value); break;
        default: static_cast<float*>(data)[at] = value;
    }
}

inline void store_sum(const Call& call, int64_t row, int64_t token, float sum) {
    if (call.bias) sum += load(call.bias, call.dtype, row);
    store(call.y, call.dtype, token * call.y_stride + row, sum);
}

}  // namespace
}  // namespace gqsa::cpu
