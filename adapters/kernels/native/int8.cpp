#include "int8.h"

#include "dot8.h"
#include "export.h"
#include "pool.h"
#include "tile.h"

namespace {

constexpr int BLOCK = 64;         // inputs under one scale
constexpr int STEPS = BLOCK / 8;  // a step reads eight weights of each output
constexpr float TINY = 1e-30f;    // a block without a greater input counts as zeros, since 127 / top must be finite

constexpr int MOST = W == 16 ? 8 : 4;  // rows at once; for more than twice as many, weights are decoded once into a tile

typedef int8_t vq __attribute__((vector_size(W)));

template <class F>
INLINE int32_t reduced(vi v, F&& f) {
    int32_t lanes[W];
    memcpy(lanes, &v, sizeof lanes);
    for (int n = W / 2; n > 0; n /= 2)
        for (int i = 0; i < n; i++) lanes[i] = f(lanes[i], lanes[i + n]);
    return lanes[0];
}

// --- weights ----------------------------------------------------------------------------------------------------------

// Weights by nibble.
#if !defined(__AVX512F__) && !defined(__AVX2__)
__attribute__((noinline))  // inlined sixteen times, it would take long to compile
#else
INLINE
#endif
void look_up(vb table, vb bytes, vb& high, vb& low) {
#if defined(__AVX512F__)
    const __m512i mask = _mm512_set1_epi8(15);
    high = (vb)_mm512_shuffle_epi8((__m512i)table, _mm512_and_si512(_mm512_srli_epi16((__m512i)bytes, 4), mask));
    low = (vb)_mm512_shuffle_epi8((__m512i)table, _mm512_and_si512((__m512i)bytes, mask));
#elif defined(__AVX2__)
    const __m256i mask = _mm256_set1_epi8(15);
    high = (vb)_mm256_shuffle_epi8((__m256i)table, _mm256_and_si256(_mm256_srli_epi16((__m256i)bytes, 4), mask));
    low = (vb)_mm256_shuffle_epi8((__m256i)table, _mm256_and_si256((__m256i)bytes, mask));
#else
    for (int i = 0; i < 4 * W; i++) high[i] = table[(uint8_t)bytes[i] >> 4], low[i] = table[bytes[i] & 15];
#endif
}

vb load_table(const int8_t* levels, int shift) {
    int8_t table[4 * W];
    for (int i = 0; i < 4 * W; i++) table[i] = (int8_t)(levels[i % 16] + shift);
    return load_bytes(table);
}

// W outputs of a group from `lane` on, decoded as they are read.
struct Packed {
    const Int8Weights* group;
    vb table;
    int lane;
    const Int8Weights* at;

    INLINE void block(int b) {
        at = group + b;
        for (int line = 0; line < (int)sizeof *at; line += 64) __builtin_prefetch((const char*)at + 4096 + line);
    }
    INLINE void step(int d, vb& first, vb& second) const { look_up(table, load_bytes((const int8_t*)at->codes[d][lane]), first, second); }
};

// The same, decoded beforehand: [blocks, eight inputs, first and second four].
struct Decoded {
    const int8_t* tile;
    const int8_t* at;

    INLINE void block(int b) { at = tile + (int64_t)b * BLOCK * W; }
    INLINE void step(int d, vb& first, vb& second) const {
        first = load_bytes(at + d * 8 * W), second = load_bytes(at + d * 8 * W + 4 * W);
    }
};

// --- rows x outputs -----------------------------------------------------------------------------------------------------

// Multiplies M rows by W outputs. scales: of the first block's outputs.
template <class Arithmetic, int M, class Weights>
INLINE void multiply(Weights weights, const float* scales, const Int8Block* x, int blocks, vf (&y)[M]) {
    constexpr int CHAINS = M == 1 ? 4 : M == 2 ? 2 : 1;  // so that few rows do not wait for each sum
    for (int m = 0; m < M; m++) y[m] = vf{};
    for (int b = 0; b < blocks; b++, scales += sizeof(Int8Weights) / sizeof(float)) {
        weights.block(b);
        const Int8Block* at[M];
        vi dots[CHAINS][M] = {};
        for (int m = 0; m < M; m++) {
            at[m] = x + (int64_t)m * blocks + b;
            if (Arithmetic::SHIFT) dots[0][m] = at[m]->offset - vi{};
        }
#pragma GCC unroll 8
        for (int d = 0; d < STEPS; d++) {
            vb first, second;
            weights.step(d, first, second);
            const auto w0 = Arithmetic::operand(first), w1 = Arithmetic::operand(second);
            vi(&dots0)[M] = dots[2 * d % CHAINS], (&dots1)[M] = dots[(2 * d + 1) % CHAINS];
            for (int m = 0; m < M; m++) dots0[m] = Arithmetic::dot(dots0[m], w0, at[m]->x + 8 * d);
            for (int m = 0; m < M; m++) dots1[m] = Arithmetic::dot(dots1[m], w1, at[m]->x + 8 * d + 4);
        }
        for (int c = 1; c < CHAINS; c++)
            for (int m = 0; m < M; m++) dots[0][m] += dots[c][m];
        const vf scale = load(scales);
        for (int m = 0; m < M; m++) y[m] = fma(__builtin_convertvector(dots[0][m], vf), scale * set1(at[m]->scale), y[m]);
    }
}

// The inputs and the result of a tile of W outputs, of which only lanes [first, last) are stored.
struct Tile {
    const float* scales;  // of the first block's outputs
    const Int8Block* x;
    int blocks;
    const float* bias;  // or null
    float* y;
    int64_t stride;
    int first, last;

    template <class Arithmetic, int M, class Weights>
    INLINE void multiply_rows(const Weights& weights, int m) const {
        vf sums[M];
        multiply<Arithmetic, M>(weights, scales, x + (int64_t)m * blocks, blocks, sums);
        for (int i = 0; i < M; i++) {
            float lanes[W];
            store(lanes, sums[i]);
            for (int n = first; n < last; n++) y[(m + i) * stride + n] = bias ? lanes[n] + bias[n] : lanes[n];
        }
    }

    template <class Arithmetic, class Weights>
    void multiply_most(const Weights& weights, int m) const {
        multiply_rows<Arithmetic, MOST>(weights, m);
    }

    // Fewer than MOST rows.
    template <class Arithmetic, int M = MOST - 1>
    void multiply_rest(const Packed& weights, int m, int rows) const {
        if (rows == M) return multiply_rows<Arithmetic, M>(weights, m);
        if constexpr (M > 1) multiply_rest<Arithmetic, M - 1>(weights, m, rows);
    }
};

const int8_t* decode(Packed weights, int blocks) {
    int8_t* const tile = (int8_t*)scratch(TILE, (size_t)blocks * BLOCK * W / sizeof(float));
    int8_t* to = tile;
    for (int b = 0; b < blocks; b++) {
        weights.block(b);
        for (int d = 0; d < STEPS; d++, to += 8 * W) {
            vb first, second;
            weights.step(d, first, second);
            memcpy(to, &first, sizeof first), memcpy(to + 4 * W, &second, sizeof second);
        }
    }
    return tile;
}

template <class Arithmetic>
void multiply_tiles(const Weight& w, const Int8Block* x, int rows, int first, int last, float* y, int64_t stride) {
    const int blocks = w.in / BLOCK;
    const vb table = load_table(w.levels, Arithmetic::SHIFT);
    for (int o = first / W * W; o < last; o += W) {
        const Int8Weights* group = int8_group(w, o / 16);
        const Packed packed{group, table, o % 16, nullptr};
        const float* bias = w.bias ? w.bias + o : nullptr;
        const Tile tile{group->scales + o % 16, x, blocks, bias, y + o, stride, o < first ? first - o : 0, least(W, last - o)};
        int m = 0;
        if (rows > 2 * MOST) {  // decoding once for all rows pays
            const Decoded decoded{decode(packed, blocks), nullptr};
            for (; m + MOST <= rows; m += MOST) tile.multiply_most<Arithmetic>(decoded, m);
        }
        for (; m + MOST <= rows; m += MOST) tile.multiply_most<Arithmetic>(packed, m);
        tile.multiply_rest<Arithmetic>(packed, m, rows - m);
    }
}

}  // namespace

void int8_copy_group(const Weight& w, int group, float unit, Int8Weights* to) {
    const int blocks = w.in / BLOCK;
    if (w.out < group * 16 + 16) memset(to, 0, sizeof *to * blocks);  // the missing outputs
    for (int o = group * 16; o < least(group * 16 + 16, w.out); o++) {
        const uint8_t* from = (const uint8_t*)w.data + (int64_t)o * w.in / 2;
        const float* scales = w.scales + (int64_t)o * blocks;
        for (int b = 0; b < blocks; b++) {
            to[b].scales[o % 16] = scales[b] * unit;
            for (int d = 0; d < STEPS; d++, from += 4) {
                const uint8_t codes[4] = {(uint8_t)((from[0] & 0xf0) | from[2] >> 4), (uint8_t)(from[0] << 4 | (from[2] & 15)),
                                          (uint8_t)((from[1] & 0xf0) | from[3] >> 4), (uint8_t)(from[1] << 4 | (from[3] & 15))};
                memcpy(to[b].codes[d][o % 16], codes, sizeof codes);
            }
        }
    }
}

void pack_int8(const float* row, int in, Int8Block* to) {
    const vf magic = set1(12582912.f);  // 1.5 * 2^23: adding it rounds to an integer, in the low bits
    for (; in > 0; in -= BLOCK, row += BLOCK, to++) {
        vi tops = {};  // magnitudes' bits order as the magnitudes do, with infinity and NaN on top
        for (int i = 0; i < BLOCK; i += W) {
            const vi bits = (vi)load(row + i) & 0x7fffffff;
            tops = bits > tops ? bits : tops;
        }
        const int32_t bits = reduced(tops, [](int32_t a, int32_t b) { return a > b ? a : b; });
        float top;
        memcpy(&top, &bits, sizeof top);
        if (!(top < INFINITY)) {
            memset(to->x, 0, sizeof to->x);
            to->scale = NAN, to->offset = 0;
            continue;
        }
        const vf per_unit = set1(top > TINY ? 127.f / top : 0.f);
        vi total = {};
        for (int i = 0; i < BLOCK; i += W) {
            const vi q = (vi)(load(row + i) * per_unit + magic) - (vi)magic;
            total += q;
            const auto bytes = __builtin_convertvector(q, vq);
            memcpy(to->x + i, &bytes, sizeof bytes);
        }
        to->scale = top / 127.f;
        to->offset = -128 * reduced(total, [](int32_t a, int32_t b) { return a + b; });
    }
}

#if defined(__AVX512F__)
static const bool vnni_available = __builtin_cpu_supports("avx512vnni");
#else
static constexpr bool vnni_available = false;
#endif
static bool vnni = vnni_available;

bool has_vnni() { return vnni; }

void int8_tile(const Weight& w, const Int8Block* x, int rows, int first, int last, float* y, int64_t stride) {
    with_arithmetic([&]<class Arithmetic>() { multiply_tiles<Arithmetic>(w, x, rows, first, last, y, stride); });
}

EXPORT void lk_int8_copy(const Weight* w, float unit, Int8Weights* to) {
    parallel_for((int)int8_groups(*w), [&](int group) { int8_copy_group(*w, group, unit, to + (int64_t)group * (w->in / BLOCK)); });
}

EXPORT void lk_set_vnni(int allowed) { vnni = allowed && vnni_available; }
