// Elements of parameters and gradients: their dtypes, how they widen to float32 and are rounded back, their magnitude.
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
};
struct Float16 {
    using Stored = uint16_t;
};

// Lane i of a block adds i times the Weyl increment to its block's word: codec.Dither.
struct LaneWords {
    alignas(64) int32_t words[kBlockSize];
    constexpr explicit LaneWords(uint32_t increment) : words() {
        for (int i = 0; i < kBlockSize; ++i) words[i] = static_cast<int32_t>(increment * static_cast<uint32_t>(i));
    }
};
constexpr LaneWords kMomentLanes(kFormat.moment_lane);
constexpr LaneWords kUpdateLanes(kFormat.update_lane);

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

// Rounds four vectors of new weights to the parameter's dtype and stores them. `word` is the block's, `lane` the first
// element's place in the block.
template <class V, bool stochastic, bool careful>
LOWMEM_ADAM_INLINE void narrow(Float32, float *p, const typename V::F (&x)[4], uint32_t, int) {
    four(EACH { V::store(p + u * V::kLanes, x[u]); });
}
template <class V, bool stochastic, bool careful>
LOWMEM_ADAM_INLINE void narrow(BFloat16, uint16_t *p, const typename V::F (&x)[4], uint32_t word, int lane) {
    typename V::I upper[4];
    four(EACH {
        const typename V::I bits = V::float_to_bits(x[u]);
        typename V::I add;
        if (stochastic) {
            const typename V::I lanes = V::loadi(kUpdateLanes.words + lane + u * V::kLanes);
            add = V::template shift_right<16>(V::addi(lanes, V::seti(static_cast<int32_t>(word))));
        } else {
            add = V::addi(V::seti(0x7FFF), V::andi(V::template shift_right<16>(bits), V::seti(1)));
        }
        typename V::I sum = V::addi(bits, add);
        if (careful) {  // a carry out of a NaN's bits would make something else of it
            sum = V::float_to_bits(V::select(V::is_nan(x[u]), x[u], V::bits_to_float(sum)));
        }
        upper[u] = V::template shift_right<16>(sum);
    });
    V::store_halves(p, upper);
}
template <class V, bool stochastic, bool careful>
LOWMEM_ADAM_INLINE void narrow(Float16, uint16_t *p, const typename V::F (&x)[4], uint32_t word, int lane) {
    using F = typename V::F;
    using I = typename V::I;
    if (!stochastic) {
        V::store_float16(p, x);
        return;
    }
    F rounded[4];
    four(EACH {
        const I lanes = V::loadi(kUpdateLanes.words + lane + u * V::kLanes);
        const I add = V::template shift_right<19>(V::addi(lanes, V::seti(static_cast<int32_t>(word))));
        const F normal = V::bits_to_float(V::andi(V::addi(V::float_to_bits(x[u]), add), V::seti(-8192)));
        const F magnitude = V::abs(x[u]);
        const F threshold = V::mul(V::to_float(add), V::set(0x1p-13f));
        // Kept in range, so that what is not selected converts to an integer as well.
        const F steps = V::mul(V::min(magnitude, V::set(0x1p-14f)), V::set(0x1p24f));
        const F below = V::mul(V::to_float(V::truncate(V::add(steps, threshold))), V::set(0x1p-24f));
        rounded[u] = V::select(V::greater(V::set(0x1p-14f), magnitude), V::copy_sign(below, x[u]), normal);
        if (careful) rounded[u] = V::select(V::is_nan(x[u]), x[u], rounded[u]);
    });
    V::store_float16(p, rounded);
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
