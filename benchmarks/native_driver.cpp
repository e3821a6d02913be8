// Steps a parameter of N elements S times on one thread, for benchmarks/bench_native_instructions.py.
// Usage: native_driver ISA(number) DTYPE(0 float32, 1 bfloat16) CODED(0, 1) MASTER(kind) N S
#include <stdio.h>
#include <stdlib.h>

#include <vector>

#include "../lowmem_adam/native/lowmem_adam.h"

int main(int argc, char **argv) {
    if (argc != 7) return 2;
    const int isa = atoi(argv[1]), dtype = atoi(argv[2]), coded = atoi(argv[3]), kind = atoi(argv[4]), steps = atoi(argv[6]);
    const int64_t n = atoll(argv[5]), cols = 1024, rows = n / cols;
    std::vector<float> wide_param(static_cast<size_t>(n)), wide_grad(static_cast<size_t>(n));
    std::vector<uint16_t> param(static_cast<size_t>(n)), grad(static_cast<size_t>(n));
    uint32_t state = 1;
    for (size_t i = 0; i < static_cast<size_t>(n); ++i) {
        state = state * 1664525u + 1013904223u;
        wide_param[i] = static_cast<float>(state >> 8) * 0x1p-24f - 0.5f;
        state = state * 1664525u + 1013904223u;
        wide_grad[i] = (static_cast<float>(state >> 8) * 0x1p-24f - 0.5f) * 1e-3f;
        param[i] = static_cast<uint16_t>(0x3F00u | (state & 0xFFu));
        grad[i] = static_cast<uint16_t>(0x3A00u | (state >> 8 & 0x80FFu));
    }
    std::vector<float> moments(static_cast<size_t>(2 * n)), master(static_cast<size_t>(n));
    for (size_t i = 0; kind == LOWMEM_ADAM_MASTER_FLOAT32 && i < static_cast<size_t>(n); ++i) {
        const uint32_t bits = static_cast<uint32_t>(param[i]) << 16;
        __builtin_memcpy(&master[i], &bits, sizeof bits);
    }
    std::vector<uint8_t> metadata(static_cast<size_t>(2 * n / 128));
    struct lowmem_adam_fragment f = {};
    f.param = {dtype ? static_cast<void *>(param.data()) : wide_param.data(), nullptr, dtype, 0};
    f.grad = {dtype ? static_cast<void *>(grad.data()) : wide_grad.data(), nullptr, dtype, 0};
    f.exp_avg = moments.data();
    f.exp_avg_sq = moments.data() + n;
    f.block_floor = coded ? metadata.data() : nullptr;
    f.block_span = coded ? metadata.data() + n / 128 : nullptr;
    f.master = kind ? master.data() : nullptr;
    f.master_kind = kind;
    f.rows = rows;
    f.cols = cols;
    f.block_size = 128;
    f.end_block = n / 128;
    for (int step = 1; step <= steps; ++step) {
        const struct lowmem_adam_scalars s = {0.9f,   0.1f, 0.999f, 0.001f, 1e-8f, 0.0f, 0.99999f,
                                              1e-3f, 1.0f, dtype != 0, 1, 0, 12345u, static_cast<uint32_t>(step)};
        int64_t skipped;
        if (lowmem_adam_step(&f, 1, &s, 1, 1, isa, &skipped)) return 1;
    }
    return 0;
}
