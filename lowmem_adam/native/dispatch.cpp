// The C interface: checks, the choice of instruction set, and the split of all fragments' blocks over threads.
#include <atomic>
#include <system_error>
#include <thread>
#include <vector>

#include "cpu.h"
#include "dynamic_map.h"
#include "format.h"
#include "work.h"

#ifdef _OPENMP
#include <omp.h>
#endif
#if defined(__unix__) || defined(__APPLE__)
#include <dlfcn.h>
#include <pthread.h>
#define LOWMEM_ADAM_POSIX 1
#endif

// ---------------------------------------------------------------- tables

namespace {

// Of `count` values in rising order: dynamic_map.thresholds.
void fill_bins(int32_t (&bins)[kBins], const uint32_t *values, int count) {
    int nearest = 0;
    for (int32_t bin = 0; bin < kBins; ++bin) {
        const uint32_t upper = static_cast<uint32_t>(kLowestBin + bin) << 16;
        uint32_t threshold = UINT32_MAX;  // the largest number that this value is the nearest to
        if (nearest + 1 < count) {
            const double middle = (static_cast<double>(float_of_bits(values[nearest])) +
                                   static_cast<double>(float_of_bits(values[nearest + 1]))) / 2;
            threshold = bits_of_float(static_cast<float>(middle));
            if (static_cast<double>(float_of_bits(threshold)) > middle) --threshold;
        }
        const bool ends_here = threshold - upper <= 0xFFFF;
        const uint32_t rest = ends_here ? 0xFFFF - (threshold - upper) : 0;
        bins[bin] = static_cast<int32_t>(static_cast<uint32_t>(nearest) << 16 | rest);
        nearest += ends_here;
    }
}

}  // namespace

DynamicTables::DynamicTables() {
    for (int i = 0; i < 256; ++i) values[0][i] = float_of_bits(kUnsignedValues[i]);
    for (int i = 0; i <= kSignedZero + 1; ++i) values[1][kSignedZero + i] = float_of_bits(kSignedValues[i]);
    for (int i = 1; i <= kSignedZero; ++i) values[1][kSignedZero - i] = -float_of_bits(kSignedValues[i]);
    fill_bins(bins[0], kUnsignedValues, 256);
    fill_bins(bins[1], kSignedValues, kSignedZero + 2);
}

const DynamicTables lowmem_adam_dynamic_tables;

namespace {

// ---------------------------------------------------------------- instruction sets

StepBlocks function_of(int32_t isa) {
    switch (isa) {
        case LOWMEM_ADAM_SCALAR:
            return lowmem_adam_step_blocks_scalar;
#ifdef LOWMEM_ADAM_X86
        case LOWMEM_ADAM_AVX2:
            return host_cpu().avx2 ? lowmem_adam_step_blocks_avx2 : nullptr;
        case LOWMEM_ADAM_AVX512:
            return host_cpu().avx512 ? lowmem_adam_step_blocks_avx512 : nullptr;
#endif
#ifdef LOWMEM_ADAM_ARM64
        case LOWMEM_ADAM_NEON:
            return lowmem_adam_step_blocks_neon;
#endif
        default:
            return nullptr;
    }
}

// ---------------------------------------------------------------- forks

// Threads do not survive a fork: a parallel region in the child would wait for them for ever.
std::atomic<bool> in_forked_child{false};

#ifdef LOWMEM_ADAM_POSIX
void note_fork() { in_forked_child = true; }
const int registered = pthread_atfork(nullptr, nullptr, note_fork);
#endif

// ---------------------------------------------------------------- checks

bool good_tensor(const lowmem_adam_tensor &t, int64_t numel) {
    if (t.dims == 0) return true;
    if (t.dims < 0 || t.dims > LOWMEM_ADAM_MAX_DIMS || !t.shape) return false;
    int64_t elements = 1;
    for (int d = 0; d < t.dims; ++d) {
        if (t.shape[d] < 1) return false;
        elements *= t.shape[d];
    }
    return elements == numel;
}

int64_t blocks_per_row(const lowmem_adam_fragment &f) { return f.cols / f.block_size + (f.cols % f.block_size != 0); }

// Elements before a block.
int64_t block_start(const lowmem_adam_fragment &f, int64_t block) {
    const int64_t per_row = blocks_per_row(f);
    return block / per_row * f.cols + block % per_row * f.block_size;
}

int32_t check(const lowmem_adam_fragment &f, int64_t scalars_count) {
    if (f.rows < 0 || f.cols < 0 || f.scalars < 0 || f.scalars >= scalars_count) return LOWMEM_ADAM_BAD_LAYOUT;
    if (f.block_size != kBlockSize && f.block_size != kFlatBlockSize) return LOWMEM_ADAM_BAD_LAYOUT;
    int64_t blocks, elements;
    if (__builtin_mul_overflow(f.rows, blocks_per_row(f), &blocks) ||
        __builtin_mul_overflow(f.rows, f.cols, &elements) || elements > INT64_MAX / 8 || f.first_block < 0 ||
        f.first_block > f.end_block || f.end_block > blocks) {
        return LOWMEM_ADAM_BAD_LAYOUT;
    }
    const int32_t p = f.param.dtype, g = f.grad.dtype;
    if (p < LOWMEM_ADAM_FLOAT32 || p > LOWMEM_ADAM_FLOAT16 || (g != p && g != LOWMEM_ADAM_FLOAT32)) {
        return LOWMEM_ADAM_BAD_DTYPE;
    }
    if (f.master_kind < LOWMEM_ADAM_NO_MASTER || f.master_kind > LOWMEM_ADAM_MASTER_INT8 ||
        (f.master_kind != LOWMEM_ADAM_NO_MASTER && p == LOWMEM_ADAM_FLOAT32)) {
        return LOWMEM_ADAM_BAD_DTYPE;
    }
    if (f.first_block == f.end_block) return LOWMEM_ADAM_OK;
    const int64_t numel = block_start(f, f.end_block) - block_start(f, f.first_block);
    if (!good_tensor(f.param, numel) || !good_tensor(f.grad, numel)) return LOWMEM_ADAM_BAD_LAYOUT;
    if (!f.param.data || !f.grad.data || !f.exp_avg || !f.exp_avg_sq || !f.block_floor != !f.block_span ||
        !f.absmax1 != !f.absmax2 ||
        !f.master != (f.master_kind == LOWMEM_ADAM_NO_MASTER)) {
        return LOWMEM_ADAM_BAD_POINTER;
    }
    if ((f.block_floor && f.block_size != kBlockSize) || (f.absmax1 && f.block_size != kFlatBlockSize) ||
        (f.block_floor && f.absmax1)) {
        return LOWMEM_ADAM_BAD_LAYOUT;
    }
    return LOWMEM_ADAM_OK;
}

// ---------------------------------------------------------------- threads

// All blocks of all fragments as one list, handed out piece by piece: a thread that is held up does fewer of them.
class WorkList {
   public:
    WorkList(const lowmem_adam_fragment *fragments, int64_t count, const lowmem_adam_scalars *scalars, StepBlocks step)
        : fragments_(fragments), scalars_(scalars), step_(step), ends_(static_cast<size_t>(count)) {
        for (int64_t i = 0; i < count; ++i) {
            total_ += fragments[i].end_block - fragments[i].first_block;
            ends_[static_cast<size_t>(i)] = total_;
        }
    }

    int64_t total() const { return total_; }

    // Pieces of some 16 a thread, none smaller than is worth a trip to the shared counter (8,192 elements).
    void split(int threads) {
        piece_ = total_ / (static_cast<int64_t>(threads) * 16);
        if (piece_ < 64) piece_ = 64;
        if (threads == 1) piece_ = total_;
    }

    // What each thread runs, until nothing is left.
    void work() {
        const FloatMode default_mode;
        int64_t skipped = 0;
        for (;;) {
            const int64_t first = next_.fetch_add(piece_, std::memory_order_relaxed);
            if (first >= total_) break;
            skipped += step(first, first + piece_ < total_ ? first + piece_ : total_);
        }
        skipped_.fetch_add(skipped, std::memory_order_relaxed);
    }

    int64_t skipped() const { return skipped_; }

   private:
    // The fragment that entry `at` of the list belongs to: the first whose end lies beyond it.
    size_t fragment_at(int64_t at) const {
        size_t low = 0, high = ends_.size() - 1;
        while (low < high) {
            const size_t middle = (low + high) / 2;
            if (ends_[middle] > at) {
                high = middle;
            } else {
                low = middle + 1;
            }
        }
        return low;
    }

    int64_t step(int64_t first, int64_t end) const {
        int64_t skipped = 0;
        for (size_t i = fragment_at(first); first < end; ++i) {
            const lowmem_adam_fragment &f = fragments_[i];
            const int64_t stop = ends_[i] < end ? ends_[i] : end;
            if (stop == first) continue;  // a fragment without blocks
            const int64_t to_block = f.end_block - ends_[i];
            skipped += step_(f, scalars_[f.scalars], first + to_block, stop + to_block);
            first = stop;
        }
        return skipped;
    }

    const lowmem_adam_fragment *fragments_;
    const lowmem_adam_scalars *scalars_;
    StepBlocks step_;
    std::vector<int64_t> ends_;
    int64_t total_ = 0;
    int64_t piece_ = 1;
    std::atomic<int64_t> next_{0};
    std::atomic<int64_t> skipped_{0};
};

void run(WorkList &list, int threads) {
#ifdef _OPENMP
    if (threads > 1) {
#pragma omp parallel num_threads(threads)
        list.work();
        return;
    }
#else
    std::vector<std::thread> others;
    try {
        for (int i = 1; i < threads; ++i) others.emplace_back([&list] { list.work(); });
    } catch (const std::system_error &) {
        // No more threads to be had: those that run do the work.
    }
    list.work();
    for (std::thread &other : others) other.join();
    return;
#endif
    list.work();
}

}  // namespace

// ---------------------------------------------------------------- the interface

int32_t lowmem_adam_abi_version(void) { return LOWMEM_ADAM_ABI_VERSION; }

struct lowmem_adam_format lowmem_adam_format(void) { return kFormat; }

const float *lowmem_adam_dynamic_map(int32_t is_signed) {
    return lowmem_adam_dynamic_tables.values[is_signed != 0];
}

int32_t lowmem_adam_has_isa(int32_t isa) { return function_of(isa) != nullptr; }

int32_t lowmem_adam_best_isa(void) {
    for (const int32_t isa : {LOWMEM_ADAM_AVX512, LOWMEM_ADAM_AVX2, LOWMEM_ADAM_NEON}) {
        if (function_of(isa)) return isa;
    }
    return LOWMEM_ADAM_SCALAR;
}

const char *lowmem_adam_openmp_library(void) {
#ifdef _OPENMP
#ifdef LOWMEM_ADAM_POSIX
    Dl_info info;
    if (dladdr(reinterpret_cast<void *>(&omp_get_max_threads), &info) && info.dli_fname) return info.dli_fname;
#endif
    return "";
#else
    return nullptr;
#endif
}

int32_t lowmem_adam_step(const struct lowmem_adam_fragment *fragments, int64_t count,
                         const struct lowmem_adam_scalars *scalars, int64_t scalars_count, int32_t num_threads,
                         int32_t isa, int64_t *skipped) {
    const StepBlocks step = function_of(isa == LOWMEM_ADAM_BEST ? lowmem_adam_best_isa() : isa);
    if (!step) return LOWMEM_ADAM_BAD_ISA;
    if (num_threads < 1) return LOWMEM_ADAM_BAD_THREADS;
    if (num_threads > 1 && in_forked_child) return LOWMEM_ADAM_FORKED;
    if (count < 0) return LOWMEM_ADAM_BAD_LAYOUT;
    if (!skipped || (count > 0 && (!fragments || !scalars))) return LOWMEM_ADAM_BAD_POINTER;
    for (int64_t i = 0; i < count; ++i) {
        const int32_t status = check(fragments[i], scalars_count);
        if (status != LOWMEM_ADAM_OK) return status;
    }
    WorkList list(fragments, count, scalars, step);
    // A thread takes at least 64 blocks, or waking it costs more than it does.
    const int64_t useful = list.total() / 64;
    const int threads = useful < num_threads ? (useful > 1 ? static_cast<int>(useful) : 1) : num_threads;
    list.split(threads);
    run(list, threads);
    *skipped = list.skipped();
    return LOWMEM_ADAM_OK;
}
