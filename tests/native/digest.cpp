// Steps many deterministic cases with one instruction set of the native library and prints a hash of each group's
// results, so that instruction sets can be compared across machines, emulators and compilers: every line must be the
// same everywhere.
//
//   digest list   the instruction sets that the library has and this processor can run, one a line
//   digest ISA    `dtype+gradient's dtype/moments/what is kept/group hash` for each group
//
// Numbers are put together from bits with a generator of its own: a library's random numbers or powers may differ
// between machines. Each group is stepped twice, whole on one thread and cut as far as it goes on three threads; where
// the two differ, the program says so and exits with 1.
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <algorithm>
#include <string>
#include <utility>
#include <vector>

#include "digest_values.h"
#include "lowmem_adam.h"

namespace {

constexpr int64_t kBlock = 128, kFlatBlock = 256;
constexpr int kSteps = 3;
const char *const kIsas[] = {"scalar", "avx2", "avx512", "neon"};
const char *const kDtypes[] = {"float32", "bfloat16", "float16"};
const char *const kMomentNames[] = {"8bit", "32bit", "bnb8bit", "flat32bit"};
const char *const kMasters[] = {"nothing", "float32", "int16", "int8"};

// ---------------------------------------------------------------- cases

enum Moments { kCoded, kFull, kDynamic, kFlatFull };

// What a group is made for.
struct Kind {
    int32_t param, grad;
    Moments moments;
    int32_t master;  // lowmem_adam_master_kind
    bool flat() const { return moments == kDynamic || moments == kFlatFull; }
    bool full() const { return moments == kFull || moments == kFlatFull; }
    int64_t block() const { return flat() ? kFlatBlock : kBlock; }
    int64_t moment_bytes() const { return full() ? 4 : 1; }
    size_t master_bytes() const { return master == LOWMEM_ADAM_NO_MASTER ? 0 : 4u >> (master - 1); }
};

struct Case {
    Kind kind;
    int64_t rows, cols, rows_before;
    lowmem_adam_scalars scalars;
    std::vector<Values> gradients;
    // Row-major sizes and then strides; empty where contiguous.
    std::vector<int64_t> param_shape, grad_shape;
    // A block of memory for each, none larger than it must be: AddressSanitizer sees the first byte beyond.
    Bytes param, grad, exp_avg, exp_avg_sq, floor, span, absmax1, absmax2, master;

    const Float &param_type() const { return kFloats[kind.param]; }
    const Float &grad_type() const { return kFloats[kind.grad]; }
    // As blocks see it: flat ones do not keep to rows.
    int64_t layout_rows() const { return kind.flat() ? 1 : rows; }
    int64_t layout_cols() const { return kind.flat() ? rows * cols : cols; }
    int64_t per_row() const { return (layout_cols() + kind.block() - 1) / kind.block(); }
};

// All combinations, by number.
constexpr int kVariants = 3 * 3 * 3 * 2 * 2;
lowmem_adam_scalars variant(int number, Random &random) {
    const auto choose = [&number](int n) {
        const int chosen = number % n;
        number /= n;
        return chosen;
    };
    lowmem_adam_scalars s = {};
    s.beta1 = 0.9f, s.one_minus_beta1 = 0.1f, s.beta2 = 0.999f, s.one_minus_beta2 = 0.001f;
    const int decay = choose(3), scale = choose(3), eps = choose(3);
    s.weight_decay = decay == 1 ? 0.01f : 0.0f;
    s.shrink = decay == 2 ? 0.99f : 1.0f;
    s.grad_scale = scale == 0 ? 1.0f : scale == 1 ? 0.37f : -1.0f;
    s.eps = eps == 0 ? 1e-8f : eps == 1 ? 0.0f : 1e-40f;  // the last is subnormal
    s.stochastic = choose(2);
    s.skip_nonfinite = choose(2);
    s.wide = random.word() % 2;
    s.step_size = random.word() % 2 ? 0.02f : 0.3f;
    s.seed_hash = random.word();
    s.step = random.between(1, 1000);
    return s;
}

size_t extent(const std::vector<int64_t> &shape, int64_t elements) {
    if (shape.empty()) return static_cast<size_t>(elements);
    int64_t last = 0;
    for (size_t d = 0; d < shape.size() / 2; ++d) last += (shape[d] - 1) * shape[d + shape.size() / 2];
    return static_cast<size_t>(last + 1);
}

// The grids that a step can write: the ceiling of the highest is 2^64, and a block of zeros has none.
bool valid_grid(uint32_t floor, uint32_t span) {
    return floor == 0 ? span == 0 : span >= 1 && span <= 24 && floor + span <= 191;
}

void fill_state(Case &c, const std::vector<Values> &weights, const std::vector<Values> &moments, Random &random) {
    const int64_t elements = c.rows * c.cols;
    const size_t blocks = static_cast<size_t>(c.layout_rows() * c.per_row());
    c.param.resize(extent(c.param_shape, elements) * c.param_type().bytes);
    c.grad.resize(extent(c.grad_shape, elements) * c.grad_type().bytes);
    fill(c.param, c.param_type(), weights, random);
    c.master.resize(static_cast<size_t>(elements) * c.kind.master_bytes());
    if (c.kind.master == LOWMEM_ADAM_MASTER_FLOAT32) {
        fill(c.master, kFloats[LOWMEM_ADAM_FLOAT32], weights, random);
        // Two of three round to their parameters, which are contiguous then, or to what is nearly that.
        for (size_t i = 0; c.param_shape.empty() && i < static_cast<size_t>(elements); ++i) {
            uint16_t half;
            memcpy(&half, c.param.data() + 2 * i, sizeof half);
            const uint32_t bits = static_cast<uint32_t>(half) << 16 | random.word() % 0x9000;
            if (random.word() % 3) memcpy(c.master.data() + 4 * i, &bits, sizeof bits);
        }
    } else {
        for (uint8_t &byte : c.master) byte = static_cast<uint8_t>(random.word());
    }
    c.exp_avg.resize(static_cast<size_t>(elements * c.kind.moment_bytes()));
    c.exp_avg_sq.resize(c.exp_avg.size());
    if (c.kind.moments == kDynamic) {
        for (Bytes *codes : {&c.exp_avg, &c.exp_avg_sq}) {
            for (uint8_t &code : *codes) code = static_cast<uint8_t>(random.between(0, 255));
        }
        for (Bytes *scales : {&c.absmax1, &c.absmax2}) {
            scales->resize(4 * blocks);
            fill(*scales, kFloats[0], moments[0] == kModerate ? std::vector<Values>{kPositive} : moments, random);
        }
        return;
    }
    if (c.kind.full()) {
        const std::vector<Values> squares = moments[0] == kModerate ? std::vector<Values>{kPositive, kZeros} : moments;
        fill(c.exp_avg, kFloats[LOWMEM_ADAM_FLOAT32], moments, random);
        fill(c.exp_avg_sq, kFloats[LOWMEM_ADAM_FLOAT32], squares, random);
        return;
    }
    for (uint8_t &code : c.exp_avg) code = static_cast<uint8_t>(random.between(0, 254) - 127);
    for (uint8_t &code : c.exp_avg_sq) code = static_cast<uint8_t>(random.between(0, 255));
    c.floor.resize(blocks);
    c.span.resize(blocks);
    for (size_t b = 0; b < blocks; ++b) {
        uint32_t floor, span;
        do {
            // Half of them are such as gradients have, of all others the rest is made.
            floor = random.word() % 2 ? random.between(95, 127) : random.between(0, 191);
            span = floor ? random.between(1, 24) : 0;
        } while (!valid_grid(floor, span));
        c.floor[b] = static_cast<uint8_t>(floor);
        // Every second has the ratio octaves of a training with other betas.
        c.span[b] = static_cast<uint8_t>(span | (floor && random.word() % 2 ? random.between(0, 7) << 5 : 0));
    }
}

Case plain_case(const Kind &kind, int64_t rows, int64_t cols, int number, Random &random,
                const std::vector<Values> &gradients) {
    Case c = {};
    c.kind = kind, c.rows = rows, c.cols = cols, c.gradients = gradients;
    c.scalars = variant(number, random);
    fill_state(c, {kModerate}, {kModerate}, random);
    return c;
}

using Cases = std::vector<Case>;
const std::vector<Values> kUsual = {kModerate, kModerate, kSparse, kFinite, kZeros};

Cases every_variant(const Kind &kind, Random &random) {
    Cases cases;
    for (int v = 0; v < kVariants; ++v) {
        for (const std::vector<Values> &gradients : {kUsual, {kRarely, kModerate}, {kFinite}, {kTiny, kZeros}}) {
            cases.push_back(plain_case(kind, 2, 300, v, random, gradients));
        }
    }
    return cases;
}

Cases every_tail(const Kind &kind, Random &random) {
    Cases cases;
    for (int cols = 1; cols <= 260; ++cols) {
        cases.push_back(plain_case(kind, 2, cols, cols * 7 % kVariants, random, kUsual));
        cases.push_back(plain_case(kind, 1, cols, cols * 5 % kVariants, random, {kModerate}));
    }
    return cases;
}

// Weights, gradients and float32 moments of any bits.
Cases any_bits(const Kind &kind, Random &random) {
    Cases cases;
    for (int v = 0; v < kVariants; ++v) {
        cases.push_back(plain_case(kind, 3, 700, v, random, {kAnyBits, kRarely}));
        fill_state(cases.back(), {kAnyBits, kModerate}, {kFinite}, random);
        cases.push_back(plain_case(kind, 3, 200, v, random, kUsual));
        fill_state(cases.back(), {kAnyBits, kModerate}, {kAnyBits}, random);
    }
    return cases;
}

// Weights in two and three dimensions whose order in memory is another; gradients too, also such as expand() makes.
Cases strided(const Kind &kind, Random &random) {
    Cases cases;
    for (int v = 0; v < kVariants; ++v) {
        const int64_t r = random.between(2, 4), a = random.between(2, 5), b = random.between(2, 60), c = a * b;
        Case made = plain_case(kind, r, c, v, random, kUsual);
        if (v % 2) {
            made.param_shape = {r, c, 1, r};
            const std::vector<int64_t> grads[] = {{r, c, 2 * c + 1, 2}, {r, c, 0, 1}, {r, c, 1, 0}, {}};
            made.grad_shape = grads[random.word() % 4];
        } else {
            made.param_shape = {r, a, b, b, r * b, 1};
            const std::vector<int64_t> grads[] = {{r, a, b, 1, r, r * a}, {r, a, b, b, 0, 1}, {}};
            made.grad_shape = grads[random.word() % 3];
        }
        fill_state(made, {kModerate}, {kModerate}, random);
        cases.push_back(std::move(made));
    }
    return cases;
}

// Blocks beyond 2^31 of a parameter, steps whose low word wraps.
Cases far(const Kind &kind, Random &random) {
    Cases cases;
    for (int v = 0; v < kVariants; ++v) {
        cases.push_back(plain_case(kind, 2, random.between(1, 400), v, random, kUsual));
        cases.back().rows_before = (static_cast<int64_t>(1) << random.between(31, 40)) + random.word();
        if (v % 2) cases.back().scalars.step = 0xFFFFFFFEu;
    }
    return cases;
}

// Each pair of codes on a row, under each turn of rounding to nearest.
Cases every_pair_of_codes(const Kind &kind, Random &random) {
    Cases cases;
    for (int v : {0, 1, 3}) {
        Case c = plain_case(kind, 256, 256, v, random, v == 3 ? std::vector<Values>{kZeros} : kUsual);
        for (size_t i = 0; i < c.exp_avg.size(); ++i) {
            c.exp_avg[i] = static_cast<uint8_t>(i % 256);
            c.exp_avg_sq[i] = static_cast<uint8_t>(i / 256);
        }
        cases.push_back(std::move(c));
    }
    return cases;
}

// Each grid, under gradients that keep it, that go beyond it and that leave it behind.
Cases every_grid(const Kind &kind, Random &random) {
    std::vector<std::pair<uint8_t, uint8_t>> grids;
    for (uint32_t floor = 0; floor <= 191; ++floor) {
        for (uint32_t span = 0; span <= 24; ++span) {
            if (valid_grid(floor, span)) grids.emplace_back(floor, span);
        }
    }
    Cases cases;
    const std::vector<Values> kinds[] = {{kZeros}, {kFinite, kSparse}, {kTiny}};
    for (const std::vector<Values> &gradients : kinds) {
        Case c = plain_case(kind, static_cast<int64_t>(grids.size()), 48, 0, random, gradients);
        for (size_t b = 0; b < grids.size(); ++b) {
            c.floor[b] = grids[b].first;
            c.span[b] = grids[b].second;
        }
        cases.push_back(std::move(c));
    }
    return cases;
}

// ---------------------------------------------------------------- steps

// The fragments of a case: one, or one for each block, or for each row where that is all that strides can say.
struct Fragments {
    std::vector<lowmem_adam_fragment> list;
    std::vector<std::vector<int64_t>> shapes;  // what they point to

    void add(Case &c, int64_t scalars, bool cut) {
        const int64_t blocks = c.layout_rows() * c.per_row(), bytes = c.kind.moment_bytes();
        const bool contiguous = c.param_shape.empty() && c.grad_shape.empty(), flat = c.kind.flat();
        cut = cut && (contiguous || !flat);
        const int64_t piece = !cut ? blocks : contiguous ? 1 : c.per_row();
        for (int64_t b = 0; b < blocks; b += piece) {
            const int64_t row = b / c.per_row(), start = row * c.layout_cols() + b % c.per_row() * c.kind.block();
            lowmem_adam_fragment f = {};
            f.param = tensor(c.param, c.param_type(), c.param_shape, c.kind.param, start, row, cut);
            f.grad = tensor(c.grad, c.grad_type(), c.grad_shape, c.kind.grad, start, row, cut);
            f.exp_avg = c.exp_avg.data() + start * bytes;
            f.exp_avg_sq = c.exp_avg_sq.data() + start * bytes;
            if (c.kind.master) f.master = c.master.data() + static_cast<size_t>(start) * c.kind.master_bytes();
            f.master_kind = c.kind.master;
            if (c.kind.moments == kCoded) f.block_floor = c.floor.data() + b, f.block_span = c.span.data() + b;
            if (c.kind.moments == kDynamic) {
                f.absmax1 = reinterpret_cast<float *>(c.absmax1.data()) + b;
                f.absmax2 = reinterpret_cast<float *>(c.absmax2.data()) + b;
            }
            f.rows = flat ? 1 : c.rows_before + c.rows + 1;
            f.cols = c.layout_cols() + (flat ? c.rows_before * c.per_row() * kFlatBlock : 0);
            f.block_size = c.kind.block();
            f.first_block = c.rows_before * c.per_row() + b;
            f.end_block = f.first_block + piece;
            f.scalars = scalars;
            list.push_back(f);
        }
    }

   private:
    lowmem_adam_tensor tensor(Bytes &buffer, const Float &type, const std::vector<int64_t> &shape, int32_t dtype,
                              int64_t start, int64_t row, bool cut) {
        if (shape.empty()) return {buffer.data() + start * type.bytes, nullptr, dtype, 0};
        const size_t dims = shape.size() / 2;
        std::vector<int64_t> kept = shape;
        if (cut) {  // a row: without the outermost dimension
            kept.erase(kept.begin() + static_cast<ptrdiff_t>(dims));
            kept.erase(kept.begin());
        }
        shapes.push_back(std::move(kept));
        return {buffer.data() + (cut ? row * shape[dims] * type.bytes : 0), shapes.back().data(), dtype,
                static_cast<int32_t>(shapes.back().size() / 2)};
    }
};

// FNV-1a over numbers. Which NaN an operation gives is not promised, so all count as one.
class Hash {
   public:
    void number(uint64_t x) { hash_ = (hash_ ^ x) * 0x100000001B3u; }
    void bytes(const Bytes &buffer) {
        for (const uint8_t byte : buffer) number(byte);
    }
    void floats(const Bytes &buffer, const Float &type) {
        for (size_t i = 0; i < buffer.size(); i += type.bytes) {
            uint32_t bits = 0;
            memcpy(&bits, buffer.data() + i, type.bytes);
            number((bits & type.magnitude()) > type.infinity() ? type.magnitude() : bits);
        }
    }
    uint64_t value() const { return hash_; }

   private:
    uint64_t hash_ = 0xCBF29CE484222325u;
};

// The hash of all that a group's cases are after each step; exits where the library refuses them.
uint64_t step_all(Cases cases, int32_t isa, int32_t threads, bool cut) {
    Hash hash;
    for (uint32_t step = 0; step < kSteps; ++step) {
        Fragments fragments;
        std::vector<lowmem_adam_scalars> scalars;
        for (size_t i = 0; i < cases.size(); ++i) {
            Random random(i * kSteps + step);
            fill(cases[i].grad, cases[i].grad_type(), cases[i].gradients, random);
            fragments.add(cases[i], static_cast<int64_t>(i), cut);
            scalars.push_back(cases[i].scalars);
            scalars.back().step += step;
        }
        if (cut) std::reverse(fragments.list.begin(), fragments.list.end());
        int64_t skipped = -1;
        const int32_t status = lowmem_adam_step(fragments.list.data(), static_cast<int64_t>(fragments.list.size()),
                                                scalars.data(), static_cast<int64_t>(scalars.size()), threads, isa,
                                                &skipped);
        if (status != LOWMEM_ADAM_OK) {
            fprintf(stderr, "lowmem_adam_step gave status %d; expected: %d\n", status, LOWMEM_ADAM_OK);
            exit(1);
        }
        hash.number(static_cast<uint64_t>(skipped));
        for (const Case &c : cases) {
            hash.floats(c.param, c.param_type());
            if (c.kind.master == LOWMEM_ADAM_MASTER_FLOAT32) hash.floats(c.master, kFloats[LOWMEM_ADAM_FLOAT32]);
            if (c.kind.master != LOWMEM_ADAM_MASTER_FLOAT32) hash.bytes(c.master);
            if (!c.kind.full()) {
                for (const Bytes *codes : {&c.exp_avg, &c.exp_avg_sq, &c.floor, &c.span}) hash.bytes(*codes);
                for (const Bytes *scales : {&c.absmax1, &c.absmax2}) hash.floats(*scales, kFloats[0]);
            } else {
                for (const Bytes *moments : {&c.exp_avg, &c.exp_avg_sq}) hash.floats(*moments, kFloats[0]);
            }
        }
    }
    return hash.value();
}

enum Serves { kEvery, kOfCodes, kOfGrids };

struct Group {
    const char *name;
    Cases (*make)(const Kind &, Random &);
    Serves serves;
};
const Group kGroups[] = {
    {"variants", every_variant, kEvery}, {"tails", every_tail, kEvery}, {"any_bits", any_bits, kEvery},
    {"strided", strided, kEvery},        {"far", far, kEvery},          {"codes", every_pair_of_codes, kOfCodes},
    {"grids", every_grid, kOfGrids},
};

// Prints the hash of a group, of which whole fragments and pieces must give the same.
bool print_digest(const Group &group, const Kind &kind, uint64_t seed, int32_t isa) {
    Random random(seed);
    const Cases cases = group.make(kind, random);
    const uint64_t whole = step_all(cases, isa, 1, false), cut = step_all(cases, isa, 3, true);
    const std::string name = std::string(kDtypes[kind.param]) + "+" + kDtypes[kind.grad] + "/" +
                             kMomentNames[kind.moments] + "/" + kMasters[kind.master] + "/" + group.name;
    printf("%s %016llx\n", name.c_str(), static_cast<unsigned long long>(whole));
    fflush(stdout);
    if (whole == cut) return true;
    fprintf(stderr, "%s is %016llx cut into pieces on three threads; expected: %016llx, as whole\n", name.c_str(),
            static_cast<unsigned long long>(cut), static_cast<unsigned long long>(whole));
    return false;
}

bool print_digests(int32_t isa) {
    bool same = true;
    uint64_t seed = 0;
    for (int32_t param = 0; param < 3; ++param) {
        for (int32_t grad = param; grad >= 0; grad -= param ? param : 1) {  // the same dtype, then float32
            for (const Moments moments : {kCoded, kFull, kDynamic, kFlatFull}) {
                for (int32_t master = 0; master < (param ? 4 : 1); ++master) {
                    for (const Group &group : kGroups) {
                        ++seed;
                        // What codes are does not depend on where gradients come from, nor on what is kept.
                        const Kind kind = {param, grad, moments, master};
                        if (group.serves != kEvery && (kind.full() || param != grad || master)) continue;
                        if (group.serves == kOfGrids && moments != kCoded) continue;
                        same = print_digest(group, kind, seed, isa) && same;
                    }
                }
            }
        }
    }
    return same;
}

}  // namespace

int main(int argc, char **argv) {
    const std::string asked = argc == 2 ? argv[1] : "";
    std::string accepted;
    for (int32_t isa = 0; isa < 4; ++isa) {
        if (!lowmem_adam_has_isa(isa)) continue;
        if (asked == kIsas[isa]) return print_digests(isa) ? 0 : 1;
        accepted += std::string(kIsas[isa]) + "\n";
    }
    if (asked == "list") {
        fputs(accepted.c_str(), stdout);
        return 0;
    }
    fprintf(stderr, "argument is '%s'; accepted: list, or one of\n%s", asked.c_str(), accepted.c_str());
    return 2;
}
