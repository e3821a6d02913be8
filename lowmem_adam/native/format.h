// The constants of the 8-bit format, as codec.FORMAT has them: kernels/cpu.py compares the two when it loads the library.
#ifndef LOWMEM_ADAM_FORMAT_H
#define LOWMEM_ADAM_FORMAT_H

#include "lowmem_adam.h"

// A call on the way of every element would pass its vectors through memory.
#define LOWMEM_ADAM_INLINE inline __attribute__((always_inline))

namespace {

constexpr int kBlockSize = 128;
constexpr int kFlatBlockSize = 256;  // of bitsandbytes' format, and of all moments beside it: layout.FLAT_BLOCK_SIZE

constexpr struct lowmem_adam_format kFormat = {
    /*fragment_bytes*/ sizeof(struct lowmem_adam_fragment),
    /*scalars_bytes*/ sizeof(struct lowmem_adam_scalars),
    /*version*/ 2,
    /*block_size*/ kBlockSize,
    /*root_intervals*/ 254,
    /*max_octaves*/ 24,
    /*octave_bits*/ 5,
    /*ratio_scale*/ 143,
    /*ratio_limit*/ 127,
    /*ratio_always_dithered*/ 96,
    /*ratio_thresholds*/
    {0x1.fcp+6f, 0x1.0d0d46p+7f, 0x1.154466p+7f, 0x1.1990dep+7f, 0x1.1bc4p+7f, 0x1.1ce0ep+7f, 0x1.1d7028p+7f},
    /*reciprocal_first*/ 0x1.002a9ap1f,
    /*reciprocal_second*/ 0x1.000008p1f,
    /*reciprocal_seed*/ 0x7EF32400u,
    /*hash_fold*/ 0x9E3779B9u,
    /*hash_multipliers*/ {0x7FEB352Du, 0x846CA68Bu},
    /*moment_step*/ 0xC13F91E1u,
    /*moment_lane*/ 0x6A09BB67u,
    /*update_step*/ 0x9E3779B9u,
    /*update_lane*/ 0xBB67AE85u,
    /*update_key*/ 0x68E31DA4u,
};

constexpr int kMantissaBits = 23;
constexpr uint32_t kInfinityBits = 0x7F800000;
constexpr float kSmallestNormal = 0x1p-126f;
constexpr float kLargestRoot = 0x1p64f;     // codec.LARGEST_ROOT
constexpr float kLargestMoment = 0x1p100f;  // codec.LARGEST_MOMENT

// codec.mix32 of a 64-bit word.
inline uint32_t mix32(uint64_t wide) {
    uint32_t word = static_cast<uint32_t>(wide) ^ static_cast<uint32_t>(wide >> 32) * kFormat.hash_fold;
    word = (word ^ word >> 16) * kFormat.hash_multipliers[0];
    word = (word ^ word >> 15) * kFormat.hash_multipliers[1];
    return word ^ word >> 16;
}

// ---------------------------------------------------------------- single floats

inline float float_of_bits(uint32_t bits) {
    float x;
    __builtin_memcpy(&x, &bits, sizeof x);
    return x;
}

inline uint32_t bits_of_float(float x) {
    uint32_t bits;
    __builtin_memcpy(&bits, &x, sizeof bits);
    return bits;
}

inline float float_of_half(uint16_t half) {
    const uint32_t sign = static_cast<uint32_t>(half & 0x8000u) << 16, magnitude = half & 0x7FFFu;
    if (magnitude >= 0x7C00u) return float_of_bits(sign | 0x7F800000u | magnitude << 13);
    // As a float with the exponent of float16 its value is off by 2^112, also where it is subnormal: exact.
    return float_of_bits(sign | bits_of_float(float_of_bits(magnitude << 13) * 0x1p112f));
}

// Rounds to nearest, ties to even; beyond 65520 it is infinite.
inline uint16_t half_of_float(float x) {
    const uint32_t bits = bits_of_float(x), sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7FFFFFFFu;
    if (magnitude > 0x7F800000u) return static_cast<uint16_t>(sign | 0x7E00u | (magnitude >> 13 & 0x1FFu));
    if (magnitude >= 0x477FF000u) return static_cast<uint16_t>(sign | 0x7C00u);
    if (magnitude < 0x38800000u) {  // the sum with 1/2 has the step of subnormal float16
        return static_cast<uint16_t>(sign | (bits_of_float(float_of_bits(magnitude) + 0.5f) - 0x3F000000u));
    }
    return static_cast<uint16_t>(sign | (((magnitude + 0xFFFu + (magnitude >> 13 & 1u)) >> 13) - 0x1C000u));
}

}  // namespace

#endif
