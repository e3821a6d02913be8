// Sixteen lanes of AVX-512 (F, DQ, BW, VL). FMA comes with it and is not used: every operation rounds once.
#ifndef LOWMEM_ADAM_VEC_AVX512_H
#define LOWMEM_ADAM_VEC_AVX512_H

#include <immintrin.h>
#include <stdint.h>

#include "elements.h"

namespace {

struct Avx512 {
    static constexpr int kLanes = 16;
    static constexpr bool kDecodesApart = false;  // there are 32 registers
    using F = __m512;
    using I = __m512i;
    using M = __mmask16;

    static F set(float x) { return _mm512_set1_ps(x); }
    static I seti(int32_t x) { return _mm512_set1_epi32(x); }

    static F load(const float *p) { return _mm512_loadu_ps(p); }
    static I loadi(const int32_t *p) { return _mm512_loadu_si512(p); }
    static void store(float *p, F x) { _mm512_storeu_ps(p, x); }

    static F bits_to_float(I x) { return _mm512_castsi512_ps(x); }
    static I float_to_bits(F x) { return _mm512_castps_si512(x); }
    static F to_float(I x) { return _mm512_cvtepi32_ps(x); }
    static I truncate(F x) { return _mm512_cvttps_epi32(x); }

    static F add(F a, F b) { return _mm512_add_ps(a, b); }
    static F sub(F a, F b) { return _mm512_sub_ps(a, b); }
    static F mul(F a, F b) { return _mm512_mul_ps(a, b); }
    static F div(F a, F b) { return _mm512_div_ps(a, b); }
    static F sqrt(F a) { return _mm512_sqrt_ps(a); }
    static F abs(F a) { return _mm512_and_ps(a, _mm512_castsi512_ps(seti(0x7FFFFFFF))); }
    // Where a is NaN the result is b.
    static F min(F a, F b) { return _mm512_min_ps(a, b); }
    static F max(F a, F b) { return _mm512_max_ps(a, b); }
    static F copy_sign(F magnitude, F sign) {
        const F mask = _mm512_castsi512_ps(seti(INT32_MIN));
        return _mm512_or_ps(_mm512_andnot_ps(mask, magnitude), _mm512_and_ps(mask, sign));
    }

    static I addi(I a, I b) { return _mm512_add_epi32(a, b); }
    static I subi(I a, I b) { return _mm512_sub_epi32(a, b); }
    static I muli(I a, I b) { return _mm512_mullo_epi32(a, b); }
    static I andi(I a, I b) { return _mm512_and_si512(a, b); }
    static I ori(I a, I b) { return _mm512_or_si512(a, b); }
    static I and_xor(I a, I b, I c) { return _mm512_ternarylogic_epi32(a, b, c, 0x6A); }
    // c where the mask is not set.
    static I and_xor(M mask, I a, I b, I c) { return _mm512_mask_ternarylogic_epi32(c, mask, a, b, 0x78); }
    static I max_unsigned(I a, I b) { return _mm512_max_epu32(a, b); }
    static I min_unsigned(I a, I b) { return _mm512_min_epu32(a, b); }
    template <int n>
    static I shift_right(I a) {
        return _mm512_srli_epi32(a, n);
    }
    template <int n>
    static I shift_left(I a) {
        return _mm512_slli_epi32(a, n);
    }
    // x where code > 0, 0 where code is 0; code is never negative.
    static I where_positive(I code, I x) { return _mm512_maskz_mov_epi32(_mm512_test_epi32_mask(code, code), x); }

    static M greater(F a, F b) { return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ); }
    static M equal(F a, F b) { return _mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ); }
    static M equal_bits(I a, I b) { return _mm512_cmpeq_epi32_mask(a, b); }
    static M is_nan(F a) { return _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q); }
    static F select(M mask, F yes, F no) { return _mm512_mask_blend_ps(mask, no, yes); }

    static uint32_t reduce_max_unsigned(I x) { return _mm512_reduce_max_epu32(x); }
    static uint32_t reduce_min_unsigned(I x) { return _mm512_reduce_min_epu32(x); }

    // Unsigned codes as integers, signed ones times 2^24. A loop over the four is one that gcc leaves a loop, with the
    // vectors in memory: that cost a tenth of the step's time.
    static void load_codes(const uint8_t *p, I (&x)[4]) {
        four(EACH { x[u] = _mm512_cvtepu8_epi32(load_bytes(p + u * kLanes)); });
    }
    static void load_codes(const int8_t *p, I (&x)[4]) {
        // Each byte to the top of a lane; a shuffle stays within 128 bits, so all four parts get all 16 bytes.
        const I order = each_lane(1 << 24, 0x00808080);
        four(EACH { x[u] = _mm512_shuffle_epi8(_mm512_broadcast_i32x4(load_bytes(p + u * kLanes)), order); });
    }
    static void store_codes(uint8_t *p, const I (&x)[4]) { _mm512_storeu_si512(p, saturated_bytes(x)); }
    static void store_codes(int8_t *p, const I (&x)[4]) {
        const I bytes = _mm512_max_epu8(saturated_bytes(x), _mm512_set1_epi8(1));
        _mm512_storeu_si512(p, _mm512_xor_si512(bytes, _mm512_set1_epi8(-128)));
    }

    // Entries of a table.
    static I gather(const int32_t *table, I index) { return _mm512_i32gather_epi32(index, table, 4); }
    static void look_up(const float *table, const I (&index)[4], F (&x)[4]) {
        four(EACH { x[u] = _mm512_i32gather_ps(index[u], table, 4); });
    }

    // Parameters and their corrections as words, with the parameter's sign. Infinities and NaN (from `infinity` on) have
    // no correction, zero has none that is negative. An int8 is the upper half of a correction.
    static void load_words(const uint16_t *p, const int16_t *rest, int infinity, I (&words)[4]) {
        for (int h = 0; h < 2; ++h) join(p + 32 * h, _mm512_loadu_si512(rest + 32 * h), infinity, words + 2 * h);
    }
    static void load_words(const uint16_t *p, const int8_t *rest, int infinity, I (&words)[4]) {
        for (int h = 0; h < 2; ++h) {
            const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(rest + 32 * h));
            join(p + 32 * h, _mm512_slli_epi16(_mm512_cvtepi8_epi16(bytes), 8), infinity, words + 2 * h);
        }
    }
    // The inverse, of words of any lower half.
    static void store_words(uint16_t *p, int16_t *rest, const I (&words)[4]) {
        for (int h = 0; h < 2; ++h) {
            _mm512_storeu_si512(rest + 32 * h, part(p + 32 * h, words + 2 * h));
        }
    }
    static void store_words(uint16_t *p, int8_t *rest, const I (&words)[4]) {
        const I first = part(p, words), second = part(p + 32, words + 2);
        const I bytes = _mm512_packs_epi16(_mm512_srai_epi16(first, 8), _mm512_srai_epi16(second, 8));
        const I order = _mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7);  // packing works within 128-bit lanes
        _mm512_storeu_si512(rest, _mm512_permutexvar_epi64(order, bytes));
    }

    static F load_bfloat16(const uint16_t *p) {
        const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(p));
        return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
    }
    // The upper halves of the lanes.
    static void store_halves(uint16_t *p, const I (&x)[4]) {
        _mm512_storeu_si512(p, halves<1>(x[0], x[1]));
        _mm512_storeu_si512(p + 32, halves<1>(x[2], x[3]));
    }
    static F load_float16(const uint16_t *p) {
        return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(p)));
    }
    static void store_float16(uint16_t *p, const F (&x)[4]) {
        four(EACH {
            const __m256i y = _mm512_cvtps_ph(x[u], _MM_FROUND_TO_NEAREST_INT);
            _mm256_storeu_si256(reinterpret_cast<__m256i *>(p + 16 * u), y);
        });
    }

    // The largest of 16-bit integers without their sign bits, over a whole block.
    static uint32_t max_halves(const uint16_t *p, int n) {
        I top = _mm512_setzero_si512();
        const I mask = _mm512_set1_epi16(0x7FFF);
        for (int i = 0; i < n; i += 32) {
            top = _mm512_max_epi16(top, _mm512_and_si512(_mm512_loadu_si512(p + i), mask));
        }
        return reduce_max_unsigned(max_unsigned(andi(top, seti(0xFFFF)), shift_right<16>(top)));
    }

   private:
    static __m128i load_bytes(const void *p) { return _mm_loadu_si128(static_cast<const __m128i *>(p)); }
    static I saturated_bytes(const I (&x)[4]) {
        // Packing works within 128-bit lanes and leaves the four vectors' dwords interleaved.
        return dwords_in_order(_mm512_packus_epi16(_mm512_packs_epi32(x[0], x[1]), _mm512_packs_epi32(x[2], x[3])));
    }
    static I dwords_in_order(I mixed) {
        const I order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
        return _mm512_permutexvar_epi32(order, mixed);
    }
    // first + lane * step, a constant.
    static I each_lane(int32_t step, int32_t first) {
        const I lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
        return addi(muli(lane, seti(step)), seti(first));
    }
    // The lower (0) or the upper (1) halves of the lanes of two vectors.
    template <int which>
    static I halves(I a, I b) {
        return _mm512_permutex2var_epi16(a, each_lane(0x00040004, 0x00020000 + which * 0x00010001), b);
    }
    // The inverse: 16 of the lanes that have these halves, from the given one on.
    template <int from>
    static I lanes_of(I lower, I upper) {
        return _mm512_permutex2var_epi16(lower, each_lane(0x00010001, 0x00200000 + from * 0x00010001), upper);
    }
    // Two vectors of words: a correction is their lower half, and where it is negative the upper one is one less.
    static void join(const uint16_t *p, I rest, int infinity, I *words) {
        const I param = _mm512_loadu_si512(p), negative = _mm512_srai_epi16(rest, 15);
        // Twice the magnitude, less one where the correction is negative. Read without a sign it is out of range for an
        // infinity of either correction, for NaN, and for zero with a negative correction.
        const I range = _mm512_add_epi16(_mm512_add_epi16(param, param), negative);
        const I largest = _mm512_set1_epi16(static_cast<int16_t>(2 * infinity - 2));
        const __mmask32 counts = _mm512_cmple_epu16_mask(range, largest);
        const I upper = _mm512_mask_add_epi16(param, counts, param, negative);
        rest = _mm512_maskz_mov_epi16(counts, rest);
        words[0] = lanes_of<0>(rest, upper);
        words[1] = lanes_of<16>(rest, upper);
    }
    // Stores the parameters of two vectors of words, and returns their corrections.
    static I part(uint16_t *p, const I *words) {
        const I rest = halves<0>(words[0], words[1]), upper = halves<1>(words[0], words[1]);
        _mm512_storeu_si512(p, _mm512_sub_epi16(upper, _mm512_srai_epi16(rest, 15)));
        return rest;
    }
};

}  // namespace

#endif
