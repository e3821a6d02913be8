// Elements of parameters and gradients: their dtypes, how they widen to float32, their magnitude.
// Like all that follows up to blocks.h, this is written once over a vector type and compiled by each instruction set.
#ifndef LOWMEM_ADAM_ELEMENTS_H
#define LOWMEM_ADAM_ELEMENTS_H

#include "format.h"

namespace {

struct Float32 {
    using Stored = float;
};
struct BFloat16 {
    using Stored = uint16_t;
    static constexpr int kInfinity = 0x7F80;
};
struct Float16 {
    using Stored = uint16_t;
    static constexpr int kInfinity = 0x7C00;
};

// Lane i of a block adds i times the Weyl increment to its block's word: codec.Dither.
template <int lanes>
struct LaneWords {
    alignas(64) int32_t words[lanes];
    constexpr explicit LaneWords(uint32_t increment) : words() {
        for (int i = 0; i < lanes; ++i) words[i] = static_cast<int32_t>(increment * static_cast<uint32_t>(i));
    }
};
constexpr LaneWords<kBlockSize> kMomentLanes(kFormat.moment_lane);
constexpr LaneWords<kFlatBlockSize> kUpdateLanes(kFormat.update_lane);

// Four vectors go through each stage side by side: one vector's chain of operations is long, and a processor looks
// ahead too few instructions to find the next vector's.
template <class V>
struct Quad {
    typename V::F v[4];
};

// A stage is four(EACH { ... }), u being the vector's number.
#define EACH [&](int u) __attribute__((always_inline))

template <class Stage>
LOWMEM_ADAM_INLINE void four(Stage stage) {
    stage(0);
    stage(1);
    stage(2);
    stage(3);
}

template <class V>
LOWMEM_ADAM_INLINE typename V::F widen(Float32, const float *p) {
    return V::load(p);
}
template <class V>
LOWMEM_ADAM_INLINE typename V::F widen(BFloat16, const uint16_t *p) {
    return V::load_bfloat16(p);
}
template <class V>
LOWMEM_ADAM_INLINE typename V::F widen(Float16, const uint16_t *p) {
    return V::load_float16(p);
}

// The largest magnitude among a block's gradients; NaN where one is NaN.
template <class V>
LOWMEM_ADAM_INLINE float largest(Float32, const float *p, int count) {
    typename V::I top[4] = {V::seti(0), V::seti(0), V::seti(0), V::seti(0)};
    for (int i = 0; i < count; i += 4 * V::kLanes) {
        four(EACH {
            top[u] = V::max_unsigned(top[u], V::float_to_bits(V::abs(V::load(p + i + u * V::kLanes))));
        });
    }
    const typename V::I low = V::max_unsigned(top[0], top[1]), high = V::max_unsigned(top[2], top[3]);
    return float_of_bits(V::reduce_max_unsigned(V::max_unsigned(low, high)));
}
template <class V>
LOWMEM_ADAM_INLINE float largest(BFloat16, const uint16_t *p, int count) {
    return float_of_bits(static_cast<uint32_t>(V::max_halves(p, count)) << 16);
}
template <class V>
LOWMEM_ADAM_INLINE float largest(Float16, const uint16_t *p, int count) {
    return float_of_half(static_cast<uint16_t>(V::max_halves(p, count)));
}

}  // namespace

#endif
