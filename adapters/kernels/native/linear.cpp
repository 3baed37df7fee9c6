#include "linear.h"

#include <type_traits>

#include "export.h"
#include "int8.h"
#include "pool.h"
#include "tile.h"

namespace {

constexpr int BLOCK = 64;             // inputs are handled in blocks of this many
constexpr int STEPS = BLOCK / (2 * W);  // a step reads 2W weights into two vectors

// Up to this many rows, weights are decoded in registers, again for each handful of rows; for more, once into a tile.
constexpr int FEW_ROWS = W == 16 ? 16 : 4;
constexpr int WHOLE = 48;             // a multiple of all kernels' numbers of outputs: larger tasks take a multiple of this
constexpr int64_t PAGE = 4096;        // bytes
constexpr int GROUP = 32;             // outputs with weights that stay in cache from one handful of rows to the next
constexpr int TILE_FLOATS = 1 << 15;  // approximate size of a decoded tile
constexpr int BACK_OUTPUTS = 64;      // backward: a tile of this many outputs
constexpr int BACK_INPUTS = 256;      //           by this many inputs

int padded(int in) { return (in + BLOCK - 1) / BLOCK * BLOCK; }

float weight_at(const Weight& w, int o, int i) {
    int64_t at = (int64_t)o * w.in + i;
    switch (w.kind) {
        case FOUR_BIT: {
            uint8_t byte = ((const uint8_t*)w.data)[at >> 1];
            return w.code[at & 1 ? byte & 15 : byte >> 4] * w.scales[at / w.blocksize];
        }
        case INT8: return (float)((const int8_t*)w.data)[at] * (w.scales[o] / 127.f);
        case FP32: return ((const float*)w.data)[at];
        case BF16: return number(((const bf16*)w.data)[at]);
        default: return number(((const fp16*)w.data)[at]);
    }
}

// Whether the vector decoders apply: they need whole blocks of inputs under one scale.
bool blockwise(const Weight& w) { return w.in % BLOCK == 0 && (w.kind != FOUR_BIT || w.blocksize == BLOCK); }

// Prefetches this block of the next rows: with few bytes per row the hardware's own prefetch is too late. Adjacent rows are
// one stream through memory: a page ahead is early enough, unless these rows are longer.
template <int N, int BYTES>
INLINE void fetch_ahead(const void* at, int64_t row_bytes) {
    const int64_t ahead = N * row_bytes > PAGE ? N * row_bytes : PAGE;
    for (int n = 0; n < N; n++)
        for (int line = 0; line < BYTES; line += 64)
            __builtin_prefetch((const char*)at + n * row_bytes + ahead + line);
}

// Decoders of N output rows from `o` on. `block` moves to a block of inputs, `step` yields 2W weights of one row: those at
// even and odd places (INTERLEAVED), or two consecutive vectors. BY_ROW decoders yield all of a row's weights in the block
// at once, by `row`.

template <int N>
struct FourBit {
    static constexpr bool INTERLEAVED = true;
    static constexpr int SCALES = 64 / sizeof(float);  // per cache line
    const uint8_t* rows;
    const uint8_t* at;
    const float* scales;
    int64_t row_bytes, blocks;
    const Table code;

    FourBit(const Weight& w, int o)
        : rows((const uint8_t*)w.data + (int64_t)o * w.in / 2), scales(w.scales + (int64_t)o * (w.in / BLOCK)),
          row_bytes(w.in / 2), blocks(w.in / BLOCK), code(load_table(w.code)) {}
    INLINE void to_block(int b) {
        at = rows + b * (BLOCK / 2);
        fetch_ahead<N, BLOCK / 2>(at, row_bytes);
        if (b % SCALES == 0) fetch_ahead<N, 1>(scales + b, blocks * sizeof(float));
    }
#if defined(__AVX2__) && !defined(__AVX512F__)
    static constexpr bool BY_ROW = true;
    const float* scale;

    INLINE void block(int b) {
        to_block(b);
        scale = scales + b;
    }
    INLINE void row(int n, vf (&w)[2 * STEPS]) const { look_up_block(code, at + n * row_bytes, scale[n * blocks], w); }
#else
    static constexpr bool BY_ROW = false;
    Table table[N];

    INLINE void block(int b) {
        to_block(b);
        for (int n = 0; n < N; n++) table[n] = scaled(code, scales[n * blocks + b]);
    }
    INLINE void step(int n, int s, vf& w0, vf& w1) const { look_up(table[n], at + n * row_bytes + s * W, w0, w1); }
#endif
};

template <int N, class Number>
struct Dense {
    static constexpr bool INTERLEAVED = std::is_same<Number, bf16>::value, BY_ROW = false;
    const Number* rows;
    const Number* at;
    int64_t in;

    Dense(const Weight& w, int o) : rows((const Number*)w.data + (int64_t)o * w.in), in(w.in) {}
    INLINE void block(int b) {
        at = rows + b * BLOCK;
        fetch_ahead<N, BLOCK * sizeof(Number)>(at, in * sizeof(Number));
    }
    INLINE void step(int n, int s, vf& w0, vf& w1) const {
        const Number* p = at + n * in + s * 2 * W;
        if constexpr (INTERLEAVED) {
            split(p, w0, w1);
        } else {
            w0 = load(p), w1 = load(p + W);
        }
    }
};

template <int N> using Fp32 = Dense<N, float>;
template <int N> using Bf16 = Dense<N, bf16>;
template <int N> using Fp16 = Dense<N, fp16>;

template <int N>
struct Int8 : Dense<N, int8_t> {
    vf scale[N];
    Int8(const Weight& w, int o) : Dense<N, int8_t>(w, o) {
        for (int n = 0; n < N; n++) scale[n] = set1(w.scales[o + n] / 127.f);
    }
    INLINE void step(int n, int s, vf& w0, vf& w1) const {
        Dense<N, int8_t>::step(n, s, w0, w1);
        w0 *= scale[n], w1 *= scale[n];
    }
};

// Calls `f` with the decoder template of a weight's kind.
template <class F>
INLINE void with_decoder(const Weight& w, F&& f) {
    switch (w.kind) {
        case FOUR_BIT: return f.template operator()<FourBit>();
        case INT8: return f.template operator()<Int8>();
        case FP32: return f.template operator()<Fp32>();
        case BF16: return f.template operator()<Bf16>();
        default: return f.template operator()<Fp16>();
    }
}

template <int M, int N>
INLINE void finish(const vf (&acc)[M][N], const float* bias, float* y, int64_t stride) {
    float sums[M][N];
    lane_sums(acc, sums);
    for (int m = 0; m < M; m++)
        for (int n = 0; n < N; n++) y[m * stride + n] = bias ? sums[m][n] + bias[n] : sums[m][n];
}

// Computes M rows x N outputs from `o` on, with weights decoded in registers; y is row 0, output 0.
template <int M, int N, template <int> class Decoder>
INLINE void dot_decoding(const Weight& w, int o, const float* x, float* y, int64_t stride, Prefetcher& prefetcher) {
    Decoder<N> weights(w, o);
    vf acc[M][N] = {};
    for (int b = 0; b < w.in / BLOCK; b++) {
        prefetcher.advance(M * N);
        weights.block(b);
        if constexpr (Decoder<N>::BY_ROW) {
            for (int n = 0; n < N; n++) {
                vf row[2 * STEPS];
                weights.row(n, row);
                for (int i = 0; i < 2 * STEPS; i++)
                    for (int m = 0; m < M; m++) acc[m][n] = fma(row[i], load(x + (int64_t)m * w.in + b * BLOCK + i * W), acc[m][n]);
            }
        } else {
#pragma GCC unroll 8
            for (int s = 0; s < STEPS; s++) {
                vf w0[N], w1[N];
                for (int n = 0; n < N; n++) weights.step(n, s, w0[n], w1[n]);
                for (int m = 0; m < M; m++) {
                    const float* p = x + (int64_t)m * w.in + b * BLOCK + s * 2 * W;
                    vf x0 = load(p), x1 = load(p + W);
                    in_register(x0), in_register(x1);
                    for (int n = 0; n < N; n++) acc[m][n] = fma(w0[n], x0, acc[m][n]);
                    for (int n = 0; n < N; n++) acc[m][n] = fma(w1[n], x1, acc[m][n]);
                }
            }
        }
    }
    finish(acc, w.bias ? w.bias + o : nullptr, y + o, stride);
}

// The same with decoded weights: tile [N, in].
template <int M, int N>
INLINE void dot_decoded(const float* tile, const float* x, int64_t in, const float* bias, float* y, int64_t stride) {
    float sums[M][N];
    dot<M, N>(x, in, tile, in, in, sums);
    for (int m = 0; m < M; m++)
        for (int n = 0; n < N; n++) y[m * stride + n] = bias ? sums[m][n] + bias[n] : sums[m][n];
}

template <int M, int N, template <int> class Decoder>
void sweep_decoding(const Weight& w, const float* x, int first, int last, float* y, int64_t stride, Prefetcher& prefetcher) {
    int o = first;
    for (; o + N <= last; o += N) dot_decoding<M, N, Decoder>(w, o, x, y, stride, prefetcher);
    for (; o < last; o++) dot_decoding<M, 1, Decoder>(w, o, x, y, stride, prefetcher);
}

// The most rows for which weights are decoded once: more if decoding is expensive.
template <template <int> class Decoder>
constexpr int rows_at_once() {
    return W < 16 ? 4 : std::is_same<Decoder<1>, FourBit<1>>::value ? 12 : 8;
}

// The number of outputs computed at once for M rows, so that sums and weights fit the registers.
template <template <int> class Decoder>
constexpr int outputs_beside(int rows) {
    if (rows > 4) return 2;
    if (rows > 2) return W == 16 ? 4 : 2;
    // With one output, a single row waits for its own sums; but fewer outputs also mean fewer streams read at once, and
    // weights that need no decoding keep the memory busy by themselves.
    return rows == 2 || W < 16 || std::is_same<Decoder<1>, FourBit<1>>::value ? 4 : 1;
}

template <template <int> class Decoder>
void few_rows(const Weight& w, const float* x, int rows, int first, int last, float* y, int64_t stride, const PrefetchList& prefetch) {
    const int64_t in = w.in;
    Prefetcher prefetcher(prefetch, (int64_t)rows * (last - first) * (w.in / BLOCK));
    for (int o = first; o < last; o += GROUP) {
        const int end = least(o + GROUP, last);
        auto sweep = [&](auto sweep_rows, int m) { sweep_rows(w, x + m * in, o, end, y + m * stride, stride, prefetcher); };
        for (int m = 0, count; m < rows; m += count) {
            constexpr int MAX_ROWS = rows_at_once<Decoder>();
            const int left = rows - m;
            count = left <= MAX_ROWS ? left : least((left + 1) / 2, MAX_ROWS);
            with_count<MAX_ROWS>(count, [&]<int M>() { sweep(sweep_decoding<M, outputs_beside<Decoder>(M), Decoder>, m); });
        }
    }
}

// Decodes a rectangle of the weight to fp32 [outputs first..last, blocks begin..end], inputs in natural or packed order.
template <template <int> class Decoder, bool NATURAL>
void decode_blocks(const Weight& w, int first, int last, int begin, int end, float* tile) {
    for (int o = first; o < last; o++) {
        Decoder<1> weights(w, o);
        for (int b = begin; b < end; b++) {
            weights.block(b);
            vf row[2 * STEPS];
            if constexpr (Decoder<1>::BY_ROW) weights.row(0, row);
            else
                for (int s = 0; s < STEPS; s++) weights.step(0, s, row[2 * s], row[2 * s + 1]);
            for (int s = 0; s < STEPS; s++, tile += 2 * W) {
                if constexpr (NATURAL && Decoder<1>::INTERLEAVED) {
                    store_interleaved(tile, row[2 * s], row[2 * s + 1]);
                } else {
                    store(tile, row[2 * s]), store(tile + W, row[2 * s + 1]);
                }
            }
        }
    }
}

template <bool NATURAL>
void decode_tile(const Weight& w, int first, int last, int begin, int end, float* tile) {
    if (blockwise(w)) {
        with_decoder(w, [&]<template <int> class Decoder>() { decode_blocks<Decoder, NATURAL>(w, first, last, begin, end, tile); });
        return;
    }
    for (int o = first; o < last; o++)
        for (int i = begin * BLOCK; i < end * BLOCK; i++) *tile++ = i < w.in ? weight_at(w, o, i) : 0.f;
}

template <int M, int N>
void sweep_decoded(const float* tile, const float* x, int64_t in, int outputs, const float* bias, float* y, int64_t stride) {
    int o = 0;
    for (; o + N <= outputs; o += N) dot_decoded<M, N>(tile + o * in, x, in, bias ? bias + o : nullptr, y + o, stride);
    for (; o < outputs; o++) dot_decoded<M, 1>(tile + o * in, x, in, bias ? bias + o : nullptr, y + o, stride);
}

void many_rows(const Weight& w, const float* x, int rows, int first, int last, float* y, int64_t stride) {
    constexpr int WIDE = W == 16 ? 6 : 3;  // 4 x WIDE accumulators fill the registers
    const int64_t in = padded(w.in);
    const int outputs = TILE_FLOATS / in < WIDE ? WIDE : TILE_FLOATS / in / WIDE * WIDE;
    float* tile = scratch(TILE, outputs * in);
    for (int o = first; o < last; o += outputs) {
        const int count = least(outputs, last - o);
        const float* bias = w.bias ? w.bias + o : nullptr;
        decode_tile<false>(w, o, o + count, 0, in / BLOCK, tile);
        in_fours(rows, [&]<int M>(int m) { sweep_decoded<M, WIDE>(tile, x + m * in, in, count, bias, y + m * stride + o, stride); });
    }
}

bool wants_interleaved(const Weight& w) { return blockwise(w) && (w.kind == FOUR_BIT || w.kind == BF16); }

void pack_row(const float* row, int in, bool interleaved, float* to) {
    if (!interleaved) {
        memcpy(to, row, sizeof(float) * in);
        memset(to + in, 0, sizeof(float) * (padded(in) - in));
        return;
    }
    for (int i = 0; i < in; i += 2 * W) {  // whole blocks
        vf even, odd;
        deinterleave(row + i, even, odd);
        store(to + i, even), store(to + i + W, odd);
    }
}

// sums [rows, wide] += dy [rows, out] @ tile [outputs, wide], M rows and V vectors at a time.
template <int M, int V>
INLINE void accumulate(const float* dy, int64_t out, const float* tile, int outputs, int wide, float* sums) {
    vf acc[M][V];
    for (int m = 0; m < M; m++)
        for (int v = 0; v < V; v++) acc[m][v] = load(sums + m * wide + v * W);
    weigh<M, V>(acc, dy, out, tile, wide, outputs);
    for (int m = 0; m < M; m++)
        for (int v = 0; v < V; v++) store(sums + m * wide + v * W, acc[m][v]);
}

// Computes blocks [begin, end) of dx.
void backward_tile(const Weight& w, const float* dy, int rows, int begin, int end, float* dx) {
    constexpr int V = W == 16 ? 4 : 2;
    const int wide = (end - begin) * BLOCK;
    float* sums = scratch(SUMS, (size_t)rows * wide);
    float* tile = scratch(TILE, BACK_OUTPUTS * wide);
    memset(sums, 0, sizeof(float) * rows * wide);
    for (int o = 0; o < w.out; o += BACK_OUTPUTS) {
        const int count = least(BACK_OUTPUTS, w.out - o);
        decode_tile<true>(w, o, o + count, begin, end, tile);
        for (int i = 0; i < wide; i += V * W) {
            int m = 0;
            for (; m + 6 <= rows; m += 6) accumulate<6, V>(dy + (int64_t)m * w.out + o, w.out, tile + i, count, wide, sums + (int64_t)m * wide + i);
            for (; m < rows; m++) accumulate<1, V>(dy + (int64_t)m * w.out + o, w.out, tile + i, count, wide, sums + (int64_t)m * wide + i);
        }
    }
    const int inputs = least(wide, w.in - begin * BLOCK);
    for (int m = 0; m < rows; m++) memcpy(dx + (int64_t)m * w.in + begin * BLOCK, sums + (int64_t)m * wide, sizeof(float) * inputs);
}

}  // namespace

PackedRows PackedRows::from(int64_t m, int64_t in) const {
    return {natural ? natural + m * in : nullptr, interleaved ? interleaved + m * in : nullptr, int8 ? int8 + m * (in / BLOCK) : nullptr};
}

PackedRows pack_rows(const Weight* const* weights, int count, const float* x, int rows) {
    const int in = weights[0]->in;
    bool wanted[2] = {}, wants_int8 = false;
    for (int i = 0; i < count; i++) (weights[i]->int8 ? wants_int8 : wanted[wants_interleaved(*weights[i])]) = true;
    float* packed[2];
    for (int form = 0; form < 2; form++)
        packed[form] = wanted[form] ? scratch(form ? PACKED_INTERLEAVED : PACKED_NATURAL, (size_t)rows * padded(in)) : nullptr;
    const int64_t blocks = in / BLOCK;
    Int8Block* const int8 = wants_int8 ? (Int8Block*)scratch(PACKED_INT8, rows * blocks * sizeof(Int8Block) / sizeof(float)) : nullptr;
    constexpr int SHARE = 4;  // rows per task
    parallel_for((rows + SHARE - 1) / SHARE, [&](int task) {
        for (int m = task * SHARE; m < least((task + 1) * SHARE, rows); m++) {
            for (int form = 0; form < 2; form++)
                if (packed[form]) pack_row(x + (int64_t)m * in, in, form, packed[form] + (int64_t)m * padded(in));
            if (int8) pack_int8(x + (int64_t)m * in, in, int8 + m * blocks);
        }
    });
    return {packed[0], packed[1], int8};
}

void linear_tile(const Weight& w, const PackedRows& x, int rows, int first, int last, float* y, int64_t stride, const PrefetchList& prefetch) {
    if (w.int8) return int8_tile(w, x.int8, rows, first, last, y, stride);
    const float* packed = wants_interleaved(w) ? x.interleaved : x.natural;
    if (rows > FEW_ROWS || !blockwise(w)) return many_rows(w, packed, rows, first, last, y, stride);
    with_decoder(w, [&]<template <int> class Decoder>() { few_rows<Decoder>(w, packed, rows, first, last, y, stride, prefetch); });
}

int outputs_per_task(int out) {
    const int tasks = 8 * pool_threads(), share = (out + tasks - 1) / tasks;
    const int whole = share > WHOLE / 2 ? WHOLE : 16;
    return (share + whole - 1) / whole * whole;
}

static void linear(const Weight& w, const float* x, int rows, float* y) {
    const Weight* const only = &w;
    const PackedRows packed = pack_rows(&only, 1, x, rows);
    const int share = outputs_per_task(w.out);
    parallel_for((w.out + share - 1) / share, [&](int task) {
        linear_tile(w, packed, rows, task * share, least((task + 1) * share, w.out), y, w.out);
    });
}

EXPORT void lk_linear(const Weight* weight, const float* bias, const float* x, int rows, float* y) {
    Weight w = *weight;
    w.bias = bias;
    linear(w, x, rows, y);
}

// One weight after another, as in a step; y holds the last result.
EXPORT void lk_linear_run(const Weight* const* weights, int count, const float* x, int rows, float* y) {
    for (int i = 0; i < count; i++) linear(*weights[i], x, rows, y);
}

EXPORT void lk_linear_backward(const Weight* w, const float* dy, int rows, float* dx) {
    const int blocks = padded(w->in) / BLOCK, share = BACK_INPUTS / BLOCK;
    parallel_for((blocks + share - 1) / share, [&](int task) {
        backward_tile(*w, dy, rows, task * share, least((task + 1) * share, blocks), dx);
    });
}

EXPORT void lk_dequantize(const Weight* w, float* dense) {
    const int blocks = padded(w->in) / BLOCK;
    parallel_for((w->out + 15) / 16, [&](int task) {
        const int first = task * 16, last = least(first + 16, w->out);
        float* tile = scratch(TILE, (size_t)16 * padded(w->in));
        decode_tile<true>(*w, first, last, 0, blocks, tile);
        for (int o = first; o < last; o++) memcpy(dense + (int64_t)o * w->in, tile + (int64_t)(o - first) * padded(w->in), sizeof(float) * w->in);
    });
}
