// A block whose moments are held in bitsandbytes' 8-bit format: decode, the step, encode, in two passes over 256 elements
// that stay in the first-level cache. lowmem_adam/dynamic_map.py has the format and its reasons.
#ifndef LOWMEM_ADAM_DYNAMIC_H
#define LOWMEM_ADAM_DYNAMIC_H

#include "dynamic_map.h"
#include "step.h"

namespace {

// What the first pass hands on to the second.
struct Stepped {
    alignas(64) float exp_avg[kFlatBlockSize];
    alignas(64) float exp_avg_sq[kFlatBlockSize];
    alignas(64) float root[kFlatBlockSize];
};

// The values of four vectors of codes, times their block's absmax.
template <class V>
LOWMEM_ADAM_INLINE Quad<V> decode_dynamic(const void *codes, const float *values, typename V::F absmax) {
    typename V::I code[4];
    Quad<V> out;
    V::load_codes(static_cast<const uint8_t *>(codes), code);
    V::look_up(values, code, out.v);
    four(EACH { out.v[u] = V::mul(out.v[u], absmax); });
    return out;
}

// How many of the map's values from 0 on lie below the one that is nearest, of magnitudes up to 1.
template <class V>
LOWMEM_ADAM_INLINE void nearest_values(const Quad<V> &magnitude, const int32_t *bins, typename V::I (&found)[4]) {
    typename V::I bits[4], bin[4];
    four(EACH { bits[u] = V::max_unsigned(V::float_to_bits(magnitude.v[u]), V::seti(kLowestBin << 16)); });
    four(EACH { bin[u] = V::subi(V::template shift_right<16>(bits[u]), V::seti(kLowestBin)); });
    four(EACH {
        const typename V::I sum = V::addi(V::gather(bins, bin[u]), V::andi(bits[u], V::seti(0xFFFF)));
        found[u] = V::template shift_right<16>(sum);
    });
}

// Codes four vectors of moments; careful ones may be anything.
template <class V, bool is_signed, bool careful>
LOWMEM_ADAM_INLINE void encode_dynamic(const float *moments, typename V::F absmax, void *codes, int i) {
    using I = typename V::I;
    Quad<V> scaled;
    four(EACH { scaled.v[u] = V::div(V::load(moments + i + u * V::kLanes), absmax); });
    if (careful) {
        four(EACH {
            const typename V::F lowest = V::set(is_signed ? -1.0f : 0.0f), of_nan = V::set(is_signed ? 0.0f : 1.0f);
            const typename V::F limited = V::max(V::min(scaled.v[u], V::set(1.0f)), lowest);
            scaled.v[u] = V::select(V::is_nan(scaled.v[u]), of_nan, limited);
        });
    }
    I code[4];
    if (is_signed) {
        Quad<V> magnitude;
        four(EACH { magnitude.v[u] = V::abs(scaled.v[u]); });
        nearest_values<V>(magnitude, lowmem_adam_dynamic_tables.bins[1], code);
        four(EACH {
            // All bits of a lane are set where it is negative. The largest value has no negative one beside it.
            const I below = V::subi(V::seti(0), V::template shift_right<31>(V::float_to_bits(scaled.v[u])));
            const I steps = V::min_unsigned(code[u], V::addi(V::seti(kSignedZero + 1), below));
            code[u] = V::addi(V::subi(V::and_xor(steps, V::seti(-1), below), below), V::seti(kSignedZero));
        });
    } else {
        nearest_values<V>(scaled, lowmem_adam_dynamic_tables.bins[0], code);
    }
    V::store_codes(static_cast<uint8_t *>(codes) + i, code);
}

template <class V, bool is_signed, bool careful>
LOWMEM_ADAM_INLINE void encode_block(const float *moments, float absmax, void *codes, int count) {
    if (absmax == 0.0f) {
        __builtin_memset(codes, 0, kFlatBlockSize);  // a shorter block is stepped in room for a whole one
        return;
    }
    const typename V::F scale = V::set(absmax);
    for (int i = 0; i < count; i += 4 * V::kLanes) encode_dynamic<V, is_signed, careful>(moments, scale, codes, i);
}

// The first pass. Bits of the largest magnitudes: infinite or beyond where one is not finite, or a second moment negative.
template <class V, class P, class G, Path path, Rounding rounding>
LOWMEM_ADAM_INLINE void step_dynamic_moments(const Hyper<V> &h, const BlockData<P, G, rounding> block, Stepped &stepped,
                                             uint32_t &largest1, uint32_t &largest2) {
    using I = typename V::I;
    const typename V::F absmax1 = V::set(*block.absmax1), absmax2 = V::set(*block.absmax2);
    const uint8_t *codes1 = static_cast<const uint8_t *>(block.exp_avg);
    const uint8_t *codes2 = static_cast<const uint8_t *>(block.exp_avg_sq);
    I top1 = V::seti(0), top2 = V::seti(0);
    for (int i = 0; i < block.count; i += 4 * V::kLanes) {
        Quad<V> weight, grad, root;
        Quad<V> exp_avg = decode_dynamic<V>(codes1 + i, lowmem_adam_dynamic_tables.values[1], absmax1);
        four(EACH { exp_avg.v[u] = V::add(exp_avg.v[u], V::set(0.0f)); });  // there is no -0.0
        Quad<V> exp_avg_sq = decode_dynamic<V>(codes2 + i, lowmem_adam_dynamic_tables.values[0], absmax2);
        if (path != Path::plain && h.decays_gradient) {
            weight = load_weight<V, rounding>(P{}, block.param, block.master, i);
        }
        four(EACH { grad.v[u] = widen<V>(G{}, block.grad + i + u * V::kLanes); });
        step_moments<V, path>(h, h.beta1, weight, grad, exp_avg, exp_avg_sq, root);
        four(EACH { V::store(stepped.exp_avg + i + u * V::kLanes, exp_avg.v[u]); });
        four(EACH { V::store(stepped.exp_avg_sq + i + u * V::kLanes, exp_avg_sq.v[u]); });
        four(EACH { V::store(stepped.root + i + u * V::kLanes, root.v[u]); });
        four(EACH { top1 = V::max_unsigned(top1, V::float_to_bits(V::abs(exp_avg.v[u]))); });
        four(EACH { top2 = V::max_unsigned(top2, V::float_to_bits(exp_avg_sq.v[u])); });
    }
    largest1 = V::reduce_max_unsigned(top1);
    largest2 = V::reduce_max_unsigned(top2);
}

template <class V, class P, Path path, Rounding rounding>
LOWMEM_ADAM_INLINE void step_dynamic_weight(const Hyper<V> &h, typename P::Stored *param,
                                            typename Master<rounding>::Stored *master, const Stepped &stepped,
                                            uint32_t update_word, int i) {
    Quad<V> weight = load_weight<V, rounding>(P{}, param, master, i), exp_avg, root;
    four(EACH { exp_avg.v[u] = V::load(stepped.exp_avg + i + u * V::kLanes); });
    four(EACH { root.v[u] = V::load(stepped.root + i + u * V::kLanes); });
    step_weight<V, path>(h, weight, exp_avg, root);
    store_weight<V, rounding, path == Path::careful>(P{}, param, master, weight, update_word, i);
}

// False where a moment is not finite: then nothing of the block has changed, and it has to be stepped with care.
template <class V, class P, class G, Path path, Rounding rounding>
__attribute__((noinline)) bool dynamic_block(const Hyper<V> &h, const BlockData<P, G, rounding> block,
                                             const BlockDither dither) {
    Stepped stepped;
    uint32_t largest1, largest2;
    step_dynamic_moments<V, P, G, path, rounding>(h, block, stepped, largest1, largest2);
    if (largest1 >= kInfinityBits || largest2 >= kInfinityBits) return false;
    *block.absmax1 = float_of_bits(largest1);
    *block.absmax2 = float_of_bits(largest2);
    for (int i = 0; i < block.count; i += 4 * V::kLanes) {
        step_dynamic_weight<V, P, path, rounding>(h, block.param, block.master, stepped, dither.update, i);
    }
    encode_block<V, true, false>(stepped.exp_avg, *block.absmax1, block.exp_avg, block.count);
    encode_block<V, false, false>(stepped.exp_avg_sq, *block.absmax2, block.exp_avg_sq, block.count);
    return true;
}

// The largest finite magnitude.
template <class V>
float largest_finite(const float *values, int count) {
    using F = typename V::F;
    typename V::I top = V::seti(0);
    for (int i = 0; i < count; i += V::kLanes) {
        const F magnitude = V::abs(V::load(values + i));
        const F counted = V::select(V::greater(V::set(__builtin_inff()), magnitude), magnitude, V::set(0.0f));
        top = V::max_unsigned(top, V::float_to_bits(counted));
    }
    return float_of_bits(V::reduce_max_unsigned(top));
}

// Whatever there is: a denominator of zero, moments that are not finite.
template <class V, class P, class G, Rounding rounding>
__attribute__((noinline)) void careful_dynamic_block(const Hyper<V> &h, const BlockData<P, G, rounding> &block, const BlockDither &dither) {
    Stepped stepped = {};
    uint32_t largest1, largest2;
    step_dynamic_moments<V, P, G, Path::careful, rounding>(h, block, stepped, largest1, largest2);
    for (int i = 0; i < block.count; i += 4 * V::kLanes) {
        step_dynamic_weight<V, P, Path::careful, rounding>(h, block.param, block.master, stepped, dither.update, i);
    }
    *block.absmax1 = largest_finite<V>(stepped.exp_avg, block.count);
    *block.absmax2 = largest_finite<V>(stepped.exp_avg_sq, block.count);
    encode_block<V, true, true>(stepped.exp_avg, *block.absmax1, block.exp_avg, block.count);
    encode_block<V, false, true>(stepped.exp_avg_sq, *block.absmax2, block.exp_avg_sq, block.count);
}

}  // namespace

#endif
