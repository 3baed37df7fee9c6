// Exact dot products of eight-bit integers, four at a time, in a CPU's instructions for them.
//
// An arithmetic makes an operand of four weights of each of W outputs (`operand`), and adds to each lane the product of
// its four weights and four inputs, all within [-127, 127] (`dot`). With a SHIFT, weights must be that much greater, and
// sums start at -SHIFT times the sum of the inputs.
#pragma once

#include "simd.h"

// Whether Vnni may be used.
bool has_vnni();

namespace {

typedef int8_t vb __attribute__((vector_size(4 * W)));  // four weights of each of W outputs
typedef int16_t vs __attribute__((vector_size(4 * W)));
typedef int32_t four __attribute__((may_alias));  // bytes

INLINE vb load_bytes(const int8_t* p) {
    vb v;
    memcpy(&v, p, sizeof v);
    return v;
}

#if defined(__AVX512F__)

struct Vnni {
    static constexpr int SHIFT = 128;
    struct Operand {
        vb l;
    };
    static INLINE Operand operand(vb l) { return {l}; }
    // In assembly, since the library is also compiled for CPUs without this instruction.
    static INLINE vi dot(vi acc, const Operand& w, const int8_t* x) {
        asm("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(acc) : "v"(w.l), "m"(*(const four*)x));
        return acc;
    }
};

struct Signed {
    static constexpr int SHIFT = 0;
    struct Operand {
        vb magnitude;
        __mmask64 negative;
    };
    static INLINE Operand operand(vb l) { return {(vb)_mm512_abs_epi8((__m512i)l), _mm512_movepi8_mask((__m512i)l)}; }
    static INLINE vi dot(vi acc, const Operand& w, const int8_t* at) {
        __m512i x = _mm512_set1_epi32(*(const four*)at);
        x = _mm512_mask_sub_epi8(x, w.negative, _mm512_setzero_si512(), x);
        __m512i pairs = _mm512_maddubs_epi16((__m512i)w.magnitude, x);  // at most 2 * 127 * 127: no saturation
        return acc + (vi)_mm512_madd_epi16(pairs, _mm512_set1_epi16(1));
    }
};

#else

struct Signed {
    static constexpr int SHIFT = 0;
#if defined(__AVX2__)
    struct Operand {
        vb magnitude, l;
    };
    static INLINE Operand operand(vb l) { return {(vb)_mm256_abs_epi8((__m256i)l), l}; }
    static INLINE vi dot(vi acc, const Operand& w, const int8_t* at) {
        __m256i x = _mm256_sign_epi8(_mm256_set1_epi32(*(const four*)at), (__m256i)w.l);
        __m256i pairs = _mm256_maddubs_epi16((__m256i)w.magnitude, x);  // at most 2 * 127 * 127: no saturation
        return acc + (vi)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
    }
#else
    struct Operand {
        vs low, high;  // of each pair of bytes
    };
    static INLINE Operand operand(vb l) { return {(vs)l << 8 >> 8, (vs)l >> 8}; }
    static INLINE vi dot(vi acc, const Operand& w, const int8_t* at) {
        const Operand x = operand((vb)(*(const four*)at - vi{}));
        const vi pairs = (vi)(w.low * x.low + w.high * x.high);  // at most 2 * 127 * 127: no overflow
        return acc + (pairs << 16 >> 16) + (pairs >> 16);
    }
#endif
};

#endif

// Calls `f` with the best arithmetic.
template <class F>
INLINE void with_arithmetic(F&& f) {
#if defined(__AVX512F__)
    if (has_vnni()) return f.template operator()<Vnni>();
#endif
    f.template operator()<Signed>();
}

}  // namespace
