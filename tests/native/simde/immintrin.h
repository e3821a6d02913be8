// Stands in for the compiler's immintrin.h, ahead of it in the include path: vec_avx512.h compiles unchanged to plain
// C++, by SIMDe, and runs on any processor. Build with SIMDE_NO_NATIVE and SIMDE_ENABLE_NATIVE_ALIASES.
//
// SIMDe 0.7.4, which is Debian 12's, lacks the operations below; a SIMDe that has one keeps its own. Each is a loop
// over what Intel's Intrinsics Guide says of one lane.
#ifndef LOWMEM_ADAM_TESTS_SIMDE_IMMINTRIN_H
#define LOWMEM_ADAM_TESTS_SIMDE_IMMINTRIN_H

#include <simde/x86/avx512.h>
#include <stdint.h>
#include <string.h>

#include "format.h"

#ifndef __mmask16
#define __mmask16 simde__mmask16
#endif
#ifndef __mmask32
#define __mmask32 simde__mmask32
#endif

namespace emulated {

// A vector's lanes, and back.
template <class Lane, class Vector>
struct Lanes {
    Lane v[sizeof(Vector) / sizeof(Lane)];
};
template <class Lane, class Vector>
Lanes<Lane, Vector> lanes(const Vector &x) {
    Lanes<Lane, Vector> lanes;
    memcpy(&lanes, &x, sizeof x);
    return lanes;
}
template <class Vector, class Lane>
Vector vector(const Lanes<Lane, Vector> &lanes) {
    Vector x;
    memcpy(&x, &lanes, sizeof x);
    return x;
}

// Each lane of `x` through `f`, as many as the result has.
template <class To, class ToLane, class FromLane, class From, class Function>
To each(const From &x, Function f) {
    const Lanes<FromLane, From> from = lanes<FromLane>(x);
    Lanes<ToLane, To> to;
    for (size_t i = 0; i < sizeof(To) / sizeof(ToLane); ++i) to.v[i] = f(from.v[i]);
    return vector<To>(to);
}

template <class Function>
uint32_t fold(const simde__m512i &x, Function f) {
    const Lanes<uint32_t, simde__m512i> from = lanes<uint32_t>(x);
    uint32_t result = from.v[0];
    for (const uint32_t lane : from.v) result = f(result, lane);
    return result;
}

}  // namespace emulated

#ifndef _mm512_cvtepi32_ps
inline simde__m512 _mm512_cvtepi32_ps(simde__m512i x) {
    return emulated::each<simde__m512, float, int32_t>(x, [](int32_t lane) { return static_cast<float>(lane); });
}
#endif

#ifndef _mm512_cvttps_epi32
// What is not a number or does not fit is INT32_MIN, "the integer indefinite".
inline simde__m512i _mm512_cvttps_epi32(simde__m512 x) {
    return emulated::each<simde__m512i, int32_t, float>(x, [](float lane) {
        return lane >= -0x1p31f && lane < 0x1p31f ? static_cast<int32_t>(lane) : INT32_MIN;
    });
}
#endif

#ifndef _mm512_cvtepu8_epi32
inline simde__m512i _mm512_cvtepu8_epi32(simde__m128i x) {
    return emulated::each<simde__m512i, int32_t, uint8_t>(x, [](uint8_t lane) { return lane; });
}
#endif

#ifndef _mm512_cvtepu16_epi32
inline simde__m512i _mm512_cvtepu16_epi32(simde__m256i x) {
    return emulated::each<simde__m512i, int32_t, uint16_t>(x, [](uint16_t lane) { return lane; });
}
#endif

#ifndef _mm512_cvtph_ps
inline simde__m512 _mm512_cvtph_ps(simde__m256i x) {
    return emulated::each<simde__m512, float, uint16_t>(x, [](uint16_t lane) { return float_of_half(lane); });
}
#endif

#ifndef _mm512_cvtps_ph
// The only rounding that is asked for is to nearest.
inline simde__m256i _mm512_cvtps_ph(simde__m512 x, int) {
    return emulated::each<simde__m256i, uint16_t, float>(x, [](float lane) { return half_of_float(lane); });
}
#endif

#ifndef _mm512_reduce_max_epu32
inline uint32_t _mm512_reduce_max_epu32(simde__m512i x) {
    return emulated::fold(x, [](uint32_t a, uint32_t b) { return a > b ? a : b; });
}
#endif

#ifndef _mm512_reduce_min_epu32
inline uint32_t _mm512_reduce_min_epu32(simde__m512i x) {
    return emulated::fold(x, [](uint32_t a, uint32_t b) { return a < b ? a : b; });
}
#endif

#ifndef _mm512_i32gather_epi32
// The only scale that is asked for is the size of an entry.
inline simde__m512i _mm512_i32gather_epi32(simde__m512i index, const void *table, int) {
    return emulated::each<simde__m512i, int32_t, int32_t>(
        index, [table](int32_t lane) { return static_cast<const int32_t *>(table)[lane]; });
}
#endif

#ifndef _mm512_i32gather_ps
inline simde__m512 _mm512_i32gather_ps(simde__m512i index, const void *table, int) {
    return emulated::each<simde__m512, float, int32_t>(
        index, [table](int32_t lane) { return static_cast<const float *>(table)[lane]; });
}
#endif

#endif
