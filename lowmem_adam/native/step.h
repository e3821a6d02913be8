// The step, written once over a vector type; each instruction set compiles it for itself (isa_*.cpp).
//
// Order and rounding of every operation are those of kernels/reference.py and codec.py, where the reasons stand. Here
// only what makes them cheap: a block of 128 elements is read, stepped and written in one go. A first pass decodes,
// steps the parameter and codes the first moment, and leaves the roots in a buffer of half a KiB; when their grid is
// known, a second pass codes them.
#ifndef LOWMEM_ADAM_STEP_H
#define LOWMEM_ADAM_STEP_H

#include <stddef.h>
#include <stdint.h>

#include "format.h"

namespace {

constexpr uint32_t kInfinityBits = 0x7F800000;
struct Float32 {
    using Stored = float;
};
struct BFloat16 {
    using Stored = uint16_t;
};
struct Float16 {
    using Stored = uint16_t;
};

// Lane i of a block adds i times the Weyl increment to its block's word.
struct LaneWords {
    alignas(64) int32_t words[kBlockSize];
    constexpr explicit LaneWords(uint32_t increment) : words() {
        for (int i = 0; i < kBlockSize; ++i) words[i] = static_cast<int32_t>(increment * static_cast<uint32_t>(i));
    }
};
constexpr LaneWords kMomentLanes(kFormat.moment_lane);
constexpr LaneWords kUpdateLanes(kFormat.update_lane);

// What a block needs beyond the plain operations.
enum class Path {
    plain,
    scaled,   // gradients times a factor
    careful,  // also decay of the gradient, roots that are not finite, a denominator of zero, NaN
};

template <class V>
struct Hyper {
    using F = typename V::F;
    F beta1, one_minus_beta1, beta2, one_minus_beta2, eps, weight_decay, shrink, step_size, grad_scale;
    bool decays_gradient;

    explicit Hyper(const lowmem_adam_scalars &s)
        : beta1(V::set(s.beta1)), one_minus_beta1(V::set(s.one_minus_beta1)), beta2(V::set(s.beta2)),
          one_minus_beta2(V::set(s.one_minus_beta2)), eps(V::set(s.eps)), weight_decay(V::set(s.weight_decay)),
          shrink(V::set(s.shrink)), step_size(V::set(s.step_size)),
          grad_scale(V::set(s.grad_scale)), decays_gradient(s.weight_decay != 0.0f) {}
};

// Four vectors go through each stage side by side: one vector's chain of operations is long, and a processor looks
// ahead too few instructions to find the next vector's.
template <class V>
struct Quad {
    typename V::F v[4];
};

#define EACH [&](int u) __attribute__((always_inline))

template <class Stage>
LOWMEM_ADAM_INLINE void four(Stage stage) {
    stage(0);
    stage(1);
    stage(2);
    stage(3);
}

// ---------------------------------------------------------------- elements

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

// ---------------------------------------------------------------- Adam

// New moments and root; the gradient is read with the weight because L2 decay adds to it.
template <class V, Path path>
LOWMEM_ADAM_INLINE void step_moments(const Hyper<V> &h, const Quad<V> &weight, Quad<V> &grad, Quad<V> &exp_avg,
                                     Quad<V> &exp_avg_sq, Quad<V> &root) {
    if (path != Path::plain) four(EACH { grad.v[u] = V::mul(grad.v[u], h.grad_scale); });
    if (path == Path::careful && h.decays_gradient) {
        four(EACH { grad.v[u] = V::add(grad.v[u], V::mul(weight.v[u], h.weight_decay)); });
    }
    four(EACH { exp_avg_sq.v[u] = V::mul(exp_avg_sq.v[u], h.beta2); });
    four(EACH {
        exp_avg_sq.v[u] = V::add(exp_avg_sq.v[u], V::mul(V::mul(grad.v[u], h.one_minus_beta2), grad.v[u]));
    });
    four(EACH { root.v[u] = V::sqrt(exp_avg_sq.v[u]); });
    four(EACH {
        exp_avg.v[u] = V::add(V::mul(exp_avg.v[u], h.beta1), V::mul(grad.v[u], h.one_minus_beta1));
    });
}

template <class V, Path path>
LOWMEM_ADAM_INLINE void step_weight(const Hyper<V> &h, Quad<V> &weight, const Quad<V> &exp_avg, const Quad<V> &root) {
    Quad<V> update;
    four(EACH {
        const typename V::F denominator = V::add(root.v[u], h.eps);
        update.v[u] = V::div(V::mul(exp_avg.v[u], h.step_size), denominator);
        if (path == Path::careful) {
            update.v[u] = V::select(V::equal(denominator, V::set(0.0f)), V::set(0.0f), update.v[u]);
        }
    });
    four(EACH { weight.v[u] = V::sub(V::mul(weight.v[u], h.shrink), update.v[u]); });
}

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

// The grid of one block, as decode and encode need it.
struct GridBits {
    int32_t floor;
    int32_t per_code;

    GridBits(uint8_t block_floor, uint8_t block_span)
        : floor((block_floor > 0 ? block_floor : 1) << kMantissaBits),
          per_code(((block_span > 0 ? block_span : 1) << kMantissaBits) / kFormat.root_intervals) {}
};

// ---------------------------------------------------------------- a block

// The elements of a block: `count` of them, a multiple of four vectors; those beyond the block's own are zeros.
template <class P, class G>
struct BlockData {
    int count;
    typename P::Stored *param;
    const typename G::Stored *grad;
    void *exp_avg;     // int8 codes or float32
    void *exp_avg_sq;  // uint8 codes or float32
    uint8_t *floor;
    uint8_t *span;
};

// Words of a block at one step, and whose turn it is.
struct BlockDither {
    uint32_t moment;
    uint32_t update;
    bool nearest;

    BlockDither(const lowmem_adam_scalars &s, int64_t block, bool stochastic) {
        const uint32_t key = mix32(static_cast<uint64_t>(block) ^ s.seed_hash);
        moment = key + s.step * kFormat.moment_step;
        update = stochastic ? mix32(key ^ kFormat.update_key) + s.step * kFormat.update_step : 0;
        nearest = ((static_cast<uint32_t>(block) + s.step) & 1u) == 0;
    }
};

// What the passes over a block hand on to one another; it stays in the first-level cache. There is a pass for each short
// chain of operations: of a short one the processor has many vectors under way at a time.
struct Between {
    alignas(64) float ratio[kBlockSize];  // as decoded; later the roots that the new ratios refer to, if not the same
    alignas(64) float exp_avg[kBlockSize];
    alignas(64) float root[kBlockSize];
};

// Decodes the first moment's ratio. The codes come times 2^24, which the quotient does not see.
template <class V>
LOWMEM_ADAM_INLINE void decode_ratio(const int8_t *ratio_code, Between &between, int i) {
    const typename V::F levels = V::set(static_cast<float>(kFormat.ratio_scale) * 0x1p24f);
    typename V::I codes[4];
    V::load_codes(ratio_code + i, codes);
    four(EACH {
        const typename V::F level = V::to_float(codes[u]);
        V::store(between.ratio + i + u * V::kLanes, V::div(level, V::sub(levels, V::abs(level))));
    });
}

// Decodes the root, steps the moments, and follows the range of the new roots.
template <class V, class P, class G, Path path>
class MomentsPass {
    using F = typename V::F;
    using I = typename V::I;

   public:
    LOWMEM_ADAM_INLINE MomentsPass(const Hyper<V> &h, const BlockData<P, G> &block, Between &between)
        : h_(h), block_(block), between_(between), highest_(V::seti(0)), lowest_(V::seti(-1)) {
        const GridBits grid(*block.floor, *block.span);
        per_code_ = V::seti(grid.per_code);
        base_ = V::seti(grid.floor - grid.per_code);
    }

    LOWMEM_ADAM_INLINE void quad(int i) {
        Quad<V> weight, grad, exp_avg, exp_avg_sq, root;
        I codes[4];
        V::load_codes(static_cast<const uint8_t *>(block_.exp_avg_sq) + i, codes);
        four(EACH {
            root.v[u] = V::bits_to_float(V::where_positive(codes[u], V::addi(V::muli(codes[u], per_code_), base_)));
        });
        four(EACH { exp_avg_sq.v[u] = V::mul(root.v[u], root.v[u]); });
        four(EACH { exp_avg.v[u] = V::mul(V::load(between_.ratio + i + u * V::kLanes), root.v[u]); });
        if (path == Path::careful) {
            four(EACH { weight.v[u] = widen<V>(P{}, block_.param + i + u * V::kLanes); });
        }
        four(EACH { grad.v[u] = widen<V>(G{}, block_.grad + i + u * V::kLanes); });
        step_moments<V, path>(h_, weight, grad, exp_avg, exp_avg_sq, root);
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
    const BlockData<P, G> block_;
    Between &between_;
    I per_code_, base_, highest_, lowest_;
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
    *floor = static_cast<uint8_t>(empty ? 0 : exponent);
    *span = static_cast<uint8_t>(empty ? 0 : above - exponent);
    const GridBits grid(*floor, *span);
    return {grid.floor, 1.0f / static_cast<float>(grid.per_code), zeros, !empty && cap > bottom};
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
template <class V, class P, Path path, bool stochastic>
LOWMEM_ADAM_INLINE void weight_quad(const Hyper<V> &h, typename P::Stored *param, const Between &between,
                                    uint32_t update_word, int i) {
    Quad<V> weight, exp_avg, root;
    four(EACH { weight.v[u] = widen<V>(P{}, param + i + u * V::kLanes); });
    four(EACH { exp_avg.v[u] = V::load(between.exp_avg + i + u * V::kLanes); });
    four(EACH { root.v[u] = V::load(between.root + i + u * V::kLanes); });
    step_weight<V, path>(h, weight, exp_avg, root);
    narrow<V, stochastic, path == Path::careful>(P{}, param + i, weight.v, update_word, i);
}

// What the ratios refer to: the roots, but none below 2^-126.
template <class V>
const float *positive_roots(Between &between, int count) {
    for (int i = 0; i < count; i += V::kLanes) {
        V::store(between.ratio + i, V::max(V::load(between.root + i), V::set(kSmallestNormal)));
    }
    return between.ratio;
}

// Codes the first moment: codec.encode_ratio.
template <class V>
LOWMEM_ADAM_INLINE void encode_ratio(const float *exp_avgs, const float *roots, uint32_t moment_word, bool nearest,
                                     int8_t *ratio_code, int i) {
    using F = typename V::F;
    const F scale = V::set(static_cast<float>(kFormat.ratio_scale));
    const F limit = V::set(static_cast<float>(kFormat.ratio_always_dithered));
    Quad<V> exp_avg, ratio;
    typename V::I codes[4];
    four(EACH { exp_avg.v[u] = V::load(exp_avgs + i + u * V::kLanes); });
    four(EACH { ratio.v[u] = V::add(V::load(roots + i + u * V::kLanes), V::abs(exp_avg.v[u])); });
    ratio = reciprocal(ratio);
    four(EACH { ratio.v[u] = V::mul(V::mul(exp_avg.v[u], ratio.v[u]), scale); });
    four(EACH {
        codes[u] = V::addi(V::loadi(kMomentLanes.words + i + u * V::kLanes),
                           V::seti(static_cast<int32_t>(moment_word)));
    });
    if (nearest) {
        four(EACH { codes[u] = V::where(V::greater(V::abs(ratio.v[u]), limit), codes[u]); });
    }
    // Without a word this is 128.5.
    four(EACH { codes[u] = V::and_xor(codes[u], V::seti(0xFFFF), V::seti(0x43008000)); });
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
template <class V, class P, class G, Path path, bool stochastic>
LOWMEM_ADAM_INLINE bool coded_block(const Hyper<V> &h, const BlockData<P, G> block, const BlockDither dither,
                                    const Pending *before, Pending &current) {
    // By value, so that no store to memory makes the compiler read pointers again.
    constexpr int kQuad = 4 * V::kLanes;
    int8_t *ratio_code = static_cast<int8_t *>(block.exp_avg);
    Between &between = current.between;
    if (before) {
        const RootPass<V> roots = root_pass<V>(*before);
        for (int i = 0; i < kBlockSize; i += kQuad) {
            decode_ratio<V>(ratio_code, between, i);
            roots.quad(i);
        }
    } else {
        for (int i = 0; i < block.count; i += kQuad) decode_ratio<V>(ratio_code, between, i);
    }

    MomentsPass<V, P, G, path> moments(h, block, between);
    for (int i = 0; i < block.count; i += kQuad) moments.quad(i);
    const uint32_t highest = moments.highest(), lowest = moments.lowest();
    if (highest >= kInfinityBits) return false;
    current.grid = lowest > 0 ? choose_grid(highest, lowest, false, block.floor, block.span)
                              : choose_grid_with_zeros<V>(between, block.count, block.floor, block.span);
    current.moment_word = dither.moment;
    current.root_code = static_cast<uint8_t *>(block.exp_avg_sq);

    const float *roots = current.grid.zeros ? positive_roots<V>(between, block.count) : between.root;
    for (int i = 0; i < block.count; i += kQuad) {
        weight_quad<V, P, path, stochastic>(h, block.param, between, dither.update, i);
        encode_ratio<V>(between.exp_avg, roots, dither.moment, dither.nearest, ratio_code, i);
    }
    return true;
}

// Whatever there is: decay in the gradient, a denominator of zero, roots and moments that are not finite.
template <class V, class P, class G, bool stochastic>
void careful_block(const Hyper<V> &h, const BlockData<P, G> &block, const BlockDither &dither) {
    using F = typename V::F;
    constexpr int kQuad = 4 * V::kLanes;
    int8_t *ratio_code = static_cast<int8_t *>(block.exp_avg);
    Pending pending;
    Between &between = pending.between;
    for (int i = 0; i < block.count; i += kQuad) decode_ratio<V>(ratio_code, between, i);
    MomentsPass<V, P, G, Path::careful> moments(h, block, between);
    for (int i = 0; i < block.count; i += kQuad) moments.quad(i);
    for (int i = 0; i < block.count; i += kQuad) {
        weight_quad<V, P, Path::careful, stochastic>(h, block.param, between, dither.update, i);
    }

    // What is not finite does not count for the grid; stand-ins are coded for it.
    alignas(64) bool counted[kBlockSize];
    for (int i = 0; i < block.count; ++i) {
        counted[i] = between.root[i] < __builtin_inff();
        if (!counted[i]) between.root[i] = 0.0f;
    }
    pending.grid = choose_grid_with_zeros<V>(between, block.count, block.floor, block.span);
    for (int i = 0; i < block.count; ++i) {
        if (!counted[i]) between.root[i] = kLargestRoot;
    }
    for (int i = 0; i < block.count; i += V::kLanes) {
        F exp_avg = V::load(between.exp_avg + i);
        exp_avg = V::select(V::is_nan(exp_avg), V::set(0.0f), exp_avg);
        V::store(between.exp_avg + i, V::max(V::min(exp_avg, V::set(kLargestMoment)), V::set(-kLargestMoment)));
    }
    const float *roots = positive_roots<V>(between, block.count);
    for (int i = 0; i < block.count; i += kQuad) {
        encode_ratio<V>(between.exp_avg, roots, dither.moment, dither.nearest, ratio_code, i);
    }
    pending.moment_word = dither.moment;
    pending.root_code = static_cast<uint8_t *>(block.exp_avg_sq);
    encode_roots<V>(pending, block.count);
}

template <class V, class P, class G, Path path, bool stochastic>
inline void full_block(const Hyper<V> &h, const BlockData<P, G> &block, const BlockDither &dither) {
    float *exp_avgs = static_cast<float *>(block.exp_avg), *exp_avg_sqs = static_cast<float *>(block.exp_avg_sq);
    for (int i = 0; i < block.count; i += 4 * V::kLanes) {
        Quad<V> weight, grad, exp_avg, exp_avg_sq, root;
        four(EACH { weight.v[u] = widen<V>(P{}, block.param + i + u * V::kLanes); });
        four(EACH { grad.v[u] = widen<V>(G{}, block.grad + i + u * V::kLanes); });
        four(EACH { exp_avg.v[u] = V::load(exp_avgs + i + u * V::kLanes); });
        four(EACH { exp_avg_sq.v[u] = V::load(exp_avg_sqs + i + u * V::kLanes); });
        step_moments<V, path>(h, weight, grad, exp_avg, exp_avg_sq, root);
        step_weight<V, path>(h, weight, exp_avg, root);
        four(EACH { V::store(exp_avgs + i + u * V::kLanes, exp_avg.v[u]); });
        four(EACH { V::store(exp_avg_sqs + i + u * V::kLanes, exp_avg_sq.v[u]); });
        narrow<V, stochastic, path == Path::careful>(P{}, block.param + i, weight.v, dither.update, i);
    }
}

}  // namespace

#endif
