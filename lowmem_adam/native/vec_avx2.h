// Eight lanes of AVX2, with F16C for float16. FMA may be there and is not used: every operation rounds once.
#ifndef LOWMEM_ADAM_VEC_AVX2_H
#define LOWMEM_ADAM_VEC_AVX2_H

#include <immintrin.h>
#include <stdint.h>

namespace {

struct Avx2 {
    static constexpr int kLanes = 8;
    static constexpr bool kDecodesApart = true;  // there are 16 registers
    using F = __m256;
    using I = __m256i;
    using M = __m256;  // all bits of a lane set, or none

    static F set(float x) { return _mm256_set1_ps(x); }
    static I seti(int32_t x) { return _mm256_set1_epi32(x); }

    static F load(const float *p) { return _mm256_loadu_ps(p); }
    static I loadi(const int32_t *p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i *>(p)); }
    static void store(float *p, F x) { _mm256_storeu_ps(p, x); }

    static F bits_to_float(I x) { return _mm256_castsi256_ps(x); }
    static I float_to_bits(F x) { return _mm256_castps_si256(x); }
    static F to_float(I x) { return _mm256_cvtepi32_ps(x); }
    static I truncate(F x) { return _mm256_cvttps_epi32(x); }

    static F add(F a, F b) { return _mm256_add_ps(a, b); }
    static F sub(F a, F b) { return _mm256_sub_ps(a, b); }
    static F mul(F a, F b) { return _mm256_mul_ps(a, b); }
    static F div(F a, F b) { return _mm256_div_ps(a, b); }
    static F sqrt(F a) { return _mm256_sqrt_ps(a); }
    static F abs(F a) { return _mm256_and_ps(a, _mm256_castsi256_ps(seti(0x7FFFFFFF))); }
    // Where a is NaN the result is b.
    static F min(F a, F b) { return _mm256_min_ps(a, b); }
    static F max(F a, F b) { return _mm256_max_ps(a, b); }
    static F copy_sign(F magnitude, F sign) {
        const F mask = _mm256_castsi256_ps(seti(INT32_MIN));
        return _mm256_or_ps(_mm256_andnot_ps(mask, magnitude), _mm256_and_ps(mask, sign));
    }

    static I addi(I a, I b) { return _mm256_add_epi32(a, b); }
    static I subi(I a, I b) { return _mm256_sub_epi32(a, b); }
    static I muli(I a, I b) { return _mm256_mullo_epi32(a, b); }
    static I andi(I a, I b) { return _mm256_and_si256(a, b); }
    static I ori(I a, I b) { return _mm256_or_si256(a, b); }
    static I and_xor(I a, I b, I c) { return _mm256_xor_si256(andi(a, b), c); }
    static I and_xor(M mask, I a, I b, I c) { return and_xor(andi(_mm256_castps_si256(mask), a), b, c); }
    static I max_unsigned(I a, I b) { return _mm256_max_epu32(a, b); }
    static I min_unsigned(I a, I b) { return _mm256_min_epu32(a, b); }
    template <int n>
    static I shift_right(I a) { return _mm256_srli_epi32(a, n); }
    template <int n>
    static I shift_left(I a) { return _mm256_slli_epi32(a, n); }
    // x where code > 0, 0 where code is 0; code is never negative.
    static I where_positive(I code, I x) { return _mm256_sign_epi32(x, code); }

    static M greater(F a, F b) { return _mm256_cmp_ps(a, b, _CMP_GT_OQ); }
    static M equal(F a, F b) { return _mm256_cmp_ps(a, b, _CMP_EQ_OQ); }
    static M equal_bits(I a, I b) { return _mm256_castsi256_ps(_mm256_cmpeq_epi32(a, b)); }
    static M is_nan(F a) { return _mm256_cmp_ps(a, a, _CMP_UNORD_Q); }
    static F select(M mask, F yes, F no) { return _mm256_blendv_ps(no, yes, mask); }

    static uint32_t reduce_max_unsigned(I x) {
        __m128i y = _mm_max_epu32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
        y = _mm_max_epu32(y, _mm_shuffle_epi32(y, 0x4E));
        return static_cast<uint32_t>(_mm_cvtsi128_si32(_mm_max_epu32(y, _mm_shuffle_epi32(y, 0xB1))));
    }
    static uint32_t reduce_min_unsigned(I x) {
        __m128i y = _mm_min_epu32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
        y = _mm_min_epu32(y, _mm_shuffle_epi32(y, 0x4E));
        return static_cast<uint32_t>(_mm_cvtsi128_si32(_mm_min_epu32(y, _mm_shuffle_epi32(y, 0xB1))));
    }

    // Unsigned codes as integers, signed ones times 2^24.
    static void load_codes(const uint8_t *p, I (&x)[4]) { spread(p, seti(static_cast<int32_t>(0x80808000u)), 1, x); }
    static void load_codes(const int8_t *p, I (&x)[4]) { spread(p, seti(0x00808080), 1 << 24, x); }
    static void store_codes(uint8_t *p, const I (&x)[4]) {
        _mm256_storeu_si256(reinterpret_cast<__m256i *>(p), saturated_bytes(x));
    }
    static void store_codes(int8_t *p, const I (&x)[4]) {
        const I bytes = _mm256_max_epu8(saturated_bytes(x), _mm256_set1_epi8(1));
        _mm256_storeu_si256(reinterpret_cast<__m256i *>(p), _mm256_xor_si256(bytes, _mm256_set1_epi8(-128)));
    }

    // Entries of a table.
    static I gather(const int32_t *table, I index) { return _mm256_i32gather_epi32(table, index, 4); }
    static void look_up(const float *table, const I (&index)[4], F (&x)[4]) {
        for (int u = 0; u < 4; ++u) x[u] = _mm256_i32gather_ps(table, index[u], 4);
    }

    // Parameters and their corrections as words, with the parameter's sign. Infinities and NaN (from `infinity` on) have
    // no correction, zero has none that is negative. An int8 is the upper half of a correction.
    static void load_words(const uint16_t *p, const int16_t *rest, int infinity, I (&words)[4]) {
        for (int h = 0; h < 2; ++h) join(p + 16 * h, load_whole(rest + 16 * h), infinity, words + 2 * h);
    }
    static void load_words(const uint16_t *p, const int8_t *rest, int infinity, I (&words)[4]) {
        for (int h = 0; h < 2; ++h) {
            const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i *>(rest + 16 * h));
            join(p + 16 * h, _mm256_slli_epi16(_mm256_cvtepi8_epi16(bytes), 8), infinity, words + 2 * h);
        }
    }
    // The inverse, of words of any lower half.
    static void store_words(uint16_t *p, int16_t *rest, const I (&words)[4]) {
        for (int h = 0; h < 2; ++h) store_whole(rest + 16 * h, in_order(part(p + 16 * h, words + 2 * h)));
    }
    static void store_words(uint16_t *p, int8_t *rest, const I (&words)[4]) {
        const I first = part(p, words), second = part(p + 16, words + 2);
        const I bytes = _mm256_packs_epi16(_mm256_srai_epi16(first, 8), _mm256_srai_epi16(second, 8));
        store_whole(rest, dwords_in_order(bytes));
    }

    static F load_bfloat16(const uint16_t *p) {
        // Each to the upper half of a lane; cheaper than a conversion to 32 bits and a shift.
        const I both = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i *>(p)));
        const I index = muli(_mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), seti(0x02020000));
        return _mm256_castsi256_ps(_mm256_shuffle_epi8(both, addi(index, seti(0x01008080))));
    }
    // The upper halves of the lanes.
    static void store_halves(uint16_t *p, const I (&x)[4]) {
        store_pair(p, x[0], x[1]);
        store_pair(p + 16, x[2], x[3]);
    }
    static F load_float16(const uint16_t *p) {
        return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i *>(p)));
    }
    static void store_float16(uint16_t *p, const F (&x)[4]) {
        for (int u = 0; u < 4; ++u) {
            const __m128i y = _mm256_cvtps_ph(x[u], _MM_FROUND_TO_NEAREST_INT);
            _mm_storeu_si128(reinterpret_cast<__m128i *>(p + 8 * u), y);
        }
    }

    // The largest of 16-bit integers without their sign bits, over a whole block.
    static uint32_t max_halves(const uint16_t *p, int n) {
        I top = _mm256_setzero_si256();
        const I mask = _mm256_set1_epi16(0x7FFF);
        for (int i = 0; i < n; i += 16) {
            const I x = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(p + i));
            top = _mm256_max_epi16(top, _mm256_and_si256(x, mask));
        }
        return reduce_max_unsigned(max_unsigned(andi(top, seti(0xFFFF)), shift_right<16>(top)));
    }

   private:
    // Each byte to a lane of its own, zeros where a shuffle's index has its sign bit. A shuffle stays within 128 bits,
    // so both halves get all 16 bytes; it costs half of the conversion made for this.
    static void spread(const void *p, I zeros, int32_t place, I (&x)[4]) {
        const __m128i *bytes = static_cast<const __m128i *>(p);
        const I first = muli(_mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), seti(place));
        const I second = muli(_mm256_setr_epi32(8, 9, 10, 11, 12, 13, 14, 15), seti(place));
        for (int half = 0; half < 2; ++half) {
            const I both = _mm256_broadcastsi128_si256(_mm_loadu_si128(bytes + half));
            x[2 * half] = _mm256_shuffle_epi8(both, ori(zeros, first));
            x[2 * half + 1] = _mm256_shuffle_epi8(both, ori(zeros, second));
        }
    }
    static I saturated_bytes(const I (&x)[4]) {
        return dwords_in_order(_mm256_packus_epi16(_mm256_packs_epi32(x[0], x[1]), _mm256_packs_epi32(x[2], x[3])));
    }
    static I dwords_in_order(I mixed) {
        return _mm256_permutevar8x32_epi32(mixed, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
    }
    // Packing works within 128-bit lanes, and so does unpacking, for which this is the order as well.
    static I in_order(I mixed) { return _mm256_permute4x64_epi64(mixed, 0xD8); }
    static I load_whole(const void *p) { return _mm256_loadu_si256(static_cast<const __m256i *>(p)); }
    static void store_whole(void *p, I x) { _mm256_storeu_si256(static_cast<__m256i *>(p), x); }
    static void store_pair(uint16_t *p, I a, I b) {
        store_whole(p, in_order(_mm256_packus_epi32(shift_right<16>(a), shift_right<16>(b))));
    }
    // Two vectors of words: a correction is their lower half, and where it is negative the upper one is one less.
    static void join(const uint16_t *p, I rest, int infinity, I *words) {
        const I param = in_order(load_whole(p)), magnitude = andi(param, _mm256_set1_epi16(0x7FFF));
        const I limit = _mm256_set1_epi16(static_cast<int16_t>(infinity));
        rest = andi(in_order(rest), _mm256_cmpgt_epi16(limit, magnitude));
        const I zero = _mm256_cmpeq_epi16(magnitude, _mm256_setzero_si256());
        rest = _mm256_max_epi16(rest, _mm256_andnot_si256(zero, _mm256_set1_epi16(INT16_MIN)));
        const I upper = _mm256_add_epi16(param, _mm256_srai_epi16(rest, 15));
        words[0] = _mm256_unpacklo_epi16(rest, upper);
        words[1] = _mm256_unpackhi_epi16(rest, upper);
    }
    // Stores the parameters of two vectors of words, and returns their corrections as packing leaves them.
    static I part(uint16_t *p, const I *words) {
        // Lower halves of a 128-bit lane to its lower part.
        const I apart = _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15));
        const I first = _mm256_shuffle_epi8(words[0], apart), second = _mm256_shuffle_epi8(words[1], apart);
        const I rest = _mm256_unpacklo_epi64(first, second), upper = _mm256_unpackhi_epi64(first, second);
        store_whole(p, in_order(_mm256_sub_epi16(upper, _mm256_srai_epi16(rest, 15))));
        return rest;
    }
};

}  // namespace

#endif
