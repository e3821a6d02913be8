// A block whose moments are held in the 8-bit format: codec.decode, the step, codec.encode, in a few passes over 128
// elements. Order and rounding are those of codec.py; here only what makes them cheap.
#ifndef LOWMEM_ADAM_CODED_H
#define LOWMEM_ADAM_CODED_H

#include "step.h"

namespace {

// codec.reciprocal
template <class V>
LOWMEM_ADAM_INLINE Quad<V> reciprocal(const Quad<V> &x) {
    Quad<V> estimate, product;
    four(EACH {
        const typename V::I seed = V::seti(static_cast<int32_t>(kFormat.reciprocal_seed));
        estimate.v[u] = V::bits_to_float(V::subi(seed, V::float_to_bits(x.v[u])));
    });
    four(EACH { product.v[u] = V::mul(x.v[u], estimate.v[u]); });
    four(EACH { product.v[u] = V::sub(V::set(kFormat.reciprocal_first), product.v[u]); });
    four(EACH { estimate.v[u] = V::mul(estimate.v[u], product.v[u]); });
    four(EACH { product.v[u] = V::mul(x.v[u], estimate.v[u]); });
    four(EACH { product.v[u] = V::sub(V::set(kFormat.reciprocal_second), product.v[u]); });
    four(EACH { estimate.v[u] = V::mul(estimate.v[u], product.v[u]); });
    return estimate;
}

// The grid of one block: bits of its floor. A block of zeros counts as one octave from 2^-126 on.
constexpr int32_t floor_bits(int floor) { return (floor > 0 ? floor : 1) << kMantissaBits; }

// And what follows from its byte of octaves alone. From a table, as roots wait for it: encoding would divide once a block.
struct Spans {
    int32_t bits_per_code[256];
    float codes_per_bit[256];
    float ratio_scale[256];  // 2 to the power of the ratio octaves
    constexpr Spans() : bits_per_code(), codes_per_bit(), ratio_scale() {
        for (int span = 0; span < 256; ++span) {
            const int octaves = span % (1 << kFormat.octave_bits);
            bits_per_code[span] = ((octaves > 0 ? octaves : 1) << kMantissaBits) / kFormat.root_intervals;
            codes_per_bit[span] = 1.0f / static_cast<float>(bits_per_code[span]);
            ratio_scale[span] = static_cast<float>(1 << (span >> kFormat.octave_bits));
        }
    }
};
constexpr Spans kSpans;

// What the passes over a block hand on to one another; it stays in the first-level cache. There is a pass for each short
// chain of operations: of a short one the processor has many vectors under way at a time.
struct Between {
    alignas(64) float ratio[kBlockSize];  // as decoded; later the roots that the new ratios refer to, if not the same
    alignas(64) float exp_avg[kBlockSize];
    alignas(64) float root[kBlockSize];
};

// The first moments' ratios from their codes, which come times 2^24: the quotient does not see that.
template <class V>
LOWMEM_ADAM_INLINE Quad<V> decoded_ratio(const int8_t *ratio_code) {
    const typename V::F levels = V::set(static_cast<float>(kFormat.ratio_scale) * 0x1p24f);
    Quad<V> ratio;
    typename V::I codes[4];
    V::load_codes(ratio_code, codes);
    four(EACH { ratio.v[u] = V::to_float(codes[u]); });
    four(EACH { ratio.v[u] = V::div(ratio.v[u], V::sub(levels, V::abs(ratio.v[u]))); });
    return ratio;
}

// The same as a pass of its own, which it is where kDecodesApart: together with the moments it takes many registers.
template <class V>
LOWMEM_ADAM_INLINE void decode_ratio(const int8_t *ratio_code, Between &between, int i) {
    const Quad<V> ratio = decoded_ratio<V>(ratio_code + i);
    four(EACH { V::store(between.ratio + i + u * V::kLanes, ratio.v[u]); });
}

// Decodes what is not decoded yet, steps the moments, and follows the range of the new roots.
template <class V, class P, class G, Path path, Rounding rounding>
class MomentsPass {
    using F = typename V::F;
    using I = typename V::I;

   public:
    LOWMEM_ADAM_INLINE MomentsPass(const Hyper<V> &h, const BlockData<P, G, rounding> &block, Between &between)
        : h_(h), block_(block), between_(between), highest_(V::seti(0)), lowest_(V::seti(-1)) {
        const int span = *block.span;
        const int32_t per_code = kSpans.bits_per_code[span];
        const F scale = V::set(kSpans.ratio_scale[span]);
        // First moments are to be multiplied by a power of two. Their factor may be instead: neither product rounds.
        scale_ = path == Path::careful ? scale : V::mul(scale, h.beta1);
        per_code_ = V::seti(per_code);
        base_ = V::seti(floor_bits(*block.floor) - per_code);
    }

    LOWMEM_ADAM_INLINE void quad(int i) {
        Quad<V> weight, grad, exp_avg, exp_avg_sq, root;
        I codes[4];
        V::load_codes(static_cast<const uint8_t *>(block_.exp_avg_sq) + i, codes);
        four(EACH {
            root.v[u] = V::bits_to_float(V::where_positive(codes[u], V::addi(V::muli(codes[u], per_code_), base_)));
        });
        four(EACH { exp_avg_sq.v[u] = V::mul(root.v[u], root.v[u]); });
        if (V::kDecodesApart) {
            four(EACH { exp_avg.v[u] = V::load(between_.ratio + i + u * V::kLanes); });
        } else {
            exp_avg = decoded_ratio<V>(static_cast<const int8_t *>(block_.exp_avg) + i);
        }
        four(EACH { exp_avg.v[u] = V::mul(exp_avg.v[u], root.v[u]); });
        if (path != Path::plain && h_.decays_gradient) {
            weight = load_weight<V, rounding>(P{}, block_.param, block_.master, i);
        }
        four(EACH { grad.v[u] = widen<V>(G{}, block_.grad + i + u * V::kLanes); });
        if (path == Path::careful) {  // but where it is infinite
            four(EACH { exp_avg.v[u] = V::mul(exp_avg.v[u], scale_); });
        }
        step_moments<V, path>(h_, path == Path::careful ? h_.beta1 : scale_, weight, grad, exp_avg, exp_avg_sq, root);
        four(EACH { V::store(between_.exp_avg + i + u * V::kLanes, exp_avg.v[u]); });
        four(EACH { V::store(between_.root + i + u * V::kLanes, root.v[u]); });
        four(EACH { highest_ = V::max_unsigned(highest_, V::float_to_bits(root.v[u])); });
        four(EACH { lowest_ = V::min_unsigned(lowest_, V::float_to_bits(root.v[u])); });
    }

    // Bits of the largest root, at or above those of infinity where one is not finite; NaN may have a sign.
    LOWMEM_ADAM_INLINE uint32_t highest() const { return V::reduce_max_unsigned(highest_); }
    // Bits of the smallest root.
    LOWMEM_ADAM_INLINE uint32_t lowest() const { return V::reduce_min_unsigned(lowest_); }

   private:
    const Hyper<V> &h_;
    const BlockData<P, G, rounding> block_;
    Between &between_;
    I per_code_, base_, highest_, lowest_;
    F scale_;
};

// The grid of a block's new roots, and what is special about them.
struct RootGrid {
    int32_t floor_bits;
    float codes_per_bit;
    bool zeros;   // some roots are zero
    bool capped;  // some positive roots lie below the floor
};

// Chooses the grid and stores it. `highest`: bits of the largest root; `lowest`: bits of the smallest positive one; both
// 0 where there is none.
LOWMEM_ADAM_INLINE RootGrid choose_grid(uint32_t highest, uint32_t lowest, bool zeros, uint8_t *floor, uint8_t *span) {
    const int32_t above = static_cast<int32_t>(highest >> kMantissaBits) + 1;
    const int32_t bottom = static_cast<int32_t>(lowest >> kMantissaBits);
    const int32_t cap = above - kFormat.max_octaves;
    int32_t exponent = bottom > cap ? bottom : cap;
    exponent = exponent > 1 ? exponent : 1;
    const bool empty = highest == 0;
    exponent = empty ? 0 : exponent;
    const int octaves = empty ? 0 : above - exponent;
    *floor = static_cast<uint8_t>(exponent);
    *span = static_cast<uint8_t>(octaves);
    return {floor_bits(exponent), kSpans.codes_per_bit[octaves], zeros, !empty && cap > bottom};
}

// The same for finite roots some of which may be zero.
template <class V>
RootGrid choose_grid_with_zeros(const Between &between, int count, uint8_t *floor, uint8_t *span) {
    typename V::I lowest = V::seti(-1), highest = V::seti(0), least = V::seti(-1);
    for (int i = 0; i < count; i += V::kLanes) {
        const typename V::I bits = V::float_to_bits(V::load(between.root + i));
        highest = V::max_unsigned(highest, bits);
        least = V::min_unsigned(least, bits);
        lowest = V::min_unsigned(lowest, V::subi(bits, V::seti(1)));  // which sends zeros beyond all others
    }
    const bool zeros = V::reduce_min_unsigned(least) == 0;
    return choose_grid(V::reduce_max_unsigned(highest), V::reduce_min_unsigned(lowest) + 1, zeros, floor, span);
}

// Steps the weight.
template <class V, class P, Path path, Rounding rounding>
LOWMEM_ADAM_INLINE void weight_quad(const Hyper<V> &h, typename P::Stored *param,
                                    typename Master<rounding>::Stored *master, const Between &between,
                                    uint32_t update_word, int i) {
    Quad<V> weight = load_weight<V, rounding>(P{}, param, master, i), exp_avg, root;
    four(EACH { exp_avg.v[u] = V::load(between.exp_avg + i + u * V::kLanes); });
    four(EACH { root.v[u] = V::load(between.root + i + u * V::kLanes); });
    step_weight<V, path>(h, weight, exp_avg, root);
    store_weight<V, rounding, path == Path::careful>(P{}, param, master, weight, update_word, i);
}

// What the ratios refer to: the roots, but none below 2^-126.
template <class V>
const float *positive_roots(Between &between, int count) {
    for (int i = 0; i < count; i += V::kLanes) {
        V::store(between.ratio + i, V::max(V::load(between.root + i), V::set(kSmallestNormal)));
    }
    return between.ratio;
}

// Codes of the first moments before their rounding.
template <class V>
LOWMEM_ADAM_INLINE void companded(const float *exp_avgs, const float *roots, int i, Quad<V> &exp_avg, Quad<V> &ratio) {
    const typename V::F scale = V::set(static_cast<float>(kFormat.ratio_scale));
    four(EACH { exp_avg.v[u] = V::load(exp_avgs + i + u * V::kLanes); });
    four(EACH { ratio.v[u] = V::add(V::load(roots + i + u * V::kLanes), V::abs(exp_avg.v[u])); });
    ratio = reciprocal(ratio);
    four(EACH { ratio.v[u] = V::mul(V::mul(exp_avg.v[u], ratio.v[u]), scale); });
}

// The ratio octaves of a block, which are put into its byte: codec.find_ratio_octaves. What is not to count has a root
// of zero; the others lie far above 2^-126.
template <class V>
__attribute__((noinline)) void find_ratio_octaves(const Between &between, int count, uint8_t *span) {
    using F = typename V::F;
    const F zero = V::set(0.0f), infinity = V::set(__builtin_inff());
    // In most blocks of most steps no ratio comes near the first threshold, 127/16: no rounding takes 7.93 there.
    typename V::I beyond = V::seti(0);
    for (int i = 0; i < count; i += 4 * V::kLanes) {
        four(EACH {
            const F size = V::abs(V::load(between.exp_avg + i + u * V::kLanes));
            const F held = V::mul(V::load(between.root + i + u * V::kLanes), V::set(7.93f));
            const F excess = V::max(V::sub(size, held), zero);
            beyond = V::max_unsigned(beyond, V::float_to_bits(excess));
        });
    }
    if (V::reduce_max_unsigned(beyond) == 0) return;
    typename V::I largest = V::seti(0);
    for (int i = 0; i < count; i += 4 * V::kLanes) {
        Quad<V> exp_avg, ratio;
        companded<V>(between.exp_avg, between.root, i, exp_avg, ratio);
        four(EACH {
            const F finite = V::select(V::greater(infinity, V::abs(exp_avg.v[u])), V::abs(ratio.v[u]), zero);
            ratio.v[u] = V::select(V::equal(V::load(between.root + i + u * V::kLanes), zero), zero, finite);
        });
        four(EACH { largest = V::max_unsigned(largest, V::float_to_bits(ratio.v[u])); });
    }
    const float code = float_of_bits(V::reduce_max_unsigned(largest));
    int octaves = 0;
    for (const float threshold : kFormat.ratio_thresholds) octaves += code > threshold;
    *span = static_cast<uint8_t>(*span | octaves << kFormat.octave_bits);
}

// What ratios with ratio octaves refer to: roots times a power of two.
template <class V>
const float *scaled_roots(Between &between, const float *roots, int count, uint8_t span) {
    const typename V::F scale = V::set(kSpans.ratio_scale[span]);
    for (int i = 0; i < count; i += V::kLanes) V::store(between.ratio + i, V::mul(V::load(roots + i), scale));
    return between.ratio;
}

template <class V>
__attribute__((noinline)) const float *wide_roots(Between &between, const float *roots, int count, uint8_t *span) {
    find_ratio_octaves<V>(between, count, span);
    return *span >> kFormat.octave_bits ? scaled_roots<V>(between, roots, count, *span) : roots;
}

// Codes the first moment: codec.encode_ratio.
template <class V>
LOWMEM_ADAM_INLINE void encode_ratio(const float *exp_avgs, const float *roots, uint32_t moment_word, bool nearest,
                                     int8_t *ratio_code, int i) {
    using F = typename V::F;
    const F limit = V::set(static_cast<float>(kFormat.ratio_always_dithered));
    Quad<V> exp_avg, ratio;
    typename V::I codes[4];
    companded<V>(exp_avgs, roots, i, exp_avg, ratio);
    four(EACH {
        codes[u] = V::addi(V::loadi(kMomentLanes.words + i + u * V::kLanes),
                           V::seti(static_cast<int32_t>(moment_word)));
    });
    const typename V::I low = V::seti(0xFFFF), half = V::seti(0x43008000);  // 128.5: what there is without a word
    if (nearest) {
        four(EACH { codes[u] = V::and_xor(V::greater(V::abs(ratio.v[u]), limit), codes[u], low, half); });
    } else {
        four(EACH { codes[u] = V::and_xor(codes[u], low, half); });
    }
    four(EACH { codes[u] = V::truncate(V::add(ratio.v[u], V::bits_to_float(codes[u]))); });
    V::store_codes(ratio_code + i, codes);
}

// Codes the roots: codec.encode_root.
template <class V>
class RootPass {
    using F = typename V::F;
    using I = typename V::I;

   public:
    LOWMEM_ADAM_INLINE RootPass(const Between &between, const RootGrid &grid, uint32_t moment_word, uint8_t *root_code)
        : between_(between), root_code_(root_code), capped_(grid.capped),
          word_(V::seti(static_cast<int32_t>(moment_word))), floor_(V::seti(grid.floor_bits)),
          codes_per_bit_(V::set(grid.codes_per_bit)) {}

    LOWMEM_ADAM_INLINE void quad(int i) const {
        Quad<V> root, threshold;
        I codes[4];
        four(EACH { root.v[u] = V::load(between_.root + i + u * V::kLanes); });
        if (capped_) {  // more octaves than the grid takes: what lies lower takes the floor
            four(EACH {
                const F raised = V::max(root.v[u], V::bits_to_float(floor_));
                root.v[u] = V::select(V::equal(root.v[u], V::set(0.0f)), root.v[u], raised);
            });
        }
        four(EACH { root.v[u] = V::to_float(V::subi(V::float_to_bits(root.v[u]), floor_)); });
        four(EACH {
            const I words = V::addi(V::loadi(kMomentLanes.words + i + u * V::kLanes), word_);
            threshold.v[u] = V::bits_to_float(V::ori(V::template shift_right<9>(words), V::seti(0x3F800000)));
        });
        // A root of zero lies at least ten codes below the floor: saturation makes it code 0.
        four(EACH { codes[u] = V::truncate(V::add(V::mul(root.v[u], codes_per_bit_), threshold.v[u])); });
        V::store_codes(root_code_ + i, codes);
    }

   private:
    const Between &between_;
    uint8_t *root_code_;
    bool capped_;
    I word_, floor_;
    F codes_per_bit_;
};

// A block whose roots are still to be coded.
struct Pending {
    Between between;
    RootGrid grid;
    uint32_t moment_word;
    uint8_t *root_code;
};

template <class V>
LOWMEM_ADAM_INLINE RootPass<V> root_pass(const Pending &p) {
    return RootPass<V>(p.between, p.grid, p.moment_word, p.root_code);
}

template <class V>
void encode_roots(const Pending &pending, int count) {
    const RootPass<V> roots = root_pass<V>(pending);
    for (int i = 0; i < count; i += 4 * V::kLanes) roots.quad(i);
}

// Steps a block but for the coding of its roots, which is left in `current`, and codes those of the block before, if
// there is one: that keeps the units busy that do not divide. False where a root is not finite: then nothing of the
// block has changed, and it has to be stepped with care.
template <class V, class P, class G, Path path, Rounding rounding>
LOWMEM_ADAM_INLINE bool coded_block(const Hyper<V> &h, const BlockData<P, G, rounding> block, const BlockDither dither,
                                    const Pending *before, Pending &current) {
    // By value, so that no store to memory makes the compiler read pointers again.
    constexpr int kQuad = 4 * V::kLanes;
    int8_t *ratio_code = static_cast<int8_t *>(block.exp_avg);
    Between &between = current.between;
    MomentsPass<V, P, G, path, rounding> moments(h, block, between);
    const auto first_pass = [&](int i) __attribute__((always_inline)) {
        if (V::kDecodesApart) {
            decode_ratio<V>(ratio_code, between, i);
        } else {
            moments.quad(i);
        }
    };
    if (before) {
        const RootPass<V> roots = root_pass<V>(*before);
        for (int i = 0; i < kBlockSize; i += kQuad) {
            first_pass(i);
            roots.quad(i);
        }
    } else {
        for (int i = 0; i < block.count; i += kQuad) first_pass(i);
    }
    if (V::kDecodesApart) {
        for (int i = 0; i < block.count; i += kQuad) moments.quad(i);
    }
    const uint32_t highest = moments.highest(), lowest = moments.lowest();
    if (highest >= kInfinityBits) return false;
    current.grid = lowest > 0 ? choose_grid(highest, lowest, false, block.floor, block.span)
                              : choose_grid_with_zeros<V>(between, block.count, block.floor, block.span);
    current.moment_word = dither.moment;
    current.root_code = static_cast<uint8_t *>(block.exp_avg_sq);

    const float *roots = current.grid.zeros ? positive_roots<V>(between, block.count) : between.root;
    if (h.wide) roots = wide_roots<V>(between, roots, block.count, block.span);
    for (int i = 0; i < block.count; i += kQuad) {
        weight_quad<V, P, path, rounding>(h, block.param, block.master, between, dither.update, i);
        encode_ratio<V>(between.exp_avg, roots, dither.moment, dither.nearest, ratio_code, i);
    }
    return true;
}

// Whatever there is: a denominator of zero, roots and moments that are not finite.
template <class V, class P, class G, Rounding rounding>
void careful_block(const Hyper<V> &h, const BlockData<P, G, rounding> &block, const BlockDither &dither) {
    using F = typename V::F;
    constexpr int kQuad = 4 * V::kLanes;
    int8_t *ratio_code = static_cast<int8_t *>(block.exp_avg);
    Pending pending;
    Between &between = pending.between;
    if (V::kDecodesApart) {
        for (int i = 0; i < block.count; i += kQuad) decode_ratio<V>(ratio_code, between, i);
    }
    MomentsPass<V, P, G, Path::careful, rounding> moments(h, block, between);
    for (int i = 0; i < block.count; i += kQuad) moments.quad(i);
    for (int i = 0; i < block.count; i += kQuad) {
        weight_quad<V, P, Path::careful, rounding>(h, block.param, block.master, between, dither.update, i);
    }

    // What is not finite does not count for the grid; stand-ins are coded for it.
    alignas(64) bool counted[kBlockSize];
    for (int i = 0; i < block.count; ++i) {
        counted[i] = between.root[i] < __builtin_inff();
        if (!counted[i]) between.root[i] = 0.0f;
    }
    pending.grid = choose_grid_with_zeros<V>(between, block.count, block.floor, block.span);
    if (h.wide) find_ratio_octaves<V>(between, block.count, block.span);
    for (int i = 0; i < block.count; ++i) {
        if (!counted[i]) between.root[i] = kLargestRoot;
    }
    for (int i = 0; i < block.count; i += V::kLanes) {
        F exp_avg = V::load(between.exp_avg + i);
        exp_avg = V::select(V::is_nan(exp_avg), V::set(0.0f), exp_avg);
        V::store(between.exp_avg + i, V::max(V::min(exp_avg, V::set(kLargestMoment)), V::set(-kLargestMoment)));
    }
    const float *roots = positive_roots<V>(between, block.count);
    roots = scaled_roots<V>(between, roots, block.count, *block.span);
    for (int i = 0; i < block.count; i += kQuad) {
        encode_ratio<V>(between.exp_avg, roots, dither.moment, dither.nearest, ratio_code, i);
    }
    pending.moment_word = dither.moment;
    pending.root_code = static_cast<uint8_t *>(block.exp_avg_sq);
    encode_roots<V>(pending, block.count);
}

}  // namespace

#endif
