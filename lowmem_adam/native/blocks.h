// From a fragment to its blocks: where each lies, what of it has to be copied to whole vectors first, and on which path
// it goes. Compiled by each instruction set (isa_*.cpp).
#ifndef LOWMEM_ADAM_BLOCKS_H
#define LOWMEM_ADAM_BLOCKS_H

#include <stddef.h>

#include <type_traits>

#include "coded.h"
#include "dynamic.h"

namespace {

// Memory offsets of consecutive elements of a tensor that is not contiguous.
class Walk {
   public:
    Walk(const lowmem_adam_tensor &t, int64_t index) : dims_(t.dims), sizes_(t.shape), strides_(t.shape + t.dims) {
        for (int d = dims_ - 1; d >= 0; --d) {
            at_[d] = index % sizes_[d];
            index /= sizes_[d];
            offset_ += at_[d] * strides_[d];
        }
    }
    int64_t next() {
        const int64_t here = offset_;
        for (int d = dims_ - 1; d >= 0; --d) {
            offset_ += strides_[d];
            if (++at_[d] < sizes_[d]) break;
            offset_ -= at_[d] * strides_[d];
            at_[d] = 0;
        }
        return here;
    }

   private:
    const int dims_;
    const int64_t *sizes_;
    const int64_t *strides_;
    int64_t at_[LOWMEM_ADAM_MAX_DIMS];
    int64_t offset_ = 0;
};

template <class T>
inline void copy_in(T *to, const lowmem_adam_tensor &from, int64_t start, int n, int count) {
    const T *data = static_cast<const T *>(from.data);
    if (from.dims == 0) {
        __builtin_memcpy(to, data + start, static_cast<size_t>(n) * sizeof(T));
    } else {
        Walk walk(from, start);
        for (int i = 0; i < n; ++i) to[i] = data[walk.next()];
    }
    __builtin_memset(to + n, 0, static_cast<size_t>(count - n) * sizeof(T));
}

template <class T>
inline void copy_out(const lowmem_adam_tensor &to, const T *from, int64_t start, int n) {
    T *data = static_cast<T *>(to.data);
    if (to.dims == 0) {
        __builtin_memcpy(data + start, from, static_cast<size_t>(n) * sizeof(T));
    } else {
        Walk walk(to, start);
        for (int i = 0; i < n; ++i) data[walk.next()] = from[i];
    }
}

// How moments are held, and in blocks of at most how many elements. What codes are padded with stands for 0.
struct CodedKind {
    using First = int8_t;
    using Second = uint8_t;
    static constexpr int kSize = kBlockSize, kPadding = 0;
};
struct DynamicKind {
    using First = uint8_t;
    using Second = uint8_t;
    static constexpr int kSize = kFlatBlockSize, kPadding = kSignedZero;
};
struct FullKind {
    using First = float;
    using Second = float;
    static constexpr int kSize = kFlatBlockSize, kPadding = 0;
};

// Room for one block: short ones, and those of tensors that are not contiguous, are stepped here.
template <class P, class G, class Kind, Rounding rounding>
struct Stage {
    alignas(64) typename P::Stored param[Kind::kSize];
    alignas(64) typename G::Stored grad[Kind::kSize];
    alignas(64) typename Kind::First exp_avg[Kind::kSize];
    alignas(64) typename Kind::Second exp_avg_sq[Kind::kSize];
    alignas(64) typename Master<rounding>::Stored master[keeps_master(rounding) ? Kind::kSize : 1];
};

// Steps the blocks [first, end) of one fragment.
template <class V, class P, class G, class Kind, Rounding rounding>
class BlockLoop {
    using M1 = typename Kind::First;
    using M2 = typename Kind::Second;
    static constexpr bool kCoded = std::is_same<Kind, CodedKind>::value;
    static constexpr bool kDynamic = std::is_same<Kind, DynamicKind>::value;
    static constexpr bool kFull = std::is_same<Kind, FullKind>::value;
    static constexpr int kQuad = 4 * V::kLanes;

   public:
    BlockLoop(const lowmem_adam_fragment &f, const lowmem_adam_scalars &s)
        : f_(f), s_(s), h_(s), scale_(s.grad_scale < 0 ? -s.grad_scale : s.grad_scale),
          careful_(s.eps < kSmallestNormal),
          direct_(f.param.dims == 0 && f.grad.dims == 0), per_row_((f.cols + size() - 1) / size()),
          origin_(f.first_block / per_row_ * f.cols + f.first_block % per_row_ * size()) {}

    int64_t run(int64_t first, int64_t end) {
        if (careful_) {
            run_on<Path::careful>(first, end);
        } else if (s_.grad_scale != 1.0f || s_.weight_decay != 0.0f) {
            run_on<Path::scaled>(first, end);
        } else {
            run_on<Path::plain>(first, end);
        }
        return skipped_;
    }

   private:
    using Block = BlockData<P, G, rounding>;
    using Rest = typename Master<rounding>::Stored;

    // Elements of a block: of coded ones a constant.
    LOWMEM_ADAM_INLINE int size() const { return kFull ? static_cast<int>(f_.block_size) : Kind::kSize; }

    Block block_at(int64_t b, int64_t start) const {
        Block block;
        block.count = size();
        block.param = static_cast<typename P::Stored *>(f_.param.data) + start;
        block.grad = static_cast<const typename G::Stored *>(f_.grad.data) + start;
        block.exp_avg = static_cast<M1 *>(f_.exp_avg) + start;
        block.exp_avg_sq = static_cast<M2 *>(f_.exp_avg_sq) + start;
        block.floor = kCoded ? f_.block_floor + (b - f_.first_block) : nullptr;
        block.span = kCoded ? f_.block_span + (b - f_.first_block) : nullptr;
        block.absmax1 = kDynamic ? f_.absmax1 + (b - f_.first_block) : nullptr;
        block.absmax2 = kDynamic ? f_.absmax2 + (b - f_.first_block) : nullptr;
        block.master = keeps_master(rounding) ? static_cast<Rest *>(f_.master) + start : nullptr;
        return block;
    }

    // Starts to load what is 768 elements further on; beyond the end it does nothing. Float32 leaves a page every eight
    // blocks, where the processor's own prefetch stops. In 16 bits there is time enough, and instructions count.
    static LOWMEM_ADAM_INLINE void fetch_ahead(const Block &block) {
        constexpr int kAhead = 6 * kBlockSize, kLine = 64 / sizeof(float);
        for (int i = kAhead; i < kAhead + Kind::kSize; i += kLine) {
            __builtin_prefetch(block.param + i, 1);
            __builtin_prefetch(block.grad + i);
        }
    }

    template <Path path>
    LOWMEM_ADAM_INLINE void run_on(int64_t first, int64_t end) {
        int64_t row = first / per_row_, within = first % per_row_ * size();
        for (int64_t b = first; b < end; ++b) {
            const int64_t start = row * f_.cols + within - origin_;
            const int64_t left = f_.cols - within;
            if (direct_ && left >= size()) {
                const Block block = block_at(b, start);
                if ((kCoded || kDynamic) && sizeof(*block.param) == sizeof(float)) fetch_ahead(block);
                step<path>(block, b);
            } else {
                step_staged<path>(b, start, static_cast<int>(left < size() ? left : size()));
            }
            within += size();
            if (within >= f_.cols) {
                within = 0;
                ++row;
            }
        }
        flush();
    }

    // A short block, or one of a tensor that is not contiguous, by way of copies.
    template <Path path>
    __attribute__((noinline)) void step_staged(int64_t b, int64_t start, int n) {
        flush();
        Stage<P, G, Kind, rounding> stage;
        Block block = block_at(b, start);
        M1 *exp_avg = static_cast<M1 *>(block.exp_avg);
        M2 *exp_avg_sq = static_cast<M2 *>(block.exp_avg_sq);
        const size_t length = static_cast<size_t>(n);
        block.count = (n + kQuad - 1) / kQuad * kQuad;
        copy_in(stage.param, f_.param, start, n, block.count);
        copy_in(stage.grad, f_.grad, start, n, block.count);
        __builtin_memset(stage.exp_avg, Kind::kPadding, sizeof stage.exp_avg);
        __builtin_memset(stage.exp_avg_sq, 0, sizeof stage.exp_avg_sq);
        __builtin_memcpy(stage.exp_avg, exp_avg, length * sizeof(M1));
        __builtin_memcpy(stage.exp_avg_sq, exp_avg_sq, length * sizeof(M2));
        block.param = stage.param;
        block.grad = stage.grad;
        block.exp_avg = stage.exp_avg;
        block.exp_avg_sq = stage.exp_avg_sq;
        Rest *master = block.master;
        if (keeps_master(rounding)) {
            __builtin_memset(stage.master, 0, sizeof stage.master);
            __builtin_memcpy(stage.master, master, length * sizeof(Rest));
            block.master = stage.master;
        }
        step<path>(block, b);
        flush();
        copy_out(f_.param, stage.param, start, n);
        __builtin_memcpy(exp_avg, stage.exp_avg, length * sizeof(M1));
        __builtin_memcpy(exp_avg_sq, stage.exp_avg_sq, length * sizeof(M2));
        if (keeps_master(rounding)) __builtin_memcpy(master, stage.master, length * sizeof(Rest));
    }

    template <Path path>
    LOWMEM_ADAM_INLINE void step(const Block &block, int64_t b) {
        const BlockDither dither(s_, b, is_dithered(rounding));
        if (kCoded && path != Path::careful) {
            // A staged block is not whole, and never has one pending before it.
            Pending *before = pending_, &current = rooms_[before == &rooms_[0]];
            const bool stepped = coded_block<V, P, G, path, rounding>(h_, block, dither, before, current);
            pending_ = stepped ? &current : nullptr;
            pending_count_ = block.count;
            if (!stepped) step_checked<path>(block, dither);
        } else if (!kDynamic || path == Path::careful || !stepped_dynamic<path>(block, dither)) {
            step_checked<path>(block, dither);
        }
    }

    template <Path path>
    LOWMEM_ADAM_INLINE bool stepped_dynamic(const Block &block, const BlockDither &dither) {
        if constexpr (kDynamic) {
            return dynamic_block<V, P, G, path, rounding>(h_, block, dither);
        } else {
            return false;
        }
    }

    // Looks at the gradient first.
    template <Path path>
    __attribute__((noinline)) void step_checked(const Block &block, const BlockDither &dither) {
        const float largest_grad = largest<V>(G{}, block.grad, block.count) * scale_;
        const bool finite = largest_grad < __builtin_inff();
        if (s_.skip_nonfinite && !finite) {
            ++skipped_;
        } else if constexpr (kDynamic) {
            careful_dynamic_block<V, P, G, rounding>(h_, block, dither);
        } else if constexpr (kCoded) {
            careful_block<V, P, G, rounding>(h_, block, dither);
        } else if (finite) {
            full_block<V, P, G, path, rounding>(h_, block, dither);
        } else {
            full_block<V, P, G, Path::careful, rounding>(h_, block, dither);
        }
    }

    void flush() {
        if (pending_) encode_roots<V>(*pending_, pending_count_);
        pending_ = nullptr;
    }

    const lowmem_adam_fragment &f_;
    const lowmem_adam_scalars &s_;
    const Hyper<V> h_;
    const float scale_;
    const bool careful_;  // on every block
    const bool direct_;
    const int64_t per_row_;
    const int64_t origin_;  // of the fragment, in elements of the parameter
    int64_t skipped_ = 0;
    Pending rooms_[2];
    Pending *pending_ = nullptr;
    int pending_count_ = 0;
};

template <class V, class P, class G, Rounding rounding>
int64_t with_moments(const lowmem_adam_fragment &f, const lowmem_adam_scalars &s, int64_t first, int64_t end) {
    if (f.block_floor) return BlockLoop<V, P, G, CodedKind, rounding>(f, s).run(first, end);
    if (f.absmax1) return BlockLoop<V, P, G, DynamicKind, rounding>(f, s).run(first, end);
    return BlockLoop<V, P, G, FullKind, rounding>(f, s).run(first, end);
}

template <class V, class P, class G>
int64_t with_rounding(const lowmem_adam_fragment &f, const lowmem_adam_scalars &s, int64_t first, int64_t end) {
    switch (f.master_kind) {
        case LOWMEM_ADAM_MASTER_FLOAT32:
            return with_moments<V, P, G, Rounding::full>(f, s, first, end);
        case LOWMEM_ADAM_MASTER_INT16:
            return with_moments<V, P, G, Rounding::split16>(f, s, first, end);
        case LOWMEM_ADAM_MASTER_INT8:
            return with_moments<V, P, G, Rounding::split8>(f, s, first, end);
        default:
            return s.stochastic ? with_moments<V, P, G, Rounding::stochastic>(f, s, first, end)
                                : with_moments<V, P, G, Rounding::nearest>(f, s, first, end);
    }
}

template <class V, class P>
int64_t with_grad(const lowmem_adam_fragment &f, const lowmem_adam_scalars &s, int64_t first, int64_t end) {
    return f.grad.dtype == LOWMEM_ADAM_FLOAT32 ? with_rounding<V, P, Float32>(f, s, first, end)
                                               : with_rounding<V, P, P>(f, s, first, end);
}

template <class V>
int64_t step_blocks_of(const lowmem_adam_fragment &f, const lowmem_adam_scalars &s, int64_t first, int64_t end) {
    switch (f.param.dtype) {
        case LOWMEM_ADAM_BFLOAT16:
            return with_grad<V, BFloat16>(f, s, first, end);
        case LOWMEM_ADAM_FLOAT16:
            return with_grad<V, Float16>(f, s, first, end);
        default:
            return with_moments<V, Float32, Float32, Rounding::nearest>(f, s, first, end);
    }
}

}  // namespace

#endif
