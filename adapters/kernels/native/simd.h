// One vector type for every CPU: 16 lanes with AVX-512, 8 with AVX2, 4 otherwise.
//
// The library is compiled once per instruction set and the loader picks one, so there is no dispatch at run time.
// Functions of this file hide the differences between CPUs (fused multiply-add, 16-entry table look-up, half precision);
// the rest is GCC/Clang vector arithmetic. Built with -ffp-contract=off: only `fma` fuses.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif
#if defined(__ARM_NEON)
#include <arm_neon.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int W = 16;
#elif defined(__AVX2__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif

typedef float vf __attribute__((vector_size(4 * W)));
typedef int32_t vi __attribute__((vector_size(4 * W)));
typedef uint32_t vu __attribute__((vector_size(4 * W)));
typedef float v4 __attribute__((vector_size(16)));
typedef float v8 __attribute__((vector_size(32)));

struct bf16 {
    uint16_t bits;
};
struct fp16 {
    uint16_t bits;
};
struct fp8 {  // e4m3, without infinity
    uint8_t bits;
};

#define INLINE inline __attribute__((always_inline))

INLINE vf load(const float* p) {
    vf v;
    memcpy(&v, p, sizeof v);
    return v;
}

INLINE void store(float* p, vf v) { memcpy(p, &v, sizeof v); }

INLINE void store_part(float* p, vf v, int n) {
#if defined(__AVX512F__)
    _mm512_mask_storeu_ps(p, (1u << n) - 1, (__m512)v);
#else
    memcpy(p, &v, 4 * n);
#endif
}

INLINE vf set1(float s) {
#if defined(__AVX512F__)
    return (vf)_mm512_set1_ps(s);
#elif defined(__AVX2__)
    return (vf)_mm256_set1_ps(s);
#else
    return vf{s, s, s, s};
#endif
}

INLINE vf fma(vf a, vf b, vf c) {
#if defined(__AVX512F__)
    return (vf)_mm512_fmadd_ps(a, b, c);
#elif defined(__AVX2__)
    return (vf)_mm256_fmadd_ps(a, b, c);
#elif defined(__ARM_NEON)
    return (vf)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
    return a * b + c;
#endif
}

INLINE bool any(vi mask) {  // whether any lane is set; lanes are all ones or all zeros
#if defined(__AVX512F__)
    return _mm512_test_epi32_mask((__m512i)mask, (__m512i)mask);
#elif defined(__AVX2__)
    return _mm256_movemask_epi8((__m256i)mask);
#else
    return mask[0] | mask[1] | mask[2] | mask[3];
#endif
}

INLINE vf max(vf a, vf b) { return (vf)(a > b ? a : b); }

// --- sums over lanes: the same order (fold halves, then pairs) for one vector as for four at once ----------------------

INLINE v4 fold(vf v) {
#if defined(__AVX512F__)
    v8 h = (v8)_mm512_castps512_ps256(v) + (v8)_mm512_extractf32x8_ps(v, 1);
    return (v4)_mm256_castps256_ps128(h) + (v4)_mm256_extractf128_ps(h, 1);
#elif defined(__AVX2__)
    return (v4)_mm256_castps256_ps128(v) + (v4)_mm256_extractf128_ps(v, 1);
#else
    return v;
#endif
}

INLINE v4 sum4(vf a, vf b, vf c, vf d) {  // {sum a, sum b, sum c, sum d}
    v4 fa = fold(a), fb = fold(b), fc = fold(c), fd = fold(d);
    v4 ab_lo = __builtin_shufflevector(fa, fb, 0, 4, 1, 5), ab_hi = __builtin_shufflevector(fa, fb, 2, 6, 3, 7);
    v4 cd_lo = __builtin_shufflevector(fc, fd, 0, 4, 1, 5), cd_hi = __builtin_shufflevector(fc, fd, 2, 6, 3, 7);
    v4 ab = ab_lo + ab_hi, cd = cd_lo + cd_hi;  // {a0+a2, b0+b2, a1+a3, b1+b3}
    return __builtin_shufflevector(ab, cd, 0, 1, 4, 5) + __builtin_shufflevector(ab, cd, 2, 3, 6, 7);
}

INLINE float sum(vf v) {
    v4 f = fold(v);
    return (f[0] + f[2]) + (f[1] + f[3]);
}

INLINE v4 highest(vf v) {
#if defined(__AVX512F__)
    v8 h = (v8)_mm256_max_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
#elif defined(__AVX2__)
    v8 h = v;
#endif
#if defined(__AVX512F__) || defined(__AVX2__)
    v4 a = (v4)_mm256_castps256_ps128(h), b = (v4)_mm256_extractf128_ps(h, 1);
    return (v4)(a > b ? a : b);
#else
    return v;
#endif
}

INLINE float top(vf v) {
    v4 f = highest(v);
    const float a = f[0] > f[1] ? f[0] : f[1], b = f[2] > f[3] ? f[2] : f[3];
    return a > b ? a : b;
}

// --- exp ------------------------------------------------------------------------------------------------------------

// Returns p and n with exp(c) = p * 2^n, for c between -87.33654 and 88.72283.
INLINE vf exp_parts(vf c, vf& n) {
    const vf magic = set1(12582912.f);  // 1.5 * 2^23: adding it rounds to an integer
    n = (c * set1(1.44269504f) + magic) - magic;
    vf r = fma(n, set1(-0.693359375f), c);
    r = fma(n, set1(2.12194440e-4f), r);
    vf p = set1(1.9875691500e-4f);
    p = fma(p, r, set1(1.3981999507e-3f));
    p = fma(p, r, set1(8.3334519073e-3f));
    p = fma(p, r, set1(4.1665795894e-2f));
    p = fma(p, r, set1(1.6666665459e-1f));
    p = fma(p, r, set1(5.0000001201e-1f));
    return fma(p, r * r, r) + set1(1.f);
}

INLINE vf exp(vf x) {  // within 2 ulp; exp(-inf) = 0 exactly, NaN stays NaN
    const vf low = set1(-87.33654f), high = set1(88.72283f);
    vf c = (vf)(x > low ? x : low), n;
    c = (vf)(c < high ? c : high);
    const vf p = exp_parts(c, n);
    // 2^n in two factors, since n reaches 128
    vi half = __builtin_convertvector(n, vi) >> 1, rest = __builtin_convertvector(n, vi) - half;
    vf y = p * (vf)((half + 127) << 23) * (vf)((rest + 127) << 23);
    y = (vf)(x < low ? set1(0.f) : y);
    y = (vf)(x > high ? set1(INFINITY) : y);
    return (vf)(x == x ? y : x);
}

INLINE vf exp_below(vf x) {  // the same for numbers of at most 0
    const vf low = set1(-87.33654f);
    vf n;
    const vf p = exp_parts((vf)(x > low ? x : low), n);
    const vf y = p * (vf)((__builtin_convertvector(n, vi) + 127) << 23);
    return (vf)(x < low ? set1(0.f) : (vf)(x == x ? y : x));
}

// --- loads of other dtypes as fp32 ----------------------------------------------------------------------------------------------------

INLINE vf load(const bf16* p) {
#if defined(__AVX512F__)
    return (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16);
#elif defined(__AVX2__)
    return (vf)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16);
#else
    vu v;
    for (int i = 0; i < W; i++) v[i] = (uint32_t)p[i].bits << 16;
    return (vf)v;
#endif
}

INLINE float number(bf16 h) {
    uint32_t bits = (uint32_t)h.bits << 16;
    float f;
    memcpy(&f, &bits, 4);
    return f;
}

INLINE float number(fp16 half) {
    const uint16_t h = half.bits;
    uint32_t sign = (uint32_t)(h & 0x8000) << 16, rest = (uint32_t)(h & 0x7fff) << 13, bits;
    float f;
    if ((h & 0x7c00) == 0x7c00) {  // inf, NaN
        bits = sign | 0x7f800000 | rest;
    } else if (h & 0x7c00) {
        bits = sign | (rest + (112u << 23));
    } else {  // subnormal: scale the integer
        f = (float)(h & 0x3ff) * 5.9604644775390625e-8f;
        memcpy(&bits, &f, 4);
        bits |= sign;
    }
    memcpy(&f, &bits, 4);
    return f;
}

INLINE vf load(const fp16* p) {
#if defined(__AVX512F__)
    return (vf)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#elif defined(__AVX2__)
    return (vf)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
#else
    vf v;
    for (int i = 0; i < W; i++) v[i] = number(p[i]);
    return v;
#endif
}

INLINE void split(const bf16* p, vf& even, vf& odd) {  // 2W numbers -> those at even and at odd places
    vu v;
    memcpy(&v, p, sizeof v);
    even = (vf)(v << 16);
    odd = (vf)(v & 0xffff0000u);
}

INLINE vf load(const int8_t* p) {
#if defined(__AVX512F__)
    return (vf)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)));
#elif defined(__AVX2__)
    return (vf)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)));
#else
    vf v;
    for (int i = 0; i < W; i++) v[i] = (float)p[i];
    return v;
#endif
}

// An fp8's four bits of exponent and three of mantissa are placed in an fp32; the exponents' biases differ by a factor of
// 2^120, also for subnormal numbers.
INLINE vf load(const fp8* p) {
#if defined(__AVX512F__)
    const vi bits = (vi)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p));
#elif defined(__AVX2__)
    const vi bits = (vi)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p));
#else
    vi bits;
    for (int i = 0; i < W; i++) bits[i] = p[i].bits;
#endif
    const vf number = (vf)((bits & 0x80) << 24 | (bits & 0x7f) << 20) * set1(0x1p120f);
    return (vf)((bits & 0x7f) == 0x7f ? set1(NAN) : number);
}

// --- rounding of fp32 to other dtypes, half to even ----------------------------------------------------------------------

INLINE uint32_t bits_of(float f) {
    uint32_t bits;
    memcpy(&bits, &f, 4);
    return bits;
}

INLINE bf16 rounded_bf16(float f) {
    const uint32_t bits = bits_of(f);
    if (f != f) return {(uint16_t)(bits >> 16 | 0x40)};
    return {(uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

INLINE fp16 rounded_fp16(float f) {
    const uint16_t sign = bits_of(f) >> 16 & 0x8000;
    const float size = fabsf(f);
    if (size != size) return {(uint16_t)(sign | 0x7e00)};
    if (size >= 65520.f) return {(uint16_t)(sign | 0x7c00)};
    if (size < 0x1p-14f) return {(uint16_t)(sign | (int)nearbyintf(size * 0x1p24f))};
    const uint32_t bits = bits_of(size * 0x1p-112f);
    return {(uint16_t)(sign | (bits + 0xfff + (bits >> 13 & 1)) >> 13)};
}

INLINE fp8 rounded_fp8(float f) {
    const uint8_t sign = bits_of(f) >> 24 & 0x80;
    const float size = fabsf(f);
    if (size != size) return {(uint8_t)(sign | 0x7f)};
    if (size < 0x1p-6f) return {(uint8_t)(sign | (int)nearbyintf(size * 512.f))};
    const uint32_t bits = bits_of((size < 448.f ? size : 448.f) * 0x1p-120f);
    return {(uint8_t)(sign | (bits + 0x7ffff + (bits >> 20 & 1)) >> 20)};
}

template <class Number>
INLINE vf load_part(const Number* p, int n) {  // the first n lanes, the others zero
    Number part[W] = {};
    memcpy(part, p, sizeof(Number) * n);
    return load(part);
}

#if defined(__AVX512F__)
INLINE vf load_part(const float* p, int n) { return (vf)_mm512_maskz_loadu_ps((1u << n) - 1, p); }
#endif

// --- even and odd places ------------------------------------------------------------------------------------------------

INLINE void deinterleave(const float* p, vf& even, vf& odd) {
    vf a = load(p), b = load(p + W);
#if defined(__AVX512F__)
    const vi pick = {0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30};
    even = (vf)_mm512_permutex2var_ps(a, (__m512i)pick, b);
    odd = (vf)_mm512_permutex2var_ps(a, (__m512i)(pick + 1), b);
#elif defined(__AVX2__)
    even = __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14);
    odd = __builtin_shufflevector(a, b, 1, 3, 5, 7, 9, 11, 13, 15);
#else
    even = __builtin_shufflevector(a, b, 0, 2, 4, 6);
    odd = __builtin_shufflevector(a, b, 1, 3, 5, 7);
#endif
}

INLINE void store_interleaved(float* p, vf even, vf odd) {
#if defined(__AVX512F__)
    const vi pick = {0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23};
    store(p, (vf)_mm512_permutex2var_ps(even, (__m512i)pick, odd));
    store(p + W, (vf)_mm512_permutex2var_ps(even, (__m512i)(pick + 8), odd));
#elif defined(__AVX2__)
    store(p, __builtin_shufflevector(even, odd, 0, 8, 1, 9, 2, 10, 3, 11));
    store(p + W, __builtin_shufflevector(even, odd, 4, 12, 5, 13, 6, 14, 7, 15));
#else
    store(p, __builtin_shufflevector(even, odd, 0, 4, 1, 5));
    store(p + W, __builtin_shufflevector(even, odd, 2, 6, 3, 7));
#endif
}

// --- rows to columns ------------------------------------------------------------------------------------------------------

// to[i], lane r = rows[r * stride + i], for W rows and four columns.
INLINE void columns(const float* rows, int64_t stride, vf (&to)[4]) {
    vf part[4];  // four numbers of rows i, i + 4, ...
    for (int i = 0; i < 4; i++, rows += stride) {
#if defined(__AVX512F__)
        __m512 v = _mm512_castps128_ps512(_mm_loadu_ps(rows));
        v = _mm512_insertf32x4(v, _mm_loadu_ps(rows + 4 * stride), 1);
        v = _mm512_insertf32x4(v, _mm_loadu_ps(rows + 8 * stride), 2);
        part[i] = (vf)_mm512_insertf32x4(v, _mm_loadu_ps(rows + 12 * stride), 3);
#elif defined(__AVX2__)
        part[i] = (vf)_mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(rows)), _mm_loadu_ps(rows + 4 * stride), 1);
#else
        part[i] = load(rows);
#endif
    }
#if defined(__AVX512F__)
    const __m512 a = _mm512_unpacklo_ps(part[0], part[1]), b = _mm512_unpacklo_ps(part[2], part[3]);
    const __m512 c = _mm512_unpackhi_ps(part[0], part[1]), d = _mm512_unpackhi_ps(part[2], part[3]);
    to[0] = (vf)_mm512_shuffle_ps(a, b, 0x44), to[1] = (vf)_mm512_shuffle_ps(a, b, 0xEE);
    to[2] = (vf)_mm512_shuffle_ps(c, d, 0x44), to[3] = (vf)_mm512_shuffle_ps(c, d, 0xEE);
#elif defined(__AVX2__)
    const __m256 a = _mm256_unpacklo_ps(part[0], part[1]), b = _mm256_unpacklo_ps(part[2], part[3]);
    const __m256 c = _mm256_unpackhi_ps(part[0], part[1]), d = _mm256_unpackhi_ps(part[2], part[3]);
    to[0] = (vf)_mm256_shuffle_ps(a, b, 0x44), to[1] = (vf)_mm256_shuffle_ps(a, b, 0xEE);
    to[2] = (vf)_mm256_shuffle_ps(c, d, 0x44), to[3] = (vf)_mm256_shuffle_ps(c, d, 0xEE);
#else
    for (int i = 0; i < 4; i++) to[i] = vf{part[0][i], part[1][i], part[2][i], part[3][i]};
#endif
}

// --- 4-bit codes: a table of 16 numbers looked up by nibble ---------------------------------------------------------------

#if defined(__AVX2__) && !defined(__AVX512F__)

// Before AVX-512, lookups across a register's halves are slow, but byte lookups within halves are fast: so a number is
// assembled from its four bytes, looked up separately.
struct Table {
    __m256i bytes[4];  // byte i of each of the 16 numbers, in both halves
};

INLINE Table load_table(const float* code) {
    Table t;
    for (int i = 0; i < 4; i++) {
        alignas(16) uint8_t plane[16];
        for (int n = 0; n < 16; n++) plane[n] = ((const uint8_t*)(code + n))[i];
        t.bytes[i] = _mm256_broadcastsi128_si256(*(const __m128i*)plane);
    }
    return t;
}

// Looks up 32 indices, into vectors of 8: the first four indices of each half, the next four, ...
INLINE void look_up(const Table& t, __m256i indices, vf (&to)[4]) {
    const __m256i b0 = _mm256_shuffle_epi8(t.bytes[0], indices), b1 = _mm256_shuffle_epi8(t.bytes[1], indices);
    const __m256i b2 = _mm256_shuffle_epi8(t.bytes[2], indices), b3 = _mm256_shuffle_epi8(t.bytes[3], indices);
    const __m256i low = _mm256_unpacklo_epi8(b0, b1), upper = _mm256_unpacklo_epi8(b2, b3);
    const __m256i low2 = _mm256_unpackhi_epi8(b0, b1), upper2 = _mm256_unpackhi_epi8(b2, b3);
    to[0] = (vf)_mm256_unpacklo_epi16(low, upper), to[1] = (vf)_mm256_unpackhi_epi16(low, upper);
    to[2] = (vf)_mm256_unpacklo_epi16(low2, upper2), to[3] = (vf)_mm256_unpackhi_epi16(low2, upper2);
}

// 32 packed bytes -> their 64 dequantised weights, code * scale: for each eight bytes those of the high nibbles, which come
// first, then those of the low nibbles.
INLINE void look_up_block(const Table& t, const uint8_t* p, float scale, vf (&to)[8]) {
    const __m256i nibble = _mm256_set1_epi8(15);
    const __m256i order = _mm256_setr_epi32(0, 2, 4, 6, 1, 3, 5, 7);  // so that each of `look_up`'s vectors has eight adjacent bytes
    const __m256i bytes = _mm256_permutevar8x32_epi32(_mm256_loadu_si256((const __m256i*)p), order);
    vf even[4], odd[4];
    look_up(t, _mm256_and_si256(_mm256_srli_epi16(bytes, 4), nibble), even);
    look_up(t, _mm256_and_si256(bytes, nibble), odd);
    for (int i = 0; i < 4; i++) to[2 * i] = even[i] * set1(scale), to[2 * i + 1] = odd[i] * set1(scale);
}

#else

struct Table {
#if defined(__AVX512F__)
    vf all;
#else
    float all[16];
#endif
};

INLINE Table load_table(const float* code) {
    Table t;
    memcpy(&t.all, code, sizeof t.all);
    return t;
}

INLINE Table scaled(const Table& code, float scale) {  // exactly the products of dequantising: code * absmax
    Table t;
#if defined(__AVX512F__)
    t.all = code.all * set1(scale);
#else
    for (int i = 0; i < 16; i++) t.all[i] = code.all[i] * scale;
#endif
    return t;
}

// W packed bytes -> 2W weights. The earlier weight of a byte is its high nibble.
INLINE void look_up(const Table& t, const uint8_t* p, vf& even, vf& odd) {
#if defined(__AVX512F__)
    __m512i bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p));
    odd = (vf)_mm512_permutexvar_ps(bytes, t.all);  // reads the low four bits of each index
    even = (vf)_mm512_permutexvar_ps(_mm512_srli_epi32(bytes, 4), t.all);
#else
    for (int i = 0; i < W; i++) even[i] = t.all[p[i] >> 4], odd[i] = t.all[p[i] & 15];
#endif
}

#endif

// Keeps a value in a register, so that it is not loaded for each use.
INLINE void in_register(vf& v) {
#if defined(__AVX512F__)
    asm("" : "+v"(v));
#endif
}

}  // namespace
