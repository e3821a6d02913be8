// Four lanes of NEON, which every 64-bit ARM processor has. No fused operation is used: every one rounds once.
#ifndef LOWMEM_ADAM_VEC_NEON_H
#define LOWMEM_ADAM_VEC_NEON_H

#include <arm_neon.h>
#include <stdint.h>

namespace {

struct Neon {
    static constexpr int kLanes = 4;
    static constexpr bool kDecodesApart = true;  // there are 32 registers; which way is faster has not been measured
    using F = float32x4_t;
    using I = int32x4_t;
    using M = uint32x4_t;

    static F set(float x) { return vdupq_n_f32(x); }
    static I seti(int32_t x) { return vdupq_n_s32(x); }

    static F load(const float *p) { return vld1q_f32(p); }
    static I loadi(const int32_t *p) { return vld1q_s32(p); }
    static void store(float *p, F x) { vst1q_f32(p, x); }

    static F bits_to_float(I x) { return vreinterpretq_f32_s32(x); }
    static I float_to_bits(F x) { return vreinterpretq_s32_f32(x); }
    static F to_float(I x) { return vcvtq_f32_s32(x); }
    static I truncate(F x) { return vcvtq_s32_f32(x); }

    static F add(F a, F b) { return vaddq_f32(a, b); }
    static F sub(F a, F b) { return vsubq_f32(a, b); }
    static F mul(F a, F b) { return vmulq_f32(a, b); }
    static F div(F a, F b) { return vdivq_f32(a, b); }
    static F sqrt(F a) { return vsqrtq_f32(a); }
    static F abs(F a) { return vabsq_f32(a); }
    // Where a is NaN the result is b.
    static F min(F a, F b) { return vminnmq_f32(a, b); }
    static F max(F a, F b) { return vmaxnmq_f32(a, b); }
    static F copy_sign(F magnitude, F sign) { return vbslq_f32(vdupq_n_u32(0x80000000u), sign, magnitude); }

    static I addi(I a, I b) { return vaddq_s32(a, b); }
    static I subi(I a, I b) { return vsubq_s32(a, b); }
    static I muli(I a, I b) { return vmulq_s32(a, b); }
    static I andi(I a, I b) { return vandq_s32(a, b); }
    static I ori(I a, I b) { return vorrq_s32(a, b); }
    static I and_xor(I a, I b, I c) { return veorq_s32(andi(a, b), c); }
    static I and_xor(M mask, I a, I b, I c) { return and_xor(andi(vreinterpretq_s32_u32(mask), a), b, c); }
    static I max_unsigned(I a, I b) {
        return vreinterpretq_s32_u32(vmaxq_u32(vreinterpretq_u32_s32(a), vreinterpretq_u32_s32(b)));
    }
    static I min_unsigned(I a, I b) {
        return vreinterpretq_s32_u32(vminq_u32(vreinterpretq_u32_s32(a), vreinterpretq_u32_s32(b)));
    }
    template <int n>
    static I shift_right(I a) {
        return vreinterpretq_s32_u32(vshrq_n_u32(vreinterpretq_u32_s32(a), n));
    }
    template <int n>
    static I shift_left(I a) {
        return vshlq_n_s32(a, n);
    }
    // x where code > 0, 0 where code is 0; code is never negative.
    static I where_positive(I code, I x) { return vandq_s32(x, vreinterpretq_s32_u32(vtstq_s32(code, code))); }

    static M greater(F a, F b) { return vcgtq_f32(a, b); }
    static M equal(F a, F b) { return vceqq_f32(a, b); }
    static M equal_bits(I a, I b) { return vceqq_s32(a, b); }
    static M is_nan(F a) { return vmvnq_u32(vceqq_f32(a, a)); }
    static F select(M mask, F yes, F no) { return vbslq_f32(mask, yes, no); }

    static uint32_t reduce_max_unsigned(I x) { return vmaxvq_u32(vreinterpretq_u32_s32(x)); }
    static uint32_t reduce_min_unsigned(I x) { return vminvq_u32(vreinterpretq_u32_s32(x)); }

    // Unsigned codes as integers, signed ones times 2^24.
    static void load_codes(const uint8_t *p, I (&x)[4]) { spread(vld1q_u8(p), 0xFFFFFF00u, 0, x); }
    static void load_codes(const int8_t *p, I (&x)[4]) {
        spread(vreinterpretq_u8_s8(vld1q_s8(p)), 0x00FFFFFFu, 24, x);
    }
    static void store_codes(uint8_t *p, const I (&x)[4]) { vst1q_u8(p, saturated_bytes(x)); }
    static void store_codes(int8_t *p, const I (&x)[4]) {
        const uint8x16_t bytes = vmaxq_u8(saturated_bytes(x), vdupq_n_u8(1));
        vst1q_s8(p, vreinterpretq_s8_u8(veorq_u8(bytes, vdupq_n_u8(0x80))));
    }

    // Entries of a table: there is no instruction for it.
    static I gather(const int32_t *table, I index) {
        const int32_t found[4] = {table[vgetq_lane_s32(index, 0)], table[vgetq_lane_s32(index, 1)],
                                  table[vgetq_lane_s32(index, 2)], table[vgetq_lane_s32(index, 3)]};
        return vld1q_s32(found);
    }
    static void look_up(const float *table, const I (&index)[4], F (&x)[4]) {
        for (int u = 0; u < 4; ++u) {
            const float found[4] = {table[vgetq_lane_s32(index[u], 0)], table[vgetq_lane_s32(index[u], 1)],
                                    table[vgetq_lane_s32(index[u], 2)], table[vgetq_lane_s32(index[u], 3)]};
            x[u] = vld1q_f32(found);
        }
    }

    // Parameters and their corrections as words, with the parameter's sign. Infinities and NaN (from `infinity` on) have
    // no correction, zero has none that is negative. An int8 is the upper half of a correction.
    static void load_words(const uint16_t *p, const int16_t *rest, int infinity, I (&words)[4]) {
        for (int h = 0; h < 2; ++h) join(p + 8 * h, vld1q_s16(rest + 8 * h), infinity, words + 2 * h);
    }
    static void load_words(const uint16_t *p, const int8_t *rest, int infinity, I (&words)[4]) {
        for (int h = 0; h < 2; ++h) {
            join(p + 8 * h, vshlq_n_s16(vmovl_s8(vld1_s8(rest + 8 * h)), 8), infinity, words + 2 * h);
        }
    }
    // The inverse, of words of any lower half.
    static void store_words(uint16_t *p, int16_t *rest, const I (&words)[4]) {
        for (int h = 0; h < 2; ++h) vst1q_s16(rest + 8 * h, part(p + 8 * h, words + 2 * h));
    }
    static void store_words(uint16_t *p, int8_t *rest, const I (&words)[4]) {
        for (int h = 0; h < 2; ++h) vst1_s8(rest + 8 * h, vshrn_n_s16(part(p + 8 * h, words + 2 * h), 8));
    }

    static F load_bfloat16(const uint16_t *p) { return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p), 16)); }
    // The upper halves of the lanes.
    static void store_halves(uint16_t *p, const I (&x)[4]) {
        for (int u = 0; u < 4; ++u) vst1_u16(p + 4 * u, vshrn_n_u32(vreinterpretq_u32_s32(x[u]), 16));
    }
    static F load_float16(const uint16_t *p) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p))); }
    static void store_float16(uint16_t *p, const F (&x)[4]) {
        for (int u = 0; u < 4; ++u) vst1_u16(p + 4 * u, vreinterpret_u16_f16(vcvt_f16_f32(x[u])));
    }

    // The largest of 16-bit integers without their sign bits, over a whole block.
    static uint32_t max_halves(const uint16_t *p, int n) {
        uint16x8_t top = vdupq_n_u16(0);
        for (int i = 0; i < n; i += 8) top = vmaxq_u16(top, vandq_u16(vld1q_u16(p + i), vdupq_n_u16(0x7FFF)));
        return vmaxvq_u16(top);
    }

   private:
    // Two vectors of words: a correction is their lower half, and where it is negative the upper one is one less.
    static void join(const uint16_t *p, int16x8_t rest, int infinity, I *words) {
        const int16x8_t param = vreinterpretq_s16_u16(vld1q_u16(p)), none = vdupq_n_s16(0);
        const int16x8_t magnitude = vandq_s16(param, vdupq_n_s16(0x7FFF));
        const uint16x8_t finite = vcltq_s16(magnitude, vdupq_n_s16(static_cast<int16_t>(infinity)));
        rest = vandq_s16(rest, vreinterpretq_s16_u16(finite));
        rest = vbslq_s16(vceqq_s16(magnitude, none), vmaxq_s16(rest, none), rest);
        const int16x8_t upper = vaddq_s16(param, vshrq_n_s16(rest, 15));
        words[0] = vreinterpretq_s32_s16(vzip1q_s16(rest, upper));
        words[1] = vreinterpretq_s32_s16(vzip2q_s16(rest, upper));
    }
    // Stores the parameters of two vectors of words, and returns their corrections.
    static int16x8_t part(uint16_t *p, const I *words) {
        const int16x8_t first = vreinterpretq_s16_s32(words[0]), second = vreinterpretq_s16_s32(words[1]);
        const int16x8_t rest = vuzp1q_s16(first, second), upper = vuzp2q_s16(first, second);
        vst1q_u16(p, vreinterpretq_u16_s16(vsubq_s16(upper, vshrq_n_s16(rest, 15))));
        return rest;
    }
    // Each byte to a lane of its own; an index out of range gives zero.
    static void spread(uint8x16_t bytes, uint32_t zeros, int place, I (&x)[4]) {
        const uint32_t first[4] = {0u << place, 1u << place, 2u << place, 3u << place};
        const uint32x4_t order = vorrq_u32(vld1q_u32(first), vdupq_n_u32(zeros));
        for (int u = 0; u < 4; ++u) {
            const uint32x4_t index = vaddq_u32(order, vdupq_n_u32((4u << place) * static_cast<uint32_t>(u)));
            x[u] = vreinterpretq_s32_u8(vqtbl1q_u8(bytes, vreinterpretq_u8_u32(index)));
        }
    }
    static uint8x16_t saturated_bytes(const I (&x)[4]) {
        const int16x8_t low = vcombine_s16(vqmovn_s32(x[0]), vqmovn_s32(x[1]));
        const int16x8_t high = vcombine_s16(vqmovn_s32(x[2]), vqmovn_s32(x[3]));
        return vcombine_u8(vqmovun_s16(low), vqmovun_s16(high));
    }
};

}  // namespace

#endif
