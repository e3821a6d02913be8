// Numbers put together from bits by a generator of its own: what digest.cpp fills parameters, gradients and state with.
#ifndef LOWMEM_ADAM_DIGEST_VALUES_H
#define LOWMEM_ADAM_DIGEST_VALUES_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <vector>

namespace {

using Bytes = std::vector<uint8_t>;

// splitmix64
class Random {
   public:
    explicit Random(uint64_t seed) : state_(seed * 0x9E3779B97F4A7C15u + 0x2545F4914F6CDD1Du) {}
    uint32_t word() {
        uint64_t z = state_ += 0x9E3779B97F4A7C15u;
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9u;
        z = (z ^ z >> 27) * 0x94D049BB133111EBu;
        return static_cast<uint32_t>((z ^ z >> 31) >> 32);
    }
    // From low to high, both included.
    uint32_t between(uint32_t low, uint32_t high) { return low + word() % (high - low + 1); }

   private:
    uint64_t state_;
};

// ---------------------------------------------------------------- values

struct Float {
    uint32_t bytes, exponent_bits, mantissa_bits;
    uint32_t largest_exponent() const { return (1u << exponent_bits) - 1; }
    uint32_t one() const { return largest_exponent() / 2; }  // the biased exponent of 1
    uint32_t infinity() const { return largest_exponent() << mantissa_bits; }
    uint32_t magnitude() const { return infinity() | ((1u << mantissa_bits) - 1); }
};
constexpr Float kFloats[] = {{4, 8, 23}, {2, 8, 7}, {2, 5, 10}};

enum Values {
    kZeros,
    kModerate,  // 2^-12 to 1
    kSparse,    // two thirds zeros
    kTiny,      // subnormal, or nearly: their squares vanish
    kFinite,    // of every exponent
    kRarely,    // one of 256 not finite
    kAnyBits,   // infinities and NaN of every payload too
    kPositive,  // moderate
};

uint32_t value(const Float &type, Values values, Random &random) {
    const uint32_t bits = random.word() & (type.magnitude() | (type.magnitude() + 1));
    const uint32_t mantissa_and_sign = bits & ~type.infinity();
    uint32_t lowest = 0, highest = type.largest_exponent() - 1;
    switch (values) {
        case kZeros:
            return 0;
        case kAnyBits:  // NaN of all ones is the one that a carry out of its bits makes zero of
            return random.word() % 32 ? bits : bits | type.magnitude();
        case kSparse:
            if (random.word() % 3) return 0;
            break;
        case kRarely:
            if (random.word() % 256 == 0) return mantissa_and_sign | type.infinity();
            break;
        default:
            break;
    }
    if (values == kTiny) highest = 2;
    if (values == kModerate || values == kSparse || values == kRarely || values == kPositive) {
        lowest = type.one() - 12;
        highest = type.one();
    }
    const uint32_t sign = values == kPositive ? 0 : mantissa_and_sign & (type.magnitude() + 1);
    const uint32_t exponent = random.between(lowest, highest);
    return sign | exponent << type.mantissa_bits | (mantissa_and_sign & type.magnitude());
}

// One of `kinds` for every 64 elements, so that blocks are of one kind and of two.
void fill(Bytes &buffer, const Float &type, const std::vector<Values> &kinds, Random &random) {
    Values kind = kZeros;
    for (size_t i = 0; i < buffer.size() / type.bytes; ++i) {
        if (i % 64 == 0) kind = kinds[random.word() % kinds.size()];
        const uint32_t bits = value(type, kind, random);
        memcpy(buffer.data() + i * type.bytes, &bits, type.bytes);  // every machine there is puts the low bytes first
    }
}

}  // namespace

#endif
