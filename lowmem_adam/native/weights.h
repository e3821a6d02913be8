// From a parameter, and what is kept beside it, to its weight, and back: kernels/rounding.py, where the reasons stand.
#ifndef LOWMEM_ADAM_WEIGHTS_H
#define LOWMEM_ADAM_WEIGHTS_H

#include "elements.h"

namespace {

// How a weight is rounded to its parameter, and what is kept of it.
enum class Rounding { nearest, stochastic, split16, split8, full };

template <Rounding rounding>
struct Master {
    using Stored = char;  // there is none
};
template <>
struct Master<Rounding::split16> {
    using Stored = int16_t;
};
template <>
struct Master<Rounding::split8> {
    using Stored = int8_t;
};
template <>
struct Master<Rounding::full> {
    using Stored = float;
};
constexpr bool is_split(Rounding rounding) { return rounding == Rounding::split16 || rounding == Rounding::split8; }
constexpr bool keeps_master(Rounding rounding) { return is_split(rounding) || rounding == Rounding::full; }
constexpr bool is_dithered(Rounding rounding) {
    return rounding == Rounding::stochastic || rounding == Rounding::split8;
}

// ---------------------------------------------------------------- where nothing is kept

// Rounds four vectors of new weights to the parameter's dtype and stores them. `word` is the block's, `lane` the first
// element's place in the block.
template <class V, Rounding rounding, bool careful>
LOWMEM_ADAM_INLINE void narrow(Float32, float *p, const typename V::F (&x)[4], uint32_t, int) {
    four(EACH { V::store(p + u * V::kLanes, x[u]); });
}
template <class V, Rounding rounding, bool careful>
LOWMEM_ADAM_INLINE void narrow(BFloat16, uint16_t *p, const typename V::F (&x)[4], uint32_t word, int lane) {
    typename V::I sums[4];
    four(EACH {
        const typename V::I bits = V::float_to_bits(x[u]);
        typename V::I add;
        if (rounding == Rounding::stochastic) {
            const typename V::I lanes = V::loadi(kUpdateLanes.words + lane + u * V::kLanes);
            add = V::template shift_right<16>(V::addi(lanes, V::seti(static_cast<int32_t>(word))));
        } else {
            add = V::addi(V::seti(0x7FFF), V::andi(V::template shift_right<16>(bits), V::seti(1)));
        }
        sums[u] = V::addi(bits, add);
        if (careful) {  // a carry out of a NaN's bits would make something else of it
            sums[u] = V::float_to_bits(V::select(V::is_nan(x[u]), x[u], V::bits_to_float(sums[u])));
        }
    });
    V::store_halves(p, sums);
}
template <class V, Rounding rounding, bool careful>
LOWMEM_ADAM_INLINE void narrow(Float16, uint16_t *p, const typename V::F (&x)[4], uint32_t word, int lane) {
    using F = typename V::F;
    using I = typename V::I;
    if (rounding == Rounding::nearest) {
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

// ---------------------------------------------------------------- a correction

constexpr int32_t kSign = INT32_MIN;
constexpr int32_t kExponentsApart = 112 << kMantissaBits;
constexpr int32_t kLowestNormalWord = 1 << 26;

// The float of a word that has its sign in the uppermost bit. `param` is where the parameter lies.
template <class V>
LOWMEM_ADAM_INLINE typename V::F float_of_word(BFloat16, typename V::I word, const uint16_t *) {
    return V::bits_to_float(word);
}
template <class V>
LOWMEM_ADAM_INLINE typename V::F float_of_word(Float16, typename V::I word, const uint16_t *param) {
    using F = typename V::F;
    using I = typename V::I;
    const F widened = V::load_float16(param);
    const I magnitude = V::andi(word, V::seti(INT32_MAX));
    const I inexact = V::ori(V::template shift_right<24>(magnitude), V::template shift_right<25>(magnitude));
    const F below = V::mul(V::to_float(V::subi(magnitude, V::andi(magnitude, inexact))), V::set(0x1p-40f));
    const I normal = V::addi(V::template shift_right<3>(magnitude), V::seti(kExponentsApart));
    const F lowest = V::bits_to_float(V::seti(kLowestNormalWord));  // bits of positive floats are in order
    const F both = V::select(V::greater(lowest, V::bits_to_float(magnitude)), below, V::bits_to_float(normal));
    const F finite = V::copy_sign(both, V::bits_to_float(word));
    return V::select(V::greater(V::set(65536.0f), V::abs(widened)), finite, widened);
}

template <class V, bool careful>
LOWMEM_ADAM_INLINE typename V::I word_of_float(BFloat16, typename V::F x) {
    const typename V::I bits = V::float_to_bits(x);
    if (!careful) return bits;
    // A NaN may have its mark in the bits that are cut off, and a carry out of all bits would make a sign of it.
    const typename V::I nan = V::ori(V::andi(bits, V::seti(kSign)), V::seti(0x7FC00000));
    return V::float_to_bits(V::select(V::is_nan(x), V::bits_to_float(nan), x));
}
template <class V, bool careful>
LOWMEM_ADAM_INLINE typename V::I word_of_float(Float16, typename V::F x) {
    using F = typename V::F;
    using I = typename V::I;
    const F magnitude = V::abs(x);
    const I bits = V::min_unsigned(V::float_to_bits(magnitude), V::seti((127 + 16) << kMantissaBits));
    const I normal = V::template shift_left<3>(V::subi(bits, V::seti(kExponentsApart)));
    // Kept in range, so that what is not selected converts to an integer as well.
    const F steps = V::mul(V::min(magnitude, V::set(0x1p-14f)), V::set(0x1p40f));
    const I below = V::truncate(V::add(steps, V::set(0.5f - 0x1p-25f)));
    F word = V::select(V::greater(V::set(0x1p-14f), magnitude), V::bits_to_float(below), V::bits_to_float(normal));
    word = V::select(V::is_nan(x), V::bits_to_float(V::seti(0x7E000000)), word);
    return V::ori(V::float_to_bits(word), V::andi(V::float_to_bits(x), V::seti(kSign)));
}

// ---------------------------------------------------------------- all of them

// The weights of a block's elements from i on.
template <class V, Rounding rounding>
LOWMEM_ADAM_INLINE Quad<V> load_weight(Float32, const float *param, const char *, int i) {
    Quad<V> weight;
    four(EACH { weight.v[u] = V::load(param + i + u * V::kLanes); });
    return weight;
}
template <class V, Rounding rounding, class P>
LOWMEM_ADAM_INLINE Quad<V> load_weight(P, const uint16_t *param, const typename Master<rounding>::Stored *master,
                                       int i) {
    Quad<V> weight;
    param += i;
    if constexpr (is_split(rounding)) {
        typename V::I words[4];
        V::load_words(param, master + i, P::kInfinity, words);
        four(EACH { weight.v[u] = float_of_word<V>(P{}, words[u], param + u * V::kLanes); });
    } else if constexpr (rounding == Rounding::full) {
        // What the master weight rounds to, as it would be stored.
        alignas(64) uint16_t rounded[4 * V::kLanes];
        typename V::F masters[4];
        four(EACH { masters[u] = V::load(master + i + u * V::kLanes); });
        narrow<V, Rounding::nearest, false>(P{}, rounded, masters, 0, 0);
        four(EACH {
            const typename V::F widened = widen<V>(P{}, param + u * V::kLanes);
            const typename V::I fits = V::float_to_bits(widen<V>(P{}, rounded + u * V::kLanes));
            weight.v[u] = V::select(V::equal_bits(V::float_to_bits(widened), fits), masters[u], widened);
            weight.v[u] = V::select(V::is_nan(weight.v[u]), widened, weight.v[u]);
        });
    } else {
        four(EACH { weight.v[u] = widen<V>(P{}, param + u * V::kLanes); });
    }
    return weight;
}

// Rounds a block's new weights from element i on to the parameter's dtype and stores them. `word` is the block's.
template <class V, Rounding rounding, bool careful>
LOWMEM_ADAM_INLINE void store_weight(Float32, float *param, char *, const Quad<V> &weight, uint32_t, int i) {
    four(EACH { V::store(param + i + u * V::kLanes, weight.v[u]); });
}
template <class V, Rounding rounding, bool careful, class P>
LOWMEM_ADAM_INLINE void store_weight(P, uint16_t *param, typename Master<rounding>::Stored *master,
                                     const Quad<V> &weight, uint32_t word, int i) {
    if constexpr (is_split(rounding)) {
        typename V::I words[4];
        four(EACH {
            words[u] = word_of_float<V, careful>(P{}, weight.v[u]);
            if (rounding == Rounding::split8) {
                const typename V::I lanes = V::loadi(kUpdateLanes.words + i + u * V::kLanes);
                const typename V::I add = V::addi(lanes, V::seti(static_cast<int32_t>(word)));
                words[u] = V::andi(V::addi(words[u], V::template shift_right<24>(add)), V::seti(-256));
            }
        });
        V::store_words(param + i, master + i, words);
    } else if constexpr (rounding == Rounding::full) {
        four(EACH { V::store(master + i + u * V::kLanes, weight.v[u]); });
        narrow<V, Rounding::nearest, careful>(P{}, param + i, weight.v, word, i);
    } else {
        narrow<V, rounding, careful>(P{}, param + i, weight.v, word, i);
    }
}

}  // namespace

#endif
