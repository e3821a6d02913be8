// One lane, in plain C++: every operation is the IEEE one, or wraps.
#ifndef LOWMEM_ADAM_VEC_SCALAR_H
#define LOWMEM_ADAM_VEC_SCALAR_H

#include <math.h>
#include <stdint.h>

#include "format.h"

namespace {

struct Scalar {
    static constexpr int kLanes = 1;
    static constexpr bool kDecodesApart = true;
    using F = float;
    using I = int32_t;
    using M = bool;

    static F set(float x) { return x; }
    static I seti(int32_t x) { return x; }

    static F load(const float *p) { return *p; }
    static I loadi(const int32_t *p) { return *p; }
    static void store(float *p, F x) { *p = x; }

    static F bits_to_float(I x) { return float_of_bits(static_cast<uint32_t>(x)); }
    static I float_to_bits(F x) { return static_cast<I>(bits_of_float(x)); }
    static F to_float(I x) { return static_cast<float>(x); }
    static I truncate(F x) { return static_cast<I>(x); }

    static F add(F a, F b) { return a + b; }
    static F sub(F a, F b) { return a - b; }
    static F mul(F a, F b) { return a * b; }
    static F div(F a, F b) { return a / b; }
    static F sqrt(F a) { return sqrtf(a); }
    static F abs(F a) { return fabsf(a); }
    static F min(F a, F b) { return a < b ? a : b; }
    static F max(F a, F b) { return a > b ? a : b; }
    static F copy_sign(F magnitude, F sign) { return copysignf(magnitude, sign); }

    static I addi(I a, I b) { return static_cast<I>(static_cast<uint32_t>(a) + static_cast<uint32_t>(b)); }
    static I subi(I a, I b) { return static_cast<I>(static_cast<uint32_t>(a) - static_cast<uint32_t>(b)); }
    static I muli(I a, I b) { return static_cast<I>(static_cast<uint32_t>(a) * static_cast<uint32_t>(b)); }
    static I andi(I a, I b) { return a & b; }
    static I ori(I a, I b) { return a | b; }
    static I and_xor(I a, I b, I c) { return (a & b) ^ c; }
    static I and_xor(M mask, I a, I b, I c) { return mask ? (a & b) ^ c : c; }
    static I max_unsigned(I a, I b) { return static_cast<uint32_t>(a) > static_cast<uint32_t>(b) ? a : b; }
    static I min_unsigned(I a, I b) { return static_cast<uint32_t>(a) < static_cast<uint32_t>(b) ? a : b; }
    template <int n>
    static I shift_right(I a) {
        return static_cast<I>(static_cast<uint32_t>(a) >> n);
    }
    template <int n>
    static I shift_left(I a) {
        return static_cast<I>(static_cast<uint32_t>(a) << n);
    }
    static I where_positive(I code, I x) { return code > 0 ? x : 0; }

    static M greater(F a, F b) { return a > b; }
    static M equal(F a, F b) { return a == b; }
    static M equal_bits(I a, I b) { return a == b; }
    static M is_nan(F a) { return a != a; }
    static F select(M mask, F yes, F no) { return mask ? yes : no; }

    static uint32_t reduce_max_unsigned(I x) { return static_cast<uint32_t>(x); }
    static uint32_t reduce_min_unsigned(I x) { return static_cast<uint32_t>(x); }

    // Unsigned codes as integers, signed ones times 2^24.
    static void load_codes(const uint8_t *p, I (&x)[4]) {
        for (int u = 0; u < 4; ++u) x[u] = p[u];
    }
    static void load_codes(const int8_t *p, I (&x)[4]) {
        for (int u = 0; u < 4; ++u) x[u] = p[u] * (1 << 24);
    }
    static void store_codes(uint8_t *p, const I (&x)[4]) {
        for (int u = 0; u < 4; ++u) p[u] = static_cast<uint8_t>(saturated(x[u]));
    }
    static void store_codes(int8_t *p, const I (&x)[4]) {
        for (int u = 0; u < 4; ++u) p[u] = static_cast<int8_t>((x[u] < 1 ? 1 : saturated(x[u])) - 128);
    }

    // Entries of a table.
    static I gather(const int32_t *table, I index) { return table[index]; }
    static void look_up(const float *table, const I (&index)[4], F (&x)[4]) {
        for (int u = 0; u < 4; ++u) x[u] = table[index[u]];
    }

    // Parameters and their corrections as words, with the parameter's sign. Infinities and NaN (from `infinity` on) have
    // no correction, zero has none that is negative. An int8 is the upper half of a correction.
    static void load_words(const uint16_t *p, const int16_t *rest, int infinity, I (&words)[4]) {
        for (int u = 0; u < 4; ++u) words[u] = joined(p[u], rest[u], infinity);
    }
    static void load_words(const uint16_t *p, const int8_t *rest, int infinity, I (&words)[4]) {
        for (int u = 0; u < 4; ++u) words[u] = joined(p[u], rest[u] * 256, infinity);
    }
    // The inverse, of words of any lower half.
    static void store_words(uint16_t *p, int16_t *rest, const I (&words)[4]) {
        for (int u = 0; u < 4; ++u) rest[u] = parted(words[u], p + u);
    }
    static void store_words(uint16_t *p, int8_t *rest, const I (&words)[4]) {
        for (int u = 0; u < 4; ++u) rest[u] = static_cast<int8_t>(parted(words[u], p + u) >> 8);
    }

    static F load_bfloat16(const uint16_t *p) { return float_of_bits(static_cast<uint32_t>(*p) << 16); }
    // The upper halves of the lanes.
    static void store_halves(uint16_t *p, const I (&x)[4]) {
        for (int u = 0; u < 4; ++u) p[u] = static_cast<uint16_t>(static_cast<uint32_t>(x[u]) >> 16);
    }
    static F load_float16(const uint16_t *p) { return float_of_half(*p); }
    static void store_float16(uint16_t *p, const F (&x)[4]) {
        for (int u = 0; u < 4; ++u) p[u] = half_of_float(x[u]);
    }

    static uint32_t max_halves(const uint16_t *p, int n) {
        uint32_t top = 0;
        for (int i = 0; i < n; ++i) {
            const uint32_t magnitude = p[i] & 0x7FFFu;
            top = magnitude > top ? magnitude : top;
        }
        return top;
    }

   private:
    static I joined(uint16_t p, int rest, int infinity) {
        const int magnitude = p & 0x7FFF;
        if (magnitude >= infinity || (magnitude == 0 && rest < 0)) rest = 0;
        return static_cast<I>((static_cast<uint32_t>(p) << 16) + static_cast<uint32_t>(rest));
    }
    // Stores the parameter and returns the correction.
    static int16_t parted(I word, uint16_t *p) {
        *p = static_cast<uint16_t>((static_cast<uint32_t>(word) + 0x8000u) >> 16);
        return static_cast<int16_t>(word & 0xFFFF);
    }
    static I saturated(I x) { return x < 0 ? 0 : x > 255 ? 255 : x; }
};

}  // namespace

#endif
