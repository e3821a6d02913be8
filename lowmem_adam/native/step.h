// Adam on a block of elements: hyperparameters, moments, weight. Order and rounding of every operation are those of
// kernels/reference.py, where the reasons stand.
#ifndef LOWMEM_ADAM_STEP_H
#define LOWMEM_ADAM_STEP_H

#include "weights.h"

namespace {

// What a block needs beyond the plain operations.
enum class Path {
    plain,
    scaled,   // gradients times a factor, and decay added to them
    careful,  // also roots that are not finite, a denominator of zero, NaN
};

template <class V>
struct Hyper {
    using F = typename V::F;
    F beta1, one_minus_beta1, beta2, one_minus_beta2, eps, weight_decay, shrink, step_size, grad_scale;
    bool decays_gradient;
    bool wide;

    explicit Hyper(const lowmem_adam_scalars &s)
        : beta1(V::set(s.beta1)), one_minus_beta1(V::set(s.one_minus_beta1)), beta2(V::set(s.beta2)),
          one_minus_beta2(V::set(s.one_minus_beta2)), eps(V::set(s.eps)), weight_decay(V::set(s.weight_decay)),
          shrink(V::set(s.shrink)), step_size(V::set(s.step_size)), grad_scale(V::set(s.grad_scale)),
          decays_gradient(s.weight_decay != 0.0f), wide(s.wide != 0) {}
};

// The elements of a block: `count` of them, a multiple of four vectors; those beyond the block's own are zeros.
template <class P, class G, Rounding rounding>
struct BlockData {
    int count;
    typename P::Stored *param;
    const typename G::Stored *grad;
    void *exp_avg;     // codes or float32
    void *exp_avg_sq;  // codes or float32
    uint8_t *floor;
    uint8_t *span;
    float *absmax1;
    float *absmax2;
    typename Master<rounding>::Stored *master;
};

// Words of a block at one step, and whose turn it is.
struct BlockDither {
    uint32_t moment;
    uint32_t update;
    bool nearest;

    BlockDither(const lowmem_adam_scalars &s, int64_t block, bool dithered) {
        const uint32_t key = mix32(static_cast<uint64_t>(block) ^ s.seed_hash);
        moment = key + s.step * kFormat.moment_step;
        update = dithered ? mix32(key ^ kFormat.update_key) + s.step * kFormat.update_step : 0;
        nearest = ((static_cast<uint32_t>(block) + s.step) & 1u) == 0;
    }
};

// New moments and root; the gradient is read with the weight because L2 decay adds to it. `beta1` is h.beta1, times what
// the old first moment is still to be multiplied by.
template <class V, Path path>
LOWMEM_ADAM_INLINE void step_moments(const Hyper<V> &h, const typename V::F &beta1, const Quad<V> &weight,
                                     Quad<V> &grad, Quad<V> &exp_avg, Quad<V> &exp_avg_sq, Quad<V> &root) {
    if (path != Path::plain) four(EACH { grad.v[u] = V::mul(grad.v[u], h.grad_scale); });
    if (path != Path::plain && h.decays_gradient) {
        four(EACH { grad.v[u] = V::add(grad.v[u], V::mul(weight.v[u], h.weight_decay)); });
    }
    four(EACH { exp_avg_sq.v[u] = V::mul(exp_avg_sq.v[u], h.beta2); });
    four(EACH {
        exp_avg_sq.v[u] = V::add(exp_avg_sq.v[u], V::mul(V::mul(grad.v[u], h.one_minus_beta2), grad.v[u]));
    });
    four(EACH { root.v[u] = V::sqrt(exp_avg_sq.v[u]); });
    four(EACH {
        exp_avg.v[u] = V::add(V::mul(exp_avg.v[u], beta1), V::mul(grad.v[u], h.one_minus_beta1));
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

// A block whose moments are float32.
template <class V, class P, class G, Path path, Rounding rounding>
inline void full_block(const Hyper<V> &h, const BlockData<P, G, rounding> &block, const BlockDither &dither) {
    float *exp_avgs = static_cast<float *>(block.exp_avg), *exp_avg_sqs = static_cast<float *>(block.exp_avg_sq);
    for (int i = 0; i < block.count; i += 4 * V::kLanes) {
        Quad<V> weight, grad, exp_avg, exp_avg_sq, root;
        weight = load_weight<V, rounding>(P{}, block.param, block.master, i);
        four(EACH { grad.v[u] = widen<V>(G{}, block.grad + i + u * V::kLanes); });
        four(EACH { exp_avg.v[u] = V::load(exp_avgs + i + u * V::kLanes); });
        four(EACH { exp_avg_sq.v[u] = V::load(exp_avg_sqs + i + u * V::kLanes); });
        step_moments<V, path>(h, h.beta1, weight, grad, exp_avg, exp_avg_sq, root);
        step_weight<V, path>(h, weight, exp_avg, root);
        four(EACH { V::store(exp_avgs + i + u * V::kLanes, exp_avg.v[u]); });
        four(EACH { V::store(exp_avg_sqs + i + u * V::kLanes, exp_avg_sq.v[u]); });
        // fp32 moments may hold a NaN of any bits.
        store_weight<V, rounding, true>(P{}, block.param, block.master, weight, dither.update, i);
    }
}

}  // namespace

#endif
